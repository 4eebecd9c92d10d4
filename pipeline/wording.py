"""Counts with their nouns, as messages and reports print them."""


def plural(number: int, noun: str) -> str:
    """Number and noun: `1 class`, `2 classes`, `1,204 images`; an adjective may come before the noun."""
    if number == 1:
        return f"1 {noun}"
    if noun.endswith(("s", "x", "sh", "ch")) and not noun.endswith("epoch"):  # whose ch is a k
        return f"{number:,} {noun}es"
    return f"{number:,} {noun}s"
