"""Facts that the choices of `dfine fit` rest on: this machine, and the prepared data."""

from dataclasses import dataclass

import numpy as np
import psutil
import torch

from dfine_core.cpu import available_cores
from pipeline.data.doctor.examine import DoctorReport
from pipeline.data.doctor.row_checks import SIDE_EDGES

REFERENCE_SIDE = 640  # px; the doctor counts box sides at this size


@dataclass(frozen=True)
class Machine:
    """Hardware of this machine."""

    gpu: str | None  # name of the first one; None without any
    gpus: int
    gpu_gib: float  # memory of the smallest GPU
    cores: int
    memory_gib: float

    def __str__(self) -> str:
        if self.gpu is None:
            return f"{self.cores} CPU cores, no GPU"
        return f"{self.gpus} x {self.gpu} with {self.gpu_gib:.0f} GiB"


@dataclass(frozen=True)
class DataFacts:
    """Size and difficulty of the prepared data."""

    images: int  # to train on
    val_images: int
    classes: int
    boxes_per_image: float
    most_boxes: int  # in one image
    small_side: float  # px at 640 x 640 that nine tenths of the boxes reach; 640 without boxes


def this_machine() -> Machine:
    """Look at the hardware."""
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return Machine(
        gpu=gpus[0].name if gpus else None,
        gpus=len(gpus),
        gpu_gib=min((gpu.total_memory for gpu in gpus), default=0) / 2**30,
        cores=available_cores(),
        memory_gib=psutil.virtual_memory().total / 2**30,
    )


def data_facts(report: DoctorReport) -> DataFacts:
    """Read the facts from the doctor's report on training and validation data, in this order."""
    train, val = report.splits
    counted = train.statistics
    sides = np.array(train.scaled_sides).cumsum()
    small = (
        float(SIDE_EDGES[int(np.searchsorted(sides, 0.1 * sides[-1], side="right"))]) if sides[-1] else REFERENCE_SIDE
    )
    return DataFacts(
        images=train.images,
        val_images=val.images,
        classes=len(train.categories),
        boxes_per_image=counted.boxes_per_image.mean if counted else 0.0,
        most_boxes=counted.boxes_per_image.max if counted else 0,
        small_side=small,
    )
