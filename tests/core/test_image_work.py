"""Images that would take far more work to decode than their pixels are refused by their header, whatever their format."""

import io
import struct
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from dfine_core.images import SCAN_LIMIT, ImageError, TooManyPixelsError, TooManyScansError, open_image, read_image

SCAN, END = b"\xff\xda", b"\xff\xd9"


def picture(side: int = 64) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def encoded(image: PIL.Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def with_scans(count: int, *, side: int = 64) -> bytes:
    """A progressive JPEG with its last scan repeated."""
    jpeg = encoded(PIL.Image.new("RGB", (side, side), "green"), "JPEG", progressive=True)
    head, last = jpeg[: jpeg.rindex(SCAN)], jpeg[jpeg.rindex(SCAN) : -2]
    return head + last * (count - head.count(SCAN)) + END


def test_scans_are_counted_before_decoding(tmp_path: Path) -> None:
    allowed, refused = with_scans(SCAN_LIMIT), with_scans(SCAN_LIMIT + 1)
    assert (allowed.count(SCAN), refused.count(SCAN)) == (100, 101)
    assert read_image(allowed).size == (64, 64)
    (tmp_path / "bomb.jpg").write_bytes(refused)
    for source in (refused, str(tmp_path / "bomb.jpg"), tmp_path / "bomb.jpg"):
        with pytest.raises(TooManyScansError, match="more than 100 scans"):
            open_image(source)


def test_a_bomb_of_many_scans_costs_no_decoding() -> None:
    bomb = with_scans(20_000, side=1000)
    assert len(bomb) < 1_000_000
    before = time.process_time()
    with pytest.raises(TooManyScansError):
        read_image(bomb)
    assert time.process_time() - before < 1.0


def test_an_ordinary_image_with_markers_in_its_other_parts_is_read() -> None:
    thumbnails = SCAN * 300
    jpeg = encoded(picture(), "JPEG", comment=thumbnails)
    for content in (jpeg, jpeg + thumbnails):  # a video behind the image, as phones write it
        assert content.count(SCAN) > SCAN_LIMIT
        assert np.array_equal(np.asarray(read_image(content)), np.asarray(read_image(encoded(picture(), "JPEG"))))


def test_the_scans_of_a_jpeg_inside_a_tiff_are_counted() -> None:
    bomb = with_scans(SCAN_LIMIT + 1)
    for tags in ({273: 8, 279: len(bomb)}, {322: 64, 323: 64, 324: 8, 325: len(bomb)}):
        with pytest.raises(TooManyScansError):
            open_image(tiff(64, 64, 7, tags, bomb))


def test_a_tile_larger_than_the_limit_is_refused() -> None:
    with pytest.raises(TooManyPixelsError):
        open_image(tiff(16, 16, 8, {322: 65_520, 323: 65_520, 324: 8, 325: 4}, b"abcd"))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("PNG", {"save_all": True, "append_images": [picture(32)] * 200}),
        ("GIF", {"save_all": True, "append_images": [picture(32)] * 200}),
        ("WEBP", {"lossless": True, "save_all": True, "append_images": [picture(32)] * 200}),
        ("TIFF", {"save_all": True, "append_images": [picture(32)] * 200}),
        ("TIFF", {"compression": "jpeg", "strip_size": 8 * 32}),
    ],
)
def test_an_image_of_many_frames_or_strips_is_read_once(kind: str, options: dict[str, object]) -> None:
    single = read_image(
        encoded(picture(32), kind, **{k: v for k, v in options.items() if k in ("compression", "lossless")})
    )
    frames = encoded(picture(32), kind, **options)
    assert len(frames) > 1000
    image = read_image(frames)
    assert image.size == (32, 32)
    difference = np.abs(np.asarray(image, np.int16) - np.asarray(single, np.int16)).mean()
    assert difference < 30  # palettes and quantisation of JPEG differ, another image would not pass


def test_tags_of_another_type_are_an_image_error() -> None:
    for tags in ({273: 8, 279: 2**32 - 1, 322: 2**32 - 1, 323: 2**32 - 1}, {322: 64, 323: 64, 324: 2**32 - 1, 325: 9}):
        content = tiff(64, 64, 7, tags, b"abcdefgh")
        for entry in (content, content.replace(struct.pack("<HH", 322, 4), struct.pack("<HH", 322, 2))):  # text
            with pytest.raises(ImageError):
                read_image(entry)


def test_a_broken_jpeg_is_still_an_image_error() -> None:
    for cut in (b"", END, b"\xff"):
        with pytest.raises(ImageError):
            read_image(with_scans(5)[:200] + cut)


def tiff(width: int, height: int, compression: int, more: dict[int, int], data: bytes) -> bytes:
    """A little-endian RGB TIFF with its data at byte 8 and one value in each tag."""
    tags = {
        256: width,
        257: height,
        258: 8,
        259: compression,
        262: 6 if compression == 7 else 2,
        277: 3,
        278: height,
    } | more
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)
