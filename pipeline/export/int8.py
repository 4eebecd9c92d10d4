"""Post-training quantisation to 8-bit integers, as all runtimes share it: which nodes, and which blocks stay in float.

Backbone and encoder are quantised block by block. The decoder, its heads and distributions, and the postprocessing stay in
float: their numbers are coordinates and logits, and in integers they cost most of the AP. If AP falls by more than the limit,
every block is judged alone in float, and blocks are put back to float, worst first, until AP holds.
"""

import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dfine_core.agreement import INT8
from pipeline.evaluation.coco_metrics import coco_numbers
from pipeline.evaluation.detections import concatenate
from pipeline.export.check_images import Calibration
from pipeline.export.isolated import IsolatedProgram
from pipeline.export.onnx_files import module_names
from pipeline.export.openings import DetectFunction, detect_function, table
from pipeline.export.source import ExportNote, ExportSource
from pipeline.progress import Progress
from pipeline.wording import plural

if TYPE_CHECKING:
    from onnx import NodeProto

KEPT_CALIBRATION = "its calibrated scores were fitted to the detector in float, and not to these integers"
BLOCK = re.compile(r"detector\.((?:backbone|encoder)(?:\.[a-z_]+)?(?:\.\d+)?)")


@dataclass(frozen=True)
class Attempt:
    """Quantised detector with its AP."""

    in_float: tuple[str, ...]  # blocks, in the order in which they were put back
    ap: float


@dataclass(frozen=True)
class BlockSearch:
    """All attempts, the last of which holds the limit."""

    attempts: tuple[Attempt, ...]
    alone: Mapping[str, float]  # AP with this block alone in float; empty if none had to be

    @property
    def in_float(self) -> frozenset[str]:
        """Blocks that stay in float."""
        return frozenset(self.attempts[-1].in_float)


def block_of(node: "NodeProto") -> str | None:
    """Block of a node of backbone or encoder, such as `backbone.stages.1`; None for nodes that stay in float."""
    found = BLOCK.match(module_names(node)[-1])
    return found[1] if found else None


def search_blocks(blocks: Sequence[str], ap_of: Callable[[frozenset[str]], float], least: float) -> BlockSearch:
    """Put blocks back to float, worst first, until AP is at least `least`.

    Args:
        ap_of: AP of the detector that has these blocks in float, and the others quantised.

    Raises:
        ValueError: AP holds with no block quantised at all.
    """
    attempts = [Attempt((), ap_of(frozenset()))]
    alone: dict[str, float] = {}
    if attempts[-1].ap < least:
        alone = {block: ap_of(frozenset({block})) for block in blocks}
        worst_first = sorted(blocks, key=lambda block: -alone[block])
        for number in range(1, len(blocks)):
            kept = tuple(worst_first[:number])
            attempts.append(Attempt(kept, alone[kept[0]] if number == 1 else ap_of(frozenset(kept))))
            if attempts[-1].ap >= least:
                break
    if attempts[-1].ap < least:
        raise ValueError(
            f"AP stays at {attempts[-1].ap:.4f}, below {least:.4f}, with any block quantised: this detector needs float"
        )
    return BlockSearch(tuple(attempts), alone)


def write_quantised(
    source: ExportSource,
    name: str,
    blocks: Iterable[str],
    write: Callable[[Path, frozenset[str]], None],
    path: Path,
    *,
    opener: str,
    opened: str = ".",
) -> None:
    """Write a format with as many quantised blocks as AP allows, and note what each step cost.

    Args:
        name: of the format.
        write: writes the file at a path, with these blocks in float.
        opener: of the runtime; see `dfine_core.runtimes.files`.
        opened: file below the written path that it opens.

    Raises:
        ValueError: there are no calibration images, or AP never holds.
    """
    calibration = calibration_of(source)
    names = sorted(set(blocks))
    most = 2 * len(names)  # attempts: nothing in float, each block alone, and one block more at a time
    with tempfile.TemporaryDirectory() as folder, Progress(name, total=most, unit="attempt", delay=2.0) as progress:

        def ap_of(in_float: frozenset[str]) -> float:
            attempt = Path(tempfile.mkdtemp(dir=folder)) / path.name
            write(attempt, in_float)
            with IsolatedProgram(opener, attempt / opened) as program:
                ap = judged_ap(detect_function(program), calibration, source.model.config.input_size)
            progress.advance(1, f"AP {ap:.4f} with {plural(len(in_float), 'block')} in float")
            return ap

        before: float = source.once("judged AP", lambda: _float_ap(source, calibration))
        found = search_blocks(names, ap_of, before - INT8.ap)
    write(path, found.in_float)
    fitted = source.model.calibration is not None
    source.notes[name] = _note(found, before, calibration, names, float_calibration=fitted)


def calibration_of(source: ExportSource) -> Calibration:
    """Calibration images of the export.

    Raises:
        ValueError: it has none.
    """
    if source.calibration is None:
        raise ValueError("integers need images to measure their ranges: name a shard set by --calibrate or --check")
    return source.calibration


def judged_ap(detect: DetectFunction, calibration: Calibration, input_size: tuple[int, int]) -> float:
    """AP on the images of the calibration that are judged."""
    batches = calibration.judged.batches(input_size)
    tables = [table(detect(batch.pixels, batch.sizes), batch) for batch in batches]
    ground_truth = calibration.judged.ground_truth
    assert ground_truth is not None
    return coco_numbers(ground_truth, concatenate(tables)).numbers["AP"]


def _float_ap(source: ExportSource, calibration: Calibration) -> float:
    return judged_ap(source.model.detect, calibration, source.model.config.input_size)


def _note(
    found: BlockSearch, before: float, calibration: Calibration, blocks: Sequence[str], *, float_calibration: bool
) -> ExportNote:
    attempts = [{"in_float": list(one.in_float), "AP": one.ap, "AP_change": one.ap - before} for one in found.attempts]
    facts = {
        "ranges_measured_on": calibration.ranges.description,
        "judged_on": calibration.judged.description,
        "AP_in_float": before,
        "blocks": list(blocks),
        "attempts": attempts,
        "AP_with_one_block_in_float": dict(found.alone),
    }
    lines = tuple(
        f"{plural(len(blocks) - len(one.in_float), 'block')} quantised: AP {one.ap:.4f}, {100 * (one.ap - before):+.2f} points"
        f" against float{'; in float: ' + ', '.join(one.in_float) if one.in_float else ''}"
        for one in found.attempts
    )
    if float_calibration:
        facts["calibration"] = KEPT_CALIBRATION
        lines = (*lines, KEPT_CALIBRATION)
    return ExportNote({"quantisation": facts}, lines)
