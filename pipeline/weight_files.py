"""Weight files examined and converted: what a file holds, whether it fits, and the same weights in another layout.

for line in examine("dfine_s_coco.pth"):
    print(line)
convert("dfine_s_coco.pth", "huggingface", Path("converted"))
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dfine_core.checkpoints.backbones import backbone_of, load_backbone
from dfine_core.checkpoints.folder import WEIGHTS, LoadError, is_timm_folder
from dfine_core.checkpoints.released import read_weights
from dfine_core.checkpoints.weights import save_released
from dfine_core.config import VARIANTS, ModelConfig
from dfine_core.inference import LoadedDetector, load
from dfine_core.model.hgnetv2 import SIZES, HGNetv2
from pipeline.config import ConfigError
from pipeline.open_detector import open_detector
from pipeline.pretrained import fetch, is_published
from pipeline.storage import named_in_errors

Layout = Literal["safetensors", "huggingface", "released"]
Activation = Literal["relu", "silu"]
FILE_ENDINGS = (".pth", ".pt", ".safetensors")


def examine(source: str) -> list[str]:
    """Describe weights, after they were loaded into a network with every key accounted for.

    Args:
        source: file, folder, URI or published name.

    Raises:
        ConfigError: the weights are damaged, known to be wrong, or fit no detector and no backbone.
    """
    path = Path(source)
    if is_published(source):
        source = str(path := fetch(source).folder)
    lines = [f"{source}", *(_digest_line(file) for file in _files(path))]
    if is_timm_folder(source):
        source = str(path := path / WEIGHTS)
    if path.is_file() and source.endswith(FILE_ENDINGS):
        try:
            weights = read_weights(source)
        except (LoadError, ValueError) as error:
            raise ConfigError(f"{error}") from None
        if (backbone := backbone_of(weights)) is not None:
            return [*lines, _describe_backbone(source, backbone)]
    return [*lines, *_describe_detector(open_detector(source))]


def convert(source: str, layout: Layout, out: Path, activation: Activation | None = None) -> Path:
    """Write a detector in another layout, and read it back to compare every tensor.

    Args:
        source: file, folder, URI or published name.
        out: folder, or the `.pth` file of the layout "released"; must not exist.
        activation: of a released file, which does not name it: DEIM's is "silu". Default: as named, else D-FINE's.

    Raises:
        ConfigError: `out` exists, the layout cannot express the detector, or the copy differs.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; give another path")
    model = open_detector(source, activation=activation)
    writers: dict[str, Callable[[], object]] = {
        "safetensors": lambda: model.save(out),
        "huggingface": lambda: _save_transformers(model, out),
        "released": lambda: save_released(model.detector.state_dict(), model.config, out),
    }
    if layout == "released" and out.suffix != ".pth":
        raise ConfigError(f"{out}: the released layout is one file; give a path that ends in .pth")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with named_in_errors(str(out)):
            writers[layout]()
    except ValueError as error:
        raise ConfigError(f"{source} as {layout}: {error}") from None
    again = load(out, "cpu").detector.state_dict()
    ours = model.detector.state_dict()
    if different := [key for key in ours if key not in again or not torch.equal(ours[key], again[key])]:
        raise ConfigError(f"{out}: {len(different)} tensors differ from those of {source}, {different[0]} first")
    return out


def _save_transformers(model: LoadedDetector, out: Path) -> None:
    from pipeline.export.huggingface import save_transformers  # Transformers takes seconds to import

    save_transformers(model.config, model.detector.state_dict(), model.names, out)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.glob("*") if file.name.endswith(FILE_ENDINGS)) if path.is_dir() else []


def _digest_line(file: Path) -> str:
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return f"  {file.name}: {file.stat().st_size / 1e6:.1f} MB, SHA-256 {sha256}"


def _describe_detector(model: LoadedDetector) -> list[str]:
    config = model.config
    height, width = config.input_size
    variant = next((name for name in VARIANTS if _is_variant(config, name)), None)
    bins = f"reg_max {config.reg_max}, reg_scale {config.reg_scale:g}" if config.regression == "fdr" else "direct boxes"
    shown = ", ".join(model.names[:5]) + (", …" if len(model.names) > 5 else "")
    return [
        f"  detector: D-FINE-{variant.upper() if variant else ', another configuration'}, {width} x {height}, {bins},"
        f" activation {config.activation}",
        f"  classes: {len(model.names)} ({shown})",
        "  every tensor fits; no known fault",
    ]


def _is_variant(config: ModelConfig, name: str) -> bool:
    published = ModelConfig.variant(name)
    keys = ("backbone", "backbone_stages", "encoder_dim", "decoder_dim", "num_layers", "expansion", "depth")
    return all(getattr(config, key) == getattr(published, key) for key in keys)


def _describe_backbone(source: str, weights: dict[str, Tensor]) -> str:
    problems = []
    for name, size in SIZES.items():
        stem = weights.get("stem.stem1.conv.weight")
        if stem is not None and len(stem) != size.stem[0]:
            continue
        affine = any(".lab." in key for key in weights)
        backbone = HGNetv2(ModelConfig(backbone=name, learnable_affine=affine))  # type: ignore[arg-type]
        try:
            random = load_backbone(backbone, weights)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        return f"  backbone: HGNetv2-{name}, " + (f"without {', '.join(random)}" if random else "whole")
    raise ConfigError(f"{source}: a backbone that fits none of HGNetv2 {', '.join(SIZES)}. " + "\n".join(problems[:1]))
