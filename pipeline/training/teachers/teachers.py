"""Teachers of a run on one worker: frozen networks, trained projectors, and the terms that they add to the loss.

Every teacher sees the very images that the student gets. A term is computed for each micro-batch: maps are averaged over
positions, boxes are divided by counts over the whole step, so the step is the same on any number of workers. Projectors are no
part of the detector: its weights, checkpoints and exports are the same with and without teachers.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dfine_core import Detector, ModelConfig
from dfine_core.loss.teacher_boxes import teacher_box_losses
from dfine_core.loss.teachers import adapted_weight, edge_loss, feature_loss
from dfine_core.model.distribution import weighting_function
from dfine_core.structures import DetectorOutput
from pipeline.open_detector import open_detector
from pipeline.teacher_settings import TeacherSettings
from pipeline.training.teachers.vision import VisionTeacher, open_vision_folder

if TYPE_CHECKING:
    from pipeline.training.step import MicroBatch

FEATURES, DETECTOR = "features", "detector"


class Teachers:
    """Frozen networks and everything that is trained or adapted along with them.

    Args:
        student: configuration of the detector that learns.
        seed: of the run; the projectors' weights follow from it.
    """

    def __init__(self, settings: TeacherSettings, student: ModelConfig, *, device: torch.device, seed: int) -> None:
        self.settings, self._student, self._device = settings, student, device
        dtype = _dtype(settings.precision, device)
        widths: dict[str, int] = {}
        self.vision: VisionTeacher | None = None
        self.detector: Detector | None = None
        if settings.features is not None:
            folder = open_vision_folder(settings.features.model)
            self.vision = VisionTeacher(folder, folder.load(), dtype).to(device)
            widths[FEATURES] = folder.width
        if settings.detector is not None:
            self.detector = open_detector(settings.detector.weights, str(device)).detector
            self.detector.requires_grad_(False).eval()
            if settings.detector.map_weight:
                widths[DETECTOR] = self.detector.config.encoder_dim
        self._dtype = dtype

        # Random numbers of their own: the student's weights do not depend on its teachers.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = {name: nn.Linear(student.encoder_dim, width) for name, width in widths.items()}
        self.projectors = nn.ModuleDict(layers).to(device)
        self._bins = weighting_function(student.reg_max, student.up, student.reg_scale).to(device)

        self.weight = 0.0 if settings.features is None else settings.features.weight  # of the features, adapted
        self._share_sum = torch.zeros((), device=device)  # of finite steps since the epoch began
        self._share_steps = torch.zeros((), device=device)
        self.share: float | None = None  # measured in the last whole epoch
        self._counts: tuple[Tensor, Tensor] | None = None
        self._in_block: Tensor | None = None  # 1 for each gradient of the transformer block; made in the first step

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters by the names that checkpoints use."""
        return {f"teachers.{name}": parameter for name, parameter in self.projectors.named_parameters()}

    # One step

    def begin_step(self, micro_batches: "Sequence[MicroBatch]", share: float) -> None:
        """Average the numbers of boxes over the micro-batches of all workers. Collective.

        Args:
            share: micro-batches per worker.
        """
        true = sum(m.targets.total for m in micro_batches)
        taught = sum(0 if m.teacher is None else m.teacher.total for m in micro_batches)
        counts = torch.tensor([true, taught], dtype=torch.float32, device=self._device)
        workers = 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
            workers = dist.get_world_size()
        boxes, taught_boxes = (counts / (share * workers)).clamp(min=1).unbind()
        self._counts = boxes, taught_boxes

    def terms(self, micro_batch: "MicroBatch", output: DetectorOutput) -> dict[str, Tensor]:
        """Weighted terms of one micro-batch, by the names of the log; after `begin_step`."""
        assert self._counts is not None
        assert output.encoder_map is not None
        found: dict[str, Tensor] = {}
        with torch.autocast(self._device.type, enabled=False):
            if self.vision is not None:
                loss = feature_loss(self._projected(FEATURES, output.encoder_map), self.vision(micro_batch.images))
                found["loss_teacher_features"] = loss * self.weight
            if self.detector is not None:
                found |= self._detector_terms(self.detector, micro_batch, output)
            boxes = self.settings.boxes
            if boxes is not None and micro_batch.teacher is not None and micro_batch.teacher_scores is not None:
                terms = teacher_box_losses(
                    *(output, micro_batch.teacher, micro_batch.teacher_scores, self._bins, self._counts[1]),
                    self._student,
                    boxes.unmatched,
                )
                found |= {f"loss_teacher_{name}": value * boxes.weight for name, value in terms.items()}
        return found

    def _projected(self, name: str, encoder_map: Tensor) -> Tensor:
        """Student's map in the teacher's width, [B, C, h, w]."""
        projector: nn.Module = self.projectors[name]
        projected: Tensor = projector(encoder_map.float().movedim(1, -1))
        return projected.movedim(-1, 1)

    def _detector_terms(
        self, detector: Detector, micro_batch: "MicroBatch", output: DetectorOutput
    ) -> dict[str, Tensor]:
        settings = self.settings.detector
        assert settings is not None
        assert self._counts is not None
        assert output.encoder_map is not None
        half = self._dtype == torch.bfloat16
        with torch.no_grad(), torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=half):
            taught = detector(micro_batch.images, every_layer=True)
        terms = {}
        if settings.map_weight:
            loss = feature_loss(self._projected(DETECTOR, output.encoder_map), taught.encoder_map.float())
            terms["loss_teacher_map"] = loss * settings.map_weight
        if settings.edge_weight:
            loss = edge_loss(
                *(output, taught, micro_batch.targets, self._bins, self._counts[0], self._student),
                settings.edge_temperature,
            )
            terms["loss_teacher_edges"] = loss * settings.edge_weight
        return terms

    @torch.no_grad()
    def exchange_gradients(self) -> None:
        """Average the gradients of the projectors over all workers. Collective; the detector's are exchanged by its wrapper."""
        gradients = [p.grad for p in self.projectors.parameters() if p.grad is not None]
        if not gradients or not (dist.is_available() and dist.is_initialized()):
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    # Adaptation of the weight

    @property
    def adapts(self) -> bool:
        """Whether the weight of the features follows the share of the gradient."""
        return self.settings.features is not None and self.settings.features.adapt is not None

    @torch.no_grad()
    def measure(self, detector: Detector, finite: Tensor) -> None:
        """Add the share of the gradient that a step has in the encoder's transformer block, if the step was finite."""
        if not self.adapts:
            return
        trained = [p for p in (*detector.parameters(), *self.projectors.parameters()) if p.grad is not None]
        sums = torch.stack(torch._foreach_norm([p.grad for p in trained if p.grad is not None], 1))
        if self._in_block is None or len(self._in_block) != len(sums):
            block = {id(parameter) for parameter in detector.encoder.encoder.parameters()}
            self._in_block = torch.tensor([id(p) in block for p in trained], dtype=sums.dtype, device=self._device)
        self._share_sum += torch.where(finite, (sums * self._in_block).sum() / sums.sum().clamp(min=1e-30), 0)
        self._share_steps += finite

    def end_epoch(self, *, clean: bool) -> None:
        """Adapt the weight to the share of the epoch, the same one on all workers. Collective; waits for the device.

        Args:
            clean: the epoch had no strong augmentation.
        """
        features = self.settings.features
        if features is None or features.adapt is None:
            return
        sums = torch.stack([self._share_sum, self._share_steps])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        total, steps = sums.tolist()
        self.share = total / max(steps, 1.0)
        adapt = features.adapt
        default = features.weight if adapt.default is None else adapt.default
        self.weight = adapted_weight(
            self.weight, self.share, wanted=adapt.share, tolerance=adapt.tolerance, default=default, clean=clean
        )
        self._share_sum.zero_()
        self._share_steps.zero_()

    def metrics(self) -> dict[str, float]:
        """Weight and share for the log."""
        if not self.adapts:
            return {}
        share = {} if self.share is None else {"train/teacher_gradient_share": self.share}
        return {"train/teacher_weight": self.weight, **share}

    # Checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """Everything that changes, by the names of a checkpoint."""
        numbers = {
            "teachers.weight": torch.tensor(self.weight, dtype=torch.float64),
            "teachers.share_sum": self._share_sum,
            "teachers.share_steps": self._share_steps,
            "teachers.share": torch.tensor(-1.0 if self.share is None else self.share, dtype=torch.float64),
        }
        return {**self.named_parameters(), **numbers}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` returned.

        Raises:
            ValueError: it is of other teachers.
        """
        own = self.tensors()
        if tensors.keys() != own.keys() or any(tensors[name].shape != tensor.shape for name, tensor in own.items()):
            raise ValueError("saved with other teachers than this run has")
        for name, parameter in self.named_parameters().items():
            parameter.copy_(tensors[name])
        self._share_sum.copy_(tensors["teachers.share_sum"])
        self._share_steps.copy_(tensors["teachers.share_steps"])
        self.weight, share = float(tensors["teachers.weight"]), float(tensors["teachers.share"])
        self.share = None if share < 0 else share


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    half = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if half else torch.float32
