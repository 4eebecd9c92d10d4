"""What to try next after a training: rules over measured facts, each with the numbers behind it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.run_report.results import RunResults
from pipeline.wording import plural

LITTLE = 0.05  # AP of a detector that has hardly learned
LEAST_EVALUATIONS = 3  # from which a trend is read
RISING = 0.01  # gain of AP over the last third of the evaluations that speaks for a longer run
FALLEN = 0.02  # loss of AP since its best that speaks for a shorter one
COSTLY = 0.05  # AP50 that an error costs before it is worth an advice
SMALL_SHARE = 0.5  # AP of small objects, of that of large ones
FULL_SIDE = 640
FEW_BOXES, FEW_IMAGES = 50, 50
SHOWN_CLASSES = 5

# What to do about an error, by its type.
REMEDIES = {
    "classification": "Objects are found and named wrongly: look at the confusion matrix, and at the labels of the pairs in it.",
    "localisation": "Boxes lie too loosely: check that labels are tight, train longer, or raise model.input_size.",
    "both": "Boxes lie beside objects of another class: look at the worst images below.",
    "duplicate": "Objects are found twice: higher thresholds help, a longer training as well.",
    "background": "Detections lie where nothing is labelled: look for objects without labels in the worst images, and add images"
    " without objects.",
    "missed": "Objects are not found: label more images that look like those, or raise model.input_size if they are small.",
}


@dataclass(frozen=True)
class Advice:
    """A next step, and why."""

    step: str
    reason: str


def advice_for(results: RunResults) -> list[Advice]:
    """Every rule that applies, the most useful first."""
    return [
        *_length(results),
        *_start(results),
        *_errors(results),
        *_sizes(results),
        *_classes(results),
        *_data(results),
    ]


def _length(results: RunResults) -> Iterator[Advice]:
    curve = [ap for _, ap in results.metadata.history.evaluated if math.isfinite(ap)]
    if not results.finished:
        yield Advice("Let the training finish: the same command goes on.", f"it is at step {results.metadata.step:,}")
        return
    third, ap = max(1, len(curve) // 3), results.report.numbers["AP"]
    gain = max(curve[-third:]) - max(curve[:-third]) if len(curve) >= LEAST_EVALUATIONS else 0.0
    if gain >= RISING:
        yield Advice(
            "Train longer: more schedule.epochs.", f"AP rose by {gain:.3f} over the last {plural(third, 'evaluation')}"
        )
    elif ap < LITTLE:
        yield Advice(
            "Look at labels and boxes in the doctor's page (dfine doctor SHARDS --html), then train longer.",
            f"little was learned: AP is {ap:.3f} after {results.metadata.step:,} steps",
        )
    elif len(curve) >= LEAST_EVALUATIONS and max(curve) - curve[-1] >= FALLEN:
        at = curve.index(max(curve)) + 1
        yield Advice(
            "Train shorter, or on more images.",
            f"AP was best after evaluation {at} of {len(curve)} ({max(curve):.3f}), and fell to {curve[-1]:.3f}",
        )


def _start(results: RunResults) -> Iterator[Advice]:
    if not results.metadata.parent:
        variant = (results.experiment.get("model") or {}).get("variant", "s")
        name = "dfine-n-coco" if variant == "n" else f"dfine-{variant}-obj365"
        yield Advice(f"Start from published weights: --set init={name}.", "this run started from random weights")


def _errors(results: RunResults) -> Iterator[Advice]:
    errors = results.report.errors
    for name, gain in sorted(errors.gain.items(), key=lambda pair: -pair[1])[:2]:
        if gain >= COSTLY:
            yield Advice(REMEDIES[name], f"{name} errors cost {gain:.3f} of AP50 ({errors.count[name]:,} of them)")


def _sizes(results: RunResults) -> Iterator[Advice]:
    numbers, side = results.report.numbers, max(results.loaded.config.input_size)
    small, large = numbers["AP_small"], numbers["AP_large"]
    if large >= LITTLE and small < SMALL_SHARE * large and side < FULL_SIDE:  # not where one is NaN
        yield Advice(
            f"Raise model.input_size, now {side} px.",
            f"AP is {small:.3f} for small objects and {large:.3f} for large ones",
        )


def _classes(results: RunResults) -> Iterator[Advice]:
    per_class, points = results.report.per_class, results.report.points
    if results.train_boxes is not None:
        mean = results.report.numbers["AP"]
        rare = [
            (boxes, result)
            for boxes, result in zip(results.train_boxes, per_class, strict=True)
            if boxes < FEW_BOXES and result.ap < mean
        ]
        for boxes, result in sorted(rare, key=lambda row: row[0])[:SHOWN_CLASSES]:
            yield Advice(
                f"Label more objects of {result.name}.",
                f"it has {plural(boxes, 'box')} to learn from, and AP {result.ap:.3f} where the mean is {mean:.3f}",
            )
    out_of_reach = [
        result.name
        for result, point in zip(per_class, points.at_precision, strict=True)
        if point is None and result.boxes
    ]
    if out_of_reach:
        names = ", ".join(out_of_reach[:SHOWN_CLASSES])
        yield Advice(
            f"Do not rely on single detections of {names}.",
            f"no score reaches a precision of {points.wanted_precision:g} on the validation images",
        )


def _data(results: RunResults) -> Iterator[Advice]:
    if (images := results.report.images) < FEW_IMAGES:
        yield Advice("Label more validation images.", f"AP over {plural(images, 'image')} varies widely by chance")
