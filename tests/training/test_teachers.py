"""Teachers in the training loop: what they teach, what they leave alone, and what a resume needs."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from dfine_core import load
from dfine_core.loss.teachers import feature_loss
from pipeline.config import Cluster, ConfigError
from pipeline.tracking.lineage import teacher_lines
from pipeline.training import checkpoint, loop, run_dir
from pipeline.training.dry_run import preview
from pipeline.training.run_description import run_tags
from pipeline.training.step import to_micro_batch, train_step
from pipeline.training.teachers.vision import VisionTeacher, open_vision_folder, teacher_size
from tests.support.processes import one_thread
from tests.support.teachers import detector_folder, results_of_truth, teacher_boxes, tiny_vit
from tests.support.training_runs import SteppedRun, alone, experiment, job, shard_folders

ADAPT = {"share": 0.05, "tolerance": 0.001}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return shard_folders(tmp_path_factory.mktemp("shards"), images=16, val=4)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> dict[str, Any]:
    """All three forms."""
    folder = tmp_path_factory.mktemp("teachers")
    return {
        "features": {"model": tiny_vit(folder / "vit"), "weight": 5, "adapt": ADAPT},
        "detector": {"weights": detector_folder(folder / "detector")},
        "boxes": {"folder": teacher_boxes(data["train"], folder / "boxes")},
    }


class LogitsAndBoxes(nn.Module):
    """A detector as exported: tensors in, tensors out."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        output = self.detector(images)
        return output.logits, output.boxes


def stepped(folder: Path, data: dict[str, str], teacher: dict[str, Any], **sections: Any) -> SteppedRun:
    return SteppedRun.begin(job(experiment(folder, data, teacher=teacher, **sections)))


def frozen(run: SteppedRun) -> dict[str, Tensor]:
    teachers = run.state.teachers
    assert teachers is not None
    networks = {"vision": teachers.vision, "detector": teachers.detector}
    return {
        f"{name}.{key}": tensor.clone()
        for name, network in networks.items()
        if network is not None
        for key, tensor in network.state_dict().items()
    }


def test_every_form_adds_its_terms_and_teachers_never_change(
    tmp_path: Path, data: dict[str, str], teachers: dict[str, Any]
) -> None:
    run = stepped(tmp_path, data, teachers)
    before = frozen(run)
    batches = run.stream()
    results = [run.step(batches) for _ in range(3)]
    named = dict(zip(results[0].names, results[0].terms.tolist(), strict=True))
    taught = {name.removeprefix("loss_teacher_") for name in named if name.startswith("loss_teacher_")}
    assert taught == {"features", "map", "edges", "vfl", "bbox", "giou", "fgl"}
    assert all(math.isfinite(value) and value > 0 for name, value in named.items() if "teacher" in name)
    assert all(bool(result.finite) for result in results)
    after = frozen(run)
    assert len(before) > 100
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    state = run.state.teachers
    assert state is not None
    for network in (state.vision, state.detector):
        assert network is not None
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())


def test_without_a_teacher_nothing_is_built_or_read(tmp_path: Path, data: dict[str, str]) -> None:
    run = stepped(tmp_path, data, {})
    assert run.state.teachers is None
    batch = next(run.stream())
    assert batch.teacher_scores.numel() == 0
    assert sum(batch.counts) > 0


def test_columns_of_a_teacher_change_neither_images_nor_true_boxes(
    tmp_path: Path, data: dict[str, str], teachers: dict[str, Any]
) -> None:
    """Every augmentation but copy-paste takes part; the teacher has found every true box, so both travel alike."""
    augment = {"mosaic_probability": 0.5, "mixup_probability": 0.5}
    plain = stepped(tmp_path / "a", data, {}, augment=augment).stream()
    taught = stepped(tmp_path / "b", data, {"boxes": teachers["boxes"]}, augment=augment).stream()
    boxes = 0
    for _ in range(4):
        first, second = next(plain), next(taught)
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.boxes, second.boxes)
        assert first.counts == second.counts == second.teacher_counts
        for true, found in zip(second.targets(), second.teacher_targets(), strict=True):
            order = [true["boxes"].sum(1).argsort(), found["boxes"].sum(1).argsort()]
            torch.testing.assert_close(found["boxes"][order[1]], true["boxes"][order[0]], rtol=0, atol=1e-5)
        torch.testing.assert_close(second.teacher_scores, torch.full_like(second.teacher_scores, 0.8))
        boxes += sum(second.teacher_counts)
    assert boxes > 10


def test_the_student_is_the_same_detector_with_and_without_a_teacher(
    tmp_path: Path, data: dict[str, str], teachers: dict[str, Any]
) -> None:
    """State dict, exported weights and initial values: projectors are not among them."""
    plain, taught = stepped(tmp_path / "a", data, {}), stepped(tmp_path / "b", data, teachers)
    for one, other in (
        (plain.state.detector, taught.state.detector),
        (plain.state.averaged_detector, taught.state.averaged_detector),
    ):
        first, second = one.state_dict(), other.state_dict()
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert checkpoint.weights_as_bytes(one) == checkpoint.weights_as_bytes(other)
    images = torch.rand(1, 3, 64, 64)
    graphs = [
        str(torch.export.export(LogitsAndBoxes(run.state.averaged_detector).eval(), (images,)).graph)
        for run in (plain, taught)
    ]
    assert graphs[0] == graphs[1]


@pytest.mark.slow  # traced twice
@pytest.mark.timeout(1800)
def test_an_onnx_file_is_the_same_to_the_byte_with_and_without_teachers(
    tmp_path: Path, data: dict[str, str], teachers: dict[str, Any]
) -> None:
    pytest.importorskip("onnxscript")
    from pipeline.export.onnx_files import write_onnx  # here: it needs the extra `export`
    from pipeline.export.source import ExportSource

    files = []
    for name, given in (("plain", {}), ("taught", teachers)):
        run = stepped(tmp_path / name, data, given, model={"num_layers": 1})
        run.checkpoints.save(run.state)
        run.checkpoints.wait()
        loaded = replace(load(tmp_path / name / "runs" / "run", "cpu"), origin="the same")
        write_onnx(ExportSource(loaded), tmp_path / f"{name}.onnx")
        files.append((tmp_path / f"{name}.onnx").read_bytes())
    assert len(files[0]) > 1_000_000
    assert files[0] == files[1]


def test_the_feature_loss_falls_and_reaches_backbone_and_encoder_alone(
    tmp_path: Path, data: dict[str, str], teachers: dict[str, Any]
) -> None:
    run = stepped(tmp_path, data, {"features": {"model": teachers["features"]["model"], "weight": 1}})
    state, micro_batch = run.state, to_micro_batch(next(run.stream()), run.state, size=(64, 64), seed=0)
    assert state.teachers is not None
    assert state.teachers.vision is not None
    losses = []
    for _ in range(12):
        state.optimizer.zero_grad(set_to_none=True)
        output = state.model(micro_batch.images, micro_batch.targets, micro_batch.denoising or False)
        state.teachers.begin_step([micro_batch], 1)
        (loss,) = state.teachers.terms(micro_batch, output).values()
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(float(loss.detach()))
        reached = {name.split(".")[0] for name, p in state.named_parameters().items() if p.grad is not None}
        assert reached == {"backbone", "encoder", "teachers"}
        state.optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("side", range(480, 801, 32))
@pytest.mark.parametrize("patch_size", [14, 16])
def test_a_teachers_patches_lie_as_the_students_positions(side: int, patch_size: int) -> None:
    for height, width in ((side, side), (side, 480), (320, side)):
        seen = teacher_size(height, width, patch_size)
        assert (seen[0] // patch_size, seen[1] // patch_size) == (height // 32, width // 32)
        assert (seen[0] % patch_size, seen[1] % patch_size) == (0, 0)


@pytest.mark.parametrize("patch_size", [14, 16])
def test_features_of_a_rectangle_are_row_major_and_the_same_in_bf16(tmp_path: Path, patch_size: int) -> None:
    """The image is bright in one 32 px square, whose patch alone differs from the others' in a model without attention."""
    folder = open_vision_folder(tiny_vit(tmp_path / "vit", patch_size))
    exact, half = (VisionTeacher(folder, folder.load(), dtype) for dtype in (torch.float32, torch.bfloat16))
    torch.manual_seed(1)
    images, student = torch.rand(2, 3, 96, 160), torch.randn(2, 32, 3, 5)
    features = exact(images)
    assert features.shape == (2, 32, 3, 5)
    assert abs(float(feature_loss(student, features)) - float(feature_loss(student, half(images)))) < 1e-2
    # One patch at a time: the embedding of a patch is the model's on that patch, whatever its place in the grid.
    change = images.clone()
    change[:, :, 64:96, 32:64] = 1 - change[:, :, 64:96, 32:64]
    difference = (exact(change) - features).norm(dim=1).mean(0)
    assert divmod(int(difference.argmax()), 5) == (2, 1)


def test_a_resumed_run_equals_one_that_was_not_interrupted(
    tmp_path: Path, data: dict[str, str], teachers: dict[str, Any]
) -> None:
    """Four steps an epoch: stopped inside the second one, after the weight was adapted."""
    schedule = {"steps": 8}
    whole = stepped(tmp_path / "a", data, teachers, schedule=schedule)
    whole.losses(8)
    first = stepped(tmp_path / "b", data, teachers, schedule=schedule)
    first.losses(6)
    assert first.state.teachers is not None
    assert first.state.teachers.weight != 5
    first.checkpoints.save(first.state)
    first.checkpoints.wait()
    second = stepped(tmp_path / "b", data, teachers, schedule=schedule)
    assert second.state.step == 6
    second.losses(2)
    states = []
    for run in (whole, second):
        assert run.state.teachers is not None
        moments = {f"{i}.{k}": v for i, m in run.state.optimizer.state_dict()["state"].items() for k, v in m.items()}
        states.append({**run.state.detector.state_dict(), **run.state.teachers.tensors(), **moments})
    assert states[0].keys() == states[1].keys()
    assert [key for key in states[0] if not torch.equal(states[0][key], states[1][key])] == []


def test_a_checkpoint_of_other_teachers_is_refused(
    tmp_path: Path, data: dict[str, str], teachers: dict[str, Any]
) -> None:
    run = stepped(tmp_path, data, {"features": teachers["features"]})
    run.checkpoints.save(run.state)
    run.checkpoints.wait()
    for other in ({}, {"detector": teachers["detector"]}):
        state = loop.new_state(job(experiment(tmp_path / "c", data, teacher=other)), alone())
        with pytest.raises(checkpoint.CheckpointError, match="teachers"):
            checkpoint.restore(state, run.checkpoints.uri(0))


def test_the_share_is_that_of_the_transformer_block_in_all_gradients(
    tmp_path: Path, data: dict[str, str], teachers: dict[str, Any]
) -> None:
    run = stepped(tmp_path, data, {"features": teachers["features"]})
    state = run.state
    assert state.teachers is not None
    train_step(state, [to_micro_batch(next(run.stream()), state, size=(64, 64), seed=0)])
    sums = {name: float(p.grad.abs().sum()) for name, p in state.named_parameters().items() if p.grad is not None}
    inside = sum(value for name, value in sums.items() if name.startswith("encoder.encoder."))
    state.teachers.end_epoch(clean=False)
    assert state.teachers.share == pytest.approx(inside / sum(sums.values()), rel=1e-4)
    assert 0 < state.teachers.share < 1
    state.teachers.end_epoch(clean=True)
    assert state.teachers.weight == 5


def one_of_two(rank: int, folder: str, data: dict[str, str], teachers: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    setting = experiment(Path(folder), data, teacher=teachers, schedule={"micro_batch_size": 2})
    run = SteppedRun.begin(job(setting, workers=2), alone(rank=rank, world_size=2))
    losses = run.losses(5)
    assert run.state.teachers is not None
    saved = {"losses": losses, "weight": run.state.teachers.weight, **run.state.teachers.tensors()}
    torch.save(
        {key: value.detach() if isinstance(value, Tensor) else value for key, value in saved.items()},
        f"{folder}/rank-{rank}.pt",
    )
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_equal_one_and_agree_on_the_adapted_weight(
    tmp_path: Path, data: dict[str, str], teachers: dict[str, Any]
) -> None:
    mp.spawn(one_of_two, args=(str(tmp_path), data, teachers), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    assert first["weight"] == second["weight"] != 5
    assert first["losses"] == second["losses"]
    assert all(torch.equal(first[name], second[name]) for name in first if name.startswith("teachers.features"))
    setting = experiment(tmp_path, data, name="alone", teacher=teachers, schedule={"micro_batch_size": 2})
    run = SteppedRun.begin(job(setting))
    with one_thread():
        losses = run.losses(5)
    assert first["losses"] == pytest.approx(losses, rel=1e-4)
    assert run.state.teachers is not None
    assert run.state.teachers.weight == pytest.approx(first["weight"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["features", "detector", "boxes"])
def test_a_whole_run_with_each_teacher_evaluates_and_logs(
    tmp_path: Path, data: dict[str, str], teachers: dict[str, Any], form: str
) -> None:
    setting = experiment(tmp_path, data, teacher={form: teachers[form]}, evaluation={"every_steps": 4})
    result = loop.train(job(setting), alone())
    assert result["step"] == 6
    assert "AP" in result["numbers"]
    (newest,) = checkpoint.steps_in(str(tmp_path / "runs/run/checkpoints"))[-1:]
    metadata = checkpoint.read_metadata(f"{tmp_path}/runs/run/checkpoints/{checkpoint.step_folder(newest)}")
    assert metadata.data.keys() == {"train", "val", f"teacher.{form}"}


# Before the start


def problem(tmp_path: Path, data: dict[str, str], teacher: dict[str, Any], **sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        job(experiment(tmp_path, data, teacher=teacher, **sections))
    return str(caught.value)


def test_a_folder_without_a_vision_model_is_refused_before_the_start(tmp_path: Path, data: dict[str, str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no config.json" in problem(tmp_path, data, {"features": {"model": str(empty)}})
    (empty / "config.json").write_text('{"model_type": "dinov2"}')
    (empty / "pytorch_model.bin").write_bytes(b"")
    assert "no safetensors" in problem(tmp_path, data, {"features": {"model": str(empty)}})
    (empty / "model.safetensors").write_bytes(b"")
    (empty / "config.json").write_text('{"model_type": "bert"}')
    assert "no vision model with patch tokens" in problem(tmp_path, data, {"features": {"model": str(empty)}})


def test_a_vision_model_without_its_weights_is_refused(tmp_path: Path) -> None:
    path = Path(tiny_vit(tmp_path / "vit"))
    (path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        open_vision_folder(str(path)).load()


def test_a_detector_with_other_bins_or_classes_teaches_its_map_alone(tmp_path: Path, data: dict[str, str]) -> None:
    weights = detector_folder(tmp_path / "other", names=["one", "two"], reg_scale=8.0)
    text = problem(tmp_path, data, {"detector": {"weights": weights}})
    assert "reg_scale is 8 there and 4 here" in text
    assert "set model.reg_scale: 8" in text
    assert "its 2 classes are not the" in text
    found = job(experiment(tmp_path, data, teacher={"detector": {"weights": weights, "edge_weight": 0}})).data
    assert len(found.teachers["teacher.detector"]) == 64
    assert "no detector" in problem(tmp_path, data, {"detector": {"weights": str(tmp_path)}})


def test_boxes_of_another_shard_set_and_pasted_objects_are_refused(
    tmp_path: Path, data: dict[str, str], teachers: dict[str, Any]
) -> None:
    assert "there is none" in problem(tmp_path, data, {"boxes": {"folder": str(tmp_path)}})
    other = {"train": data["val"], "val": data["val"]}
    assert "belong to the shard set" in problem(tmp_path, other, {"boxes": teachers["boxes"]})
    pasted = problem(tmp_path, data, {"boxes": teachers["boxes"]}, augment={"copy_paste_probability": 0.5})
    assert "copy_paste_probability" in pasted


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"features": {"model": "/x", "weight": -1}}, "must not be negative"),
        ({"features": {"model": "/x", "adapt": {"share": 2, "tolerance": 0.1}}}, "must lie between 0 and 1"),
        ({"detector": {"weights": "/x", "map_weight": 0, "edge_weight": 0}}, "leave teacher.detector out"),
        ({"feature": {"model": "/x"}}, "feature"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, data: dict[str, str], teacher: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        experiment(tmp_path, data, teacher=teacher)


def test_a_dry_run_prints_what_each_teacher_costs(
    tmp_path: Path, data: dict[str, str], teachers: dict[str, Any]
) -> None:
    text = preview(experiment(tmp_path, data, teacher=teachers), Cluster(), measured=False)
    section = text.partition("# teachers\n")[2].partition("\n\n")[0]
    assert [line.partition(":")[0] for line in section.splitlines()] == [
        *("teacher.features", "  counted", "teacher.detector", "  counted", "teacher.boxes", "  counted")
    ]
    assert "GFLOP forward an image" in section
    assert f"{len(results_of_truth(data['train'])) / 16:.1f} boxes an image, 16 of 16 images" in section


def test_the_lineage_names_every_teacher_with_its_digest(
    tmp_path: Path, data: dict[str, str], teachers: dict[str, Any]
) -> None:
    made = job(experiment(tmp_path, data, teacher=teachers))
    tags = run_tags(made, {})
    lines = teacher_lines(tags)
    assert [line.partition(",")[0] for line in lines] == ["teacher: boxes", "teacher: detector", "teacher: features"]
    assert all(f"digest {digest[:12]}" in "\n".join(lines) for digest in made.data.teachers.values())
    assert teacher_lines(run_tags(job(experiment(tmp_path, data)), {})) == []


def test_a_run_does_not_continue_with_a_teacher_of_other_content(
    tmp_path: Path, data: dict[str, str], teachers: dict[str, Any]
) -> None:
    boxes = {"boxes": teachers["boxes"]}
    other = {"boxes": {"folder": teacher_boxes(data["train"], tmp_path / "other", score=0.5)}}
    first, second = (job(experiment(tmp_path, data, teacher=teacher)) for teacher in (boxes, other))
    begin = partial(run_dir.begin_or_continue, first.run, tracking_key="key", allow_changes=False)
    begin(first.experiment, first.data)
    begin(first.experiment, first.data)
    with pytest.raises(ConfigError, match=r"teacher\.boxes: other data, digest"):
        begin(second.experiment, second.data)
