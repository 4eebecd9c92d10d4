"""Checks of the teachers before a start: they exist, fit the student and its data, and are identified by a digest."""

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

from dfine_core.config import ModelConfig
from pipeline.config import ConfigError, Experiment
from pipeline.data.shards.teacher_boxes import load_teacher_boxes
from pipeline.data.shards.training_set import TrainingSet
from pipeline.errors import UserError
from pipeline.teacher_settings import DetectorTeacher
from pipeline.training.context import ResolvedData
from pipeline.training.init_weights import TEACHER, copied_or_given, default_server, materialize_init
from pipeline.training.multiscale import multiscale_sides

BINS = ("reg_max", "up", "reg_scale")


def with_teachers(
    experiment: Experiment, data: ResolvedData, run: str | None = None, tracking_uri: str | None = None
) -> ResolvedData:
    """Check the teachers of an experiment, and add their digests and boxes to its data.

    Args:
        run: folder of the run, which may have its copy of the detector already.
        tracking_uri: server of a detector in MLflow, unless the environment names one.

    Raises:
        ConfigError: a teacher is missing or does not fit; names every problem.
    """
    if not experiment.teacher.in_use:
        return data
    problems: list[str] = []
    digests: dict[str, str] = {}
    train = data.train
    student = experiment.model.config(len(train.categories), experiment.loss)
    settings = experiment.teacher
    try:
        if settings.features is not None:
            from pipeline.training.teachers.vision import open_vision_folder  # here: Transformers takes seconds

            digests["teacher.features"] = open_vision_folder(settings.features.model).digest()
    except UserError as error:
        problems.append(f"{error}")
    try:
        if settings.detector is not None:
            from pipeline.open_detector import open_detector  # here: few runs have one
            from pipeline.training.checkpoint import weights_as_bytes

            source = settings.detector.weights
            source = copied_or_given(source, run, TEACHER) if run else source
            with default_server(tracking_uri) if tracking_uri else nullcontext():
                loaded = open_detector(source)
            digests["teacher.detector"] = hashlib.sha256(weights_as_bytes(loaded.detector)).hexdigest()
            problems += _edge_problems(settings.detector, loaded.config, list(loaded.names), student, train.names)
            problems += _size_problems(loaded.config, student, experiment.base_size_repeat)
    except UserError as error:
        problems.append(f"teacher.detector.weights: {error}")
    try:
        if settings.boxes is not None:
            train, digests["teacher.boxes"] = _with_boxes(train, settings.boxes.folder)
    except UserError as error:
        problems.append(f"teacher.boxes.folder: {error}")
    if settings.boxes is not None and experiment.augment.copy_paste_probability:
        problems.append(
            "teacher.boxes does not go with augment.copy_paste_probability: objects that are pasted would lack the"
            " teacher's boxes; set it to 0"
        )
    if problems:
        raise ConfigError("\n  ".join(["the teachers do not fit:", *problems]))
    return replace(data, train=train, teachers=digests)


def _with_boxes(train: TrainingSet, folder: str) -> tuple[TrainingSet, str]:
    """The training set with a teacher's boxes, and their digest."""
    (first, *others) = train.sets
    if others:
        raise ConfigError(
            f"{folder}: boxes of a teacher belong to one shard set, and data.train has {len(train.sets)}: images of the others"
            " would count as images in which the teacher found nothing; train on one set, or leave teacher.boxes out"
        )
    boxes = load_teacher_boxes(folder, first.shards.manifest.digest)
    taught = replace(first, shards=replace(first.shards, teacher_boxes=boxes.uri))
    return replace(train, sets=(taught,)), boxes.manifest.digest


def with_copied_teacher(experiment: Experiment, run: str, tracking_uri: str) -> Experiment:
    """Copy a detector of the hub or of MLflow into the run's folder, once, and name the copy in the experiment."""
    detector = experiment.teacher.detector
    if detector is None:
        return experiment
    copied = replace(detector, weights=materialize_init(detector.weights, run, tracking_uri, TEACHER))
    return experiment.model_copy(update={"teacher": replace(experiment.teacher, detector=copied)})


def _size_problems(teacher: ModelConfig, student: ModelConfig, base_size_repeat: int) -> Iterator[str]:
    """Reasons why a detector cannot look at the student's images, the smallest of which count."""
    height, width = student.input_size
    if base_size_repeat:
        height = width = min(multiscale_sides(student, base_size_repeat))
    for problem in teacher.size_problems(height, width):
        yield f"teacher.detector: images of {height} x {width} do not suit it: {problem}"


def _edge_problems(
    settings: DetectorTeacher, teacher: ModelConfig, theirs: list[str], student: ModelConfig, names: list[str]
) -> Iterator[str]:
    """Reasons why edges cannot be learned from a detector."""
    if not settings.edge_weight:
        return
    without = "or teacher.detector.edge_weight: 0 to learn from its map alone"
    if "direct" in (teacher.regression, student.regression):
        yield f"teacher.detector: both need model.regression fdr, whose edges are distributions, {without}"
    if wrong := [key for key in BINS if getattr(teacher, key) != getattr(student, key)]:
        listed = ", ".join(
            f"{key} is {getattr(teacher, key):g} there and {getattr(student, key):g} here" for key in wrong
        )
        wanted = ", ".join(f"model.{key}: {getattr(teacher, key):g}" for key in wrong)
        yield f"teacher.detector: its edges are distributions over other bins ({listed}): set {wanted}, {without}"
    if theirs != names:
        yield (
            f"teacher.detector: its {len(theirs)} classes are not the {len(names)} of data.train in this order: train it on"
            f" the same classes, {without}"
        )
