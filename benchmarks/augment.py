"""Images per second on one core: the released augmentation, ours, and the parts of ours.

    python -m benchmarks.augment                     generated images
    python -m benchmarks.augment --images train2017 --annotations instances_train2017.json

The released chain is torchvision v2 on Pillow in the released order, up to the resized uint8 image; the conversion to
float is left out of both. Ours is shown without the photometric part, which a GPU takes over, and with it.
Times are CPU seconds of one thread; rounds of all rows alternate and each row shows its fastest.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from dfine_core.images import read_image
from pipeline.data.augment.decode import crop_and_place, decode_rgb
from pipeline.data.augment.generators import keyed_generator
from pipeline.data.augment.geometry import View, draw_view
from pipeline.data.augment.mosaic import mosaic_sample
from pipeline.data.augment.photometric import photometric_distort
from pipeline.data.augment.photometric_parameters import draw_photometric
from pipeline.data.augment.photometric_pixels import distort_pixels
from pipeline.data.augment.samples import AnnotatedImage, Sample, augmented_sample, plain_sample
from pipeline.data.augment.settings import AugmentSettings
from pipeline.data.stream.partners import draw_partners

CANVAS = (640, 640)
SETTINGS = AugmentSettings()
RELEASED = "released chain: torchvision v2 on Pillow"


@dataclass(frozen=True, kw_only=True)
class Annotated(AnnotatedImage):
    image_id: int


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of a COCO set")
    parser.add_argument("--annotations", type=Path, help="its instances file")
    parser.add_argument("--limit", type=int, default=100, help="images to use")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    if (args.images is None) != (args.annotations is None):
        parser.error("--images and --annotations go together")
    torch.set_num_threads(1)

    images = coco_images(args.images, args.annotations, args.limit) if args.images else synthetic_images(args.limit)
    kilobytes = np.mean([len(image.encoded) for image in images]) / 1000
    width, height = np.mean([(image.width, image.height) for image in images], axis=0)
    print(f"{len(images)} images, on average {kilobytes:.0f} kB and {width:.0f}x{height:.0f} pixels, to {CANVAS}\n")
    print_table(fastest_seconds(rows(images), images, args.rounds))


def rows(images: list[Annotated]) -> dict[str, Callable[[Annotated], object]]:
    """Operations to time, each for one image.

    Args:
        images: partners of mosaics are drawn from.
    """
    released = v2.Compose(released_transforms(CANVAS))
    return {
        RELEASED: lambda image: released(*released_inputs(image)),
        "ours: decode, draws, resampling": augmented,
        "ours with the photometric part, as a CPU training decodes": lambda image: distorted_pixels(augmented(image)),
        "ours with the photometric part in tensors": lambda image: distorted(augmented(image)),
        "ours, a mosaic: four images decoded": lambda image: mosaicked(image, images),
        "ours, dense stage: mosaics with p 0.5": lambda image: dense(image, images),
        "    libjpeg-turbo alone, the limit": lambda image: simplejpeg.decode_jpeg(image.encoded, "RGB"),
        "    draws": sampled_view,
        "    decode": lambda image: decode_rgb(image.encoded, image.width, image.height),
        "    draws, scaled decode": decoded_pixels,
        "    draws, scaled decode, resampling": resized,
        "released evaluation": lambda image: released_inputs(image)[0].resize(CANVAS[::-1], Image.Resampling.BILINEAR),
        "our evaluation": lambda image: plain_sample(image, canvas=CANVAS),
    }


def fastest_seconds(
    timed: dict[str, Callable[[Annotated], object]], images: list[Annotated], rounds: int
) -> dict[str, float]:
    """CPU seconds for one image."""
    seconds = dict.fromkeys(timed, float("inf"))
    for _ in range(rounds):
        for name, process in timed.items():
            started = time.process_time()
            for image in images:
                process(image)
            seconds[name] = min(seconds[name], (time.process_time() - started) / len(images))
    return seconds


def print_table(seconds: dict[str, float]) -> None:
    print(f"{'one core':60}{'images/s':>9}{'ms/image':>10}{'x released':>12}")
    for name, value in seconds.items():
        print(f"{name:60}{1 / value:9.1f}{value * 1000:10.2f}{seconds[RELEASED] / value:12.2f}")


def released_transforms(canvas: tuple[int, int]) -> list[torch.nn.Module]:
    """Released recipe in torchvision, for (image, boxes, labels)."""
    return [
        v2.RandomPhotometricDistort(p=0.5),
        v2.RandomZoomOut(fill=0),
        v2.RandomApply([v2.RandomIoUCrop()], p=0.8),
        v2.SanitizeBoundingBoxes(min_size=1, labels_getter=lambda inputs: inputs[2]),
        v2.RandomHorizontalFlip(),
        v2.Resize(canvas),
        v2.SanitizeBoundingBoxes(min_size=1, labels_getter=lambda inputs: inputs[2]),
    ]


def released_inputs(image: Annotated) -> tuple[Image.Image, tv_tensors.BoundingBoxes, torch.Tensor]:
    boxes = tv_tensors.BoundingBoxes(
        torch.from_numpy(image.boxes),
        format=tv_tensors.BoundingBoxFormat.XYXY,
        canvas_size=(image.height, image.width),
    )
    return read_image(image.encoded, upright=False), boxes, torch.from_numpy(image.labels)


def augmented(image: Annotated) -> Sample:
    return augmented_sample(image, seed=0, epoch=0, image_id=image.image_id, settings=SETTINGS, canvas=CANVAS)


def mosaicked(image: Annotated, images: list[Annotated]) -> Sample:
    partners = draw_partners(np.array([image.image_id]), len(images), seed=0, epoch=0, probability=1)[0]
    four = [image, *(images[partner] for partner in partners)]
    return mosaic_sample(four, seed=0, epoch=0, image_id=image.image_id, settings=SETTINGS, canvas=CANVAS)[0]


def dense(image: Annotated, images: list[Annotated]) -> Sample:
    partners = draw_partners(np.array([image.image_id]), len(images), seed=0, epoch=0, probability=0.5)[0]
    return mosaicked(image, images) if partners[0] >= 0 else augmented(image)


def distorted(sample: Sample) -> torch.Tensor:
    image = torch.from_numpy(sample.image).permute(2, 0, 1).unsqueeze(0).float() / 255
    return photometric_distort(image, torch.from_numpy(sample.photometric).unsqueeze(0))


def distorted_pixels(sample: Sample) -> NDArray[np.uint8]:
    distort_pixels(sample.image, sample.photometric)
    return sample.image


def sampled_view(image: Annotated) -> View:
    generator = keyed_generator("image", 0, 0, image.image_id)
    draw_photometric(generator, SETTINGS)
    return draw_view(generator, image.boxes, image.width, image.height, SETTINGS, CANVAS)[0]


def decoded_pixels(image: Annotated) -> tuple[NDArray[np.uint8], View]:
    view = sampled_view(image)
    return decode_rgb(image.encoded, image.width, image.height, view.divisor), view


def resized(image: Annotated) -> NDArray[np.uint8]:
    pixels, view = decoded_pixels(image)
    return crop_and_place(pixels, view, CANVAS, view.divisor)


def coco_images(folder: Path, annotations: Path, limit: int) -> list[Annotated]:
    content = json.loads(annotations.read_text())
    boxes: dict[int, list[list[float]]] = {}
    for annotation in content["annotations"]:
        if not annotation["iscrowd"]:
            left, top, width, height = annotation["bbox"]
            boxes.setdefault(annotation["image_id"], []).append([left, top, left + width, top + height])
    return [
        Annotated(
            image_id=image["id"],
            encoded=(folder / image["file_name"]).read_bytes(),
            width=image["width"],
            height=image["height"],
            boxes=np.array(boxes.get(image["id"], []), np.float32).reshape(-1, 4),
            labels=np.zeros(len(boxes.get(image["id"], [])), np.int64),
            areas=np.ones(len(boxes.get(image["id"], [])), np.float32),
        )
        for image in content["images"][:limit]
    ]


def synthetic_images(count: int, width: int = 640, height: int = 480) -> list[Annotated]:
    """Generate smooth noise that compresses like a photograph (about 100 kB), with a few boxes."""
    random = np.random.default_rng(0)
    images = []
    for image_id in range(count):
        layers = [random.integers(0, 256, (height // step, width // step, 3), np.uint8) for step in (2, 8, 40)]
        stretched = [np.asarray(Image.fromarray(layer).resize((width, height)), np.float32) for layer in layers]
        pixels = np.average(stretched, axis=0, weights=(1, 2, 4)).astype(np.uint8)
        corners = random.uniform(0, 0.7, (7, 2))
        boxes = np.concatenate([corners, corners + random.uniform(0.02, 0.3, (7, 2))], axis=1) * np.array(
            [width, height] * 2
        )
        images.append(
            Annotated(
                image_id=image_id,
                encoded=simplejpeg.encode_jpeg(pixels, quality=90, colorsubsampling="420"),
                width=width,
                height=height,
                boxes=boxes.astype(np.float32),
                labels=np.zeros(len(boxes), np.int64),
                areas=np.ones(len(boxes), np.float32),
            )
        )
    return images


if __name__ == "__main__":
    main()
