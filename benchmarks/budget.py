"""Cost of pretraining on Objects365 and fine-tuning on COCO for every variant: counted operations, extrapolated hours.

    python -m benchmarks.budget                   counts only
    python -m benchmarks.budget --measure n s     also times a training step of these variants on this machine
    python -m benchmarks.budget --tflops 50       sustained by one GPU; measure it in your first epoch

Epochs and images are those of the published logs. Evaluations and waiting for data or other workers are not included.
"""

import argparse

import torch

from dfine_core import ModelConfig
from pipeline.training.budget import flops_per_image, seconds_per_image

OBJECTS365_IMAGES, COCO_IMAGES = 56_790 * 32, 118_287
OBJECTS365_BOXES, COCO_BOXES = 15, 7  # average per image
EPOCHS = {"s": (28, 64), "m": (29, 56), "l": (25, 36), "x": (21, 36)}  # epochs on Objects365, epochs on COCO
GPUS = (1, 4, 8)  # more would get less than four images of the published batch of 32


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=30, help="sustained by one GPU in a training step")
    parser.add_argument("--measure", nargs="*", default=[], choices=["n", "s", "m", "l", "x"])
    args = parser.parse_args(argv)
    print(f"{'':3}{'stage':12}{'epochs':>7}{'images':>13}{'GFLOP/image':>13}{'EFLOP':>8}", end="")
    print("".join(f"{f'{count} GPU':>10}" for count in GPUS), f"  hours at {args.tflops:g} TFLOP/s each")
    for variant, epochs in EPOCHS.items():
        stages = (("Objects365", OBJECTS365_IMAGES, 366, OBJECTS365_BOXES), ("COCO", COCO_IMAGES, 80, COCO_BOXES))
        for count, (name, images, classes, boxes) in zip(epochs, stages, strict=True):
            flops = flops_per_image(ModelConfig.variant(variant, num_classes=classes), boxes)
            total = flops * images * count
            hours = "".join(f"{total / gpus / args.tflops / 1e12 / 3600:10.1f}" for gpus in GPUS)
            print(f"{variant:3}{name:12}{count:7}{images * count:13,}{flops / 1e9:13.1f}{total / 1e18:8.2f}{hours}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for variant in args.measure:
        config = ModelConfig.variant(variant, num_classes=80)
        seconds, flops = seconds_per_image(config, COCO_BOXES, device), flops_per_image(config, COCO_BOXES)
        print(
            f"measured on {device}, {torch.get_num_threads()} threads, fp32, one image of 640 x 640 at a time: {variant}",
            end=" ",
        )
        print(f"{seconds:.2f} s an image, {flops / seconds / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
