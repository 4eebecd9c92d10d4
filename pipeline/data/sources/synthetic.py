"""Drawn images of shapes: a data set without files, for tests and demonstrations.

Textured shapes of eight classes cover each other on a textured ground; some are a few pixels small, some images are
empty and some hold a crowd. Image `index` is a pure function of (seed, index): any of them can be drawn alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import parse_qsl, urlencode

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from pydantic import JsonValue

from pipeline.data.shards.manifest import Category
from pipeline.data.shards.records import ImageRecord
from pipeline.data.sources.index import AnnotationIndex, BoxEntry, ImageEntry, Source, SourceError

SCHEME = "synthetic:"
CLASSES = ("circle", "ring", "triangle", "square", "hexagon", "star", "cross", "bar")

EMPTY_FRACTION = 0.1  # of all images
CROWD_FRACTION = 0.05  # of the others
CROWD_SIZE = 10  # shapes in one crowd region
SMALLEST_PX = 8.0
SMALLEST_FRACTION, LARGEST_FRACTION = 0.15, 0.45  # of the shorter side; the first counts in tiny images only
SMALLEST_IMAGE_PX = 32
MOST_COVERED = 0.5  # no shape's box is covered by more than this by the shapes before it
SUBPIXEL_BITS = 4  # of cv2's fixed-point coordinates

Contours = tuple[NDArray[np.float64], ...]  # each [P, 2]; an inner one cuts a hole


@dataclass(frozen=True)
class Shape:
    label: int
    contours: Contours  # pixels

    @cached_property
    def box(self) -> NDArray[np.float32]:
        """[4] xyxy in pixels, tight."""
        outer = self.contours[0]
        return np.concatenate([outer.min(0), outer.max(0)]).astype(np.float32)

    @property
    def area(self) -> float:
        """px^2, without the hole."""
        outer, *holes = (_polygon_area(contour) for contour in self.contours)
        return outer - sum(holes)


@dataclass(frozen=True)
class Scene:
    """What an image shows, before any pixel is drawn."""

    width: int
    height: int
    shapes: tuple[Shape, ...]  # from back to front
    crowd: tuple[Shape, ...]  # drawn first, annotated together as one crowd region
    texture_seed: int

    @property
    def boxes(self) -> NDArray[np.float32]:
        """[G, 4] xyxy in pixels, the crowd region last."""
        boxes = [shape.box for shape in self.shapes]
        if self.crowd:
            corners = np.stack([shape.box for shape in self.crowd])
            boxes.append(np.concatenate([corners[:, :2].min(0), corners[:, 2:].max(0)]))
        return np.asarray(boxes, np.float32).reshape(-1, 4)

    @property
    def labels(self) -> NDArray[np.int32]:
        return np.array([shape.label for shape in (*self.shapes, *self.crowd[:1])], np.int32)

    @property
    def areas(self) -> NDArray[np.float32]:
        areas = [shape.area for shape in self.shapes]
        if self.crowd:
            areas.append(sum(shape.area for shape in self.crowd))
        return np.array(areas, np.float32)

    @property
    def is_crowd(self) -> NDArray[np.bool_]:
        return np.array([False] * len(self.shapes) + [True] * bool(self.crowd), np.bool_)


def synthetic_scene(index: int, *, seed: int = 0, longest_side: int = 320, max_shapes: int = 12) -> Scene:
    """The layout of one image: cheap, since nothing is drawn.

    Args:
        index: number of the image.
        longest_side: of the image, in pixels; the other side is between half of it and all of it.
        max_shapes: in one image; the crowd is not counted.
    """
    if longest_side < SMALLEST_IMAGE_PX:
        raise SourceError(f"longest_side is {longest_side}; shapes need at least {SMALLEST_IMAGE_PX} pixels")
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
    sides = [longest_side, int(rng.integers(longest_side // 2, longest_side + 1))]
    width, height = sides if rng.random() < 0.5 else sides[::-1]
    texture_seed = int(rng.integers(2**32))
    if rng.random() < EMPTY_FRACTION:
        return Scene(width, height, (), (), texture_seed)

    smallest = min(SMALLEST_PX, SMALLEST_FRACTION * min(width, height))
    largest = LARGEST_FRACTION * min(width, height)

    crowd: list[Shape] = []
    if rng.random() < CROWD_FRACTION:
        label = int(rng.integers(len(CLASSES)))
        centre = rng.uniform(0.3, 0.7, 2) * (width, height)
        spread = 0.12 * min(width, height)
        crowd = [_shape(rng, label, centre + rng.uniform(-spread, spread, 2), smallest) for _ in range(CROWD_SIZE)]

    shapes: list[Shape] = []
    covered: list[float] = []  # fraction of each shape's box that later ones hide, at most
    for _ in range(int(rng.integers(1, max_shapes + 1))):
        diameter = float(np.exp(rng.uniform(np.log(smallest), np.log(largest))))  # as many small as large
        centre = rng.uniform(diameter / 2, np.array([width, height]) - diameter / 2)
        shape = _shape(rng, int(rng.integers(len(CLASSES))), centre, diameter)
        hidden = [before + _covered(old.box, shape.box) for old, before in zip(shapes, covered, strict=True)]
        if all(fraction <= MOST_COVERED for fraction in hidden):
            shapes.append(shape)
            covered = [*hidden, 0.0]
    return Scene(width, height, tuple(shapes), tuple(crowd), texture_seed)


def draw_scene(scene: Scene) -> NDArray[np.uint8]:
    """[H, W, 3] RGB."""
    rng = np.random.Generator(np.random.Philox(key=np.array([scene.texture_seed, 1], np.uint64)))
    image = _texture(rng, scene.width, scene.height)
    for shape in (*scene.crowd, *scene.shapes):
        x0, y0, x1, y1 = (int(edge) for edge in shape.box)
        ground = image[y0 : y1 + 1, x0 : x1 + 1]  # a view
        opacity = np.zeros(ground.shape[:2], np.uint8)
        # A pixel's centre lies at a half; cv2 puts it at a whole number.
        fixed_point = [
            np.rint((contour - (x0 + 0.5, y0 + 0.5)) * 2**SUBPIXEL_BITS).astype(np.int32) for contour in shape.contours
        ]
        cv2.fillPoly(opacity, fixed_point, 255, lineType=cv2.LINE_AA, shift=SUBPIXEL_BITS)
        filling = _texture(rng, ground.shape[1], ground.shape[0]).astype(np.float32)
        ground[:] = ground + (filling - ground) * (opacity[..., None] / np.float32(255)) + np.float32(0.5)
    return image


def synthetic_image(
    index: int, *, seed: int = 0, longest_side: int = 320, max_shapes: int = 12, quality: int = 90
) -> ImageRecord:
    """Image `index` of the set, drawn and encoded as JPEG, with its boxes."""
    scene = synthetic_scene(index, seed=seed, longest_side=longest_side, max_shapes=max_shapes)
    return ImageRecord(
        image_id=index + 1,
        file_name=f"{index:08d}.jpg",
        width=scene.width,
        height=scene.height,
        image=simplejpeg.encode_jpeg(draw_scene(scene), quality=quality),
        boxes=scene.boxes,
        labels=scene.labels,
        areas=scene.areas,
        crowd=scene.is_crowd,
    )


def synthetic_source(
    images: int,
    *,
    seed: int = 0,
    longest_side: int = 320,
    max_shapes: int = 12,
    classes: Mapping[str, str] | None = None,
) -> Source:
    """The first `images` images of a seed, as a source; they are drawn when their shard is written.

    Args:
        classes: shapes that are annotated, in the order of their labels, and the name that each goes by; the others are
            drawn and not annotated. All of them, under their own names, if None.

    Raises:
        SourceError: for a shape that is not drawn.
    """
    names = dict(classes) if classes else {name: name for name in CLASSES}
    if unknown := names.keys() - set(CLASSES):
        raise SourceError(f"classes: {', '.join(sorted(unknown))} is not drawn; known: {', '.join(CLASSES)}")
    labels = {CLASSES.index(name): label for label, name in enumerate(names)}  # of what is annotated, by shape

    def fill(index: AnnotationIndex) -> tuple[Category, ...]:
        for number in range(images):
            scene = synthetic_scene(number, seed=seed, longest_side=longest_side, max_shapes=max_shapes)
            query = urlencode({"index": number, "seed": seed, "longest_side": longest_side, "max_shapes": max_shapes})
            entry = ImageEntry(number + 1, f"{SCHEME}{query}", f"{number:08d}.jpg", scene.width, scene.height)
            index.add_images([entry])
            columns = scene.boxes.tolist(), scene.labels.tolist(), scene.areas.tolist(), scene.is_crowd.tolist()
            index.add_boxes(
                BoxEntry(number + 1, x1, y1, x2, y2, labels[shape], area, crowd)
                for (x1, y1, x2, y2), shape, area, crowd in zip(*columns, strict=True)
                if shape in labels
            )
        return tuple(Category(label=label, original_id=label, name=name) for label, name in enumerate(names.values()))

    description: dict[str, JsonValue] = {
        "images": images,
        "seed": seed,
        "longest_side": longest_side,
        "max_shapes": max_shapes,
        **({"classes": [f"{shape}={name}" for shape, name in names.items()]} if classes else {}),
    }
    return Source({"kind": "synthetic", **description}, fill)


def draw_uri(uri: str) -> bytes:
    """The encoded image behind a URI of `synthetic_source`."""
    arguments = {key: int(value) for key, value in parse_qsl(uri.removeprefix(SCHEME))}
    return synthetic_image(**arguments).image


def _shape(rng: np.random.Generator, label: int, centre: NDArray[np.float64], diameter: float) -> Shape:
    """A shape turned by a random angle, inside the circle of `diameter` about `centre`."""
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    contours = tuple(contour @ rotation.T * diameter / 2 + centre for contour in _unit_contours(CLASSES[label]))
    return Shape(label, contours)


def _unit_contours(name: str) -> Contours:
    """Outlines inside the unit circle."""
    match name:
        case "circle":
            return (_regular(64),)
        case "ring":
            return (_regular(64), 0.55 * _regular(64))
        case "triangle":
            return (_regular(3),)
        case "square":
            return (_regular(4),)
        case "hexagon":
            return (_regular(6),)
        case "star":
            return (_regular(10) * np.tile([1.0, 0.4], 5)[:, None],)
        case "cross":
            arm = np.array([[0.95, -0.3], [0.95, 0.3], [0.3, 0.3]])
            quarter_turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
            return (np.concatenate([arm @ np.linalg.matrix_power(quarter_turn, turns) for turns in range(4)]),)
        case _:  # bar
            return (np.array([[-0.96, -0.25], [0.96, -0.25], [0.96, 0.25], [-0.96, 0.25]]),)


def _regular(corners: int) -> NDArray[np.float64]:
    """[corners, 2] of a regular polygon on the unit circle."""
    angles = np.arange(corners) * 2 * np.pi / corners
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _polygon_area(contour: NDArray[np.float64]) -> float:
    x, y = contour.T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def _covered(under: NDArray[np.float32], over: NDArray[np.float32]) -> float:
    """Fraction of box `under` that box `over` covers."""
    sides = np.minimum(under[2:], over[2:]) - np.maximum(under[:2], over[:2])
    return float(np.prod(np.maximum(sides, 0)) / np.prod(under[2:] - under[:2]))


def _texture(rng: np.random.Generator, width: int, height: int) -> NDArray[np.uint8]:
    """[height, width, 3]: a colour with blotches, and stripes on half of them."""
    colour = rng.uniform(40, 215, 3).astype(np.float32)
    blotches = 18 * rng.standard_normal((4, 4, 3), np.float32)
    pixels: NDArray[np.float32] = colour + cv2.resize(blotches, (width, height), interpolation=cv2.INTER_CUBIC)
    shade = 6 * rng.standard_normal((height, width), np.float32)
    if rng.random() < 0.5:
        x_step, y_step = rng.normal(0, 0.35, 2).astype(np.float32)
        phase = np.arange(width, dtype=np.float32) * x_step + np.arange(height, dtype=np.float32)[:, None] * y_step
        shade += 25 * np.sin(phase)
    return np.clip(pixels + shade[..., None], 0, 255).astype(np.uint8)
