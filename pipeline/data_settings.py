"""Settings of a training's data: one shard set or several, and the way they are read."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, PositiveInt, ValidationError, field_validator

from pipeline.config_keys import Config, key_prefix, plain_message, unknown_key
from pipeline.data.stream.settings import DecodeIn
from pipeline.ray_job import absolute_location
from pipeline.teacher_settings import Location

MAX_WEIGHT = 100  # largest weight of a set
MAX_SETS = 100  # in one training


class TrainShards(Config):
    """One of several shard sets of a training."""

    shards: Location
    weight: Annotated[float, Field(gt=0, le=MAX_WEIGHT)] = 1.0  # how often each image appears in an epoch, on average
    # New names of classes that the training calls otherwise.
    classes: dict[str, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)


class Data(Config):
    """Shard sets and the way they are read."""

    # Manifest, or its folder; a path or a URI. Or several: [{shards: a, weight: 2}, {shards: b, classes: {car: vehicle}}].
    train: Location | tuple[TrainShards, ...]
    # Images with a class that fewer than this share of the images have appear more often; null: every image as often as its set
    repeat_factor_threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    val: Location | None = None  # without it a run only trains
    decode_in: DecodeIn = "task"
    prefetch: PositiveInt = 2  # micro-batches that each worker keeps ready
    window_rows: PositiveInt | None = (
        None  # rows that are shuffled together; default: 2,048, or 128 per micro-batch of a step
    )

    @field_validator("train", mode="wrap")  # pydantic would list the problems of both forms of a union
    @classmethod
    def _one_set_or_several(cls, value: Any, _: object) -> str | tuple[TrainShards, ...]:
        if isinstance(value, str):
            return absolute_location(value)
        if not isinstance(value, list | tuple) or not 0 < len(value) <= MAX_SETS:
            raise ValueError(
                f"give a shard set, or a list of 1 to {MAX_SETS}: [{{shards: FOLDER, weight: 2}}, {{shards: OTHER_FOLDER}}]"
            )
        sets = tuple(_checked_sets(value))
        (first, *others) = sets
        return first.shards if not others and first.weight == 1 and not first.classes else sets

    @property
    def train_sets(self) -> tuple[TrainShards, ...]:
        """The training's sets, also where it has one."""
        return (TrainShards(shards=self.train),) if isinstance(self.train, str) else self.train


def _checked_sets(values: Sequence[Any]) -> Sequence[TrainShards]:
    """Sets of a training from plain values.

    Raises:
        ValueError: names every problem.
    """
    sets, problems = list[TrainShards](), list[str]()
    for number, value in enumerate(values, start=1):
        try:
            sets.append(TrainShards.model_validate(value))
        except ValidationError as error:
            problems += [f"set {number}: {_set_problem(e)}" for e in error.errors()]
    places = [each.shards for each in sets]
    problems += [
        f"{place} is listed twice: give it a larger weight"
        for place in dict.fromkeys(places)
        if places.count(place) > 1
    ]
    if problems:
        raise ValueError("; ".join(problems))
    return sets


def _set_problem(error: Any) -> str:
    if not error["loc"]:
        return f"{error['input']!r} is no set: write {{shards: FOLDER}}, with weight or classes where they differ"
    if error["type"] == "extra_forbidden":
        return unknown_key(error["loc"][-1], tuple(TrainShards.model_fields))
    given = "" if error["type"] == "missing" else f" (it is {error['input']!r})"
    return f"{key_prefix(error['loc'])}{plain_message(error['msg'])}{given}"
