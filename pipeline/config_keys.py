"""Base of all config models, and messages about keys that they do not know."""

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

# Keys that had another name before the first release.
RENAMED_KEYS = {
    "beside": "asynchronous",
    "clean_epochs": "no_aug_epochs",
    "clip_norm": "max_grad_norm",
    "final_factor": "min_lr_ratio",
    "global_batch": "global_batch_size",
    "groups": "param_groups",
    "in_a_row": "max_consecutive",
    "micro_batch": "micro_batch_size",
    "mixup_weight": "mixup_ratio",
    "multiscale_repeat": "base_size_repeat",
    "not_finite": "non_finite",
    "pictures": "num_images",
    "reference_batch": "base_batch_size",
    "register_as": "registered_model_name",
    "saved": "max_saved",
    "silent_s": "heartbeat_timeout_s",
    "together": "max_concurrent_trials",
}

# Keys that have no successor, and what to do without them.
REMOVED_KEYS = {
    "copy_paste_max_covered": "pasted objects are blended, so covered ones keep their boxes; leave it out",
    "copy_paste_object_probability": "give the number of objects, copy_paste_objects",
    "mosaic_centre": "the four images of a mosaic fill equal cells; its map is given by mosaic_rotation, mosaic_translation and"
    " mosaic_scale",
}


class Config(BaseModel):
    """Base of all config models: frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def unknown_key(key: object, known: Sequence[str]) -> str:
    """Message about an unknown key: its new name or the way without it, otherwise the known keys that resemble it."""
    if key in RENAMED_KEYS and RENAMED_KEYS[str(key)] in known:
        return f"unknown key {key!r}; it is called {RENAMED_KEYS[str(key)]}"
    if key in REMOVED_KEYS:
        return f"unknown key {key!r}; {REMOVED_KEYS[str(key)]}"
    close = difflib.get_close_matches(str(key), known, n=3)
    return f"unknown key {key!r}; " + (f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}")


def key_prefix(location: Sequence[Any]) -> str:
    """Prefix of an error message: the location as a dotted key; empty for the whole file."""
    return ".".join(map(str, location)) + ": " if location else ""


def plain_message(text: str) -> str:
    """Pydantic's message without the prefix that it adds to messages of validators."""
    return text.removeprefix("Value error, ")
