"""Mutated image files of every accepted format, and a process that reads thousands of them within bounds.

python -m tests.support.fuzzed_images SEED COUNT
"""

import io
import json
import random
import resource
import sys
import time
import warnings
import zlib
from collections import Counter

import numpy as np
import PIL.Image

from tests.support.image_bombs import bmp_runs

ADDRESS_SPACE = 3 * 2**30  # bytes; beyond it the process gets MemoryErrors
CPU_S = 20  # per file, after which the system ends the process


def valid_images() -> dict[str, bytes]:
    """Small valid files of all formats, in their variants."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    colour = PIL.Image.fromarray(pixels)
    exif = PIL.Image.Exif()
    exif[0x0112], exif[270] = 6, "x" * 40
    grey16 = PIL.Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    variants: list[tuple[str, PIL.Image.Image, str, dict[str, object]]] = [
        ("jpeg", colour, "JPEG", {"exif": exif, "comment": b"abc"}),
        ("jpeg progressive", colour, "JPEG", {"progressive": True, "quality": 95}),
        ("jpeg restarts", colour, "JPEG", {"restart_marker_blocks": 1}),
        ("jpeg cmyk", colour.convert("CMYK"), "JPEG", {}),
        ("mpo", colour, "MPO", {"save_all": True, "append_images": [colour]}),
        ("png", colour, "PNG", {"exif": exif}),
        ("png palette", colour.quantize(16), "PNG", {"transparency": 1}),
        ("png 16 bit", grey16, "PNG", {}),
        ("png animated", colour, "PNG", {"save_all": True, "append_images": [colour.rotate(90), colour.rotate(180)]}),
        ("gif", colour, "GIF", {"comment": b"abc", "save_all": True, "append_images": [colour.rotate(90)]}),
        ("webp", colour, "WEBP", {"exif": exif}),
        ("webp lossless", colour.convert("RGBA"), "WEBP", {"lossless": True}),
        ("webp animated", colour, "WEBP", {"save_all": True, "append_images": [colour.rotate(90)]}),
        ("bmp", colour, "BMP", {}),
        ("bmp palette", colour.quantize(200), "BMP", {}),
        ("tiff", colour, "TIFF", {}),
        *((f"tiff {name}", colour, "TIFF", {"compression": name}) for name in TIFF_COMPRESSIONS),
        ("tiff group4", colour.convert("1"), "TIFF", {"compression": "group4"}),
        ("ppm", colour, "PPM", {}),
        ("pgm 16 bit", grey16.convert("I"), "PPM", {}),
        ("pbm", colour.convert("1"), "PPM", {}),
    ]
    files = {name: _encoded(image, kind, options) for name, image, kind, options in variants}
    files["ppm text"] = b"P3\n4 2\n200\n" + b"10 20 199 # comment\n" * 8
    files["ppm levels"] = b"P6\n4 2\n200\n" + bytes(range(24))
    files["bmp runs"] = bmp_runs(4, 2, b"\4\1\0\0\0\3abc\0\1\2\0\0")
    return files


TIFF_COMPRESSIONS = ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "lzma", "zstd")


def mutated(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Content with a few mutations: changed bytes and numbers, missing, repeated and foreign parts."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        size = len(data)
        if size < 4:
            break
        at = rng.randrange(size) if rng.random() < 0.5 else rng.randrange(min(size, 64))  # headers first
        kind = rng.randrange(8)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind in (2, 3):  # a length, an offset or a count
            width = rng.choice((2, 4))
            number = rng.choice((0, 1, 8, 255, 65_535, 2**31 - 1, 2 ** (8 * width) - 1, rng.getrandbits(8 * width)))
            number %= 2 ** (8 * width)
            data[at : at + width] = number.to_bytes(width, rng.choice(("big", "little")))
        elif kind == 4:
            del data[at:]
        elif kind == 5:
            del data[at : at + rng.randrange(1, 40)]
        elif kind == 6:
            data[at:at] = bytes(data[at : at + rng.randrange(1, 60)]) * rng.choice((1, 2, 50, 1000))
        else:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            data[at : at + rng.randrange(60)] = other[start : start + rng.randrange(1, 200)]
    return bytes(data)


def with_checksums(png: bytes) -> bytes:
    """PNG whose chunks have the right checksums, so that readers look at what was changed in them."""
    repaired, at = bytearray(png), 8
    while at + 12 <= len(repaired):
        end = at + 8 + int.from_bytes(repaired[at : at + 4], "big")
        if end + 4 > len(repaired):
            break
        repaired[end : end + 4] = zlib.crc32(repaired[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(repaired)


def _encoded(image: PIL.Image.Image, kind: str, options: dict[str, object]) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def main() -> None:
    """Read mutated files and print the outcomes; any exception but the project's own ends the process."""
    from dfine_core.images import ImageError, read_image

    seed, count = map(int, sys.argv[1:])
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    files = valid_images()
    for name, content in files.items():
        assert min(read_image(content).size) > 0, name
    names, others, rng = list(files), list(files.values()), random.Random(seed)
    outcomes: Counter[str] = Counter()
    slowest, largest = (0.0, ""), 0
    for number in range(count):
        name = names[number % len(names)]
        content = mutated(files[name], others, rng)
        if name.startswith("png") and rng.random() < 0.7:
            content = with_checksums(content)
        before = time.process_time()
        resource.setrlimit(resource.RLIMIT_CPU, (int(before) + CPU_S, resource.RLIM_INFINITY))
        try:
            outcomes[f"{name}: read"] += min(read_image(content).size) > 0
        except ImageError:
            outcomes[f"{name}: refused"] += 1
        slowest = max(slowest, (time.process_time() - before, name))
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"outcomes": outcomes, "slowest": slowest, "largest_kib": largest}))


if __name__ == "__main__":
    main()
