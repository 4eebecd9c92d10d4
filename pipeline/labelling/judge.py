"""Judge the boxes of a shard set by a detector; see `suspects`."""

from dfine_core.inference import LoadedDetector
from pipeline.calibration.measure import measure
from pipeline.data.shards.classes import with_classes_of
from pipeline.data.shards.manifest import ShardSet
from pipeline.data.shards.reader import refuse_changed_files
from pipeline.evaluation.ground_truth import read_ground_truth
from pipeline.labelling.suspects import find_suspects
from pipeline.labelling.suspects_report import LabelReport, trained_on


def judge_labels(loaded: LoadedDetector, shards: ShardSet, *, least: float, batch_size: int) -> LabelReport:
    """Detect in all images, in this process, and list where the boxes differ from what is found.

    Args:
        least: confidence of the suspects that are listed.

    Raises:
        UserError: the classes differ, files are damaged, or the detector regresses boxes directly.
    """
    refuse_changed_files(shards)
    judged = with_classes_of(shards, loaded.names, f"the detector {loaded.origin}")
    truth = read_ground_truth(judged)
    measured = measure(loaded, judged, truth, batch_size=batch_size)
    return LabelReport(
        detector=loaded.origin,
        shards=shards.uri,
        digest=shards.manifest.digest,
        images=len(truth.image_id),
        boxes=len(truth.label),
        calibrated=loaded.calibration is not None,
        memorised=trained_on(loaded.path, shards),
        suspects=tuple(find_suspects(measured, truth, loaded.calibration, least=least)),
    )
