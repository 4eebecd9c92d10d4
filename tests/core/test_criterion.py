"""Whole training loss on difficult data: no objects, too many objects, odd classes, a rank without objects."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dfine_core import Criterion, Detector, LossConfig, ModelConfig
from tests.support import recorded

NUMBER_OF_TERMS = {"n": 38, "s": 38, "m": 48, "l": 68, "x": 68}  # published, with denoising


def small(**settings: Any) -> ModelConfig:
    """Configuration of a small N detector."""
    defaults = {"num_classes": 4, "input_size": (96, 96), "num_queries": 40, "num_denoising": 20}
    return ModelConfig.variant("n", **{**defaults, **settings})


def step(config: ModelConfig, targets: list[dict[str, Tensor]], **forward: Any) -> tuple[Detector, dict[str, Tensor]]:
    torch.manual_seed(0)
    detector = Detector(config).train()
    images = recorded.images(len(targets), *config.input_size, seed=1)
    terms = Criterion(config)(detector(images, targets, **forward), targets)
    torch.stack(list(terms.values())).sum().backward()
    return detector, terms


def assert_healthy(detector: nn.Module, terms: dict[str, Tensor]) -> None:
    for name, term in terms.items():
        assert torch.isfinite(term), name
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} took no part in the step"
            assert torch.isfinite(parameter.grad).all(), name


def boxes(*rows: tuple[float, float, float, float]) -> dict[str, Tensor]:
    return {"labels": torch.zeros(len(rows), dtype=torch.int64), "boxes": torch.tensor(rows).reshape(-1, 4)}


CASES = {
    "no boxes in one image": (small(), recorded.targets([3, 0], 4, 0)),
    "no boxes in the batch": (small(), recorded.targets([0, 0], 4, 0)),
    "350 boxes in an image": (small(), recorded.targets([350, 1], 4, 0)),
    "one class": (small(num_classes=1), recorded.targets([3, 2], 1, 0)),
    "366 classes": (small(num_classes=366), recorded.targets([3, 2], 366, 0)),
    "empty and inverted boxes": (small(), [boxes((0.5, 0.5, 0, 0), (0.2, 0.2, 0.1, 0)), boxes((0.5, 0.5, -0.2, 0.2))]),
    "boxes outside the image": (small(), [boxes((1.5, 0.5, 0.2, 0.2)), boxes((-0.3, 2, 1, 1), (0.5, 0.5, 3, 3))]),
    "the same box many times": (small(), [boxes(*[(0.5, 0.5, 0.2, 0.2)] * 30), boxes((0.5, 0.5, 0.2, 0.2))]),
    "no denoising": (small(num_denoising=0), recorded.targets([3, 2], 4, 0)),
    "one decoder layer": (small(num_layers=1), recorded.targets([3, 2], 4, 0)),
    "four bins": (small(reg_max=4), recorded.targets([3, 2], 4, 0)),
    "agnostic selection": (small(query_selection="agnostic"), recorded.targets([3, 2], 4, 0)),
    "one2many selection": (small(query_selection="one2many"), recorded.targets([3, 2], 4, 0)),
    "discrete sampling": (small(sampling="discrete"), recorded.targets([3, 2], 4, 0)),
    "learnt query content": (small(learn_query_content=True), recorded.targets([3, 2], 4, 0)),
    "direct regression": (small(regression="direct"), recorded.targets([3, 0], 4, 0)),
    "matchability-aware loss": (small(loss=LossConfig(classification="mal")), recorded.targets([3, 0], 4, 0)),
    "matchability-aware loss, no boxes": (
        small(loss=LossConfig(classification="mal")),
        recorded.targets([0, 0], 4, 0),
    ),
    "SiLU": (small(activation="silu"), recorded.targets([3, 2], 4, 0)),
    "rectangular input": (small(input_size=(96, 224)), recorded.targets([3, 2], 4, 0)),
}


@pytest.mark.parametrize("case", list(CASES))
def test_losses_and_gradients_stay_finite_and_complete(case: str) -> None:
    config, targets = CASES[case]
    if config.num_denoising == 0:
        detector, terms = step(config, targets)
        assert not any("_dn" in name for name in terms)
    else:
        detector, terms = step(config, targets)
    assert_healthy(detector, terms)


@pytest.mark.parametrize("variant", ["n", "m"])
def test_the_terms_are_the_published_ones_even_without_boxes(variant: str) -> None:
    config = ModelConfig.variant(variant, num_classes=3, input_size=(96, 96), num_queries=40, num_denoising=20)
    full = step(config, recorded.targets([2], 3, 0))[1]
    empty = step(config, recorded.targets([0], 3, 0))[1]
    assert len(full) == NUMBER_OF_TERMS[variant]
    assert set(empty) == set(full)
    background = {"loss_vfl", "loss_ddf"}
    for name, value in empty.items():
        may_cost = any(name.startswith(kind) for kind in background) and "_dn" not in name
        assert may_cost or value.item() == 0, name


def test_the_matchability_aware_loss_has_terms_of_its_own_name() -> None:
    config, targets = small(), recorded.targets([2], 4, 0)
    vfl = step(config, targets)[1]
    mal = step(config.with_(loss=LossConfig(classification="mal")), targets)[1]
    last_denoising = f"loss_ddf_dn_{config.num_layers - 1}"  # 0 in every step; DEIM's log leaves it out
    assert set(mal) == {name.replace("vfl", "mal") for name in vfl} - {last_denoising}
    assert all(torch.equal(mal[name], vfl[name]) for name in set(mal) & set(vfl))


def test_the_first_step_has_the_published_pattern() -> None:
    """At initialisation every layer predicts the encoder's box, so box terms agree and DDF is 0 (specification 4.8, 5.7)."""
    config = ModelConfig.variant("n", input_size=(320, 320))
    terms = step(config, recorded.targets([7, 12], 80, 0))[1]
    for kind in ("bbox", "giou"):
        same = [terms[f"loss_{kind}{suffix}"].item() for suffix in ("", "_aux_0", "_aux_1", "_pre")]
        assert same == pytest.approx([same[0]] * 4, rel=1e-5)
    assert terms["loss_ddf_aux_0"].item() == pytest.approx(0, abs=1e-6)
    total = torch.stack(list(terms.values())).sum().item()
    assert 20 < total < 60  # 37.0 in the released log of N, 35.7 on synthetic targets


def test_denoising_drawn_from_a_generator_repeats() -> None:
    config, targets = small(), recorded.targets([3, 2], 4, 0)
    first = step(config, targets, generator=torch.Generator().manual_seed(7))[1]
    second = step(config, targets, generator=torch.Generator().manual_seed(7))[1]
    other = step(config, targets, generator=torch.Generator().manual_seed(8))[1]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_half_precision_heads_do_not_reach_the_losses() -> None:
    config, targets = small(), recorded.targets([3, 2], 4, 0)
    torch.manual_seed(0)
    detector = Detector(config).train()
    images = recorded.images(2, 96, 96, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = detector(images, targets, denoising=False)
        terms = Criterion(config)(output, targets)
    assert output.logits.dtype == torch.bfloat16
    assert output.boxes.dtype == torch.float32
    assert output.matching is not None
    assert output.matching.edge_logits is not None
    assert output.matching.edge_logits.dtype == torch.float32
    assert {term.dtype for term in terms.values()} == {torch.float32}

    released = Detector(config.with_(numerics="released")).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = released(images, targets, denoising=False)
        terms = Criterion(released.config)(output, targets)
    assert output.matching is not None
    assert output.matching.edge_logits is not None
    assert output.matching.edge_logits.dtype == torch.bfloat16
    assert all(torch.isfinite(term) for term in terms.values())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"labels": torch.tensor([4]), "boxes": torch.full((1, 4), 0.5)}, "label 4, outside 0..3"),
        ({"labels": torch.tensor([-1]), "boxes": torch.full((1, 4), 0.5)}, "label -1, outside 0..3"),
        ({"labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, float("nan"), 0.1, 0.1]])}, "box 0 .* not finite"),
        ({"labels": torch.tensor([0, 1]), "boxes": torch.full((1, 4), 0.5)}, "2 labels but boxes of shape"),
    ],
)
def test_targets_that_cannot_be_trained_on_are_named(target: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step(small(), [recorded.targets([2], 4, 0)[0], target])


def test_the_loss_refuses_an_evaluation_output() -> None:
    config = small()
    detector = Detector(config).eval()
    with pytest.raises(ValueError, match="training mode"):
        Criterion(config)(detector(recorded.images(1, 96, 96, 0)), recorded.targets([1], 4, 0))


def _train_on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    config = small()
    torch.manual_seed(0)
    model = DistributedDataParallel(Detector(config).train())  # find_unused_parameters is off
    counts = [[3, 1], [0, 0]][rank]  # the second rank sees no object at all
    targets = recorded.targets(counts, 4, rank)
    criterion = Criterion(config)
    for _ in range(2):  # the reducer complains about idle parameters at the start of the second step
        model.zero_grad()
        terms = criterion(model(recorded.images(2, 96, 96, rank), targets), targets)
        torch.stack(list(terms.values())).sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.save({"gradients": gradients, "names": sorted(terms)}, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.timeout(300)
def test_a_rank_without_objects_neither_hangs_nor_drops_a_gradient(tmp_path: Path) -> None:
    mp.spawn(_train_on_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["names"] == second["names"]
    assert torch.isfinite(first["gradients"]).all()
    assert torch.equal(first["gradients"], second["gradients"])
