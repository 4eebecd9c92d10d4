"""An export from beginning to end: written aside, put through the gate, and only then placed under its name.

OUT/detector.onnx, OUT/huggingface/, ...   accepted
OUT/refused/...                            what did not pass, for whoever wants to know why
OUT/export.json                            every verdict with its numbers
"""

import hashlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dfine_core.inference import LoadedDetector
from pipeline import provenance, storage
from pipeline.export.check_images import CheckSet
from pipeline.export.formats import FORMATS, Source
from pipeline.export.gate import TOLERANCES, Verdict, judge_files

REPORT, REFUSED = "export.json", "refused"
VERSIONS = ("torch", "onnx", "onnxscript", "onnxruntime", "transformers", "safetensors", "numpy")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """One format's outcome."""

    verdict: Verdict
    path: Path | None  # where it lies, accepted or not; None: it could not be written
    files: tuple[tuple[str, int, str], ...]  # name below OUT, bytes, SHA-256
    seconds: float  # to write it, which for the first of ONNX and torch.export includes tracing

    @property
    def bytes(self) -> int:
        return sum(size for _, size, _ in self.files)

    @property
    def in_words(self) -> str:
        """The verdict as a tag."""
        if self.verdict.accepted:
            return f"accepted: {', '.join(f'{name} sha256:{digest}' for name, _, digest in self.files)}"
        return f"refused: {self.verdict.reason}"


@dataclass(frozen=True)
class Export:
    source: Source
    checked: CheckSet
    results: tuple[Exported, ...]

    @property
    def accepted(self) -> bool:
        return all(result.verdict.accepted for result in self.results)

    def as_json(self) -> dict[str, Any]:
        return {
            **self.source.description,
            "commit": provenance.code_commit(),
            "checked_on": self.checked.what,
            "versions": provenance.versions(VERSIONS),
            "formats": {result.verdict.format: _entry(result) for result in self.results},
        }

    def table(self) -> str:
        return "\n".join(_line(result) for result in self.results)


def export(model: LoadedDetector, formats: Sequence[str], out: Path, checked: CheckSet) -> Export:
    """Write, judge and place every format; see the module.

    Args:
        model: on the CPU, before `deploy()`, at the input size of the export.
    """
    source = Source(model)
    staging = out / f".export-{uuid.uuid4().hex}"
    staging.mkdir(parents=True)
    try:
        written = {name: _write(source, name, staging) for name in formats}
        files = {name: staging / FORMATS[name].file for name, (problem, _) in written.items() if problem is None}
        verdicts = judge_files(model, files, checked)
        results = tuple(
            _placed(name, staging, out, verdicts.get(name) or Verdict(name, TOLERANCES[name], problem), seconds)
            for name, (problem, seconds) in written.items()
        )
    finally:
        shutil.rmtree(staging)
    done = Export(source, checked, results)
    storage.write_atomic(out / REPORT, json.dumps(done.as_json(), indent=1).encode())
    return done


def _write(source: Source, name: str, staging: Path) -> tuple[str | None, float]:
    """Why it cannot be written, and the seconds that it took."""
    started_at = time.perf_counter()
    try:
        FORMATS[name].write(source, staging / FORMATS[name].file)
        problem = None
    except ImportError as error:
        problem = f"cannot be written: {error}; install the extra: pip install 'ray-dfine[export]'"
    except ValueError as error:
        problem = f"cannot be written: {error}"
    except Exception as error:  # each exporter raises errors of its own
        log.exception("writing %s failed", name)
        problem = f"cannot be written: {type(error).__name__}: {error}"
    return problem, time.perf_counter() - started_at


def _placed(name: str, staging: Path, out: Path, verdict: Verdict, seconds: float) -> Exported:
    """Under its name if accepted; what an earlier export left under either name goes."""
    file = FORMATS[name].file
    for old in (out / file, out / REFUSED / file):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    if not (staging / file).exists():
        return Exported(verdict, None, (), seconds)
    target = out / file if verdict.accepted else out / REFUSED / file
    target.parent.mkdir(exist_ok=True)
    (staging / file).rename(target)
    parts = sorted(target.rglob("*")) if target.is_dir() else [target]
    files = tuple((str(part.relative_to(out)), part.stat().st_size, _sha256(part)) for part in parts if part.is_file())
    return Exported(verdict, target, files, seconds)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _entry(result: Exported) -> dict[str, Any]:
    verdict = result.verdict
    return {
        "accepted": verdict.accepted,
        "reason": verdict.reason,
        "tolerance": asdict(verdict.tolerance),
        "measured": verdict.measured,
        "files": [{"file": name, "bytes": size, "sha256": digest} for name, size, digest in result.files],
        "seconds": round(result.seconds, 2),
    }


def _line(result: Exported) -> str:
    verdict, measured = result.verdict, result.verdict.measured
    if not verdict.accepted:
        return f"{verdict.format:<13} REFUSED: {verdict.reason}"
    ap = f", AP {measured['AP_exported']:.4f} of {measured['AP_pytorch']:.4f}" if "AP_exported" in measured else ""
    return (
        f"{verdict.format:<13} {result.bytes / 1e6:7.1f} MB  {result.path}: {measured['agreeing']:.1%} of"
        f" {measured['detections']:.0f} detections agree, score within {measured['score_largest_agreeing']:.1e},"
        f" box within {measured['box_largest_agreeing']:.1e} of the side{ap}"
    )
