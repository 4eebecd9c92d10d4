"""Report of one evaluation: as metrics, as a table for the console, as files."""

import csv
import io
import json
import math
import os
from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.figure import Figure

from pipeline import storage
from pipeline.evaluation import figures
from pipeline.evaluation.analysis import Confusion, Curves
from pipeline.evaluation.coco_metrics import EQUAL, ClassResult, Evaluator
from pipeline.evaluation.decoder_layers import EDGE_NUMBERS, by_layer
from pipeline.evaluation.error_types import Errors
from pipeline.evaluation.figures import format_number
from pipeline.evaluation.operating_points import POINT_FIELDS, OperatingPoints
from pipeline.mlflow_access import ACCURACY, FINAL, VAL
from pipeline.wording import plural

LOWEST_CLASSES = 5  # classes in the console table
THRESHOLD_CLASSES = 10  # likewise
REPORT = "report.json"
HEADLINES = ("AP", "AP50", "AP75")  # the first charts of a run in MLflow


@dataclass(frozen=True)
class EvaluationReport:
    """Results of one evaluation. A value that needs true boxes is NaN where there are none."""

    numbers: dict[str, float]  # COCO's twelve
    per_class: tuple[ClassResult, ...]  # by label
    points: OperatingPoints
    curves: Curves
    confusion: Confusion
    errors: Errors
    layers: dict[str, float]  # "layers/iou_initial", ..., and of the edges of found objects "edges/coverage_90", ...
    images: int
    seconds: dict[str, float]  # by part: data, model, evaluator, analysis, and pycocotools where it ran
    evaluator: Evaluator  # program that computed `numbers`
    agreement: float | None  # largest difference between the programs, where both ran
    agreement_images: int | None  # number of images that both evaluated

    @property
    def boxes(self) -> int:
        """Number of true boxes, without crowd regions."""
        return sum(result.boxes for result in self.per_class)

    @property
    def headline_numbers(self) -> dict[str, float]:
        """COCO's twelve and those of the edges' uncertainty, which a sweep can search for."""
        return self.numbers | {name: self.layers[name] for name in EDGE_NUMBERS if name in self.layers}

    @property
    def mean_f1(self) -> float:
        """Mean of the best F1 over the classes with true boxes, 0 for one that is never found; NaN without true boxes."""
        pairs = zip(self.per_class, self.points.best_f1, strict=True)
        known = [0.0 if point is None else point.f1 for result, point in pairs if result.boxes]
        return sum(known) / len(known) if known else math.nan

    def metrics(self, *, final: bool = False) -> dict[str, float]:
        """Metrics by their names in MLflow, without values that are NaN: "accuracy/AP", "val/AR_100", "val/layers/iou_0".

        Args:
            final: of the best weights at the end of a training; all in "val/final/".
        """
        details = {
            **self.layers,
            **{f"errors/{name}": gain for name, gain in self.errors.gain.items()},
            **{f"seconds/{name}": seconds for name, seconds in self.seconds.items()},
        }
        details["best_F1"] = self.mean_f1
        if self.agreement is not None:
            details["evaluators_differ_by"] = self.agreement
        groups = {name: FINAL if final else ACCURACY if name in HEADLINES else VAL for name in self.numbers}
        values = {f"{groups[name]}/{name}": value for name, value in self.numbers.items()}
        values |= {f"{FINAL if final else VAL}/{name}": value for name, value in details.items()}
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def table(self) -> str:
        """Summary of a few lines for the console."""
        n = {name: format_number(value) for name, value in self.numbers.items()}
        times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        lines = [
            f"{plural(self.images, 'image')}, {plural(self.boxes, 'box')}, scored by {self.evaluator} ({times})",
            f"  AP      {n['AP']}   AP50  {n['AP50']}   AP75   {n['AP75']}"
            f"   small {n['AP_small']}  medium {n['AP_medium']}  large {n['AP_large']}",
            f"  AR@100  {n['AR_100']}   AR@1  {n['AR_1']}   AR@10  {n['AR_10']}"
            f"   small {n['AR_small']}  medium {n['AR_medium']}  large {n['AR_large']}",
            "  AP50 lost to  " + "  ".join(f"{name} {format_number(gain)}" for name, gain in self.errors.gain.items()),
        ]
        for name, title in (("iou", "IoU"), ("entropy_share", "entropy / log N")):
            values = by_layer(self.layers, name)
            if values:
                lines.append(f"  {title} by layer  " + "  ".join(f"{k} {format_number(v)}" for k, v in values.items()))
        if math.isfinite(self.layers.get(EDGE_NUMBERS[0], math.nan)):
            half, most, score, away = (self.layers[name] for name in EDGE_NUMBERS)
            lines.append(
                f"  edges of found objects: {100 * half:.0f} % in their 50 % intervals, {100 * most:.0f} % in those of 90 %,"
                f" widths off by {100 * away:.0f} %, interval score {format_number(score)}"
            )
        worst = sorted((c for c in self.per_class if not math.isnan(c.ap)), key=lambda c: c.ap)[:LOWEST_CLASSES]
        if len(self.per_class) > 1 and worst:
            lines.append(
                "  lowest AP  " + ", ".join(f"{c.name} {format_number(c.ap)} ({plural(c.boxes, 'box')})" for c in worst)
            )
        lines += self._threshold_lines()
        if self.agreement is not None:
            verdict = "agree" if self.agreement <= EQUAL else "DISAGREE: see the log"
            of = "" if self.agreement_images == self.images else f" on a sample of {self.agreement_images:,} images"
            lines.append(f"  hotcoco and pycocotools {verdict}{of}, largest difference {self.agreement:.1g}")
        return "\n".join(lines)

    def _threshold_lines(self) -> list[str]:
        """Thresholds of the classes with the most boxes."""
        wanted = self.points.wanted_precision
        known = [
            (result, best, precise)
            for result, best, precise in zip(self.per_class, self.points.best_f1, self.points.at_precision, strict=True)
            if best is not None
        ]
        if not known:
            return []
        shown = sorted(known, key=lambda row: -row[0].boxes)[:THRESHOLD_CLASSES]
        more = f", {len(shown)} of {len(known)} classes" if len(shown) < len(known) else ""
        lines = [f"  thresholds (best F1; precision {wanted:g}){more}"]
        for result, best, precise in shown:
            at = "none" if precise is None else f"{precise.score:.2f} with recall {precise.recall:.2f}"
            lines.append(
                f"    {result.name}: {best.score:.2f} with precision {best.precision:.2f}, recall {best.recall:.2f},"
                f" F1 {best.f1:.2f}; {at}"
            )
        return lines

    def figures(self) -> dict[str, Figure]:
        """Figures by name, without those that would be empty."""
        names = [result.name for result in self.per_class]
        rendered = {
            "precision_recall": figures.precision_recall_figure(self.curves, names),
            "per_class": figures.per_class_figure(self.per_class),
            "confusion": figures.confusion_figure(self.confusion, names),
            "errors": figures.errors_figure(self.errors),
        }
        if any(math.isfinite(value) for value in self.layers.values()):
            rendered["layers"] = figures.layers_figure(self.layers)
        return rendered

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write report.json, per_class.csv and the figures to a local folder or an object store."""
        storage.write_atomic(storage.join(folder, REPORT), json.dumps(self.as_json(), indent=1).encode())
        storage.write_atomic(storage.join(folder, "per_class.csv"), self.per_class_csv().encode())
        for name, figure in self.figures().items():
            storage.write_atomic(storage.join(folder, f"{name}.png"), figures.png(figure))

    def as_json(self) -> dict[str, Any]:
        """All results as plain values; null for NaN."""
        plain = {**asdict(self), "boxes": self.boxes}
        return {name: _plain(value) for name, value in plain.items()}

    def per_class_csv(self) -> str:
        """AP and thresholds per class as CSV; empty for NaN and where there is no threshold."""
        lines = io.StringIO()
        writer = csv.writer(lines, lineterminator="\n")
        columns = self.class_columns()
        writer.writerow(columns)
        for row in zip(*columns.values(), strict=True):
            writer.writerow([_csv_text(value) for value in row])
        return lines.getvalue()

    def class_columns(self) -> dict[str, list[Any]]:
        """Table of the classes by column; NaN where there is no value."""
        columns: dict[str, list[Any]] = {
            "category_id": [result.original_id for result in self.per_class],
            "name": [result.name for result in self.per_class],
            "boxes": [result.boxes for result in self.per_class],
            "AP": [result.ap for result in self.per_class],
            "AP50": [result.ap50 for result in self.per_class],
        }
        kinds = {
            "best_F1": self.points.best_f1,
            f"precision_{self.points.wanted_precision:g}": self.points.at_precision,
        }
        for kind, points in kinds.items():
            for name in POINT_FIELDS:
                columns[f"{kind}_{name}"] = [math.nan if each is None else getattr(each, name) for each in points]
        return columns


def _csv_text(value: float | str) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6f}"
    return f"{value}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
