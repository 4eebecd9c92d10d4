"""Write a detector in the layout of D-FINE in Hugging Face Transformers: a folder that `from_pretrained` opens.

    config.json, model.safetensors, preprocessor_config.json

Transformers has other names for the same weights: `dfine_core.checkpoints.transformers_layout` translates them, and the
library's strict loading verifies the result. Its configuration covers only part of ours; `unsupported_settings` lists what is
missing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoImageProcessor, DFineConfig, DFineForObjectDetection, HGNetV2Config, RTDetrImageProcessor
from transformers.utils import logging

from dfine_core import ModelConfig
from dfine_core.checkpoints.transformers_layout import to_transformers
from dfine_core.model.hgnetv2 import SIZES
from dfine_core.model.postprocess import Detections

BILINEAR = 2  # number of Pillow's filter


def unsupported_settings(config: ModelConfig) -> str | None:
    """List the settings that Transformers cannot express, as an error message; None if there are none."""
    height, width = config.input_size
    problems = []
    if config.regression != "fdr":
        problems.append(f"regression={config.regression!r}: only boxes from distributions are supported")
    if config.activation != "relu":
        problems.append(f"activation={config.activation!r}: its heads have ReLU, whatever the configuration says")
    if config.query_selection != "default":
        problems.append(f"query_selection={config.query_selection!r}: only the default is supported")
    if config.learn_query_content:
        problems.append("learn_query_content=True: the setting exists, but the model fails on the first image")
    if config.num_layers == 1:
        problems.append("num_layers=1: heads are shared among layers, which needs at least two")
    if config.positional_table == "released" and height != width:
        problems.append(
            f"positional_table='released' at {height}x{width}: only the table 'grid' is supported, unless the input is square"
        )
    if config.positional_temperature != int(config.positional_temperature):
        problems.append(f"positional_temperature={config.positional_temperature}: only whole numbers are supported")
    if not problems:
        return None
    return f"Transformers' D-FINE cannot express {'; '.join(problems)}. Use ONNX, torch-export or safetensors instead"


def transformers_config(config: ModelConfig, names: Sequence[str]) -> DFineConfig:
    """Translate the configuration.

    Raises:
        ValueError: Transformers cannot express this detector.
    """
    if problem := unsupported_settings(config):
        raise ValueError(problem)
    loss = config.loss
    return DFineConfig(
        backbone_config=_backbone_config(config),
        freeze_backbone_batch_norms=config.freeze_norm,
        encoder_in_channels=[SIZES[config.backbone].stages[i].out_channels for i in config.backbone_stages],
        feat_strides=list(config.strides),
        encoder_hidden_dim=config.encoder_dim,
        encoder_ffn_dim=config.encoder_ffn_dim,
        encoder_attention_heads=config.encoder_heads,
        encode_proj_layers=[config.num_levels - 1],
        positional_encoding_temperature=int(config.positional_temperature),
        hidden_expansion=config.expansion,
        depth_mult=config.depth,
        d_model=config.decoder_dim,
        decoder_in_channels=[config.encoder_dim] * config.num_levels,
        decoder_ffn_dim=config.decoder_ffn_dim,
        decoder_attention_heads=config.decoder_heads,
        decoder_layers=config.num_layers,
        decoder_n_points=list(config.num_points),
        decoder_method=config.sampling,
        num_feature_levels=config.num_levels,
        num_queries=config.num_queries,
        learn_initial_query=config.learn_query_content,
        max_num_bins=config.reg_max,
        reg_scale=config.reg_scale,
        up=config.up,
        num_denoising=config.num_denoising,
        label_noise_ratio=config.label_noise_ratio,
        box_noise_scale=config.box_noise_scale,
        matcher_alpha=loss.match_alpha,
        matcher_gamma=loss.match_gamma,
        matcher_class_cost=loss.match_class,
        matcher_bbox_cost=loss.match_bbox,
        matcher_giou_cost=loss.match_giou,
        focal_loss_alpha=loss.vfl_alpha,
        focal_loss_gamma=loss.vfl_gamma,
        **{f"weight_loss_{term}": asdict(loss)[term] for term in ("vfl", "bbox", "giou", "fgl", "ddf")},
        id2label=dict(enumerate(names)),
        label2id={name: label for label, name in enumerate(names)},
    )


def _backbone_config(config: ModelConfig) -> HGNetV2Config:
    size = SIZES[config.backbone]
    middle, out = size.stem
    make: Any = HGNetV2Config  # its signature lacks out_features
    made: HGNetV2Config = make(
        stem_channels=[3, middle, out],
        embedding_size=out,
        hidden_sizes=[stage.out_channels for stage in size.stages],
        depths=[stage.blocks for stage in size.stages],
        stage_in_channels=[stage.in_channels for stage in size.stages],
        stage_mid_channels=[stage.mid_channels for stage in size.stages],
        stage_out_channels=[stage.out_channels for stage in size.stages],
        stage_num_blocks=[stage.blocks for stage in size.stages],
        stage_numb_of_layers=[size.layers] * 4,
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, True, True],
        stage_kernel_size=[3, 3, 5, 5],
        use_learnable_affine_block=config.learnable_affine,
        out_features=[f"stage{stage + 1}" for stage in config.backbone_stages],
    )
    return made


def transformers_detector(
    config: ModelConfig, state_dict: Mapping[str, Tensor], names: Sequence[str]
) -> DFineForObjectDetection:
    """Build the equal detector of Transformers.

    Raises:
        ValueError: Transformers cannot express this detector, or its weights differ.
    """
    built: Any = DFineForObjectDetection.from_pretrained(
        None,
        config=transformers_config(config, names),
        state_dict=to_transformers(state_dict),
        output_loading_info=True,
    )
    model, loading = built
    _refuse_other_weights(loading, "its D-FINE with the same settings")
    return model


def save_transformers(
    config: ModelConfig, state_dict: Mapping[str, Tensor], names: Sequence[str], folder: Path
) -> None:
    """Write the folder. Its image processor resizes to `config.input_size` and scales to 0..1, nothing else."""
    with _without_bars():
        transformers_detector(config, state_dict, names).save_pretrained(folder)
    height, width = config.input_size
    processor = RTDetrImageProcessor(
        do_resize=True,
        size={"height": height, "width": width},
        resample=BILINEAR,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=False,
        do_pad=False,
    )
    cast(Any, processor).save_pretrained(folder)


def open_transformers(folder: Path) -> Callable[[Tensor, Tensor], Detections]:
    """Open the folder the way its users do: pixels [B, 3, H, W] uint8 and sizes [B, 2] (width, height) to detections.

    Raises:
        ValueError: weights are missing or left over.
    """
    with _without_bars():
        opened: Any = DFineForObjectDetection.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    model, loading = opened
    _refuse_other_weights(loading, f"{folder}")
    processor = cast(Any, AutoImageProcessor).from_pretrained(folder, local_files_only=True)

    @torch.no_grad()
    def detect(pixels: Tensor, sizes: Tensor) -> Detections:
        output = model(**processor(images=list(pixels), return_tensors="pt"))
        height_width = sizes.flip(1)
        images = processor.post_process_object_detection(output, threshold=-1.0, target_sizes=height_width)
        return Detections(
            **{name: torch.stack([image[name] for image in images]) for name in ("labels", "boxes", "scores")}
        )

    return detect


def _refuse_other_weights(loading: Mapping[str, Iterable[object]], origin: str) -> None:
    if unused := [key for keys in loading.values() for key in keys]:
        raise ValueError(
            f"{origin}: Transformers reports missing, unexpected or mismatched weights: {', '.join(map(str, unused[:5]))}"
        )


@contextmanager
def _without_bars() -> Iterator[None]:
    """Turn off the progress bars of Transformers."""
    bars: Any = logging  # its functions have no types
    enabled = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            bars.enable_progress_bar()
