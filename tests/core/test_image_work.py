"""Images that would take far more work to decode than their pixels are refused by their header, whatever their format."""

import struct
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from dfine_core.image_work import SCAN_LIMIT, SCANNED_PIXEL_LIMIT
from dfine_core.images import ImageError, TooMuchWorkError, open_image, read_image
from tests.support.image_bombs import BOMBS, SCAN, encoded, jpeg, jpeg_segments, png, progressive_scans, tiff

END = b"\xff\xd9"


def picture(side: int = 64) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_costs_much_work_is_refused_in_little_time(name: str, tmp_path: Path) -> None:
    """Each file would take seconds to minutes of CPU time, or gigabytes, at the size that a server accepts."""
    bomb = BOMBS[name]()
    assert len(bomb) < 20_000_000
    (tmp_path / "bomb").write_bytes(bomb)
    before = time.process_time()
    for source in (bomb, tmp_path / "bomb"):
        with pytest.raises(TooMuchWorkError, match="save it"):
            read_image(source)
    assert (
        time.process_time() - before < 8.0
    )  # Pillow alone takes 1 to 2.5 s to open each of the two TIFF files of many strips


def test_scans_are_counted_before_decoding(tmp_path: Path) -> None:
    allowed, refused = progressive_scans(SCAN_LIMIT), progressive_scans(SCAN_LIMIT + 1)
    assert (allowed.count(SCAN), refused.count(SCAN)) == (100, 101)
    assert read_image(allowed).size == (64, 64)
    (tmp_path / "bomb.jpg").write_bytes(refused)
    for source in (refused, str(tmp_path / "bomb.jpg"), tmp_path / "bomb.jpg"):
        with pytest.raises(TooMuchWorkError, match="more than 100 scans"):
            open_image(source)


def test_a_bomb_of_many_scans_costs_no_decoding() -> None:
    bomb = progressive_scans(20_000, 1000, 1000)
    assert len(bomb) < 1_000_000
    before = time.process_time()
    with pytest.raises(TooMuchWorkError):
        read_image(bomb)
    assert time.process_time() - before < 1.0


def test_an_ordinary_image_with_markers_in_its_other_parts_is_read() -> None:
    thumbnails = SCAN * 300
    jpeg = encoded(picture(), "JPEG", comment=thumbnails)
    for content in (jpeg, jpeg + thumbnails):  # a video behind the image, as phones write it
        assert content.count(SCAN) > SCAN_LIMIT
        assert np.array_equal(np.asarray(read_image(content)), np.asarray(read_image(encoded(picture(), "JPEG"))))


def test_the_scans_of_a_jpeg_inside_a_tiff_are_counted() -> None:
    bomb = progressive_scans(SCAN_LIMIT + 1)
    for tags in ({273: 8, 279: len(bomb)}, {322: 64, 323: 64, 324: 8, 325: len(bomb)}):
        with pytest.raises(TooMuchWorkError):
            open_image(tiff(64, 64, 7, tags, bomb))


def test_a_tile_larger_than_the_limit_is_refused() -> None:
    with pytest.raises(TooMuchWorkError):
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
            read_image(progressive_scans(5)[:200] + cut)


def test_the_larger_an_image_the_fewer_scans_may_pass_over_it() -> None:
    side = 6000
    allowed = SCANNED_PIXEL_LIMIT // side**2
    assert 10 < allowed < SCAN_LIMIT
    with open_image(progressive_scans(allowed, side, side)) as image:
        assert image.size == (side, side)
    with pytest.raises(TooMuchWorkError, match=f"more than {allowed} scans"):
        open_image(progressive_scans(allowed + 1, side, side))


def test_images_with_as_many_parts_as_encoders_write_are_read() -> None:
    profile = b"\xff\xe2" + struct.pack(">H", 65_000) + bytes(64_998)
    exif = PIL.Image.Exif()
    exif[270] = "x" * 50_000
    for content in (
        jpeg_segments(300, profile),  # profiles and depth maps
        jpeg(exif=exif),
        png(300, 300, level=0, split=64),
        encoded(picture(), "GIF", comment=b"x" * 100_000),
        encoded(picture(), "TIFF", compression="tiff_lzw", strip_size=64 * 3),
        b"P3 # a comment\n# and another\n2 1 255 " + b"0 1 2 3 4 5",
        b"P1 2 2 0110",
        encoded(PIL.Image.new("F", (4, 4)).convert("L"), "PPM"),
    ):
        assert min(read_image(content).size) > 0
