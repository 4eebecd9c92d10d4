"""Names and configuration of Transformers' D-FINE, without that library; `tests/export` compares with the library itself."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dfine_core import Detector, ModelConfig, load
from dfine_core.checkpoints.class_transfer import coco_categories, coco_names, objects365_names
from dfine_core.checkpoints.folder import LoadError, read_detector, tensors_to_bytes
from dfine_core.checkpoints.transformers_layout import config_from_transformers, from_transformers, to_transformers
from dfine_core.model.hgnetv2 import SIZES
from tests.support.varied_detectors import varied_detector

NAMES = ("cat", "dog", "traffic light")
SMALL = ModelConfig.variant("n", num_classes=3, input_size=(128, 160), num_queries=30, positional_table="grid")


@functools.cache
def source(config: ModelConfig) -> Detector:
    return varied_detector(config)


def json_of(config: ModelConfig = SMALL, names: tuple[str, ...] = NAMES, **changes: Any) -> dict[str, Any]:
    """Configuration as the hub's files of D-FINE-N have it, by hand."""
    size = SIZES["B0"]
    backbone = {
        "model_type": "hgnet_v2",
        "stem_channels": [3, 16, 16],
        "stage_in_channels": [16, 64, 256, 512],
        "stage_mid_channels": [16, 32, 64, 128],
        "stage_out_channels": [64, 256, 512, 1024],
        "stage_num_blocks": [1, 1, 2, 1],
        "stage_numb_of_layers": [3, 3, 3, 3],
        "use_learnable_affine_block": True,
        "out_features": ["stage3", "stage4"],
    }
    assert [stage.out_channels for stage in size.stages] == backbone["stage_out_channels"]
    return {
        "model_type": "d_fine",
        "backbone_config": backbone,
        "freeze_backbone_batch_norms": False,
        "encoder_hidden_dim": 128,
        "encoder_ffn_dim": 512,
        "hidden_expansion": 0.34,
        "depth_mult": 0.5,
        "d_model": 128,
        "decoder_ffn_dim": 512,
        "decoder_layers": 3,
        "decoder_n_points": [6, 6],
        "num_feature_levels": 2,
        "num_queries": config.num_queries,
        "weight_loss_fgl": 0.25,
        "id2label": {str(label): name for label, name in enumerate(names)},
        **changes,
    }


def folder_with(folder: Path, content: dict[str, Any], config: ModelConfig = SMALL, **processor: Any) -> Path:
    folder.mkdir()
    weights = to_transformers(source(config).state_dict())
    (folder / "model.safetensors").write_bytes(tensors_to_bytes(weights))
    (folder / "config.json").write_text(json.dumps(content))
    height, width = config.input_size
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": {"height": height, "width": width}, "do_normalize": False, **processor})
    )
    return folder


@pytest.mark.parametrize("variant", ["n", "s", "m", "l", "x"])
def test_weights_return_from_their_names_bit_for_bit(variant: str) -> None:
    ours = Detector(ModelConfig.variant(variant)).state_dict()
    theirs = to_transformers(ours)
    assert not any("in_proj" in name or (".conv.weight" in name and "backbone" in name) for name in theirs)
    again = from_transformers(theirs)
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in ours.items())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            "backbone.stages.2.blocks.1.layers.0.conv2.lab.scale",
            "model.backbone.model.encoder.stages.2.blocks.1.layers.0.conv2.lab.scale",
        ),
        ("backbone.stem.stem2a.conv.weight", "model.backbone.model.embedder.stem2a.convolution.weight"),
        ("backbone.stages.1.downsample.bn.bias", "model.backbone.model.encoder.stages.1.downsample.normalization.bias"),
        (
            "encoder.fpn_blocks.0.cv3.0.bottlenecks.1.conv2.norm.running_var",
            "model.encoder.fpn_blocks.0.csp_rep2.bottlenecks.1.conv2.norm.running_var",
        ),
        ("encoder.encoder.0.layers.0.norm2.bias", "model.encoder.encoder.0.layers.0.final_layer_norm.bias"),
        ("decoder.decoder.layers.1.norm3.bias", "model.decoder.layers.1.final_layer_norm.bias"),
        ("decoder.decoder.layers.1.linear2.weight", "model.decoder.layers.1.fc2.weight"),
        ("decoder.enc_bbox_head.layers.2.weight", "model.enc_bbox_head.layers.2.weight"),
        ("decoder.dec_score_head.2.bias", "model.decoder.class_embed.2.bias"),
        ("decoder.enc_output.norm.weight", "model.enc_output.1.weight"),
    ],
)
def test_names_by_hand(ours: str, theirs: str) -> None:
    tensor = torch.rand(2)
    assert list(to_transformers({ours: tensor})) == [theirs]
    assert list(from_transformers({theirs: tensor})) == [ours]


def test_query_key_and_value_are_stacked_in_this_order() -> None:
    name = "model.decoder.layers.0.self_attn"
    parts = {f"{name}.{letter}_proj.bias": torch.full((2,), float(i)) for i, letter in enumerate("vqk")}
    assert from_transformers(parts)["decoder.decoder.layers.0.self_attn.in_proj_bias"].tolist() == [1, 1, 2, 2, 0, 0]


def test_an_unknown_name_stays_and_a_lonely_projection_is_no_attention() -> None:
    given = {"model.something.weight": torch.ones(1), "model.decoder.layers.0.self_attn.q_proj.bias": torch.ones(1)}
    assert "model.something.weight" in from_transformers(given)
    assert not any("in_proj" in key for key in from_transformers(given))


def test_a_folder_opens_with_its_classes_its_size_and_its_weights(tmp_path: Path) -> None:
    opened = load(folder_with(tmp_path / "hub", json_of()), "cpu")
    assert opened.config == SMALL.with_(loss=opened.config.loss)
    assert opened.config.loss.fgl == 0.25
    assert opened.names == NAMES
    assert opened.category_ids == (0, 1, 2)
    assert opened.path == str(tmp_path / "hub" / "model.safetensors")
    expected = source(SMALL).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in opened.detector.state_dict().items())


def test_coco_classes_have_cocos_ids_however_they_are_spelled(tmp_path: Path) -> None:
    names = tuple({"airplane": "aeroplane", "tv": "tvmonitor"}.get(name, name.title()) for name in coco_names())
    config = SMALL.with_(num_classes=80)
    opened = load(folder_with(tmp_path / "hub", json_of(names=names), config), "cpu")
    assert opened.names == names
    assert opened.category_ids == tuple(number for number, _ in coco_categories())
    shuffled = load(folder_with(tmp_path / "other", json_of(names=names[::-1]), config), "cpu")
    assert shuffled.category_ids == tuple(range(80))


def test_placeholders_are_no_names(tmp_path: Path) -> None:
    names = tuple(f"LABEL_{label}" for label in range(3))
    assert load(folder_with(tmp_path / "hub", json_of(names=names)), "cpu").names == ("class_0", "class_1", "class_2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "rt_detr"}, "model_type is 'rt_detr', expected 'd_fine'"),
        ({"decoder_activation_function": "silu"}, "decoder_activation_function is 'silu', this detector has 'relu'"),
        ({"encoder_layers": 2}, "encoder_layers is 2"),
        ({"learn_initial_query": True}, "learn_initial_query is True"),
        ({"backbone_config": {"out_features": []}}, "none of HGNetv2 B0"),
        ({"num_queries": 0, "d_model": 130}, "must be divisible"),
    ],
)
def test_another_model_and_other_settings_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_transformers(json_of(**changes), (128, 160), source(SMALL).state_dict())
    with pytest.raises(LoadError, match=message):
        load(folder_with(tmp_path / "hub", json_of(**changes)))


@pytest.mark.parametrize("labels", [{"1": "cat"}, {"1": "a", "2": "b", "3": "c"}, {str(i): "a" for i in range(80)}, {}])
def test_labels_of_another_number_of_classes_are_refused(labels: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"id2label has \d+ labels .* for 3 classes in the weights"):
        load(folder_with(tmp_path / "hub", json_of(id2label=labels)))


@pytest.mark.parametrize("first", [0, 1])
def test_a_row_of_objects365_is_a_category_id_whatever_the_label_file_counts_from(first: int, tmp_path: Path) -> None:
    config = SMALL.with_(num_classes=366)
    named = [name for name in objects365_names() if name is not None]
    labels = {str(first + i): name for i, name in enumerate(named)}
    opened = load(folder_with(tmp_path / "hub", json_of(id2label=labels), config), "cpu")
    assert len(opened.names) == 366
    assert opened.names[1:] == tuple(named)
    stored = read_detector(str(tmp_path / "hub"))
    assert not stored.named  # so that `init` takes the names of Objects365, with row 0 untrained


def test_bins_are_those_of_the_weights_whatever_the_configuration_claims(tmp_path: Path) -> None:
    """A configuration of D-FINE-X can have Transformers' default of 4, while its tensors have 8."""
    config = SMALL.with_(reg_scale=8.0)
    assert load(folder_with(tmp_path / "hub", json_of(reg_scale=4.0), config), "cpu").config.reg_scale == 8.0


@pytest.mark.parametrize(
    ("processor", "message"),
    [({"do_normalize": True}, "has do_normalize"), ({"size": {"shortest_edge": 640}}, "shortest_edge")],
)
def test_an_image_processor_that_prepares_otherwise_is_refused(
    processor: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(LoadError, match=message):
        load(folder_with(tmp_path / "hub", json_of(), **processor))


def test_a_folder_without_safetensors_names_what_to_do(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "hub", json_of())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"no model.safetensors beside config.json; save .* safe_serialization"):
        load(folder)


def test_a_folder_whose_keys_are_its_values_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "hub", json_of())
    weights = to_transformers(source(SMALL).state_dict())
    for name in list(weights):
        if ".self_attn.k_proj." in name:
            weights[name] = weights[name.replace("k_proj", "v_proj")]
    (folder / "model.safetensors").write_bytes(tensors_to_bytes(weights))
    with pytest.raises(LoadError, match=r"keys are a copy of its values in .*decoder\.layers\.0\.self_attn"):
        load(folder)


def test_a_backbone_of_timm_is_no_detector(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "hub", {"architecture": "hgnetv2_b0", "num_classes": 1000})
    with pytest.raises(LoadError, match="timm's hgnetv2_b0, a backbone, which only `init` of a training takes"):
        load(folder)
