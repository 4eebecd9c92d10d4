"""Parameter groups against the published membership, learning rate and averages against their formulas."""

import copy
import math

import pytest
import torch
from torch import nn

from dfine_core import Detector, ModelConfig
from dfine_core.config import OptimizerConfig
from dfine_core.ema import ExponentialMovingAverage, ema_decay
from dfine_core.optim import learning_rate_factor, make_optimizer, parameter_groups
from dfine_core.parts import BACKBONE, PARTS, part_of, parts_named
from tests.support import recorded

# Tensors and numbers per group as the released code forms them: backbone, no_decay, rest.
PUBLISHED_GROUPS = {
    "n": [(186, 1_850_396), (151, 16_015), (91, 1_916_280)],
    "s": [(186, 1_850_396), (191, 38_135), (111, 8_433_344)],
    "m": [(262, 6_026_626), (242, 52_780), (140, 13_510_656)],
    "l": [(75, 13_482_752), (220, 39_936), (274, 17_696_534)],
    "x": [(125, 33_206_400), (226, 56_576), (277, 29_333_142)],
}


@pytest.mark.parametrize("variant", list(PUBLISHED_GROUPS))
def test_released_groups_have_the_published_members(variant: str) -> None:
    with torch.device("meta"):
        detector = Detector(ModelConfig.variant(variant))
    groups = parameter_groups(detector, OptimizerConfig.for_variant(variant))
    assert [g["name"] for g in groups] == ["backbone", "no_decay", "rest"]
    assert [(len(g["params"]), sum(p.numel() for p in g["params"])) for g in groups] == PUBLISHED_GROUPS[variant]


@pytest.mark.parametrize("variant", ["s", "l"])
def test_the_groups_of_deim_have_the_recorded_members(variant: str) -> None:
    with torch.device("meta"):
        detector = Detector(ModelConfig.variant(variant, activation="silu", freeze_at=-1, freeze_norm=False))
    config = OptimizerConfig.for_variant(variant, param_groups="deim")
    names = {id(parameter): name for name, parameter in detector.named_parameters()}
    recording = recorded.deim_rates(variant)["groups"]
    ours = [{names[id(p)] for p in group["params"]} for group in parameter_groups(detector, config)]
    assert ours == [set(group["names"]) for group in recording]
    assert sum(map(len, ours)) > 400


def test_n_of_deim_keeps_its_groups_and_decays_no_bias() -> None:
    with torch.device("meta"):
        detector = Detector(ModelConfig.variant("n"))
    groups = parameter_groups(detector, OptimizerConfig.for_variant("n", param_groups="deim"))
    assert [(len(g["params"]), sum(p.numel() for p in g["params"])) for g in groups] == PUBLISHED_GROUPS["n"]


@pytest.mark.parametrize("mode", ["released", "deim", "fixed"])
def test_every_trainable_parameter_is_in_exactly_one_group(mode: str) -> None:
    detector = Detector(ModelConfig.variant("s", num_classes=3))
    groups = parameter_groups(detector, OptimizerConfig.for_variant("s", param_groups=mode))
    grouped = [id(p) for g in groups for p in g["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in detector.parameters() if p.requires_grad}


def test_fixed_groups_spare_the_backbones_norms() -> None:
    detector = Detector(ModelConfig.variant("s", num_classes=3))
    groups = {g["name"]: g for g in parameter_groups(detector, OptimizerConfig.for_variant("s", param_groups="fixed"))}
    spared = {id(p) for p in groups["backbone_no_decay"]["params"]}
    stem = detector.backbone.stem.stem1
    assert {id(stem.bn.weight), id(stem.bn.bias), id(stem.lab.scale), id(stem.lab.bias)} <= spared
    assert id(stem.conv.weight) not in spared
    assert groups["backbone_no_decay"]["weight_decay"] == 0


def test_a_step_moves_the_backbone_at_its_own_rate() -> None:
    detector = Detector(ModelConfig.variant("n", num_classes=2))
    optimizer = make_optimizer(detector, OptimizerConfig(lr=1e-2, backbone_lr=1e-4, weight_decay=0.0))
    before = {name: p.detach().clone() for name, p in detector.named_parameters()}
    for p in detector.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in detector.named_parameters()}
    assert moved["backbone.stem.stem1.conv.weight"] == pytest.approx(1e-4, rel=1e-3)  # AdamW's first step is the rate
    assert moved["encoder.input_proj.0.conv.weight"] == pytest.approx(1e-2, rel=1e-3)


def test_the_learning_rate_warms_up_and_stays() -> None:
    assert learning_rate_factor(0) == pytest.approx(1 / 500)
    assert learning_rate_factor(249) == pytest.approx(0.5)
    assert [learning_rate_factor(step) for step in (499, 500, 10**6)] == [1, 1, 1]
    assert learning_rate_factor(0, warmup_steps=0) == 1


def test_a_cosine_tail_ends_where_it_should() -> None:
    tail = [learning_rate_factor(s, warmup_steps=10, total_steps=110, min_lr_ratio=0.1) for s in (10, 60, 110, 500)]
    assert tail == pytest.approx([1, 0.55, 0.1, 0.1])


@pytest.mark.parametrize("variant", ["s", "l"])
def test_the_rates_of_deim_are_the_recorded_ones(variant: str) -> None:
    recording = recorded.deim_rates(variant)
    shape = {
        "warmup_steps": recording["warmup_iterations"],
        "warmup_power": 2,
        "total_steps": recording["total_iterations"],
        "min_lr_ratio": recording["lr_gamma"],
        "flat_steps": recording["flat_iterations"],
        "clean_steps": recording["no_aug_iterations"],
    }
    assert recording["iterations"][0] == 0
    assert len(recording["iterations"]) == 60
    for iteration, rates in zip(recording["iterations"][1:], recording["rates"][1:], strict=True):
        factor = learning_rate_factor(iteration, **shape)
        ours = [group["initial_lr"] * factor for group in recording["groups"]]
        assert ours == pytest.approx(rates, rel=1e-12), iteration
    assert learning_rate_factor(0, **shape) == learning_rate_factor(1, **shape) > 0  # the recorded first rate is 0


def test_a_flat_cosine_of_a_hundred_steps() -> None:
    shape = {"warmup_steps": 5, "warmup_power": 2, "total_steps": 100, "min_lr_ratio": 0.5}
    factors = [learning_rate_factor(s, flat_steps=40, clean_steps=20, **shape) for s in range(100)]
    assert factors[1:6] == pytest.approx([0.04, 0.16, 0.36, 0.64, 1])
    assert factors[40:42] == pytest.approx([1, 0.999229], abs=1e-6)
    assert [factors[s] for s in (50, 60, 70, 79)] == pytest.approx([0.926777, 0.75, 0.573223, 0.500771], abs=1e-6)
    assert factors[80:] == [0.5] * 20
    none = {**shape, "warmup_steps": 0}
    assert learning_rate_factor(0, flat_steps=40, clean_steps=20, **none) == 1  # no warm-up, and no division by zero


def test_a_flat_part_as_long_as_the_run_keeps_the_rate() -> None:
    shape = {"warmup_steps": 5, "total_steps": 100, "min_lr_ratio": 0.5, "flat_steps": 780, "clean_steps": 20}
    assert {learning_rate_factor(s, **shape) for s in range(5, 100)} == {1.0}


def test_the_decay_is_the_published_function_of_the_update() -> None:
    published = {1: 0.001, 1000: 0.632, 5000: 0.993}
    for update, value in published.items():
        assert ema_decay(torch.tensor(update).double(), 0.9999, 1000).item() == pytest.approx(value, abs=5e-4)
    assert ema_decay(torch.tensor(1.0).double(), 0.9999, 0) == 0.9999


def test_averages_equal_a_plain_loop_and_survive_saving() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    average = ExponentialMovingAverage(model, decay=0.9, warmup_steps=5)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    for update in range(1, 8):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(2, 3, 4, 4))
        decay = 0.9 * (1 - math.exp(-update / 5))
        for key, value in model.state_dict().items():
            if value.dtype.is_floating_point:
                expected[key] = decay * expected[key] + (1 - decay) * value
        average.update(model)
    for key, value in average.module.state_dict().items():
        torch.testing.assert_close(value, expected[key])
    assert average.module.state_dict()["1.num_batches_tracked"] == 0  # counters are not averaged

    before = copy.deepcopy(average.state_dict())
    average.update(model, made=torch.tensor(False))
    assert average.updates == before["updates"]
    assert all(torch.equal(a, before["module"][key]) for key, a in average.module.state_dict().items())

    resumed = ExponentialMovingAverage(copy.deepcopy(model), decay=0.9, warmup_steps=5)
    resumed.load_state_dict(average.state_dict())
    average.update(model)
    resumed.update(model)
    for a, b in zip(average.module.state_dict().values(), resumed.module.state_dict().values(), strict=True):
        assert torch.equal(a, b)


# Rates by depth


# Parts from the head, with the power of the decay that each has.
DEPTHS = {
    "decoder.": 0,
    "encoder.": 1,
    "backbone.stages.3.": 2,
    "backbone.stages.2.": 3,
    "backbone.stages.1.": 4,
    "backbone.stages.0.": 5,
    "backbone.stem.": 6,
}


@pytest.mark.parametrize("variant", ["n", "l"])
@pytest.mark.parametrize("mode", ["released", "deim", "fixed"])
def test_each_part_has_the_rate_of_its_group_times_the_decay_of_its_depth(variant: str, mode: str) -> None:
    with torch.device("meta"):
        detector = Detector(ModelConfig.variant(variant))
    names = {id(p): name for name, p in detector.named_parameters()}
    settings = {"param_groups": mode, "lr": 1e-3, "backbone_lr": 1e-4}
    whole = parameter_groups(detector, OptimizerConfig.for_variant(variant, **settings))
    split = parameter_groups(detector, OptimizerConfig.for_variant(variant, **settings, layer_decay=0.5))
    before = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in whole for p in g["params"]}
    after = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in split for p in g["params"]}
    assert before.keys() == after.keys()
    assert sum(len(g["params"]) for g in split) == len(after)
    for name, (rate, decay) in after.items():
        (depth,) = (depth for prefix, depth in DEPTHS.items() if name.startswith(prefix))
        assert rate == pytest.approx(before[name][0] * 0.5**depth), name
        assert decay == before[name][1]
    by_part = {(g["name"], g["part"]): g["lr"] for g in split}
    assert by_part["rest", "decoder"] == 1e-3
    assert by_part["rest", "encoder"] == 5e-4
    assert by_part["backbone", "backbone.stage4"] == 2.5e-5
    assert by_part["backbone", "backbone.stage1"] == pytest.approx(3.125e-6)
    # L does not train its stem (model.freeze_at).
    assert ("backbone", "backbone.stem") in by_part or variant == "l"
    assert variant != "l" or not any(part == "backbone.stem" for _, part in by_part)


def test_parts_cover_a_detector_and_names_stand_for_them() -> None:
    with torch.device("meta"):
        detector = Detector(ModelConfig.variant("n"))
    assert {part_of(name) for name, _ in detector.named_parameters()} == set(PARTS)
    assert part_of("backbone.stages.3.blocks.0.layers.0.bn.running_var") == "backbone.stage4"
    assert part_of("backbone") == part_of("backbone.stages") == "backbone"
    assert parts_named(["encoder", "backbone"]) == (*BACKBONE, "encoder")
    assert parts_named(["backbone.stage2", "backbone.stem", "backbone.stem"]) == ("backbone.stem", "backbone.stage2")
    with pytest.raises(ValueError, match=r"unknown part 'stem'; known: backbone, backbone\.stem"):
        parts_named(["stem"])
