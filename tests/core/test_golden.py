"""Comparison with the published detectors, D-FINE and DEIM, number by number."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from dfine_core import Criterion, DenoisingQueries, Detector, ModelConfig
from dfine_core.model.hgnetv2 import LearnableAffine
from dfine_core.model.layers import FrozenBatchNorm2d
from dfine_core.model.postprocess import postprocess
from tests.support import recorded

# Parameters of the training graph and after deploy(), specification of the released code, 80 classes.
PARAMETERS = {
    "n": (3_782_693, 3_753_799),
    "s": (10_321_877, 10_237_491),
    "m": (19_590_064, 19_248_189),
    "l": (31_244_152, 30_724_195),
    "x": (62_621_560, 61_601_635),
}
TRAINABLE = {"n": 3_782_691, "s": 10_321_875, "m": 19_590_062, "l": 31_219_222, "x": 62_596_118}
DEPLOYED_KEYS = {"n": 506, "s": 550, "m": 723, "l": 751, "x": 1019}


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def from_case(case: dict[str, object], **settings: object) -> Detector:
    sizes = (case["height"], case["width"]) if "height" in case else (case["size"], case["size"])
    given = {"num_classes": case["num_classes"], "input_size": sizes, **recorded.settings(case), **settings}
    detector = Detector(ModelConfig.variant(str(case["variant"]), **given))
    recorded.fill(detector, int(str(case["seed"])))
    return detector


@pytest.mark.parametrize("variant", list(PARAMETERS))
def test_keys_shapes_and_counts_are_the_published_ones(variant: str) -> None:
    detector = Detector(ModelConfig.variant(variant))
    theirs = {k: v for k, v in recorded.keys_and_shapes(variant).items() if k not in recorded.DERIVED}
    ours = {key: list(tensor.shape) for key, tensor in detector.state_dict().items()}
    assert ours == theirs
    assert list(ours) == list(theirs)  # optimiser states of training checkpoints are positional

    assert sum(p.numel() for p in detector.parameters()) == PARAMETERS[variant][0]
    assert sum(p.numel() for p in detector.parameters() if p.requires_grad) == TRAINABLE[variant]
    detector.deploy(as_released=True)
    assert sum(p.numel() for p in detector.parameters()) == PARAMETERS[variant][1]
    assert len(detector.state_dict()) + len(recorded.DERIVED) == DEPLOYED_KEYS[variant]


@pytest.mark.parametrize("name", recorded.recordings("eval"))
@torch.no_grad()
def test_evaluation_equals_the_recording(name: str) -> None:
    record = recorded.load(name)
    case = record.case
    detector = from_case(case).eval()
    images = recorded.images(1, case["height"], case["width"], case["seed"])

    backbone_maps = detector.backbone(images)
    maps = detector.encoder(backbone_maps)
    stats = record.json("stage_stats")
    theirs = [*stats["backbone"], *stats["encoder"]]
    for ours, expected in zip([*backbone_maps, *maps], theirs, strict=True):
        assert list(ours.shape) == expected["shape"]
        assert float(ours.mean()) == pytest.approx(expected["mean"], abs=1e-5)
        assert float(ours.std()) == pytest.approx(expected["std"], rel=1e-4)
    for ours_map, theirs_map in zip(maps, record.encoder_maps, strict=True):
        assert relative(ours_map, theirs_map) <= 1e-5

    logits, boxes = record.tensor("pred_logits"), record.tensor("pred_boxes")
    # Near-tied scores may swap ranks among the queries, so compare query with its counterpart.
    for output, tolerance in ((detector.decoder(record.encoder_maps), 1e-5), (detector(images), 1e-4)):
        distance = torch.cdist(torch.cat([output.logits[0], output.boxes[0]], 1), torch.cat([logits[0], boxes[0]], 1))
        ours_index, theirs_index = linear_sum_assignment(distance.numpy())
        assert relative(output.logits[0][ours_index], logits[0][theirs_index]) <= tolerance
        assert relative(output.boxes[0][ours_index], boxes[0][theirs_index]) <= tolerance

    found = postprocess(logits, boxes, torch.tensor([[640, 480]]))
    assert torch.equal(found.labels[0], record.tensor("top_labels"))
    torch.testing.assert_close(found.boxes[0], record.tensor("top_boxes"), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(found.scores[0], record.tensor("top_scores"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", recorded.recordings("train"))
def test_every_loss_term_and_gradient_equals_the_recording(name: str) -> None:
    record = recorded.load(name)
    case = record.case
    detector = from_case(case, num_denoising=case["num_denoising"]).train()
    recorded.batch_norms_to_eval(detector)
    images = recorded.images(len(case["counts"]), case["size"], case["size"], case["seed"])
    targets = recorded.targets(case["counts"], case["num_classes"], case["seed"])
    denoising: DenoisingQueries | bool = False
    if "dn.class" in record.arrays:
        denoising = recorded.denoising_queries(record, targets)

    output = detector(images, targets, denoising=denoising)
    terms = Criterion(detector.config)(output, targets)

    expected = record.json("losses")
    assert set(terms) == set(expected)
    for key, value in expected.items():
        assert terms[key].item() == pytest.approx(value, rel=1e-4, abs=1e-7), key

    total = torch.stack(list(terms.values())).sum()
    assert total.item() == pytest.approx(float(record.arrays["total"]), rel=1e-5)
    total.backward()
    norms = record.json("grad_norms")
    parameters = dict(detector.named_parameters())
    # DEIM builds no embedding for denoising that is off; ours takes no part then.
    unlisted = set(parameters) - set(norms)
    assert set(norms) <= set(parameters)
    assert unlisted <= ({"decoder.denoising_class_embed.weight"} if case["num_denoising"] == 0 else set())
    assert not any(parameters[key].grad.any() for key in unlisted)
    tolerance = 1e-3 if case["criterion"] else 0.01  # DEIM's recordings are stable to 1.2e-4, D-FINE's to 1e-3
    floor = 1e-3 * max(norm for norm in norms.values() if norm is not None)
    for key, norm in norms.items():
        gradient = parameters[key].grad
        ours = 0.0 if gradient is None else float(gradient.norm())
        assert abs(ours - (norm or 0.0)) <= tolerance * max(norm or 0.0, floor), key


@pytest.mark.parametrize("variant", ["n", "s", "x"])
@torch.no_grad()
def test_deploy_changes_nothing_but_the_graph(variant: str) -> None:
    size = 320 if variant == "n" else 160
    case = {"variant": variant, "size": size, "num_classes": 80, "seed": 0}
    detector = from_case(case).eval()
    affine = [module for module in detector.modules() if isinstance(module, LearnableAffine)]
    assert bool(affine) == (variant != "x")
    for module in affine[::3]:  # scales of both signs
        module.scale.neg_()
        module.bias.add_(0.1)
    images = recorded.images(1, size, size, 0)
    before = detector.decoder(maps := detector.encoder(detector.backbone(images)))
    detector.deploy()
    fused_maps = detector.encoder(detector.backbone(images))
    for fused, plain in zip(fused_maps, maps, strict=True):
        assert relative(fused, plain) <= 1e-5
    after = detector.decoder(maps)
    assert relative(after.logits, before.logits) <= 1e-5
    assert relative(after.boxes, before.boxes) <= 1e-5
    assert not [module for module in detector.modules() if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d)]
