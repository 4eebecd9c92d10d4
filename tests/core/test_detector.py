"""Network as a whole: sizes, compilation, export, and errors for invalid input."""

import pytest
import torch
from torch import nn

from dfine_core import Detector, ModelConfig
from dfine_core.model.attention import DeformableAttention, split_levels
from dfine_core.model.hybrid_encoder import positional_table
from tests.support import recorded


def test_any_size_that_the_strides_divide_is_taken() -> None:
    config = ModelConfig.variant("s", num_classes=9, input_size=(160, 224), reg_max=16, reg_scale=8.0)
    detector = Detector(config).eval()
    for height, width in ((160, 224), (224, 160), (192, 192)):
        output = detector(recorded.images(1, height, width, 0))
        assert output.logits.shape == (1, 300, 9)
        assert output.boxes.shape == (1, 300, 4)


def test_the_parameter_free_settings_are_free() -> None:
    """up, reg_scale and the temperature change no shape; reg_max changes only the last layer of the edge heads."""
    shapes = {}
    for reg_max in (8, 32):
        detector = Detector(ModelConfig.variant("n", num_classes=2, reg_max=reg_max, reg_scale=6.0, up=0.3))
        shapes[reg_max] = {key: tuple(t.shape) for key, t in detector.state_dict().items()}
    differing = {key for key in shapes[8] if shapes[8][key] != shapes[32][key]}
    assert differing == {f"decoder.dec_bbox_head.{i}.layers.2.{leaf}" for i in range(3) for leaf in ("weight", "bias")}


@pytest.mark.parametrize("name", ["B0", "B1", "B2", "B3", "B4", "B5", "B6"])
def test_every_backbone_has_the_published_strides(name: str) -> None:
    with torch.device("meta"):
        detector = Detector(ModelConfig.variant("s", backbone=name))
        maps = detector.backbone(torch.empty(1, 3, 64, 96))
    assert [tuple(x.shape[-2:]) for x in maps] == [(8, 12), (4, 6), (2, 3)]


def test_freezing_follows_the_settings() -> None:
    detector = Detector(ModelConfig.variant("l", num_classes=2))
    frozen = {name for name, p in detector.named_parameters() if not p.requires_grad}
    assert len([name for name in frozen if name.startswith("backbone.stem.")]) == 5
    assert not any(isinstance(module, nn.BatchNorm2d) for module in detector.backbone.modules())
    deeper = Detector(ModelConfig.variant("s", num_classes=2, freeze_at=1, freeze_stem_only=False))
    trained = {name for name, p in deeper.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("backbone.stem", "backbone.stages.0", "backbone.stages.1")) for name in trained)
    assert any(name.startswith("backbone.stages.2") for name in trained)


@torch.no_grad()
def test_every_layer_can_be_asked_for_in_evaluation() -> None:
    config = ModelConfig.variant("s", num_classes=2, input_size=(160, 160))
    detector = Detector(config)
    recorded.fill(detector, 0)
    detector.eval()
    images = recorded.images(1, 160, 160, 0)
    plain, full = detector(images), detector(images, every_layer=True)
    torch.testing.assert_close(plain.logits, full.logits, rtol=0, atol=1e-6)  # the heads of all layers are one product
    assert full.matching.edge_logits.shape == (3, 1, 300, 4, 33)
    assert full.matching.boxes.shape == (3, 1, 300, 4)


@pytest.mark.parametrize("sampling", ["default", pytest.param("discrete", marks=pytest.mark.slow)])
def test_the_detector_is_traced_as_one_graph_and_exported_with_the_same_output(sampling: str) -> None:
    config = ModelConfig.variant(
        "n", num_classes=2, input_size=(64, 64), num_queries=20, num_layers=2, sampling=sampling
    )
    detector = Detector(config)
    recorded.fill(detector, 0)
    detector.deploy()
    images = recorded.images(2, 64, 64, 0)
    with torch.no_grad():
        expected = detector(images)
        # The backend runs the captured graph as it is: no graph break, but no compiled kernel either.
        traced = torch.compile(detector, backend="eager", fullgraph=True)(images)
        torch.testing.assert_close(traced.logits, expected.logits, rtol=1e-4, atol=1e-5)
        program = torch.export.export(Plain(detector), (images,)).module()
        logits, boxes = program(images)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(boxes, expected.boxes, rtol=1e-4, atol=1e-5)


class Plain(nn.Module):
    """Wrapper with tensors as output, for an exporter."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.detector(images)
        return output.logits, output.boxes


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("spread", [0.3, 4.0], ids=["inside the maps", "also outside"])
@torch.no_grad()
def test_deformable_attention_equals_a_plain_loop(gathers: bool, spread: float) -> None:
    torch.manual_seed(0)
    shapes, heads, dim = [(4, 5), (2, 3)], 2, 8
    attention = DeformableAttention(dim, heads, (2, 1))
    attention.gathers = gathers
    for parameter in attention.parameters():
        parameter.normal_(0, spread)
    memory = torch.randn(1, sum(h * w for h, w in shapes), dim)
    query, boxes = torch.randn(1, 3, dim), torch.rand(1, 3, 4) * 0.8 + 0.1
    ours = attention(query, boxes, split_levels(memory, shapes, heads))

    level_of, points_in = [0, 0, 1], [2, 2, 1]
    starts = [0, 20]
    expected = torch.zeros(1, 3, dim)
    for q in range(3):
        offsets = attention.sampling_offsets(query[0, q]).reshape(heads, 3, 2)
        weights = attention.attention_weights(query[0, q]).reshape(heads, 3).softmax(-1)
        for head in range(heads):
            for point in range(3):
                height, width = shapes[level_of[point]]
                centre, size = boxes[0, q, :2], boxes[0, q, 2:]
                x, y = (centre + offsets[head, point] / points_in[point] * size * 0.5).tolist()
                column, row = x * width - 0.5, y * height - 0.5
                for i in (int(row // 1), int(row // 1) + 1):
                    for j in (int(column // 1), int(column // 1) + 1):
                        if 0 <= i < height and 0 <= j < width:
                            token = memory[0, starts[level_of[point]] + i * width + j]
                            share = (1 - abs(row - i)) * (1 - abs(column - j)) * weights[head, point]
                            channels = slice(head * dim // heads, (head + 1) * dim // heads)
                            expected[0, q, channels] += share * token[channels]
    torch.testing.assert_close(ours, expected)


def test_positional_tables_agree_on_squares_and_say_row_and_column_on_a_grid() -> None:
    device = torch.device("cpu")
    square = [positional_table(5, 5, 16, 1e4, order, device) for order in ("released", "grid")]
    assert torch.equal(square[0], square[1])
    wide = positional_table(2, 3, 16, 1e4, "grid", device)[0].reshape(2, 3, 16)
    assert torch.equal(wide[1, 0, :8], wide[1, 2, :8])  # one row: first half equal
    assert torch.equal(wide[0, 2, 8:], wide[1, 2, 8:])  # one column: second half equal
    assert not torch.equal(positional_table(2, 3, 16, 1e4, "released", device)[0].reshape(2, 3, 16), wide)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("t", {}, "unknown variant 't': choose one of n, s, m, l, x"),
        ("s", {"reg_max": 31}, r"reg_max \(31\) must be an even number"),
        ("s", {"reg_max": 2}, r"reg_max \(2\)"),
        ("s", {"num_clases": 3}, "unknown setting 'num_clases'.*num_classes"),
        ("n", {"input_size": (160, 160)}, r"\(160, 160\) gives 125 feature positions, fewer than num_queries \(300\)"),
        ("s", {"input_size": (650, 640)}, r"must be a multiple of 32.*nearest is \(640, 640\)"),
        ("s", {"num_classes": 0}, "num_classes"),
        ("s", {"num_points": (4, 4)}, "num_points"),
    ],
)
def test_a_wrong_setting_is_named_with_a_way_out(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.variant(name, **settings)


def test_images_that_are_too_small_are_refused_with_their_size() -> None:
    detector = Detector(ModelConfig.variant("s", num_classes=2, input_size=(160, 160))).eval()
    with pytest.raises(ValueError, match=r"images of size \(64, 64\) gives 84"):
        detector(torch.zeros(1, 3, 64, 64))


def test_weights_of_another_scale_are_refused() -> None:
    x_like = Detector(ModelConfig.variant("n", num_classes=2, reg_scale=8.0))
    with pytest.raises(ValueError, match="reg_scale = 8, this model has 4"):
        Detector(ModelConfig.variant("n", num_classes=2)).load_state_dict(x_like.state_dict())
