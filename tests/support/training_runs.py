"""Small real runs for tests: drawn shards, D-FINE-N on pictures of 64 px, in this process and without Ray."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.config import Experiment
from pipeline.config_files import check
from pipeline.training.context import Job
from pipeline.training.group import Group
from tests.support.drawn_shards import drawn_records, write_shards


@dataclass
class Heard:
    """A console that keeps what it is told."""

    said: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def beat(self, step: int, doing: str) -> None:
        pass

    def say(self, text: str) -> None:
        self.said.append(text)

    def progress(self, step: int, note: str) -> None:
        self.steps.append(step)

    def about(self, part: str) -> list[str]:
        return [text for text in self.said if part in text]


def shard_folders(folder: Path, *, images: int = 24, val: int = 6) -> dict[str, str]:
    return {
        "train": write_shards(folder / "train", drawn_records(images, longest_side=64)).uri,
        "val": write_shards(folder / "val", drawn_records(val, longest_side=64, seed=1)).uri,
    }


def experiment(folder: Path, data: dict[str, str], **sections: Any) -> Experiment:
    content: dict[str, Any] = {
        "name": "run",
        "storage": str(folder / "runs"),
        "data": {**data, "decode_in": "inline"},
        "model": {"variant": "n", "input_size": [64, 64], "num_queries": 20, "num_denoising": 10},
        "schedule": {"steps": 6, "global_batch": 4, "clean_epochs": 0},
        "evaluation": {"pictures": 0, "every_steps": 1000},
        "tracking": {"every_steps": 1},
    }
    for name, value in sections.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) and name in content else value
    return check(Experiment, content, source="test")


def job(experiment: Experiment, **settings: Any) -> Job:
    run = f"{experiment.storage}/{experiment.name}"
    return Job(**{"experiment": experiment, "run": run, "tracking": None, **settings})


ALONE = Group(rank=0, world_size=1, device=torch.device("cpu"), broadcast=lambda value: value)
