"""Parts of a detector by readable names, from the image to the head: they can be frozen, and have a depth."""

from collections.abc import Iterable

BACKBONE = ("backbone.stem", "backbone.stage1", "backbone.stage2", "backbone.stage3", "backbone.stage4")
PARTS = (*BACKBONE, "encoder", "decoder")
NAMES = ("backbone", *PARTS)  # `backbone` stands for all of its parts
DEPTH = {part: depth for depth, part in enumerate(reversed(PARTS))}  # from the head: 0 for the decoder, 6 for the stem


def part_of(name: str) -> str:
    """Part of a module or tensor, by its name in the detector; names of other modules keep their first word."""
    top, *rest = name.split(".")
    if top != "backbone" or not rest:
        return top
    return "backbone.stem" if rest[0] == "stem" else f"backbone.stage{int(rest[1]) + 1}" if len(rest) > 1 else top


def parts_named(names: Iterable[str]) -> tuple[str, ...]:
    """Parts that the names stand for, each once, from the image to the head.

    Raises:
        ValueError: a name is unknown.
    """
    given = list(names)
    if unknown := [name for name in given if name not in NAMES]:
        raise ValueError(f"unknown part {', '.join(map(repr, unknown))}; known: {', '.join(NAMES)}")
    return tuple(part for part in PARTS if part in given or (part in BACKBONE and "backbone" in given))
