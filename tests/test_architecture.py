"""Where things may be used: imports point one way, and each foreign library enters through named files."""

import ast
import re
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import pytest

from tests.support.source_imports import imports

ROOT = Path(__file__).parent.parent
BELOW = {
    "dfine_core": {"dfine_core"},
    "pipeline": {"dfine_core", "pipeline"},
    "jobs": {"dfine_core", "pipeline", "jobs"},
}
OURS = set(BELOW)
CORE_MAY_IMPORT = {"torch", "torchvision", "scipy", "numpy"}  # besides the standard library
# Files of the core that use more; the detector needs none of this.
ALSO = {f"dfine_core/{name}.py": {"PIL"} for name in ("drawing", "image_work", "images")} | {
    "dfine_core/model/sampling_triton.py": {"triton"}  # imported at the first call, where Triton is installed
}
BORROWED = {
    "dfine_core/checkpoints/folder.py": {"safetensors"},
    "dfine_core/runtimes/onnx_file.py": {"onnxruntime"},
    "dfine_core/runtimes/openvino_file.py": {"openvino"},
}

# The parts of `pipeline`, lowest first: packages, and modules beside them. The foundation is open to all that comes later.
FOUNDATION = (
    "errors",
    "drawing",
    "redaction",
    "wording",
    "progress",
    "provenance",
    "mlflow_access",
    "ray_job",
    "hub",
    "pretrained",
    "ray_address",
    "ray_core_internals",
    "ray_internals",
    "ray_cluster",
    "storage",
    "html_pages",
    "text_files",
    "output_folder",
    "config_keys",
)
EMPTY = {"__init__", "data.__init__"}
LAYERS: dict[str, set[str]] = {  # part to the parts that it may import, besides the foundation and itself
    "data.shards": set(),
    "data.sources": {"data.shards"},
    "data.prepare": {"data.shards", "data.sources"},
    "data.augment": {"data.shards"},
    "data.stream": {"data.shards", "data.augment"},
    "data.doctor": {"data.shards", "data.augment", "data.prepare"},
    "augment_presets": set(),
    "recipes": set(),
    "teacher_settings": set(),
    "data_settings": {"data.stream", "teacher_settings"},
    "config": {"data.augment", "data.stream", "augment_presets", "recipes", "teacher_settings", "data_settings"},
    "config_files": {"config"},
    "open_detector": {"config"},
    "thresholds": {"config", "open_detector"},
    "benchmark": {"config", "open_detector"},
    "evaluation": {"config", "data.shards", "data.augment", "data.stream"},
    "tracking": {"config", "open_detector"},
    "training": {
        *("data.shards", "data.augment", "data.stream", "recipes", "config", "config_files"),
        *("open_detector", "thresholds", "benchmark", "evaluation", "tracking", "teacher_settings", "data_settings"),
    },
    "export": {
        *("data.shards", "data.sources", "data.stream"),
        *("config", "open_detector", "evaluation"),
    },
    "run_report": {
        *(
            "data.shards",
            "data.augment",
            "config",
            "data_settings",
            "open_detector",
            "evaluation",
            "tracking",
            "training",
        ),
    },
    "calibration": {"data.shards", "data.stream", "config", "open_detector", "evaluation", "tracking"},
    "fit": {
        *("data.shards", "data.sources", "data.prepare", "data.doctor", "config", "config_files"),
        *("open_detector", "evaluation", "export", "training", "run_report"),
    },
    "weight_files": {"config", "open_detector", "export"},
    "predict": {"data.shards", "data.prepare", "config", "open_detector", "thresholds", "evaluation"},
    "labelling": {
        *("data.shards", "data.prepare", "data.augment", "config", "thresholds"),
        *("evaluation", "calibration", "predict"),
    },
    "serve": {"config", "open_detector"},
    "tuning": {
        *("data.shards", "data.stream", "config", "config_files"),
        *("open_detector", "evaluation", "tracking", "training"),
    },
}

# Modules that run inside Ray Data tasks, or that such modules import: torch there would cost seconds per worker process.
WITHOUT_TORCH = (
    "dfine_core.image_work",
    "dfine_core.images",
    "pipeline.storage",
    *(f"pipeline.data.shards.{name}" for name in ("records", "manifest", "reader", "training_set")),
    *(f"pipeline.data.augment.{name}" for name in ("geometry", "samples", "decode", "mosaic", "blend", "stages")),
    *(f"pipeline.data.stream.{name}" for name in ("mixture", "plan", "partners", "tasks")),
    *(f"pipeline.data.prepare.{name}" for name in ("prepare", "shard_writer", "image_files")),
    *(f"pipeline.data.doctor.{name}" for name in ("findings", "row_checks", "shard_checks")),
)

# The files below `pipeline` and `jobs` that use a foreign library.
ENTRANCES = {
    "mlflow": (
        *("pipeline/mlflow_access.py", "pipeline/open_detector.py"),
        *(
            f"pipeline/tracking/{name}.py"
            for name in (
                *("calibrated_model", "client", "database", "lineage", "mlflow_writer", "model", "model_registry"),
                *("run_facts", "served_detector"),
            )
        ),
    ),
    "pycocotools": ("pipeline/evaluation/coco_metrics.py",),
    "hotcoco": tuple(f"pipeline/evaluation/{name}.py" for name in ("analysis", "coco_metrics", "error_types")),
    "yaml": (
        *("pipeline/config_files.py", "pipeline/text_files.py", "pipeline/pretrained.py"),
        *(f"pipeline/training/{name}.py" for name in ("checkpoint", "dry_run", "run_log")),
    ),
    "ray": (
        *(f"pipeline/{name}.py" for name in ("ray_cluster", "ray_core_internals", "ray_internals")),
        *("pipeline/data/doctor/examine.py", "pipeline/data/prepare/prepare.py"),
        *(f"pipeline/data/stream/{name}.py" for name in ("backpressure", "groups", "ray_executions")),
        *(
            f"pipeline/training/{name}.py"
            for name in (
                *("evaluation_task", "heartbeat", "launch", "on_ray", "preflight", "rendezvous", "worker"),
                "worker_console",
            )
        ),
        *("pipeline/predict/on_ray.py", "pipeline/serve/deployment.py"),
        *(f"pipeline/tuning/{name}.py" for name in ("callbacks", "driver", "schedulers", "searcher", "trial")),
    ),
    "fastapi": ("pipeline/serve/deployment.py",),
    "starlette": tuple(f"pipeline/serve/{name}.py" for name in ("deployment", "proxy", "replica", "request_parsing")),
    "jinja2": ("pipeline/html_pages.py",),
    "pynvml": ("pipeline/tracking/system.py",),
    "optuna": ("pipeline/tuning/analysis/importance.py", "pipeline/tuning/searcher.py", "pipeline/tuning/space.py"),
    "triton": ("pipeline/data/augment/photometric_triton.py",),
    "onnx": tuple(f"pipeline/export/{name}.py" for name in ("int8", "onnx_files", "onnx_int8")),
    "onnxruntime": ("pipeline/export/onnx_files.py", "pipeline/export/onnx_int8.py"),
    "openvino": ("pipeline/export/openvino_files.py",),
    "nncf": ("pipeline/export/openvino_int8.py",),
    "transformers": ("pipeline/export/huggingface.py", "pipeline/training/teachers/vision.py"),
    "huggingface_hub": ("pipeline/hub.py",),
}

# Text that belongs to one file, or to none.
CORE_HAS_NO = re.compile(r"redact|MLFLOW_TRACKING|\bmlflow\.", re.I)
DEFAULT_THRESHOLDS = re.compile(r"threshold\w*[\"']?\s*(:[^=\n]*)?[=,]\s*(Field\()?0\.\d", re.I)
MOST_DETECTIONS = re.compile(r"(detections|kept|keep)\w*\s*(:[^=\n]*)?= ?(Field\()?300\b", re.I)
POSTPROCESSES = re.compile(r"(?<!def )\bpostprocess\(")
ONCE = {
    "dfine_core/inference.py": (DEFAULT_THRESHOLDS, POSTPROCESSES),
    "dfine_core/model/postprocess.py": (MOST_DETECTIONS,),
}


def roots(source: str) -> set[str]:
    return {name.split(".")[0] for name in imports(source)}


def violations(package: str, source: str, borrowed: Collection[str] = (), also: Collection[str] = ()) -> list[str]:
    """Imports of a module of `package` that are forbidden; what it borrows must not be imported along with it."""
    allowed = OURS | CORE_MAY_IMPORT | sys.stdlib_module_names | set(borrowed) | set(also)
    found = []
    for name in imports(source):
        top = name.split(".")[0]
        upwards = top in OURS and top not in BELOW[package]
        foreign = package == "dfine_core" and top not in allowed
        if name == "." or upwards or foreign:
            found.append(name)
    return found + [name for name in imported_at_once(source) if name.split(".")[0] in borrowed]


def imported_at_once(source: str) -> list[str]:
    """Names that a module's own body imports: not those inside functions or for types only."""
    tree = ast.parse(source)
    waiting = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) or _is_for_types(node)]
    later = {id(inner) for node in waiting for inner in ast.walk(node)}
    return [
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in later
        for name in imports(ast.unparse(node))
    ]


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def upwards(part: str, source: str) -> set[str]:
    """Parts of `pipeline` that a module of `part` imports, lazily too, and must not."""
    used = {_part(name.split(".")[1:]) for name in imports(source) if name.startswith("pipeline.")}
    return used - allowed_parts(part) - {"data"}  # `pipeline.data` itself holds nothing but packages


def _part(names: Sequence[str]) -> str:
    return ".".join(names[:2]) if names[0] == "data" else names[0]


def allowed_parts(part: str) -> set[str]:
    if part in FOUNDATION:
        return set(FOUNDATION[: FOUNDATION.index(part) + 1])
    return {part, *FOUNDATION} | LAYERS[part]


def out_of_order(layers: Mapping[str, Collection[str]]) -> list[str]:
    """Parts that may import one which does not come before them."""
    order = list(layers)
    return [part for part in order if not set(layers[part]) <= set(order[: order.index(part)])]


def part_of(path: Path) -> str:
    return _part([part.removesuffix(".py") for part in path.relative_to(ROOT / "pipeline").parts])


def users_of(library: str, sources: Mapping[str, str]) -> set[str]:
    return {name for name, source in sources.items() if library in roots(source)}


def texts_matching(pattern: re.Pattern[str], sources: Mapping[str, str]) -> list[str]:
    return [name for name, source in sources.items() if pattern.search(source)]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"{package} has no modules"
    return found


def sources_of(*packages: str) -> dict[str, str]:
    return {_name(path): path.read_text() for package in packages for path in modules(package)}


# Between the packages


@pytest.mark.parametrize("package", list(BELOW))
def test_imports_point_one_way(package: str) -> None:
    wrong = {
        name: bad
        for name, source in sources_of(package).items()
        if (bad := violations(package, source, BORROWED.get(name, ()), ALSO.get(name, ())))
    }
    assert not wrong


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("dfine_core", "import ray"),
        ("dfine_core", "def f():\n    import mlflow.pytorch"),
        ("dfine_core", "def f():\n    from mlflow.artifacts import download_artifacts"),
        ("dfine_core", "def f():\n    return importlib.import_module('mlflow')"),
        ("dfine_core", "def f():\n    return __import__('mlflow')"),
        ("dfine_core", "def f():\n    from pipeline.redaction import redact"),
        ("dfine_core", "from yaml import safe_load"),
        ("dfine_core", "import pydantic"),
        ("dfine_core", "import pyarrow.parquet as pq"),
        ("dfine_core", "from pycocotools.coco import COCO"),
        ("dfine_core", "from pipeline.data import plan"),
        ("dfine_core", "from . import boxes"),
        ("pipeline", "from jobs.train import main"),
        ("pipeline", "import_module('jobs.train')"),
    ],
)
def test_the_check_can_fail(package: str, source: str) -> None:
    assert violations(package, source)


def test_what_the_core_borrows_waits_until_it_is_needed() -> None:
    assert all((ROOT / name).exists() for name in (*BORROWED, *ALSO))
    assert violations("dfine_core", "import PIL.Image", {"PIL"})
    assert violations("dfine_core", "import PIL.Image")
    assert not violations("dfine_core", "import PIL.Image", also={"PIL"})
    assert not violations("dfine_core", "def f():\n    import PIL.Image", {"PIL"})
    assert violations("dfine_core", "def f():\n    import mlflow", {"PIL"})


def test_the_core_neither_asks_mlflow_nor_redacts() -> None:
    assert not any("mlflow" in names for names in (CORE_MAY_IMPORT, *ALSO.values(), *BORROWED.values()))
    assert texts_matching(CORE_HAS_NO, sources_of("dfine_core")) == []


# Inside pipeline


def test_every_part_of_pipeline_has_its_layer_and_imports_lower_ones_alone() -> None:
    parts = {part_of(path) for path in modules("pipeline")} - EMPTY
    assert parts >= set(LAYERS), "a part that is gone"
    assert parts <= {*LAYERS, *FOUNDATION}, "a part without a layer"
    wrong = {
        _name(path): bad
        for path in modules("pipeline")
        if part_of(path) not in EMPTY and (bad := upwards(part_of(path), path.read_text()))
    }
    assert not wrong
    assert out_of_order(LAYERS) == []


@pytest.mark.parametrize(
    ("part", "source", "bad"),
    [
        ("evaluation", "from pipeline.training import loop", "training"),
        ("training", "def f():\n    from pipeline.export.formats import ExportSource", "export"),
        ("training", "from pipeline import export", "export"),
        ("data.shards", "import pipeline.config as config", "config"),
        ("data.shards", "from pipeline.data.stream import plan", "data.stream"),
        ("tracking", "importlib.import_module('pipeline.training.loop')", "training"),
        ("export", "if TYPE_CHECKING:\n    from pipeline.tuning.driver import Sweep", "tuning"),
        ("progress", "from pipeline import storage", "storage"),
        ("redaction", "from pipeline.progress import Progress", "progress"),
    ],
)
def test_an_import_of_a_higher_part_is_found(part: str, source: str, bad: str) -> None:
    assert upwards(part, source) == {bad}


def test_an_order_with_a_cycle_is_found() -> None:
    assert out_of_order({"training": {"export"}, "export": {"training"}}) == ["training"]
    assert out_of_order({"data.shards": set(), "config": {"data.shards"}}) == []
    assert upwards("training", "from pipeline.progress import Progress\nfrom pipeline.training import step") == set()


# Libraries and texts


def test_task_modules_do_not_import_torch() -> None:
    sources = {name: (ROOT / f"{name.replace('.', '/')}.py").read_text() for name in WITHOUT_TORCH}
    assert users_of("torch", sources) == set()
    # By way of others they do not import it either.
    code = f"import sys, {', '.join(WITHOUT_TORCH)}\nassert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("library", list(ENTRANCES))
def test_foreign_libraries_enter_through_named_files(library: str) -> None:
    assert users_of(library, sources_of("pipeline", "jobs")) == set(ENTRANCES[library])


@pytest.mark.parametrize(
    "source", ["import ray", "def f():\n    import ray.data", "from ray import train", "x = import_module('ray.tune')"]
)
def test_a_use_of_a_library_elsewhere_is_found(source: str) -> None:
    assert users_of("ray", {"pipeline/data/stream/plan.py": source, "b.py": "import rayon"}) == {
        "pipeline/data/stream/plan.py"
    }


def test_detections_are_made_in_one_place_with_one_number_and_one_threshold() -> None:
    sources = sources_of("dfine_core", "pipeline", "jobs")
    for name, patterns in ONCE.items():
        for pattern in patterns:
            assert texts_matching(pattern, sources) == [name], pattern.pattern


@pytest.mark.parametrize(
    ("pattern", "source"),
    [
        (CORE_HAS_NO, "from x import redact"),
        (CORE_HAS_NO, 'os.environ["MLFLOW_TRACKING_URI"]'),
        (CORE_HAS_NO, 'find("mlflow.artifacts")'),
        (DEFAULT_THRESHOLDS, "THRESHOLD = 0.4  # of the score"),
        (DEFAULT_THRESHOLDS, "    threshold: Share = 0.4"),
        (DEFAULT_THRESHOLDS, 'float((params or {}).get("threshold", 0.4))'),
        (MOST_DETECTIONS, "KEPT = 300"),
        (MOST_DETECTIONS, "def f(keep: int = 300): ..."),
        (MOST_DETECTIONS, "max_detections: int = Field(300, ge=1)"),
        (POSTPROCESSES, "found = postprocess(output.logits, output.boxes, sizes, keep)"),
    ],
)
def test_the_checks_of_text_can_fail(pattern: re.Pattern[str], source: str) -> None:
    assert texts_matching(pattern, {"a.py": source}) == ["a.py"]


def unknown_imports(source: str) -> list[str]:
    """Imports from the project's packages of modules or names that do not exist; found without importing."""
    unknown = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or node.level or not node.module:
            continue
        if node.module.split(".")[0] not in ("pipeline", "dfine_core", "jobs", "benchmarks"):
            continue
        base = ROOT.joinpath(*node.module.split("."))
        file = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
        words = set(re.findall(r"\w+", file.read_text())) if file.is_file() else set()
        unknown += [
            f"{node.module}.{alias.name}"
            for alias in node.names
            if alias.name not in words and not (base / f"{alias.name}.py").is_file()
        ]
    return unknown


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/*.py")), ids=lambda path: path.stem)
def test_benchmarks_import_what_exists(path: Path) -> None:
    assert unknown_imports(path.read_text()) == []


def test_an_import_of_something_that_is_gone_is_found() -> None:
    source = "def f():\n    from pipeline.data.augment.augment import A\nfrom pipeline.errors import Gone, UserError"
    assert sorted(unknown_imports(source)) == ["pipeline.data.augment.augment.A", "pipeline.errors.Gone"]
