"""Mistakes of users, over all commands: each ends with an exit code and a message with the way out, never with a traceback."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dfine_core.checkpoints.weights import save_released
from pipeline.export.source import ExportSource
from pipeline.export.writers import write_safetensors
from tests.support.commands import COMMAND_MODULES, JOB, ROOT
from tests.support.small_detectors import small_detector
from tests.support.synthetic_shards import synthetic_records, write_shards

JOB_SERVER = {"RAY_ADDRESS": "http://127.0.0.1:8265"}
DEAD_CLUSTER = {"RAY_ADDRESS": "127.0.0.1:1"}
UNSET = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", *JOB)

# command line, what the message must hold, environment beside the usual one
MISTAKES: list[tuple[str, tuple[str, ...], dict[str, str]]] = [
    # an address of Ray under which no command can run; first, for a Ray that runs already would be used
    ("train run.yaml --set storage=away", ("RAY_ADDRESS=http://127.0.0.1:8265", "ray job submit"), JOB_SERVER),
    ("tune sweep.yaml --set trials=1 storage=away", ("RAY_ADDRESS=http://", "ray job submit"), JOB_SERVER),
    ("pretrain_finetune chain.yaml --set storage=away", ("RAY_ADDRESS=http://", "ray job submit"), JOB_SERVER),
    ("predict detector photos --out predicted", ("RAY_ADDRESS=http://", "ray job submit"), JOB_SERVER),
    ("evaluate detector val", ("RAY_ADDRESS=http://", "ray job submit"), JOB_SERVER),
    ("serve detector", ("RAY_ADDRESS=http://", "ray job submit"), JOB_SERVER),
    ("doctor train", ("RAY_ADDRESS=http://", "ray job submit"), JOB_SERVER),
    ("prepare synthetic --images 2 --split a --out out", ("RAY_ADDRESS=http://", "ray job submit"), JOB_SERVER),
    ("doctor train", ("RAY_ADDRESS=127.0.0.1:1", "no Ray cluster responds", "unset it"), DEAD_CLUSTER),
    (
        "train run.yaml --set storage=away --cluster dead.yaml",
        ("RAY_ADDRESS=127.0.0.1:1", "`address`"),
        {"RAY_ADDRESS": ""},
    ),
    # train: files and keys
    ("train nowhere.yaml", ("nowhere.yaml", "no such file"), {}),
    ("train empty", ("empty", "is a directory"), {}),
    ("train broken.yaml", ("broken.yaml", "not readable as YAML"), {}),
    ("train list.yaml", ("list.yaml", "expected keys with values"), {}),
    ("train binary.yaml", ("binary.yaml", "expected keys with values"), {}),
    ("train twice.yaml", ("twice.yaml", "seed is given twice"), {}),
    ("train run.yaml --set optimiser.lr=1", ("unknown key 'optimiser'", "did you mean optimizer"), {}),
    ("train run.yaml --set schedule.epoch=1", ("unknown key 'epoch'", "did you mean epochs"), {}),
    ("train run.yaml --set optimizer.lr=fast", ("optimizer.lr", "valid number", "'fast'"), {}),
    ("train run.yaml --set optimizer.lr=-1", ("optimizer.lr", "greater than 0"), {}),
    ("train run.yaml --set schedule.steps=-5", ("schedule.steps", "greater than 0", "-5"), {}),
    ("train run.yaml --set seed=-1", ("seed", "greater than or equal to 0"), {}),
    ("train run.yaml --set model.variant=xl", ("model", "variant", "'xl'"), {}),
    ("train run.yaml --set model.input_size=[100,100]", ("multiple of 32",), {}),
    ("train run.yaml --set name=a/b", ("name", "becomes a folder"), {}),
    ("train run.yaml --set seed", ("--set seed", "KEY=VALUE"), {}),
    ("train run.yaml --set seed=[1", ("--set seed=[1", "not readable as YAML"), {}),
    ("train run.yaml --set seed.deeper=1", ("seed", "valid integer"), {}),
    ("train run.yaml --set data.train.deeper=1", ("data.train.deeper", "not a section"), {}),
    ("train run.yaml --set seed=1 --set seed=2", ("--set seed", "twice"), {}),
    ("train run.yaml --set seed=1 --set optimiser.lr=1", ("unknown key 'optimiser'",), {}),
    ("train run.yaml --cluster nowhere.yaml", ("nowhere.yaml", "no such file"), {}),
    ("train run.yaml --cluster cluster.yaml", ("cluster.yaml", "gpus_per_workers", "gpus_per_worker"), {}),
    # train: data, weights, tracking
    ("train run.yaml --set data.train=nowhere", ("nowhere/manifest.json", "dfine prepare"), {}),
    (
        'train run.yaml --dry-run --set data.train=[{"shards":0},3,{"shards":"a","weigth":2}]',
        ("set 1: shards", "set 2: 3 is no set", "set 3: unknown key 'weigth'", "weight"),
        {},
    ),
    (
        'train run.yaml --dry-run --set data.train=[{"shards":"train","classes":{"nothing":"x"}}]',
        ("classes renames 'nothing'", "it has no such class"),
        {},
    ),
    (
        'train run.yaml --set data.train=[{"shards":"train"},{"shards":"nowhere"},{"shards":"gone/not"}]',
        ("nowhere/manifest.json", "gone/not/manifest.json", "dfine prepare"),
        {},
    ),
    ("train run.yaml --set data.train=notes.txt", ("notes.txt", "dfine prepare"), {}),
    ("train run.yaml --set data.train=gone", ("gone", "is missing"), {}),
    ("train run.yaml --set data.val=bad", ("bad/manifest.json", "not JSON"), {}),
    ("train run.yaml --set data.val=old", ("old/manifest.json", "format_version", "prepare the data again"), {}),
    ("train run.yaml --set data.val=odd", ("odd/manifest.json: images is 3, the shards hold 12",), {}),
    ("train run.yaml --set data.train=ftp://host/train", ("ftp://host/train/manifest.json: unknown scheme",), {}),
    ("train run.yaml --set storage=s3:///runs", ("s3:///runs", "no bucket"), {}),
    ("train run.yaml --set storage=s3://bucket/runs", ("MLFLOW_TRACKING_URI", "s3://bucket/runs"), {}),
    ("train run.yaml --set tracking.uri=mlruns", ("'mlruns'", "http://HOST:PORT"), {}),
    ("train run.yaml", ("'./mlruns'", "http://HOST:PORT"), {"MLFLOW_TRACKING_URI": "./mlruns"}),
    ("train run.yaml --set init=nowhere.pth", ("init", "nowhere.pth", "does not exist"), {}),
    ("train run.yaml --set init=broken.pth", ("init", "broken.pth", "not a file of plain tensors"), {}),
    ("train run.yaml --set init=empty", ("init: /", "/empty: "), {}),
    (
        "train run.yaml --set init=dfine-n-obj365",
        ("init", "no published weights of this name", "dfine weights list"),
        {},
    ),
    ("train run.yaml --set init=hf://mine", ("init", "hf://ORGANISATION/NAME"), {}),
    ("train run.yaml --set init=dfine-s-coco", ("offline mode is on", "dfine weights fetch dfine-s-coco"), {}),
    ("train run.yaml --resume empty", ("empty", "not a checkpoint"), {}),
    ("train run.yaml --dry-run --set data.train=nowhere", ("nowhere/manifest.json",), {}),
    ("train run.yaml --set storage=notes.txt", ("notes.txt",), {}),
    # train: as a submitted job
    ("train run.yaml", ("storage", "'runs'", "$PWD/runs", "data.train", "$PWD/train", "data.val"), JOB),
    ("train run.yaml --set init=broken.pth", ("init", "broken.pth", "not a file of plain tensors"), {}),
    ("train run.yaml --set init=empty", ("init: /", "/empty: "), {}),
    ("train run.yaml --resume empty", ("--resume", "'empty'", "$PWD/empty"), JOB),
    # pretrain_finetune
    ("pretrain_finetune nowhere.yaml", ("nowhere.yaml", "no such file"), {}),
    ("pretrain_finetune chain.yaml --set second.seed=1", ("second.seed", "begin with a stage", "first"), {}),
    ("pretrain_finetune chain.yaml --set first.seed=x", ("seed", "valid integer"), {}),
    ("pretrain_finetune chain.yaml --set first.seed=1 --set first.seed=2", ("first.seed", "twice"), {}),
    ("pretrain_finetune chain.yaml --set storage=s3://bucket/runs", ("MLFLOW_TRACKING_URI",), {}),
    ("pretrain_finetune unquoted.yaml", ("prepare", "quotation"), {}),
    ("pretrain_finetune chain.yaml", ("storage", "$PWD/runs"), JOB),
    (
        "pretrain_finetune preparing.yaml --set storage=/runs first.data.train=/a first.data.val=/b",
        ("prepare: --out", "$PWD/shards"),
        JOB,
    ),
    # tune
    ("tune", ("sweep file", "configs/sweeps/"), {}),
    ("tune nowhere.yaml", ("nowhere.yaml", "no such file"), {}),
    ("tune sweep.yaml --set trails=3", ("trails",), {}),
    ("tune sweep.yaml --set trials=-3 --dry-run", ("trials", "greater than 0"), {}),
    ("tune sweep.yaml --set trials=1 --set trials=2", ("trials", "twice"), {}),
    ("tune sweep.yaml --set trials=1 --set storage=s3://bucket/runs", ("MLFLOW_TRACKING_URI",), {}),
    ("tune sweep.yaml --set metric=mAP --dry-run", ("mAP",), {}),
    ("tune --promote empty", ("empty", "not the folder of a sweep"), {}),
    ("tune --promote brokensweep", ("brokensweep/sweep.json",), {}),
    ("tune sweep.yaml", ("storage", "$PWD/runs"), JOB),
    # calibrate
    ("calibrate nowhere train", ("nowhere", "no detector"), {}),
    ("calibrate detector nowhere", ("nowhere/manifest.json", "dfine prepare"), {}),
    ("calibrate detector train --out photos", ("photos", "holds other files"), {}),
    ("calibrate detector train --score 2", ("--score", "0..1"), {}),
    # select, labels
    ("select nowhere photos --out chosen", ("nowhere", "no detector"), {}),
    ("select detector nowhere --out chosen", ("nowhere", "no such file or folder"), {}),
    ("select detector empty --out chosen", ("empty", "no images or videos"), {}),
    ("select detector photos --out train", ("train", "holds other files", "--out"), {}),
    ("select detector photos --out chosen --threshold 2", ("--threshold", "0..1"), {}),
    ("select detector photos --out chosen --format voc", ("--format", "label-studio"), {}),
    ("select detector photos --out chosen --count 0", ("--count", "less than 1"), {}),
    ("select {folder}/detector {folder}/photos --out chosen", ("--out", "$PWD/chosen"), JOB),
    ("doctor train --model nowhere", ("nowhere", "no detector"), {}),
    ("doctor nowhere --model detector", ("nowhere/manifest.json", "dfine prepare"), {}),
    ("doctor train val --model detector", ("one shard set at a time",), {}),
    ("doctor train --model detector --html notes.txt", ("notes.txt", "another kind"), {}),
    ("doctor train --model detector --csv notes.txt", ("notes.txt", "another kind"), {}),
    ("doctor train --csv labels.csv", ("--csv", "--model"), {}),
    # fit, report
    ("fit nowhere", ("nowhere does not exist", "no data set"), {}),
    ("fit empty --out fitted", ("empty", "no data set was recognised"), {}),
    ("fit photos --out detector", ("detector", "holds other files", "--out"), {}),
    ("fit photos --out fitted --set optimiser.lr=1", ("unknown key 'optimiser'", "did you mean optimizer"), {}),
    ("fit photos --out fitted --set schedule.epochs=-1", ("schedule.epochs", "greater than 0"), {}),
    ("fit photos --out fitted --split-off val", ("--split-off val", "NAME=SHARE"), {}),
    ("fit photos --out fitted --split-off test=0.2", ("--split-off test=0.2", "val=0.2"), {}),
    ("fit photos --out fitted --init nowhere.pth", ("nowhere.pth", "does not exist"), {}),
    ("fit photos --out fitted --init dfine-n-obj365", ("no published weights of this name",), {}),
    ("fit photos --cluster nowhere.yaml", ("nowhere.yaml", "no such file"), {}),
    ("fit photos", ("folder", "$PWD/photos"), JOB),
    ("fit {folder}/photos", ("--out", "$PWD/runs/photos"), JOB),
    ("report nowhere", ("nowhere", "no run"), {}),
    ("report empty", ("empty", "not the folder of a run"), {}),
    ("report brokenrun", ("brokenrun", "not the folder of a run"), {}),
    ("report empty --data nowhere", ("nowhere/manifest.json", "dfine prepare"), {}),
    ("report {folder}/empty --out page.html", ("--out", "$PWD/page.html"), JOB),
    # prepare
    ("prepare coco --split train --out out", ("--images and --annotations",), {}),
    ("prepare coco nowhere --split train --out out", ("instances_train.json", "no such file"), {}),
    ("prepare coco --images photos --annotations bad.json --split a --out out", ("bad.json", "JSON"), {}),
    ("prepare coco --images photos --annotations notes.txt --split a --out out", ("notes.txt",), {}),
    ("prepare coco --images photos --annotations photos --split a --out out", ("photos",), {}),
    ("prepare objects365 nowhere --split test --out out", ("'test'", "train and val"), {}),
    ("prepare voc nowhere --split train --out out", ("nowhere", "no such folder"), {}),
    ("prepare voc empty --split train --out out", ("empty", "no XML files"), {}),
    ("prepare auto nowhere --out out", ("nowhere", "no such folder"), {}),
    ("prepare auto empty --out out", ("empty", "no data set was recognised"), {}),
    ("prepare synthetic --images 9 --split a --out out --split-off val", ("--split-off val", "NAME=SHARE"), {}),
    ("prepare synthetic --images 9 --split a --out out --split-off a=0.5", ("--split-off", "another name"), {}),
    ("prepare synthetic --images 2 --split a --out out --exif sideways", ("--exif", "sideways"), {}),
    ("prepare yolo nowhere.yaml --split train --out out", ("nowhere.yaml", "no such file"), {}),
    ("prepare yolo list.yaml --split train --out out", ("list.yaml", "names"), {}),
    ("prepare yolo empty --split train --out out", ("empty",), {}),
    ("prepare yolo binary.yaml --split train --out out", ("binary.yaml",), {}),
    ("prepare synthetic --images 2 --split a --out ftp://host/out", ("ftp://host/out", "unknown scheme"), {}),
    ("prepare synthetic --images 2 --split a --out notes.txt", ("notes.txt",), {}),
    ("prepare synthetic --images 0 --split a --out out", ("no images",), {}),
    ("prepare synthetic --images 2 --split a --out out --shard-mib -1", ("shard_mib", "greater than 0"), {}),
    ("prepare synthetic --images 2 --split a --out out --image-side 8", ("longest_side", "8"), {}),
    ("prepare synthetic --images 2 --split a --out out --classes cube", ("cube", "known"), {}),
    ("prepare synthetic --images 2 --split a --out train", ("train", "another --out"), {}),
    ("prepare synthetic --images 2 --split a --out photos", ("photos", "holds other files", "--out"), {}),
    ("prepare teacher train --results results.json --out train", ("train", "holds other files", "--out"), {}),
    ("prepare synthetic --images 2 --split a --out out", ("--out", "$PWD/out"), JOB),
    ("prepare tfrecord --split a --out out", ("tfrecord", "coco"), {}),
    # doctor
    ("doctor nowhere", ("nowhere/manifest.json", "dfine prepare"), {}),
    ("doctor train train/manifest.json", ("twice",), {}),
    ("doctor bad", ("bad/manifest.json", "not JSON"), {}),
    ("doctor train --html notes.txt", ("--html", "notes.txt", "would be replaced", "name a new file"), {}),
    ("doctor train --html photos", ("--html", "photos", "name a file"), {}),
    ("doctor train", ("MANIFEST", "$PWD/train"), JOB),
    # weights
    ("weights", ("list|fetch|verify|convert",), {}),
    ("weights fetch dfine-n-obj365", ("dfine-n-obj365", "no published weights of this name"), {}),
    ("weights fetch dfine-s-coco", ("offline mode is on", "HF_HOME", "dfine_s_coco.pth"), {}),
    ("weights fetch empty", ("no published weights of this name", "dfine weights list"), {}),
    ("weights verify empty", ("empty", "no detector"), {}),
    ("weights verify broken.pth", ("broken.pth", "not a file of plain tensors"), {}),
    ("weights convert detector --to released --out made", ("made", ".pth"), {}),
    ("weights convert detector --to safetensors --out empty", ("empty exists already",), {}),
    ("predict dfine-s-coco photos --out out", ("offline mode is on",), {}),
    # evaluate
    ("evaluate empty train", ("empty", "no detector"), {}),
    ("evaluate detector nowhere", ("nowhere/manifest.json", "dfine prepare"), {}),
    ("evaluate cut train", ("cut", "damaged"), {}),
    ("evaluate described train", ("described", "cannot be read"), {}),
    ("evaluate notes.txt train", ("notes.txt",), {}),
    ("evaluate small.pth train", ("classes", "same categories"), {}),
    ("evaluate detector gone", ("gone", "is missing"), {}),
    ("evaluate detector torn", ("torn", "1,000 bytes"), {}),
    ("evaluate models:/shapes@champion train", ("MLFLOW_TRACKING_URI",), {}),
    ("evaluate detector train --batch-size 0", ("--batch-size", "0"), {}),
    ("evaluate detector train --num-images -1", ("--num-images", "-1"), {}),
    ("evaluate {folder}/detector {folder}/train --out found", ("--out", "$PWD/found"), JOB),
    # predict
    ("predict nowhere photos --out out", ("nowhere", "does not exist"), {}),
    ("predict detector nowhere --out out", ("nowhere", "no such file or folder"), {}),
    ("predict detector empty --out out", ("no images or videos", "empty"), {}),
    ("predict detector photos/*.gif --out out", ("*.gif", "no file matches"), {}),
    ("predict detector photos --out out --threshold 1.5", ("--threshold", "1.5", "0..1"), {}),
    ("predict detector photos --out out --threshold high", ("--threshold", "'high'"), {}),
    ("predict detector photos --out out --batch-size 0", ("--batch-size", "0"), {}),
    ("predict detector photos --out out --batch-size many", ("--batch-size", "'many'"), {}),
    ("predict detector photos --out notes.txt --workers 0", ("notes.txt",), {}),
    ("predict detector photos --out photos --workers 0", ("photos", "holds other files", "--out"), {}),
    ("predict detector photos --out . --workers 0", ("holds other files", "nothing is written", "--out"), {}),
    ("predict detector photos --out sftp://host/out --workers 0", ("sftp://host/out", "unknown scheme"), {}),
    ("predict {folder}/detector {folder}/photos --out out", ("--out", "$PWD/out"), JOB),
    # export
    ("export nowhere --to onnx --out out", ("nowhere", "does not exist"), {}),
    ("export detector --to tflite --out out", ("--to", "tflite", "onnx"), {}),
    ("export detector --to released --out notes.txt", ("notes.txt",), {}),
    ("export detector --to released --out out --input-size 100", ("--input-size", "multiple of 32"), {}),
    ("export detector --to released --out out --input-size 64 64 64", ("--input-size", "3 numbers"), {}),
    ("export detector --to released --out out --num-images 0", ("--num-images", "0"), {}),
    ("export detector --to released --out out --check nowhere", ("nowhere/manifest.json",), {}),
    ("export detector --to released --out out --images-from empty", ("--images-from", "empty"), {}),
    ("export detector --to released --out out --images-from nowhere.jpg", ("nowhere.jpg",), {}),
    ("export detector --to released --out out --images-from notes.txt", ("notes.txt",), {}),
    ("export detector --to released --out out --attach shapes", ("shapes", "runs:/RUN_ID"), {}),
    ("export detector --to released --out out --attach runs:/1", ("MLFLOW_TRACKING_URI",), {}),
    ("export broken.pth --to released --out out", ("broken.pth",), {}),
    ("export {folder}/detector --to released --out out", ("--out", "$PWD/out"), JOB),
    # serve
    ("serve nowhere", ("nowhere", "no detector"), {}),
    ("serve detector --threshold 2", ("--threshold", "2 is not in 0..1"), {}),
    ("serve detector --batch-size 0", ("--batch-size", "0 is less than 1"), {}),
    ("serve detector --port 70000", ("--port", "70000"), {}),
    ("serve detector --detach", ("--detach", "RAY_ADDRESS"), {}),
    ("serve detector", ("MODEL", "$PWD/detector"), JOB),
    # check-engine
    ("check_engine nowhere.onnx detector val", ("nowhere.onnx", "does not exist"), {}),
    ("check_engine notes.txt detector val", ("notes.txt", "no runtime opens it", ".onnx"), {}),
    ("check_engine broken.onnx nowhere val", ("nowhere", "does not exist"), {}),
    ("check_engine broken.onnx detector nowhere", ("nowhere/manifest.json",), {}),
    ("check_engine broken.onnx detector val --json notes.txt", ("--json", "notes.txt", "another kind"), {}),
    ("check_engine broken.onnx broken.onnx val", ("broken.onnx", "give the detector that it was made of"), {}),
    ("evaluate broken.onnx val", ("broken.onnx", "give the detector that it was made of"), {}),
    ("predict broken.onnx photos --out out --workers 0", ("broken.onnx", "cannot be opened by onnxruntime"), {}),
    # benchmark
    ("benchmark nowhere", ("nowhere", "does not exist"), {}),
    ("benchmark nowhere.onnx", ("nowhere.onnx", "does not exist"), {}),
    ("benchmark broken.onnx", ("broken.onnx",), {}),
    ("benchmark broken.pt2", ("broken.pt2", "torch.export"), {}),
    ("benchmark broken.pth", ("broken.pth",), {}),
    ("benchmark detector --precision int8", ("--precision", "int8"), {}),
    ("benchmark detector --device tpu9000", ("--device", "tpu9000"), {}),
    ("benchmark detector --batch-sizes 0", ("--batch-sizes", "0"), {}),
    ("benchmark detector --calls 0", ("--calls", "0"), {}),
    ("benchmark detector --threads -2", ("--threads", "-2"), {}),
    ("benchmark {folder}/detector --json out/speed.json", ("--json", "$PWD/out/speed.json"), JOB),
    # ui, lineage, compare, record, replay
    ("record nowhere", ("nowhere", "no run"), {}),
    ("ui nowhere", ("nowhere", "MLFLOW_TRACKING_URI"), {}),
    ("ui brokenrun", ("brokenrun",), {}),
    ("lineage nowhere", ("nowhere", "MLFLOW_TRACKING_URI"), {}),
    ("lineage brokenrun", ("brokenrun",), {}),
    ("lineage nowhere", ("nowhere", "sqlite"), {"MLFLOW_TRACKING_URI": "sqlite:///{folder}/none.db"}),
    ("compare nowhere other", ("database", "--tracking"), {}),
    ("compare brokenrun nowhere", ("brokenrun", "damaged"), {}),
    ("compare a b --tracking mlruns", ("'mlruns'", "http://HOST:PORT"), {}),
    ("compare a b --tracking sqlite:///runs.db", ("sqlite", "$PWD/runs.db"), JOB),
    ("compare a b", ("storage", "$PWD/runs"), JOB),
    ("compare a b --html notes.txt", ("--html", "notes.txt", "name a new file"), {}),
    ("replay nowhere", ("nowhere", "no saved step"), {}),
    ("replay brokenstep", ("brokenstep",), {}),
    ("replay detector --precision int8", ("--precision", "int8"), {}),
    ("replay empty", ("folder", "$PWD/empty"), JOB),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with data, a detector and files for all commands, many of them broken."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("empty", "photos", "bad", "old", "odd", "brokenrun", "brokensweep", "brokenstep"):
        (folder / name).mkdir()
    records = synthetic_records(12, longest_side=64)
    for name in ("train", "val", "gone", "torn"):
        write_shards(folder / name, records)
    (folder / "photos" / "one.jpg").write_bytes(records[0].image)
    (shard,) = (folder / "gone").glob("*.parquet")
    shard.unlink()
    (shard,) = (folder / "torn").glob("*.parquet")
    shard.write_bytes(shard.read_bytes()[:1000])
    _write_detectors(folder)
    _write_texts(folder)
    return folder


def _write_detectors(folder: Path) -> None:
    write_safetensors(ExportSource(small_detector()), folder / "detector")
    for name in ("cut", "described"):
        shutil.copytree(folder / "detector", folder / name)
    (weights,) = (folder / "cut").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    (description,) = (folder / "described").glob("*.json")
    description.write_text("{}")
    released = small_detector(("person", "dog"), input_size=(160, 160))
    save_released(released.detector.state_dict(), released.config, folder / "small.pth")


def _write_texts(folder: Path) -> None:
    manifest = json.loads((folder / "val" / "manifest.json").read_text())
    experiment = {
        "data": {"train": "train", "val": "val"},
        "model": {"variant": "n", "input_size": [64, 64], "num_queries": 20, "num_denoising": 10},
        "schedule": {"steps": 6, "global_batch_size": 4, "no_aug_epochs": 0},
    }
    stage = {"name": "first", "experiment": "run.yaml"}
    texts = {
        "run.yaml": json.dumps(experiment),
        "broken.yaml": "data: {train: [",
        "list.yaml": "- 1\n- 2\n",
        "twice.yaml": "seed: 1\nseed: 2\n",
        "cluster.yaml": "gpus_per_workers: 1\n",
        "dead.yaml": "address: 127.0.0.1:1\n",
        "chain.yaml": json.dumps({"stages": [stage]}),
        "preparing.yaml": json.dumps(
            {"stages": [stage | {"prepare": ["synthetic --images 2 --split a --out shards"]}]}
        ),
        "unquoted.yaml": json.dumps({"stages": [stage | {"prepare": ["coco 'a --out b"]}]}),
        "sweep.yaml": json.dumps(
            {"experiment": "run.yaml", "trials": 1, "space": {"optimizer.lr": {"choice": [1, 2]}}}
        ),
        "bad/manifest.json": "{",
        "old/manifest.json": json.dumps(manifest | {"format_version": 0}),
        "odd/manifest.json": json.dumps(manifest | {"images": 3}),
        "bad.json": "{",
        "notes.txt": "no image\n",
        "broken.onnx": "nothing",
        "broken.pt2": "nothing",
        "broken.pth": "nothing",
        "brokenrun/run.json": "{",
        "brokensweep/sweep.json": "{",
        "brokensweep/records.json": "{",
        "brokenstep/about.json": "{",
        "brokenstep/model.safetensors": "",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")


def environment(folder: Path) -> dict[str, str]:
    usual = {name: value for name, value in os.environ.items() if name not in UNSET}
    return (
        usual
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        | {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "hub"),
        }
    )


@pytest.fixture(scope="module")
def endings(folder: Path) -> list[dict[str, Any]]:
    """How each of the mistakes ended, all of them in one other process."""
    rows = []
    for line, _, special in MISTAKES:
        command, *arguments = line.replace("{folder}", str(folder)).split()
        filled = {name: value.replace("{folder}", str(folder)) for name, value in special.items()}
        rows.append({"command": command, "arguments": arguments, "environment": filled})
    (folder / "rows.json").write_text(json.dumps(rows))
    driver = [sys.executable, "-m", "tests.support.mistakes_driver", "rows.json", "results.json"]
    done = subprocess.run(
        driver, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return results


def test_the_table_has_at_least_forty_mistakes_over_all_commands() -> None:
    assert len(MISTAKES) >= 40
    assert {line.split()[0] for line, _, _ in MISTAKES} == COMMAND_MODULES


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[line for line, _, _ in MISTAKES])
def test_a_mistake_ends_with_a_message_and_no_traceback(number: int, endings: list[dict[str, Any]]) -> None:
    _, fragments, _ = MISTAKES[number]
    ended = endings[number]
    said = ended["out"] + ended["err"]
    assert "Traceback" not in said, said[-3000:]
    assert ended["code"] in (1, 2), said
    assert [fragment for fragment in fragments if fragment not in said] == [], said
    assert 0 < len(ended["err"].strip().splitlines()) < 40, said


@pytest.mark.parametrize(
    "line",
    ["train run.yaml --set optimiser.lr=1", "prepare yolo nowhere.yaml --split a --out out", "doctor nowhere"],
)
def test_the_interpreter_prints_the_message_on_stderr(line: str, folder: Path) -> None:
    command, *arguments = line.split()
    (fragments,) = {fragments for known, fragments, _ in MISTAKES if known == line} or {("no such file",)}
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{command}", *arguments],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert all(fragment in done.stderr for fragment in fragments)
