"""Published weights by name, against a server of the hub's API: what is fetched, what is refused, and each way out."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from dfine_core import Detector, ModelConfig
from dfine_core.checkpoints.folder import tensors_to_bytes
from jobs import lineage
from pipeline.config import Cluster, ConfigError
from pipeline.data.sources.synthetic import CLASSES
from pipeline.hub import PretrainedError
from pipeline.open_detector import open_detector
from pipeline.pretrained import describe, fetch, find, is_published, pinned, table, weights_location
from pipeline.training.checkpoint import weights_as_bytes
from pipeline.training.context import resolve_data
from pipeline.training.dry_run import preview
from pipeline.training.init_weights import ORIGIN, load_initial, materialize_init, refuse_unreadable_weights
from pipeline.training.launch import launch
from pipeline.training.teachers.checks import with_copied_teacher, with_teachers
from tests.support.hub_server import COMMIT, Hub, hub_server
from tests.support.training_runs import experiment, shard_folders
from tests.support.varied_detectors import varied_detector

NAME, REPO = "dfine-n-coco", "ustc-community/dfine-nano-coco"
SMALL = ModelConfig.variant("n", num_classes=len(CLASSES), input_size=(128, 128), num_queries=30)
SECONDS = 30  # within which every failure must end on a busy machine


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a repository: the layout of Transformers, written by it."""
    from pipeline.export.huggingface import save_transformers

    folder = tmp_path_factory.mktemp("published")
    save_transformers(SMALL, varied_detector(SMALL, seed=3).state_dict(), CLASSES, folder)
    return folder


@pytest.fixture
def hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Running server, with an empty cache; the variables of huggingface_hub, which reads them when it is imported."""
    with hub_server({REPO: published}) as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            running.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield running


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def refused(source: str = NAME) -> str:
    """Message of a fetch that must fail within seconds."""
    started_at = time.monotonic()
    with pytest.raises(PretrainedError) as caught:
        fetch(source)
    assert time.monotonic() - started_at < SECONDS
    return str(caught.value)


# The table


def test_every_row_names_a_repository_and_what_it_holds() -> None:
    rows = table()
    assert {f"dfine-{variant}-coco" for variant in "nsmlx"} <= rows.keys()
    assert {f"dfine-{variant}-{data}" for variant in "smlx" for data in ("obj365", "obj2coco")} <= rows.keys()
    assert {f"hgnetv2-b{number}" for number in range(7)} <= rows.keys()
    assert "dfine-n-obj365" not in rows
    for name, row in rows.items():
        assert find(name) == row
        assert row.repo.count("/") == 1
        assert row.sha256 is None or len(row.sha256) == 64
        assert row.licence
    assert rows["dfine-x-obj2coco"].ap == 0.593


def test_names_and_repositories_stay_and_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source in ("dfine-s-obj365", "hf://me/mine", "hf://me/mine@v2"):
        assert weights_location(source) == source
        assert is_published(source)
    for source in ("runs/mine", "./dfine-s-obj365", "dfine_s_coco.pth"):
        assert weights_location(source) == os.path.abspath(source)
        assert not is_published(source)
    assert weights_location("s3://bucket/dfine-s-coco") == "s3://bucket/dfine-s-coco"
    (tmp_path / "dfine-mine").mkdir()
    assert weights_location("dfine-mine") == str(tmp_path / "dfine-mine")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("dfine-n-obj365", "'dfine-n-obj365': no published weights of this name.*did you mean dfine-"),
        ("dfine-small-coco", "did you mean dfine-s-coco"),
        ("hf://mine", "write hf://ORGANISATION/NAME"),
        ("hf://me/mine@", "write hf://ORGANISATION/NAME"),
        ("hf://me/mine/file.pth", "write hf://ORGANISATION/NAME"),
    ],
)
def test_a_name_that_nobody_published_is_named_with_its_neighbours(source: str, message: str) -> None:
    with pytest.raises((ValueError, PretrainedError), match=message):
        weights_location(source)


# Fetching


def test_a_name_opens_as_the_published_detector_and_is_fetched_once(hub: Hub) -> None:
    opened = open_detector(NAME)
    expected = varied_detector_weights()
    assert opened.names == CLASSES
    assert opened.origin == f"{NAME} ({REPO}@{COMMIT[:12]})"
    assert all(torch.equal(tensor, expected[key]) for key, tensor in opened.detector.state_dict().items())
    assert hub.requests.count("GET model.safetensors") == 1
    assert open_detector(f"hf://{REPO}@{COMMIT}").config == opened.config
    assert hub.requests.count("GET model.safetensors") == 1


def varied_detector_weights() -> dict[str, torch.Tensor]:
    folder = next(Path(huggingface_hub.constants.HF_HUB_CACHE).rglob("snapshots/*"))
    return dict(open_detector(str(folder)).detector.state_dict())


def test_a_pinned_name_opens_the_same_commit_without_a_request(hub: Hub) -> None:
    source = pinned(NAME)
    assert source == f"hf://{REPO}@{COMMIT}"
    asked = len(hub.requests)
    assert fetch(source).folder == fetch(NAME).folder
    before = hub.requests[asked:]
    assert all(request.startswith("HEAD") for request in before)
    hub.requests.clear()
    fetch(source)
    assert hub.requests == []
    assert pinned("runs/mine") == "runs/mine"


def test_describing_fetches_nothing_and_names_file_size_revision_and_licence(hub: Hub) -> None:
    size = len(hub.files[REPO]["model.safetensors"])
    first, second = describe(NAME)
    assert first.startswith(f"{NAME}: model.safetensors of {REPO}, revision main (commit {COMMIT[:12]})")
    assert first.endswith(f"{size / 1e6:.1f} MB, to be fetched")
    assert "Apache-2.0" in second
    assert not any(request.startswith("GET") for request in hub.requests)
    sha256 = fetch(NAME).sha256
    first, second = describe(NAME)
    assert first.endswith("in the cache")
    assert sha256 in second


def test_a_repository_in_this_projects_own_layout_is_taken(hub: Hub, tmp_path: Path) -> None:
    folder = open_detector(NAME).save(tmp_path / "own")
    hub.files["me/mine"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert open_detector("hf://me/mine").names == CLASSES


def test_a_run_has_its_own_copy_with_hash_and_commit_and_needs_no_hub_again(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(tmp_path / "run")
    refuse_unreadable_weights(NAME, None, run)
    folder = materialize_init(NAME, run, "sqlite:///unused.db")
    assert folder == f"{run}/init"
    origin = load_initial(Detector(SMALL), folder, CLASSES)
    assert origin.parent["repository"] == REPO
    assert origin.parent["revision"] == COMMIT
    assert origin.parent["sha256"] == fetch(NAME).sha256
    assert origin.parent["source"] == f"{NAME} (hf://{REPO}@{COMMIT})"
    assert json.loads(Path(folder, ORIGIN).read_text()) == origin.parent

    hub.status = 500
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    refuse_unreadable_weights(NAME, None, run)
    assert materialize_init(NAME, run, "sqlite:///unused.db") == folder


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's own
def test_a_training_starts_from_a_name_and_its_record_leads_to_the_commit(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    schedule = {"steps": 1, "global_batch_size": 2}
    setting = experiment(tmp_path, shard_folders(tmp_path, images=4, val=2), init=NAME, schedule=schedule)
    plan = preview(setting, Cluster(), measured=False)
    assert f"# initial weights\n{NAME}: model.safetensors of {REPO}, revision main (commit {COMMIT[:12]})" in plan
    assert not any(request.startswith("GET") for request in hub.requests)
    trained = launch(setting)
    assert trained.step == 1
    sha256 = fetch(NAME).sha256
    metadata = json.loads(Path(trained.run, "checkpoints", "step-00000001", "metadata.json").read_text())
    assert metadata["parent"]["revision"] == COMMIT
    assert metadata["parent"]["sha256"] == sha256
    capsys.readouterr()
    lineage.main([trained.run])
    assert f"began with {NAME} (hf://{REPO}@{COMMIT}), sha256 {sha256[:12]}" in capsys.readouterr().out


def test_a_detector_of_the_hub_teaches_as_the_copy_in_the_runs_folder(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    data = shard_folders(tmp_path, images=4, val=2)
    schedule = {"steps": 1, "global_batch_size": 2}
    teacher = {"detector": {"weights": NAME, "edge_weight": 0}}
    small = experiment(tmp_path, data, teacher=teacher, schedule=schedule)
    with pytest.raises(ConfigError, match=r"teacher.detector: images of 64 x 64 .* fewer than num_queries \(30\)"):
        launch(small)
    setting = experiment(tmp_path, data, teacher=teacher, schedule=schedule, model={"input_size": [128, 128]})
    assert f"teacher.detector: {NAME}, " in preview(setting, Cluster(), measured=False)
    trained = launch(setting)
    copy = Path(trained.run, "teacher")
    assert json.loads((copy / ORIGIN).read_text())["revision"] == COMMIT
    metadata = json.loads(Path(trained.run, "checkpoints", "step-00000001", "metadata.json").read_text())
    digest = metadata["data"]["teacher.detector"]
    assert digest == hashlib.sha256(weights_as_bytes(open_detector(str(copy)).detector)).hexdigest()
    # The name stands for other weights now, or for none: the run keeps its copy.
    resolved = resolve_data(setting.data)
    hub.files.clear()
    found = with_teachers(setting, resolved, trained.run, "sqlite:///unused.db")
    assert found.teachers == {"teacher.detector": digest}
    again = with_copied_teacher(setting, trained.run, "sqlite:///unused.db").teacher.detector
    assert again is not None
    assert again.weights == str(copy)


def test_a_backbone_of_timm_is_fetched_and_its_origin_recorded(hub: Hub, tmp_path: Path) -> None:
    weights = {**varied_detector(SMALL).backbone.state_dict(), "head.fc.weight": torch.ones(2, 2)}
    hub.files["timm/hgnetv2_b0.ssld_stage1_in22k_in1k"] = {
        "config.json": b'{"architecture": "hgnetv2_b0"}',
        "model.safetensors": tensors_to_bytes(weights),
    }
    folder = materialize_init("hgnetv2-b0", str(tmp_path / "run"), "sqlite:///unused.db")
    detector = Detector(SMALL)
    origin = load_initial(detector, folder, CLASSES)
    assert origin.parent["repository"] == "timm/hgnetv2_b0.ssld_stage1_in22k_in1k"
    assert all(torch.equal(tensor, weights[key]) for key, tensor in detector.backbone.state_dict().items())


# Refusals, each with its way out


def test_a_download_that_was_cut_continues_where_it_stopped(hub: Hub) -> None:
    hub.cut_after, hub.cuts = 100_000, 1
    assert fetch(NAME).files[0] == "model.safetensors"
    assert hub.requests.count("GET model.safetensors") == 2


@pytest.mark.parametrize(
    ("chunk_size", "sentence"),
    [(10_000, "the connection was cut 4 times during the download"), (10**7, "the download of .* broke off")],
    ids=["gaining", "gaining nothing"],
)
def test_a_connection_that_is_cut_every_time_ends_with_a_sentence(
    chunk_size: int, sentence: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub counts attempts anew with each chunk that arrives, and would go on for ever."""
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", chunk_size)
    hub.cut_after, hub.continues = 100_000, False
    message = refused()
    assert re.search(sentence, message)
    assert "dfine_n_coco.pth" in message


def test_altered_content_is_refused_and_leaves_no_file_behind(hub: Hub) -> None:
    hub.altered = {"model.safetensors"}
    message = refused()
    assert "has SHA-256" in message
    assert "the hub states" in message
    assert "removed from the cache" in message
    hub.altered = set()
    assert fetch(NAME).commit == COMMIT


def test_the_digest_of_the_table_is_compared_too(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    row = replace(find(NAME), sha256="f" * 64)
    monkeypatch.setattr("pipeline.pretrained._table", lambda: {NAME: row})
    assert f"the table states {'f' * 64}" in refused()


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_names_its_conditions_and_the_token(status: int, hub: Hub) -> None:
    hub.status, hub.error_code = status, "GatedRepo"
    message = refused()
    assert f"{REPO} is gated: accept its conditions at {hub.url}/{REPO}" in message
    assert "HF_TOKEN" in message
    with pytest.raises(PretrainedError, match="is gated"):
        describe(NAME)


def test_a_token_opens_a_gated_repository(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    assert "is gated" in refused()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert fetch(NAME).commit == COMMIT


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://me/none", "has no repository me/none, or it is private: .*HF_TOKEN"),
        (f"hf://{REPO}@v7", "has no revision 'v7'"),
    ],
)
def test_a_missing_repository_and_revision_are_told_apart(source: str, message: str, hub: Hub) -> None:
    with pytest.raises(PretrainedError, match=message):
        fetch(source)


def test_a_repository_without_weights_is_refused(hub: Hub) -> None:
    hub.files["me/empty"] = {"README.md": b"soon"}
    assert "has neither config.json nor detector.json" in refused("hf://me/empty")
    hub.files["me/empty"]["config.json"] = b"{}"
    assert "has no model.safetensors" in refused("hf://me/empty")
    with pytest.raises(PretrainedError, match=r"has no model.safetensors"):
        describe("hf://me/empty")


def test_offline_mode_takes_the_cache_and_else_names_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    message = refused()
    assert "offline mode is on (HF_HUB_OFFLINE)" in message
    assert huggingface_hub.constants.HF_HUB_CACHE in message
    assert f"dfine weights fetch {NAME}" in message
    assert describe(NAME)[0].endswith("not in the cache, and the hub cannot be reached")
    assert hub.requests == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    online = fetch(NAME)
    offline(monkeypatch)
    assert fetch(NAME) == online


@pytest.mark.parametrize("failure", ["gone", "500"])
def test_without_the_hub_the_cache_is_taken_and_else_the_way_out_is_named(
    failure: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = fetch(NAME)
    if failure == "gone":
        template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    else:
        hub.status = 500
    assert fetch(NAME) == fetched
    assert "cannot be reached, and the cache" in refused("dfine-s-coco")


def test_the_variables_of_huggingface_hub_hold_for_the_command(hub: Hub, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}

    def weights(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "jobs.weights", *words],
            capture_output=True,
            text=True,
            env=environment | more,
            check=False,
        )

    fetched = weights("fetch", NAME)
    assert fetched.returncode == 0, fetched.stderr
    assert str(tmp_path / "home") in fetched.stdout
    again = weights("fetch", NAME, HF_HUB_OFFLINE="1")
    assert again.stdout == fetched.stdout
    missing = weights("fetch", "dfine-s-coco", HF_HUB_OFFLINE="1")
    assert missing.returncode == 1
    assert "offline mode is on" in missing.stderr
    assert "Traceback" not in missing.stderr
