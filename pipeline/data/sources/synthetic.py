"""Synthetic source: rendered images of shapes, a data set without files for tests and demonstrations.

Textured shapes of eight classes overlap on a textured background. Some are only a few pixels large, some images are empty and
some hold a crowd. Image `index` is a pure function of (seed, index), so each can be rendered alone.
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
from pipeline.data.sources.index import AnnotationIndex, BoxEntry, DatasetSource, ImageEntry, SourceError

SCHEME = "synthetic:"
CLASSES = ("circle", "ring", "triangle", "square", "hexagon", "star", "cross", "bar")

EMPTY_FRACTION = 0.1  # fraction of all images
CROWD_FRACTION = 0.05  # fraction of the images with shapes
CROWD_SIZE = 10  # shapes per crowd region
SMALLEST_PX = 8.0
SMALLEST_FRACTION, LARGEST_FRACTION = 0.15, 0.45  # fractions of the shorter side; the first matters in tiny images only
SMALLEST_IMAGE_PX = 32
MOST_COVERED = 0.5  # largest fraction of a shape's box that the shapes in front of it may cover
SUBPIXEL_BITS = 4  # fractional bits of cv2's coordinates

Contours = tuple[NDArray[np.float64], ...]  # each [P, 2]; an inner one cuts a hole


@dataclass(frozen=True)
class Shape:
    """A shape of one class, as outlines."""

    label: int
    contours: Contours  # pixels

    @cached_property
    def box(self) -> NDArray[np.float32]:
        """Tight box [4] xyxy in pixels."""
        outer = self.contours[0]
        return np.concatenate([outer.min(0), outer.max(0)]).astype(np.float32)

    @property
    def area(self) -> float:
        """Area in px^2, without the hole."""
        outer, *holes = (_polygon_area(contour) for contour in self.contours)
        return outer - sum(holes)


@dataclass(frozen=True)
class Scene:
    """Layout of an image, before rendering."""

    width: int
    height: int
    shapes: tuple[Shape, ...]  # from back to front
    crowd: tuple[Shape, ...]  # rendered first, annotated together as one crowd region
    texture_seed: int

    @property
    def boxes(self) -> NDArray[np.float32]:
        """Boxes [G, 4] xyxy in pixels, the crowd region last."""
        boxes = [shape.box for shape in self.shapes]
        if self.crowd:
            corners = np.stack([shape.box for shape in self.crowd])
            boxes.append(np.concatenate([corners[:, :2].min(0), corners[:, 2:].max(0)]))
        return np.asarray(boxes, np.float32).reshape(-1, 4)

    @property
    def labels(self) -> NDArray[np.int32]:
        """Class [G] of each box."""
        return np.array([shape.label for shape in (*self.shapes, *self.crowd[:1])], np.int32)

    @property
    def areas(self) -> NDArray[np.float32]:
        """Area [G] of each box's shapes, in px^2."""
        areas = [shape.area for shape in self.shapes]
        if self.crowd:
            areas.append(sum(shape.area for shape in self.crowd))
        return np.array(areas, np.float32)

    @property
    def is_crowd(self) -> NDArray[np.bool_]:
        """Mask [G] of crowd regions."""
        return np.array([False] * len(self.shapes) + [True] * bool(self.crowd), np.bool_)


def synthetic_scene(index: int, *, seed: int = 0, longest_side: int = 320, max_shapes: int = 12) -> Scene:
    """Generate the layout of one image, without rendering it.

    Args:
        index: number of the image.
        longest_side: longer side of the image in pixels; the other side is between half of it and all of it.
        max_shapes: maximum number of shapes per image, not counting a crowd.
    """
    if longest_side < SMALLEST_IMAGE_PX:
        raise SourceError(f"longest_side is {longest_side}; shapes need at least {SMALLEST_IMAGE_PX} pixels")
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
    sides = [longest_side, int(rng.integers(longest_side // 2, longest_side + 1))]
    width, height = sides if rng.random() < 0.5 else sides[::-1]
    texture_seed = int(rng.integers(2**32))
    if rng.random() < EMPTY_FRACTION:
        return Scene(width, height, (), (), texture_seed)

    # Sizes of the shapes, in pixels.
    smallest = min(SMALLEST_PX, SMALLEST_FRACTION * min(width, height))
    largest = LARGEST_FRACTION * min(width, height)

    # A crowd, in some images.
    crowd: list[Shape] = []
    if rng.random() < CROWD_FRACTION:
        label = int(rng.integers(len(CLASSES)))
        centre = rng.uniform(0.3, 0.7, 2) * (width, height)
        spread = 0.12 * min(width, height)
        crowd = [
            _random_shape(rng, label, centre + rng.uniform(-spread, spread, 2), smallest) for _ in range(CROWD_SIZE)
        ]

    # Shapes from back to front; one that would hide too much of an earlier one is dropped.
    shapes: list[Shape] = []
    covered: list[float] = []  # upper bound of the fraction of each shape's box that later ones hide
    for _ in range(int(rng.integers(1, max_shapes + 1))):
        diameter = float(np.exp(rng.uniform(np.log(smallest), np.log(largest))))  # log-uniform
        centre = rng.uniform(diameter / 2, np.array([width, height]) - diameter / 2)
        shape = _random_shape(rng, int(rng.integers(len(CLASSES))), centre, diameter)
        hidden = [before + _covered_share(old.box, shape.box) for old, before in zip(shapes, covered, strict=True)]
        if all(fraction <= MOST_COVERED for fraction in hidden):
            shapes.append(shape)
            covered = [*hidden, 0.0]
    return Scene(width, height, tuple(shapes), tuple(crowd), texture_seed)


def render_scene(scene: Scene) -> NDArray[np.uint8]:
    """Render a scene to RGB pixels [H, W, 3]."""
    rng = np.random.Generator(np.random.Philox(key=np.array([scene.texture_seed, 1], np.uint64)))
    image = _texture(rng, scene.width, scene.height)
    for shape in (*scene.crowd, *scene.shapes):
        x0, y0, x1, y1 = (int(edge) for edge in shape.box)
        ground = image[y0 : y1 + 1, x0 : x1 + 1]  # a view
        opacity = np.zeros(ground.shape[:2], np.uint8)
        # Pixel centres are at half-integers here, and at integers in cv2.
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
    """Render image `index` of the set and encode it as JPEG, with its boxes."""
    scene = synthetic_scene(index, seed=seed, longest_side=longest_side, max_shapes=max_shapes)
    return ImageRecord(
        image_id=index + 1,
        file_name=f"{index:08d}.jpg",
        width=scene.width,
        height=scene.height,
        image=simplejpeg.encode_jpeg(render_scene(scene), quality=quality),
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
) -> DatasetSource:
    """Source of the first `images` images of a seed; they are rendered when their shard is written.

    Args:
        classes: annotated shapes in label order, each with the name of its class; other shapes are rendered but not annotated.
            None annotates all shapes under their own names.

    Raises:
        SourceError: for an unknown shape.
    """
    names = dict(classes) if classes else {name: name for name in CLASSES}
    if unknown := names.keys() - set(CLASSES):
        raise SourceError(f"classes: {', '.join(sorted(unknown))} is not a shape; known: {', '.join(CLASSES)}")
    labels = {CLASSES.index(name): label for label, name in enumerate(names)}  # label of each annotated shape

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
    return DatasetSource({"kind": "synthetic", **description}, fill)


def render_uri(uri: str) -> bytes:
    """Render the image behind a URI of `synthetic_source`, and encode it."""
    arguments = {key: int(value) for key, value in parse_qsl(uri.removeprefix(SCHEME))}
    return synthetic_image(**arguments).image


def _random_shape(rng: np.random.Generator, label: int, centre: NDArray[np.float64], diameter: float) -> Shape:
    """A randomly rotated shape inside the circle of `diameter` around `centre`."""
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
    """Corners [corners, 2] of a regular polygon on the unit circle."""
    angles = np.arange(corners) * 2 * np.pi / corners
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _polygon_area(contour: NDArray[np.float64]) -> float:
    x, y = contour.T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def _covered_share(under: NDArray[np.float32], over: NDArray[np.float32]) -> float:
    """Fraction of box `under` that box `over` covers."""
    sides = np.minimum(under[2:], over[2:]) - np.maximum(under[:2], over[:2])
    return float(np.prod(np.maximum(sides, 0)) / np.prod(under[2:] - under[:2]))


def _texture(rng: np.random.Generator, width: int, height: int) -> NDArray[np.uint8]:
    """Random texture [height, width, 3]: a blotched colour, with stripes half of the time."""
    colour = rng.uniform(40, 215, 3).astype(np.float32)
    blotches = 18 * rng.standard_normal((4, 4, 3), np.float32)
    pixels: NDArray[np.float32] = colour + cv2.resize(blotches, (width, height), interpolation=cv2.INTER_CUBIC)
    shade = 6 * rng.standard_normal((height, width), np.float32)
    if rng.random() < 0.5:
        x_step, y_step = rng.normal(0, 0.35, 2).astype(np.float32)
        phase = np.arange(width, dtype=np.float32) * x_step + np.arange(height, dtype=np.float32)[:, None] * y_step
        shade += 25 * np.sin(phase)
    return np.clip(pixels + shade[..., None], 0, 255).astype(np.uint8)
