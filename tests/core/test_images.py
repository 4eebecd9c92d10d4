"""Opener of images: accepted formats and sizes, and that nothing else in the project opens images."""

import base64
import io
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfine_core.images import (
    FORMATS,
    PIXEL_LIMIT,
    ImageError,
    TooManyPixelsError,
    UnknownFormatError,
    open_image,
    orientation,
    read_image,
)
from pipeline.data.augment.decode import UndecodableImageError, decode_rgb, image_size
from pipeline.data.augment.samples import AnnotatedImage, plain_sample
from pipeline.data.prepare.image_files import BadImageError, checked_image

ROOT = Path(__file__).parents[2]
SOURCES = ("dfine_core", "pipeline", "jobs", "benchmarks")
OPENS = re.compile(r"\bImage\.open\(|from PIL\.Image import .*\bopen\b")
REPEATS = re.compile(r"89_?478_?485|^\s*(FORMATS|PIXEL_LIMIT)\b.*= .*(\d|JPEG)|I;16|\"transparency\"", re.M)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"


def encoded(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def checked(data: bytes) -> object:
    return checked_image(data, (8, 8), longest_side=None, quality=75, max_pixels=PIXEL_LIMIT, verify=True)


def files_matching(pattern: re.Pattern[str], texts: Iterable[tuple[str, str]]) -> list[str]:
    return [name for name, text in texts if pattern.search(text)]


def source_files() -> list[tuple[str, str]]:
    found = [path for folder in SOURCES for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(found) > 100
    return [(str(path.relative_to(ROOT)), path.read_text()) for path in found]


def test_images_are_opened_in_one_file() -> None:
    assert files_matching(OPENS, source_files()) == ["dfine_core/images.py"]


def test_limit_formats_and_rules_of_conversion_exist_once() -> None:
    assert files_matching(REPEATS, source_files()) == ["dfine_core/images.py"]


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (OPENS, "image = PIL.Image.open(path)"),
        (OPENS, "with Image.open(io.BytesIO(data), formats=FORMATS) as image:"),
        (OPENS, "from PIL.Image import fromarray, open"),
        (REPEATS, "x = 1\nPIXEL_LIMIT = 89478485"),
        (REPEATS, "class A:\n    max_pixels: PositiveInt = 89_478_485"),
        (REPEATS, 'FORMATS = ("JPEG", "PNG")'),
        (REPEATS, 'if image.mode.startswith("I;16"):'),
    ],
)
def test_the_checks_of_source_text_can_fail(pattern: re.Pattern[str], text: str) -> None:
    assert files_matching(pattern, [("a.py", text)]) == ["a.py"]


def test_the_opener_needs_no_torch() -> None:
    code = "import sys, dfine_core.images\nassert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("kind", "name"), [("ICO", "ICO"), ("PCX", "PCX"), ("SGI", "SGI"), (None, "EPS"), (None, None)]
)
def test_a_format_outside_the_list_is_refused_with_its_name_at_every_entrance(
    kind: str | None, name: str | None, tmp_path: Path
) -> None:
    data = encoded(Image.new("RGB", (8, 8), "red"), kind) if kind else EPS if name else b"not an image"
    message = f"its format seems to be {name}; only JPEG, PNG" if name else "cannot identify its format; only JPEG, PNG"
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(UnknownFormatError, match=message):
        open_image(tmp_path / "a.png")
    with pytest.raises(ImageError, match=message):
        read_image(data)
    with pytest.raises(UndecodableImageError, match=message):  # in a shard, by header and in training
        image_size(data)
    with pytest.raises(UndecodableImageError, match=message):
        decode_rgb(data, 8, 8)
    without_boxes = AnnotatedImage(
        data, 8, 8, np.zeros((0, 4), np.float32), np.zeros(0, np.int32), np.zeros(0, np.float32)
    )
    with pytest.raises(UndecodableImageError, match=message):
        plain_sample(without_boxes, canvas=(64, 64))
    with pytest.raises(BadImageError, match=f"undecodable: .*{message}"):
        checked(data)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_of_the_list_gives_the_same_pixels_from_shards_and_to_detectors(kind: str) -> None:
    data = encoded(Image.effect_noise((8, 8), 90).convert("RGB"), kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(read_image(data), expected)
    np.testing.assert_array_equal(decode_rgb(data, 8, 8), expected)
    checked(data)


def png_header(width: int, height: int) -> bytes:
    """PNG whose header claims so many pixels, with hardly any data behind it."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + encoded(Image.new("RGB", (4, 3)), "PNG")[33:]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # Pillow's own, before ours
@pytest.mark.parametrize(("width", "height"), [(12_000, 8_000), (50_000, 40_000)])
def test_the_limit_of_pixels_holds_by_the_header(width: int, height: int) -> None:
    with pytest.raises(TooManyPixelsError, match=r"exceeds (the )?limit of"):
        open_image(png_header(width, height))
    with pytest.raises(TooManyPixelsError, match="100x60 pixels exceeds the limit of 5999"):
        open_image(png_header(100, 60), max_pixels=5999)
    assert open_image(png_header(100, 60), max_pixels=6000).size == (100, 60)


# EXIF orientation


def turned(kind: str, mark: int, size: tuple[int, int] = (48, 32)) -> tuple[bytes, np.ndarray]:
    """An encoded image that is marked as turned, and how a viewer shows it: red only in its upper left quarter."""
    upright = np.full((size[1], size[0], 3), 200, np.uint8)
    upright[: size[1] // 2, : size[0] // 2] = (250, 10, 10)
    # The inverse of each turn, written with NumPy: row and column of a stored pixel, by the EXIF standard.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[mark]
    exif = Image.Exif()
    exif[0x0112] = mark
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(stored)).save(stream, kind, exif=exif, quality=95, subsampling=0)
    return stream.getvalue(), upright


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mark", range(1, 9))
def test_files_are_turned_upright_on_reading(kind: str, mark: int, tmp_path: Path) -> None:
    data, upright = turned(kind, mark)
    (tmp_path / "a").write_bytes(data)
    opened = Image.open(io.BytesIO(data))
    for source in (data, tmp_path / "a", str(tmp_path / "a"), base64.b64encode(data).decode(), opened):
        pixels = np.asarray(read_image(source), int)
        assert pixels.shape == upright.shape
        assert np.abs(pixels - upright).mean() < 8
    assert read_image(data, upright=False).size == Image.open(io.BytesIO(data)).size


def test_a_tiff_is_turned_once() -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24, 0] = 250
    stream = io.BytesIO()
    lying = Image.fromarray(np.ascontiguousarray(upright.transpose(1, 0, 2)[::-1]))
    lying.save(stream, "TIFF", tiffinfo={0x0112: 6})
    np.testing.assert_array_equal(read_image(stream.getvalue()), upright)
    np.testing.assert_array_equal(decode_rgb(stream.getvalue(), 48, 32), upright)


def test_pixels_in_memory_are_taken_as_they_are() -> None:
    data, _ = turned("JPEG", 6)
    in_memory = Image.open(io.BytesIO(data)).convert("RGB")  # keeps the mark, but its owner counts in these pixels
    assert read_image(in_memory).size == in_memory.size == (32, 48)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01"]
)
def test_damaged_exif_turns_nothing(exif: bytes) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (48, 32)).save(stream, "JPEG", exif=exif)
    assert orientation(Image.open(io.BytesIO(stream.getvalue()))) == 1
    assert read_image(stream.getvalue()).size == (48, 32)


# Levels of more than 8 bits


@pytest.mark.parametrize("longest_side", [None, 8])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("mark", [1, 6])
def test_sixteen_bits_keep_their_upper_byte_however_they_enter(kind: str, longest_side: int | None, mark: int) -> None:
    image = Image.fromarray(np.full((40, 40), 0x8040, np.uint16))
    exif = Image.Exif()
    exif[0x0112] = mark
    stream = io.BytesIO()
    image.save(stream, kind, **({} if kind == "PPM" else {"exif": exif}))
    assert (np.asarray(read_image(stream.getvalue())) == 0x80).all()
    stored = checked_image(
        stream.getvalue(), (40, 40), longest_side=longest_side, quality=95, max_pixels=PIXEL_LIMIT, verify=True
    )
    side = longest_side or 40
    assert np.abs(decode_rgb(stored.data, side, side).astype(int) - 0x80).max() <= 1


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("longest_side", [None, 8])
@pytest.mark.parametrize("levels", [np.float32, np.int32])
def test_levels_of_unknown_range_are_rejected_before_they_reach_a_shard(
    levels: type, longest_side: int | None, verify: bool
) -> None:
    data = encoded(Image.fromarray(np.ones((16, 16), levels)), "TIFF")
    with pytest.raises(BadImageError, match=r"undecodable: .*levels of unknown range \((floats|32-bit integers)\)"):
        checked_image(data, (16, 16), longest_side=longest_side, quality=95, max_pixels=PIXEL_LIMIT, verify=verify)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # Pillow's own limit is lower
def test_images_larger_than_training_reads_need_a_longest_side() -> None:
    data = encoded(Image.new("1", (10_000, 9_000)), "PNG")
    options = {"quality": 75, "max_pixels": 200_000_000, "verify": False}
    with pytest.raises(
        BadImageError, match="too many pixels: 10000 x 9000: training reads 89,478,485 at most; take --lon"
    ):
        checked_image(data, None, longest_side=None, **options)
    assert checked_image(data, None, longest_side=100, **options).width == 100
