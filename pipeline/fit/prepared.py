"""The data of `dfine fit`: a folder of any recognised layout to shard sets that the doctor has passed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import storage
from pipeline.data.doctor.examine import DoctorReport, examine
from pipeline.data.doctor.findings import SEVERITIES
from pipeline.data.doctor.html_report import doctor_page, doctor_text
from pipeline.data.prepare.prepare import prepare, read_rejected, reasons
from pipeline.data.prepare.shard_writer import PrepareOptions
from pipeline.data.prepare.split_off import SplitOff, split_off
from pipeline.data.shards.manifest import ShardSet
from pipeline.data.sources.detect import find_source
from pipeline.data.sources.index import DatasetSource
from pipeline.errors import UserError
from pipeline.wording import plural

SHARDS, DOCTOR_PAGE = "shards", "doctor.html"
TRAIN, VAL = "train", "val"
DEFAULT_SPLIT = f"{VAL}=0.2"
SHOWN_FINDINGS = SEVERITIES[:2]  # errors and warnings; the page has the notes, too


class FitError(UserError, ValueError):
    """Data that cannot be trained on as it is, or a folder that holds something else."""


@dataclass(frozen=True)
class PreparedData:
    """Two shard sets, and what the doctor says about them."""

    train: ShardSet
    val: ShardSet
    report: DoctorReport


@dataclass(frozen=True)
class FoundSplits:
    """Splits of a data set that a fit uses."""

    sources: dict[str, DatasetSource]  # train; and val, unless it is split off
    to_split_off: SplitOff | None  # share of train to validate on

    def parts(self, seed: int) -> dict[str, DatasetSource]:
        """What to train and to validate on."""
        if self.to_split_off is None:
            return self.sources
        rest, taken = split_off(self.sources[TRAIN], self.to_split_off, split=TRAIN, seed=seed)
        return {TRAIN: rest, VAL: taken}


def find_splits(folder: Path, split: str | None) -> FoundSplits:
    """Recognise the data set in a folder, and find what to train and to validate on.

    Args:
        split: NAME=SHARE to split off, although there may be a validation split.

    Raises:
        UserError: the folder holds no data set that is recognised, or none to train on.
    """
    part = SplitOff.parse(split or DEFAULT_SPLIT)
    if part.name != VAL:
        raise FitError(f"--split-off {split}: the part to validate on is called {VAL}, as in {DEFAULT_SPLIT}")
    found = find_source(folder)
    names = list(found.splits)
    print(f"{folder} is {found.text}; splits: {', '.join(names)}", flush=True)
    train, val = _named(names, TRAIN), _named(names, VAL)
    if train is None:
        raise FitError(f"no split is called {TRAIN} (there are {', '.join(names)}): use dfine prepare and dfine train")
    if left_out := [name for name in names if name != train and (name != val or split)]:
        print(f"{', '.join(left_out)}: left alone, for a last evaluation by dfine evaluate", flush=True)
    if val is not None and split is None:
        return FoundSplits({TRAIN: found.splits[train](), VAL: found.splits[val]()}, None)
    print(f"{part.share:.0%} of the images of {train} are split off to validate on", flush=True)
    return FoundSplits({TRAIN: found.splits[train]()}, part)


def _named(names: Sequence[str], use: str) -> str | None:
    """The split for a use, which may have a year in its name: `train2017`; None if there is none or several."""
    if use in names:
        return use
    found = [name for name in names if re.fullmatch(rf"{use}\d+", name)]
    return found[0] if len(found) == 1 else None


def prepare_parts(sources: Mapping[str, DatasetSource], out: str, *, seed: int) -> PreparedData:
    """Prepare the parts, and let the doctor look at them; Ray must be running.

    Args:
        out: folder for shards and the doctor's page.

    Raises:
        UserError: an image set cannot be prepared, or the doctor found errors.
    """
    # 1. Shards.
    sets = {}
    for name, source in sources.items():
        sets[name] = prepare(source, storage.join(out, SHARDS, name), split=name, options=PrepareOptions(seed=seed))
        manifest, rejected = sets[name].manifest, read_rejected(sets[name])
        left_out = f"; rejected: {reasons(rejected)}, see rejected.parquet" if rejected else ""
        images, boxes = plural(manifest.images, "image"), plural(manifest.boxes, "box")
        print(f"{name}: {images}, {boxes} of {plural(len(manifest.categories), 'class')}{left_out}", flush=True)

    # 2. The doctor.
    train, val = sets[TRAIN], sets[VAL]
    report = examine([train, val])
    page = storage.join(out, DOCTOR_PAGE)
    storage.write_atomic(page, doctor_page(report, [train, val]).encode())
    shown = report.model_copy(update={"splits": (), "findings": _to_show(report)})
    print(f"{doctor_text(shown)}; see {page}", flush=True)
    if report.count("error"):
        storage.remove_folder(storage.join(out, SHARDS))  # they would hide that the source was repaired
        raise FitError(
            f"{plural(report.count('error'), 'kind')} of errors in the data, see {page}: repair them, and give the"
            " same command again"
        )
    return PreparedData(train, val, report)


def _to_show(report: DoctorReport) -> tuple[object, ...]:
    return tuple(finding for finding in report.findings if finding.severity in SHOWN_FINDINGS)
