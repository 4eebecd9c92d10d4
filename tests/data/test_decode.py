"""Decoding and resampling, against Pillow and against pixels set by hand."""

import io
import struct
import subprocess
import sys
import zlib
from itertools import product

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import v2

from dfine_core.images import PIXEL_LIMIT
from pipeline.data.augment.decode import UndecodableImageError, crop_and_place, decode_rgb, image_size, stretch
from pipeline.data.augment.geometry import Rectangle, View, composed_view

Pixels = NDArray[np.uint8]


def photograph(width: int, height: int, seed: int = 0) -> Pixels:
    """Noise with most of its power in low frequencies, as photographs have."""
    random = np.random.default_rng(seed)
    layers = [random.integers(0, 256, (height // step + 2, width // step + 2, 3), np.uint8) for step in (2, 8, 32)]
    smooth = [np.asarray(Image.fromarray(layer).resize((width, height)), np.float32) for layer in layers]
    return np.average(smooth, axis=0, weights=(1, 3, 6)).astype(np.uint8)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def by_pillow(encoded: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def decibels(image: Pixels, reference: Pixels) -> float:
    """Peak signal-to-noise ratio."""
    return float(10 * np.log10(255**2 / np.square(image.astype(float) - reference).mean()))


@pytest.mark.parametrize(("width", "height"), [(64, 48), (101, 77), (1, 1), (17, 3)])
@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411", "Gray"])
def test_jpeg_pixels_are_those_of_pillow(subsampling: str, width: int, height: int) -> None:
    if subsampling == "Gray":
        pixels = np.ascontiguousarray(photograph(width, height)[:, :, :1])
        encoded = simplejpeg.encode_jpeg(pixels, colorspace="GRAY", colorsubsampling="Gray")
    else:
        encoded = simplejpeg.encode_jpeg(photograph(width, height), colorsubsampling=subsampling)
    np.testing.assert_array_equal(decode_rgb(encoded, width, height), by_pillow(encoded))


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "RGB", {"keep_rgb": True}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGB", {}),
        ("PNG", "L", {}),
        ("PNG", "1", {}),
        ("PNG", "LA", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "P", {"transparency": 3}),
        ("PNG", "P", {"transparency": bytes(range(256))}),
        ("GIF", "P", {}),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {}),
        ("WEBP", "RGB", {"lossless": True}),
    ],
)
def test_every_kind_of_image_becomes_rgb(kind: str, mode: str, options: dict[str, object]) -> None:
    image = Image.fromarray(photograph(40, 30)).convert(mode)
    encoded = encode(image, kind, **options)
    opened = Image.open(io.BytesIO(encoded))
    expected = opened.convert("RGBA").convert("RGB") if "transparency" in opened.info else opened.convert("RGB")
    np.testing.assert_array_equal(decode_rgb(encoded, 40, 30), np.asarray(expected))


def test_sixteen_bit_levels_keep_their_upper_byte() -> None:
    levels = np.arange(0, 65536, 32, dtype=np.uint16).reshape(32, 64)
    decoded = decode_rgb(encode(Image.fromarray(levels), "PNG"), 64, 32)
    np.testing.assert_array_equal(decoded, np.repeat((levels // 256)[:, :, np.newaxis], 3, axis=2))


def test_levels_of_unknown_range_are_refused() -> None:
    encoded = encode(Image.fromarray(np.ones((4, 5), np.float32)), "TIFF")
    with pytest.raises(UndecodableImageError, match="mode F, levels of unknown range"):
        decode_rgb(encoded, 5, 4)


def test_exif_orientation_is_ignored_in_shards_and_named_where_it_confuses() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    encoded = encode(Image.fromarray(photograph(40, 30)), "JPEG", exif=exif)
    assert decode_rgb(encoded, 40, 30).shape == (30, 40, 3)
    with pytest.raises(UndecodableImageError, match=r"stored as 40x30 but annotated as 30x40.*EXIF"):
        decode_rgb(encoded, 30, 40)


def test_an_image_of_another_size_than_annotated_is_refused() -> None:
    encoded = encode(Image.fromarray(photograph(40, 30)), "PNG")
    with pytest.raises(UndecodableImageError, match=r"stored as 40x30 but annotated as 41x30$"):
        decode_rgb(encoded, 41, 30)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.9])
def test_a_truncated_image_is_refused(kind: str, kept: float) -> None:
    encoded = encode(Image.fromarray(photograph(80, 60)), kind)
    with pytest.raises(UndecodableImageError, match=r"truncated|cannot identify|Truncated|broken"):
        decode_rgb(encoded[: int(kept * len(encoded))], 80, 60)


def test_an_untidy_jpeg_that_pillow_reads_is_read() -> None:
    """Stray bytes between segments: libjpeg warns, and no pixel is lost."""
    encoded = encode(Image.fromarray(photograph(40, 30)), "JPEG")
    tables = encoded.index(b"\xff\xc4")  # the Huffman tables
    untidy = encoded[:tables] + b"\x00\x11" + encoded[tables:]
    with pytest.raises(ValueError, match="extraneous bytes"):
        simplejpeg.decode_jpeg(untidy)
    np.testing.assert_array_equal(decode_rgb(untidy, 40, 30), by_pillow(encoded))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF"]), st.data())
def test_damage_is_refused_by_one_error_or_does_no_harm(kind: str, data: st.DataObject) -> None:
    damaged = bytearray(encode(Image.fromarray(photograph(24, 18)), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = decode_rgb(bytes(damaged), 24, 18)
    except UndecodableImageError:
        return
    assert decoded.shape == (18, 24, 3)
    assert decoded.dtype == np.uint8


def test_a_decompression_bomb_is_refused_from_its_header() -> None:
    jpeg = bytearray(encode(Image.fromarray(photograph(40, 30)), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")  # marker, length 2, precision 1, height 2, width 2
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 40_000, 50_000)
    with pytest.raises(UndecodableImageError, match=f"50000x40000 pixels exceeds the limit of {PIXEL_LIMIT}"):
        decode_rgb(bytes(jpeg), 50_000, 40_000)

    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 40_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    with pytest.raises(UndecodableImageError, match="exceeds limit"):
        image_size(png + encode(Image.fromarray(photograph(4, 3)), "PNG")[33:])


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("divisor", [2, 4, 8])
def test_scaled_decoding_averages_blocks(kind: str, divisor: int) -> None:
    pixels = photograph(203, 117)
    encoded = encode(Image.fromarray(pixels), kind, quality=98, subsampling=0)
    small = decode_rgb(encoded, 203, 117, divisor)
    assert small.shape == (-(-117 // divisor), -(-203 // divisor), 3)
    whole = 117 // divisor, 203 // divisor
    blocks = pixels[: whole[0] * divisor, : whole[1] * divisor].reshape(whole[0], divisor, whole[1], divisor, 3)
    assert decibels(small[: whole[0], : whole[1]], blocks.mean(axis=(1, 3)).round().astype(np.uint8)) > 30


@pytest.mark.parametrize(
    ("source_side", "region_side", "divisor"),
    [(640, 640, 1), (640, 161, 1), (640, 160, 2), (640, 80, 4), (640, 40, 8), (640, 10, 8), (100, 640, 1)],
)
def test_an_image_is_decoded_at_twice_the_pixels_wanted_or_more(
    source_side: int, region_side: int, divisor: int
) -> None:
    source, region = Rectangle(0, 0, source_side, source_side), Rectangle(0, 0, region_side, region_side)
    assert View(source, region, flip=False).divisor == divisor
    wide = region._replace(right=640)  # an axis that needs every pixel keeps both from being decoded smaller
    assert View(source, wide, flip=False).divisor == 1


@pytest.mark.parametrize("canvas", [(200, 160), (120, 170), (333, 777)])
def test_enlarging_equals_pillow_within_one_level(canvas: tuple[int, int]) -> None:
    pixels = photograph(160, 120)
    whole = View(Rectangle(0, 0, 160, 120), Rectangle(0, 0, canvas[1], canvas[0]), flip=False)
    placed = crop_and_place(pixels, whole, canvas)
    assert np.abs(placed.astype(int) - stretch(pixels, canvas)).max() <= 1


@pytest.mark.parametrize("canvas", [(240, 700), (380, 300), (240, 320), (150, 210), (100, 80), (50, 90)])
def test_shrinking_is_as_antialiased_as_pillow(canvas: tuple[int, int]) -> None:
    """Far closer than plain interpolation between neighbours, which aliases."""
    pixels = photograph(640, 480)
    whole = View(Rectangle(0, 0, 640, 480), Rectangle(0, 0, canvas[1], canvas[0]), flip=False)
    expected = stretch(pixels, canvas)
    ours = decibels(crop_and_place(pixels, whole, canvas), expected)
    neighbours = decibels(np.asarray(cv2.resize(pixels, canvas[::-1]), np.uint8), expected)
    assert ours > 40
    assert ours > neighbours + 3


def test_a_view_is_cut_out_flipped_and_set_on_zeros() -> None:
    pixels = photograph(20, 16)
    view = View(source=Rectangle(3, 2, 13, 10), region=Rectangle(5, 1, 15, 9), flip=True)
    placed = crop_and_place(pixels, view, (12, 18))
    expected = np.zeros((12, 18, 3), np.uint8)
    expected[1:9, 5:15] = pixels[2:10, 3:13][:, ::-1]  # neither enlarged nor shrunk, so exactly the same pixels
    np.testing.assert_array_equal(placed, expected)


@pytest.mark.parametrize("orientation", [*product([False, True], repeat=3)])
@pytest.mark.parametrize("side", [1, 2])
def test_an_oriented_view_shows_the_pixels_of_the_image_transposed_and_flipped(
    orientation: tuple[bool, bool, bool], side: int
) -> None:
    """Against numpy, which moves the pixels before the view is cut out; exact at the same size and when enlarged."""
    flip, vertical, transpose = orientation
    pixels = photograph(40, 24)
    crop = Rectangle(-4, 2, 36, 22)
    canvas = (40 * side, 20 * side) if transpose else (20 * side, 40 * side)
    placed = crop_and_place(pixels, composed_view(crop, 40, 24, canvas, *orientation), canvas)

    upright = crop_and_place(
        pixels, composed_view(crop, 40, 24, (20 * side, 40 * side), flip=False), (20 * side, 40 * side)
    )
    expected = upright.transpose(1, 0, 2) if transpose else upright
    expected = expected[:, ::-1] if flip else expected
    np.testing.assert_array_equal(placed, expected[::-1] if vertical else expected)
    assert (placed == 0).all(axis=2).sum() == 4 * 20 * side**2  # the part of the crop outside the image


def test_a_view_of_an_image_decoded_smaller_shows_the_same_part() -> None:
    pixels = photograph(641, 481)
    encoded = encode(Image.fromarray(pixels), "JPEG", quality=98, subsampling=0)
    view = View(source=Rectangle(33, 21, 601, 441), region=Rectangle(4, 6, 104, 78), flip=False)
    assert view.divisor == 2
    small = crop_and_place(decode_rgb(encoded, 641, 481, 2), view, (90, 110), 2)
    full = crop_and_place(decode_rgb(encoded, 641, 481), view, (90, 110))
    assert decibels(small, full) > 35


@pytest.mark.parametrize("canvas", [(640, 640), (320, 512), (90, 70)])
def test_the_evaluation_resize_is_the_released_one_to_the_last_bit(canvas: tuple[int, int]) -> None:
    encoded = simplejpeg.encode_jpeg(photograph(320, 240))
    released = v2.Resize(canvas)(Image.open(io.BytesIO(encoded)).convert("RGB"))
    np.testing.assert_array_equal(stretch(decode_rgb(encoded, 320, 240), canvas), np.asarray(released))


def test_data_tasks_start_without_torch_and_with_one_opencv_thread() -> None:
    code = (
        "import sys, cv2, pipeline.data.stream.tasks\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "assert cv2.getNumThreads() == 1, cv2.getNumThreads()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
