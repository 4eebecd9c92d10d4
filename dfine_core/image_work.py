"""Bounds on the work of reading an image, found in its bytes before Pillow reads them: a small file must not cost minutes.

Each function returns the reason to refuse, or None. Pixels are counted by the opener in `images.py`. The limits are far above
those of real files; `tests/support/image_bombs.py` builds a file beyond each of them.
"""

import re
from typing import Any

import PIL.Image

SCAN_LIMIT = 100  # of one JPEG stream; encoders write about ten
SCANNED_PIXEL_LIMIT = 1_073_000_000  # pixels times scans: 12 scans of the largest image
SEGMENT_LIMIT = 4096  # before the first scan of a JPEG; a depth map in 64 KB segments takes some hundreds
EXIF_SEGMENT_LIMIT = 64  # Pillow copies all before each of them
STRAY_BYTE_LIMIT = 65_536  # between segments of a JPEG
CHUNK_LIMIT = 100_000  # of a PNG; 800 MB in the usual 8 KB
PACKED_CHUNK_LIMIT = 256  # compressed text and profiles of a PNG, each of which may expand to 1 MB
BLOCK_LIMIT = 100_000  # before the image of a GIF, up to 255 bytes each
STRIP_LIMIT = 250_000  # strips or tiles of a TIFF
HEADER_LIMIT = 65_536  # of a PPM, whose comments may have any length
COMMENT_LIMIT = 1000  # of a PPM as text, where each copies up to 1 MB
PYTHON_SECONDS = 10.0  # for the decoders that Pillow has in Python, at the rates below on one core of 2026
RUN_PIXEL_S, RUN_BYTE_S = 90e-9, 170e-9  # BMP with run lengths
TEXT_BYTE_S, SCALED_BYTE_S = 120e-9, 330e-9  # PPM as text, and with levels other than 255

SAVE_ANEW = "save it anew"


def excessive_structure(content: bytes) -> str | None:
    """Find more parts before the pixels than any encoder writes, in an encoded image of any format."""
    head = content[:12]
    if head.startswith(b"\xff\xd8\xff"):
        return _jpeg_segments(content)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png_chunks(content)
    if head.startswith((b"GIF87a", b"GIF89a")):
        return _gif_blocks(content)
    if re.match(rb"P[1-6fF]\s", head):
        # Comments count as one word; all but those of a bitmap and its two sides are in the header.
        words = len(re.sub(rb"#[^\r\n]*", b"#", content[:HEADER_LIMIT]).replace(b"#", b"").split())
        if words < 4 and len(content) > HEADER_LIMIT:
            return f"a PPM image with a header of more than {HEADER_LIMIT} bytes; {SAVE_ANEW}"
        if head[1:2] in b"123" and content.count(b"#") > COMMENT_LIMIT:
            return f"a PPM image with more than {COMMENT_LIMIT} comments; {SAVE_ANEW}"
    return None


def excessive_decoding(image: PIL.Image.Image, content: bytes) -> str | None:
    """Find an opened image whose decoder would pass over its pixels hundreds of times, or take minutes.

    Each scan of a JPEG stream passes over the whole image, and a few bytes make one. The decoders that Pillow has in Python take
    a microsecond where the others take nanoseconds. Other formats decode each pixel once: an interlaced PNG in seven parts, an
    animation's first frame alone.
    """
    pixels = image.width * image.height
    if image.format in ("JPEG", "MPO"):
        return _scans(content, pixels)
    if image.format == "TIFF":
        return _tiff_work(image, content, pixels)
    coder = image.tile[0][0] if image.tile else ""  # type: ignore[attr-defined]
    seconds = 0.0
    if coder == "bmp_rle":
        seconds = RUN_PIXEL_S * pixels + RUN_BYTE_S * len(content)
    elif coder == "ppm_plain":
        seconds = TEXT_BYTE_S * len(content)
    elif coder == "ppm":
        seconds = SCALED_BYTE_S * min(len(content), 6 * pixels)
    if seconds > PYTHON_SECONDS:
        kind = "run lengths" if coder == "bmp_rle" else "levels as text, or of another range than 0..255"
        return f"a {image.format} image with {kind} that would take {seconds:.0f} s to decode; save it as PNG"
    return None


# In coded data 0xFF stands before a zero or a restart marker; any other byte makes it the next segment's marker.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
_SEGMENT = re.compile(rb"\xff+([^\x00\xff])")
_SCAN, _END, _EXIF = 0xDA, 0xD9, 0xE1
_ALONE = {0x01, *range(0xD0, 0xDA)}  # markers without a length
_PACKED = (b"zTXt", b"iTXt", b"iCCP")
# Numbers of TIFF's tags.
_COMPRESSION, _TILE_WIDTH, _TILE_LENGTH = 259, 322, 323
_STRIPS, _TILES = (273, 279), (324, 325)  # offsets, lengths
_OVERLAP = 4  # bytes of all strips, in file sizes; equal tiles may share their bytes


def _length(content: bytes, at: int, size: int = 2) -> int:
    return int.from_bytes(content[at : at + size], "big")


def _jpeg_segments(content: bytes) -> str | None:
    position, stray, exif = 2, 0, 0
    for _ in range(SEGMENT_LIMIT):
        marker = _SEGMENT.search(content, position)
        if marker is None or marker[1][0] == _SCAN:
            return None
        stray += marker.end() - 2 - position
        exif += marker[1][0] == _EXIF and content[marker.end() + 2 : marker.end() + 6] == b"Exif"
        if stray > STRAY_BYTE_LIMIT:
            return f"a JPEG image with more than {STRAY_BYTE_LIMIT} bytes that belong to no segment; {SAVE_ANEW}"
        if exif > EXIF_SEGMENT_LIMIT:
            return f"a JPEG image with more than {EXIF_SEGMENT_LIMIT} EXIF segments; {SAVE_ANEW}"
        position = marker.end() + (0 if marker[1][0] in _ALONE else _length(content, marker.end()))
    return f"a JPEG image with more than {SEGMENT_LIMIT} segments before its pixels; {SAVE_ANEW}"


def _png_chunks(content: bytes) -> str | None:
    position, packed = 8, 0
    for _ in range(CHUNK_LIMIT):
        kind = content[position + 4 : position + 8]
        if len(kind) < 4 or kind == b"IEND":
            return None
        packed += kind in _PACKED
        if packed > PACKED_CHUNK_LIMIT:
            return f"a PNG image with more than {PACKED_CHUNK_LIMIT} compressed texts and profiles; {SAVE_ANEW}"
        position += 12 + _length(content, position, 4)
    return f"a PNG image in more than {CHUNK_LIMIT} chunks; {SAVE_ANEW}"


def _gif_blocks(content: bytes) -> str | None:
    if len(content) < 13:
        return None
    position = 13 + (3 << ((content[10] & 7) + 1) if content[10] & 128 else 0)
    in_extension = False
    for _ in range(BLOCK_LIMIT):
        if position >= len(content):
            return None
        first = content[position]
        if in_extension:
            position, in_extension = position + 1 + first, first > 0
        elif first == 0x21:  # an extension: its kind, then blocks up to an empty one
            position, in_extension = position + 2, True
        elif first in (0x2C, 0x3B):  # the image, or the end
            return None
        else:
            position += 1
    return f"a GIF image with more than {BLOCK_LIMIT} blocks before its pixels; {SAVE_ANEW}"


def _scans(stream: bytes, pixels: int) -> str | None:
    """Find a JPEG stream of too many scans for its pixels."""
    limit = min(SCAN_LIMIT, SCANNED_PIXEL_LIMIT // max(1, pixels))
    if stream.count(b"\xff\xda") <= limit:  # by far the most; those in thumbnails and behind the end count too
        return None
    scans, position = 0, 0
    while (marker := _MARKER.search(stream, position)) and marker[1][0] != _END:
        scans += marker[1][0] == _SCAN
        if scans > limit:
            return f"a JPEG image of more than {limit} scans, each of which decodes the whole image again; {SAVE_ANEW}"
        position = marker.end() + _length(stream, marker.end())
    return None


def _tiff_work(image: PIL.Image.Image, content: bytes, pixels: int) -> str | None:
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    width, length = int(tags.get(_TILE_WIDTH, 0)), int(tags.get(_TILE_LENGTH, 0))
    if width > 0 < length:  # tiles may reach far over the image
        columns, rows = -(-image.width // width), -(-image.height // length)
        pixels = columns * width * rows * length
        if pixels > 4 * image.width * image.height + 4 * 1024 * 1024:
            return f"a TIFF image with tiles of {width}x{length} pixels, which together exceed it by far; {SAVE_ANEW}"
    for offsets, lengths in (_STRIPS, _TILES):
        starts, sizes = tags.get(offsets, ()), tags.get(lengths, ())
        if len(starts) > STRIP_LIMIT:
            return f"a TIFF image in more than {STRIP_LIMIT} strips or tiles; {SAVE_ANEW}"
        if tags.get(_COMPRESSION) in (6, 7):  # JPEG, a stream in each strip or tile
            if sum(sizes) > _OVERLAP * len(content):
                return f"a TIFF image whose strips or tiles share their bytes; {SAVE_ANEW}"
            for start, size in zip(starts, sizes, strict=False):
                if reason := _scans(content[start : start + size], pixels):
                    return reason
    return None
