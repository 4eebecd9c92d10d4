"""Small image files that take far more work or memory to read than their bytes and pixels suggest, one kind a function."""

import io
import struct
import zlib
from collections.abc import Callable, Mapping

import PIL.Image

SCAN, END = b"\xff\xda", b"\xff\xd9"
JPEG_START = b"\xff\xd8"


def encoded(image: PIL.Image.Image, kind: str, **options: object) -> bytes:
    """Image as Pillow writes it."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def jpeg(width: int = 64, height: int = 64, **options: object) -> bytes:
    """JPEG of one colour."""
    return encoded(PIL.Image.new("RGB", (width, height), "green"), "JPEG", **options)


def progressive_scans(count: int, width: int = 64, height: int = 64) -> bytes:
    """Progressive JPEG with its last scan repeated."""
    content = jpeg(width, height, progressive=True)
    head, last = content[: content.rindex(SCAN)], content[content.rindex(SCAN) : -2]
    return head + last * (count - head.count(SCAN)) + END


def arithmetic_scans(count: int, width: int, height: int) -> bytes:
    """Progressive JPEG with arithmetic coding, whose refinement scans are a few bytes each."""
    tables = b"\xff\xdb" + struct.pack(">HB", 67, 0) + bytes([1] * 64)
    frame = b"\xff\xca" + struct.pack(">HBHHB", 17, 8, height, width, 3) + b"\1\x11\0\2\x11\0\3\x11\0"
    first = SCAN + struct.pack(">HB", 12, 3) + b"\1\0\2\0\3\0" + b"\0\0\1" + bytes([0x55, 0xAA] * 40)
    refined = [
        SCAN + struct.pack(">HB", 8, 1) + bytes([1 + n % 3, 0]) + b"\1\x3f\1" + bytes([0x55, 0x5A] * 40)
        for n in range(3)
    ]
    refine = SCAN + struct.pack(">HB", 8, 1) + bytes([1, 0]) + b"\1\x3f\x10" + bytes([0x55, 0xAA] * 20)
    return JPEG_START + tables + frame + first + b"".join(refined) + refine * (count - 4) + END


def jpeg_segments(count: int, segment: bytes = b"\xff\xfe\0\2") -> bytes:
    """JPEG with many short segments before its frame."""
    return JPEG_START + segment * count + jpeg()[2:]


def jpeg_exif(count: int) -> bytes:
    """JPEG whose EXIF is continued in many segments of a byte, after a few long ones."""
    long = b"\xff\xe1" + struct.pack(">H", 65_000) + b"Exif\0\0" + bytes(65_000 - 8)
    short = b"\xff\xe1\0\x09Exif\0\0x"
    return JPEG_START + long * 100 + short * count + jpeg()[2:]


def jpeg_junk(count: int) -> bytes:
    """JPEG with bytes between its segments that belong to none."""
    content = jpeg()
    return content[:20] + bytes(count) + content[20:]


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    """PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def png(
    width: int,
    height: int,
    *,
    depth: int = 8,
    colour: int = 2,
    interlaced: bool = False,
    before: bytes = b"",
    after: bytes = b"",
    level: int = 9,
    filter_type: int = 4,
    split: int = 0,
) -> bytes:
    """PNG of zeros, Paeth-filtered; `split` cuts its data into chunks of that many bytes."""
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    packer = zlib.compressobj(level)
    parts = []
    passes = (
        ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
        if interlaced
        else ((0, 0, 1, 1),)
    )
    for x, y, dx, dy in passes:
        columns, rows = -(-(width - x) // dx), -(-(height - y) // dy)
        if columns > 0:
            row = bytes([filter_type]) + bytes((columns * bits + 7) // 8)
            parts += [packer.compress(row) for _ in range(rows)]
    data = b"".join([*parts, packer.flush()])
    size = split or len(data)
    idat = b"".join(chunk(b"IDAT", data[at : at + size]) for at in range(0, len(data), size))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced)))
    return b"\x89PNG\r\n\x1a\n" + head + before + idat + after + chunk(b"IEND")


def zipped_text(count: int, *, named: bool = True) -> bytes:
    """Chunks of compressed text, each as long as Pillow accepts; it does not count those without a name."""
    packed = zlib.compress(bytes(2**20 - 1), 9)
    return chunk(b"zTXt", (b"name" if named else b"") + b"\0\0" + packed) * count


def gif_blocks(count: int) -> bytes:
    """GIF with a comment of many short blocks."""
    content = encoded(PIL.Image.new("P", (8, 8)), "GIF")
    at = content.index(b",", 13 + (3 << ((content[10] & 7) + 1) if content[10] & 128 else 0))
    return content[:at] + b"!\xfe" + b"\1x" * count + b"\0" + content[at:]


def bmp_runs(width: int, height: int, coded: bytes, *, rle4: bool = False) -> bytes:
    """BMP with run-length coding."""
    palette = bytes(4 * 16 if rle4 else 4 * 256)
    offset = 54 + len(palette)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 4 if rle4 else 8, 2 if rle4 else 1, len(coded), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", offset + len(coded), 0, 0, offset) + info + palette + coded


def ppm(kind: str, width: int, height: int, levels: int, data: bytes) -> bytes:
    """PPM with its data."""
    return f"{kind}\n{width} {height}\n{levels}\n".encode() + data


def tiff(width: int, height: int, compression: int, more: Mapping[int, int | tuple[int, ...]], data: bytes) -> bytes:
    """Little-endian RGB TIFF with its data at byte 8; tags of several values follow the data."""
    tags: dict[int, int | tuple[int, ...]] = {
        256: width,
        257: height,
        258: (8, 8, 8),
        259: compression,
        262: 6 if compression == 7 else 2,
        277: 3,
        278: height,
    }
    entries, extra, start = b"", b"", 8 + len(data)
    for tag, value in sorted({**tags, **more}.items()):
        values = value if isinstance(value, tuple) else (value,)
        packed = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            packed, extra = struct.pack("<I", start + len(extra)), extra + packed
        entries += struct.pack("<HHI", tag, 4, len(values)) + packed
    return (
        b"II*\0"
        + struct.pack("<I", start + len(extra))
        + data
        + extra
        + struct.pack("<H", len(entries) // 12)
        + entries
        + bytes(4)
    )


BOMBS: Mapping[str, Callable[[], bytes]] = {
    "JPEG, scans": lambda: progressive_scans(2_000, 1000, 1000),
    "JPEG, scans of many pixels": lambda: progressive_scans(40, 8000, 8000),
    "JPEG, scans with arithmetic coding": lambda: arithmetic_scans(200, 3000, 3000),
    "JPEG, comments": lambda: jpeg_segments(1_000_000),
    "JPEG, EXIF": lambda: jpeg_exif(3_000),
    "JPEG, stray bytes": lambda: jpeg_junk(1_000_000),
    "JPEG, fill bytes": lambda: jpeg_segments(1_000_000, b"\xff"),
    "PNG, chunks": lambda: png(8, 8, before=chunk(b"prIv") * 400_000),
    "PNG, chunks at the end": lambda: png(8, 8, after=chunk(b"prIv") * 400_000),
    "PNG, pieces of the data": lambda: png(400, 300, level=0, split=1),
    "PNG, compressed texts": lambda: png(8, 8, before=zipped_text(5_000)),
    "PNG, compressed texts without a name": lambda: png(8, 8, before=zipped_text(5_000, named=False)),
    "PNG, profiles": lambda: png(8, 8, before=chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2**20 - 1), 9)) * 5_000),
    "GIF, comment": lambda: gif_blocks(4_000_000),
    "BMP, ends of rows": lambda: bmp_runs(9_400, 9_400, b"\1\0\0\0" * 4_000_000),
    "PPM, comments between levels": lambda: ppm("P3", 1000, 3000, 255, b"#\n" * 1_000_000),
    "PPM, comment in the header": lambda: b"P6\n" + b"#" * 10_000_000 + b"\n1 1\n255\nabc",
    "PPM, blanks in the header": lambda: b"P6\n" + b" " * 10_000_000 + b"\n1 1\n255\nabc",
    "TIFF, strips": lambda: tiff(1, 500_000, 1, {278: 1, 273: (8,) * 500_000, 279: (3,) * 500_000}, b"abc"),
    "TIFF, tiles": lambda: tiff(
        300_000, 1, 8, {322: 16, 323: 5_000_000, 324: (8,) * 18_750, 325: (20,) * 18_750}, bytes(20)
    ),
    "TIFF, one strip many times": lambda: tiff(
        64, 64 * 2000, 7, {278: 64, 273: (8,) * 2000, 279: (4_000_000,) * 2000}, jpeg() + bytes(4_000_000)
    ),
}
