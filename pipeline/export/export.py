"""Export a detector: write every format to a staging folder, pass it through the gate, then move it into place.

OUT/detector.onnx, OUT/huggingface/, ...   accepted files
OUT/refused/...                            files that did not pass the gate, for inspection
OUT/export.json                            every verdict with its measurements
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dfine_core.inference import LoadedDetector
from pipeline import provenance, storage
from pipeline.config import ConfigError
from pipeline.errors import DISK_FAULTS
from pipeline.export.check_images import Calibration, CheckSet
from pipeline.export.formats import FORMATS
from pipeline.export.gate import GateVerdict, RowVerdict, Timing, check_files
from pipeline.export.source import ExportNote, ExportSource
from pipeline.output_folder import refuse_foreign_folder, shown

REPORT_FILE, REFUSED_FOLDER = "export.json", "refused"
WRITTEN = "written"  # key of the report: files of this and earlier exports
ARRIVING = "arriving"  # the same for files that are being moved into place; an export that is killed there leaves it
STAGING = ".export-"
VERSIONS = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "transformers", "safetensors", "numpy")

NO_NOTE = ExportNote({})
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FormatResult:
    """Result of one format."""

    verdict: GateVerdict
    path: Path | None  # accepted or not; None if it could not be written
    files: tuple[tuple[str, int, str], ...]  # name below OUT, bytes, SHA-256
    seconds: float  # time to write it; tracing counts for the first of ONNX and torch.export

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(size for _, size, _ in self.files)

    @property
    def tag(self) -> str:
        """Verdict as the value of an MLflow tag."""
        if self.verdict.accepted:
            return f"accepted: {', '.join(f'{name} sha256:{digest}' for name, _, digest in self.files)}"
        return f"refused: {self.verdict.reason}"


@dataclass(frozen=True)
class ExportResult:
    """Results of all formats of one export."""

    source: ExportSource
    check_set: CheckSet
    results: tuple[FormatResult, ...]

    @property
    def accepted(self) -> bool:
        """True if every format passed."""
        return all(result.verdict.accepted for result in self.results)

    def as_json(self) -> dict[str, Any]:
        """Content of `export.json`."""
        return {
            **self.source.description,
            "commit": provenance.code_commit(),
            "checked_on": self.check_set.description,
            "versions": provenance.versions(VERSIONS),
            "formats": {result.verdict.format: _entry(result, self.source) for result in self.results},
        }

    def table(self) -> str:
        """Line per format, for the console."""
        lines = []
        for result in self.results:
            lines.append(_line(result))
            lines += [f"  {line}" for line in self.source.notes.get(result.verdict.format, NO_NOTE).lines]
        return "\n".join(lines)


def export(
    model: LoadedDetector,
    formats: Sequence[str],
    out: Path,
    check_set: CheckSet,
    *,
    batch_size: int | None = None,
    timing: Timing | None = None,
    calibration: Calibration | None = None,
) -> ExportResult:
    """Write, check and move into place every format.

    Args:
        model: on the CPU, before `deploy()`, at the input size of the export.
        batch_size: the only one that exported programs accept; None: any.
        timing: measures latencies; None: none.
        calibration: images for formats of integers, which are refused without.

    Raises:
        ConfigError: something in `out` would be replaced that no export has written.
    """
    refuse_foreign_files(out, formats)

    # 1. Write every format to a staging folder. A failure refuses this format alone.
    source = ExportSource(model, batch_size, calibration)
    with _staging(out) as staging:
        written = {name: _write(source, name, staging) for name in formats}
        files = {name: staging / FORMATS[name].file for name, (problem, _) in written.items() if problem is None}

        # 2. Compare all written files with the detector, in one pass over the images.
        verdicts = check_files(model, files, check_set, timing)

        results = tuple(
            _result(
                name, staging, out, verdicts.get(name) or GateVerdict(name, FORMATS[name].tolerance, problem), seconds
            )
            for name, (problem, seconds) in written.items()
        )

        # 3. Only now anything changes in `out`: files replace those of an earlier export. They are announced, so that another
        # export knows them for its own, if this one is killed among them.
        new = {file: digest for done in results for file, _, digest in done.files}
        report = _report(out)
        _write_report(out, {**report, WRITTEN: report.get(WRITTEN, {}), ARRIVING: new})
        for done in results:
            _move_into_place(done, staging, out)
    result = ExportResult(source, check_set, results)
    kept = {file: digest for file, digest in report.get(WRITTEN, {}).items() if (out / file).is_file()}
    _write_report(out, {**result.as_json(), WRITTEN: kept | new})
    return result


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """Make a folder for files that are not in their place, and remove those of exports that were killed.

    An export locks its folder; the lock ends with its process.
    """
    for left in out.glob(f"{STAGING}*"):
        descriptor = os.open(left, os.O_RDONLY)
        with suppress(OSError):  # its export lives, or the file system has no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
        os.close(descriptor)
    staging = out / f"{STAGING}{uuid.uuid4().hex}"
    staging.mkdir(parents=True)
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield staging
    finally:
        shutil.rmtree(staging)
        os.close(descriptor)


def refuse_foreign_files(out: Path, formats: Sequence[str]) -> None:
    """Check that an export replaces nothing but files of an earlier export, as that one wrote them.

    Raises:
        ConfigError: names the files that would be lost.
    """
    refuse_foreign_folder(str(out), REPORT_FILE, "export")
    report = _report(out)
    written = [*report.get(WRITTEN, {}).items(), *report.get(ARRIVING, {}).items()]
    replaced = [out / folder / FORMATS[name].file for name in formats for folder in (".", REFUSED_FOLDER)]
    files = [path for target in replaced for path in ([target] if target.is_file() else target.rglob("*"))]
    changed = [
        str(path.relative_to(out))
        for path in files
        if path.is_file() and (str(path.relative_to(out)), _sha256(path)) not in written
    ]
    if changed:
        raise ConfigError(
            f"{out}: {shown(changed)} would be replaced, and no export has written it as it is:"
            " move it away, or choose another --out"
        )


def _report(out: Path) -> dict[str, Any]:
    """Report of the last export into a folder; empty if there was none."""
    if not (out / REPORT_FILE).exists():
        return {}
    report: dict[str, Any] = storage.read_json(out / REPORT_FILE, WRITTEN)
    return report


def _write_report(out: Path, content: dict[str, Any]) -> None:
    storage.write_atomic(out / REPORT_FILE, json.dumps(content, indent=1).encode())


def _write(source: ExportSource, name: str, staging: Path) -> tuple[str | None, float]:
    """Write one format. Returns the reason if that failed, and the seconds spent."""
    started_at = time.perf_counter()
    try:
        with storage.named_in_errors(str(staging.parent / FORMATS[name].file)):
            FORMATS[name].write(source, staging / FORMATS[name].file)
        problem = None
    except ImportError as error:
        extra = FORMATS[name].extra
        problem = f"cannot be written: {error}" + (f"; pip install 'ray-dfine[{extra}]'" if extra else "")
    except ValueError as error:
        problem = f"cannot be written: {error}"
    except Exception as error:  # each exporter has its own error types
        if isinstance(error, OSError) and error.errno in DISK_FAULTS:
            raise
        log.exception("writing %s failed", name)
        problem = f"cannot be written: {type(error).__name__}: {error}"
    return problem, time.perf_counter() - started_at


def _result(name: str, staging: Path, out: Path, verdict: GateVerdict, seconds: float) -> FormatResult:
    """Result of a format whose file is still in the staging folder; it belongs into `out`, or below `refused/`."""
    file = FORMATS[name].file
    staged = staging / file
    if not staged.exists():
        return FormatResult(verdict, None, (), seconds)
    target = out / file if verdict.accepted else out / REFUSED_FOLDER / file
    paths = sorted(path for path in staged.rglob("*") if path.is_file()) if staged.is_dir() else [staged]
    files = tuple(
        (str((target / path.relative_to(staged)).relative_to(out)), path.stat().st_size, _sha256(path))
        for path in paths
    )
    return FormatResult(verdict, target, files, seconds)


def _move_into_place(result: FormatResult, staging: Path, out: Path) -> None:
    """Delete the files that an earlier export has written in this format, and move the new one to its place."""
    file = FORMATS[result.verdict.format].file
    for old in (out / file, out / REFUSED_FOLDER / file):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    if result.path is not None:
        result.path.parent.mkdir(exist_ok=True)
        (staging / file).rename(result.path)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _entry(result: FormatResult, source: ExportSource) -> dict[str, Any]:
    verdict = result.verdict
    note = source.notes.get(verdict.format, NO_NOTE)
    return {
        "accepted": verdict.accepted,
        "reason": verdict.reason,
        "tolerance": asdict(verdict.tolerance),
        "measured": verdict.measured,
        "openings": [opening_entry(row) for row in verdict.rows],
        "files": [{"file": name, "bytes": size, "sha256": digest} for name, size, digest in result.files],
        "seconds": round(result.seconds, 2),
        **note.facts,
    }


def opening_entry(row: RowVerdict) -> dict[str, Any]:
    """One opening of a file, for a report."""
    return {
        "runtime": row.runtime,
        "precision": row.opening.precision,
        "decides": row.opening.decides,
        "accepted": row.accepted,
        "reason": row.reason,
        "measured": row.measured,
    }


def _line(result: FormatResult) -> str:
    verdict = result.verdict
    if not verdict.accepted:
        return f"{verdict.format:<14} REFUSED: {verdict.reason}"
    first = f"{verdict.format:<14} {result.bytes / 1e6:7.1f} MB  {result.path}"
    return "\n".join([first, *(f"  {row_line(row)}" for row in verdict.rows)])


def row_line(row: RowVerdict) -> str:
    """One opening of a file, for the console."""
    measured = row.measured
    name = f"{row.runtime}, {row.opening.precision}"
    if not row.accepted:
        way_out = f"; {row.opening.way_out}" if row.opening.way_out else ""
        return f"{name}: REFUSED: {row.reason}{way_out}"
    ap = (
        f", AP {measured['AP_exported']:.4f} (PyTorch {measured['AP_pytorch']:.4f})"
        if "AP_exported" in measured
        else ""
    )
    speed = (
        f", {measured['ms_p50']:.1f} ms (p99 {measured['ms_p99']:.1f}) of one image with {measured['threads']:.0f} threads,"
        f" PyTorch {measured['ms_pytorch_p50']:.1f} ms"
        if "ms_p50" in measured
        else ""
    )
    return (
        f"{name}: {measured['agreeing']:.1%} of {measured['detections']:.0f} detections agree, score within"
        f" {measured['score_largest_agreeing']:.1e}, box within {measured['box_largest_agreeing']:.1e} of the image"
        f" side{ap}{speed}"
    )
