"""What is learnt: the detector with its loss terms, and what only exists while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from m2f2cli.models.detector import Detector
from m2f2cli.options.train_detector import TrainDetectorOptions
from m2f2cli.training.stages import freeze, group_of

# Turns a cosine similarity into the logit of "forged here": ±1 becomes ±10.
_MAP_SHARPNESS = 10.0
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Objective(nn.Module):
    """A detector in training: loss terms, heads of auxiliary tasks, running average of the weights.

    Args:
        detector: Trained in place; its parameters are frozen or freed by ``options.model.train``.
        options: What trains and towards what.
        kinds: Manipulations to tell apart, without ``real``.
        judgements: Columns of the annotators' judgements.
    """

    accepts_loss_kwargs = False  # the Trainer's own loss arguments, which ``more`` is not

    def __init__(
        self,
        detector: Detector,
        options: TrainDetectorOptions,
        *,
        kinds: int = 0,
        judgements: int = 0,
    ) -> None:
        super().__init__()
        self.detector = detector
        # Depthwise convolutions train twice as fast on the CPU with channels last.
        backbone = detector.backbone
        if backbone is not None:
            backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.options = options
        channels = detector.head.in_features if backbone is None else backbone.channels
        self.heads = nn.ModuleDict()
        if options.objective.kind_weight:
            self.heads["kind"] = nn.Linear(channels, 1 + kinds)
        if options.objective.judgement_weight:
            self.heads["judgement"] = nn.Linear(channels, judgements)
        freeze(self.named_weights(), backbone, options.model)
        self.average = (
            RunningAverage(detector, options.optimizer.ema_decay)
            if options.optimizer.ema_decay
            else None
        )

    def named_weights(self) -> dict[str, nn.Parameter]:
        """Every parameter by its detector name, training-only heads under ``heads.``."""
        own = dict(self.detector.named_parameters())
        return own | {f"heads.{name}": p for name, p in self.heads.named_parameters()}

    def train(self, mode: bool = True) -> Objective:
        """Set the mode; whatever is frozen keeps its BatchNorm statistics."""
        super().train(mode)
        for module in self.detector.modules():
            if isinstance(module, BATCH_NORMS):
                trainable = any(p.requires_grad for p in module.parameters())
                if self.options.model.freeze_batch_norm or not trainable:
                    module.eval()
        return self

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor,
        target: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
        **more: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Compute the loss of a batch.

        Args:
            pixel_values: (B, 3, S, S), normalised.
            labels: (B,) int64, 0 real and 1 fake; the target when measuring.
            target: (B,) float32, fake probability to learn, in [0, 1].
            weight: () what the batch counts beside the others of its step; 1 if unset.
            **more: Targets of the further tasks, each zero where unknown: ``kind`` (B, K) weights
                over ``real`` and the manipulations; ``judgement`` (B, J) in [0, 1] with
                ``judgement_known`` (B,); ``map`` (B, g, g) forged share of each cell with
                ``map_known`` (B,).

        Returns:
            ``loss`` (), and ``logits`` (B, 2): of the running average when measuring, if kept.
        """
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        if not self.training or target is None:
            logits = self._measured(pixel_values)
            return {"loss": functional.cross_entropy(logits, labels), "logits": logits}
        aims = self.options.objective
        output = self.detector(pixel_values=pixel_values)
        logits = output.logits
        if aims.dropout:
            logits, _ = self.detector.classify(functional.dropout(output.features, aims.dropout))
        pooled = output.features if output.pooled is None else output.pooled
        target = target * (1 - aims.label_smoothing) + aims.label_smoothing / 2
        loss = _soft_cross_entropy(logits, torch.stack([1 - target, target], dim=1))
        if "kind" in more:
            told = self.heads["kind"](pooled)
            loss = loss + aims.kind_weight * _soft_cross_entropy(told, more["kind"])
        if "judgement" in more:
            told = self.heads["judgement"](pooled)
            loss = loss + aims.judgement_weight * _known_binary(
                told, more["judgement"], more["judgement_known"]
            )
        if "map" in more:
            told = _MAP_SHARPNESS * output.forgery_map.flatten(1)
            loss = loss + aims.map_weight * _known_binary(
                told, more["map"].flatten(1), more["map_known"]
            )
        if weight is not None:
            loss = loss * weight
        return {"loss": loss, "logits": logits.float()}

    def _measured(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits (B, 2) of the running average, or of the detector where there is none."""
        if self.average is None:
            output = self.detector(pixel_values=pixel_values)
        else:
            output = torch.func.functional_call(
                self.detector, self.average.tensors(), kwargs={"pixel_values": pixel_values}
            )
        logits: torch.Tensor = output.logits
        return logits.float()

    def result(self) -> dict[str, torch.Tensor]:
        """The detector's tensors as they are to be kept: averaged, if an average is kept."""
        tensors = {name: t.detach().cpu() for name, t in self.detector.state_dict().items()}
        if self.average is not None:
            tensors |= {name: t.cpu() for name, t in self.average.tensors().items()}
        return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _soft_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over the batch of the cross-entropy with probabilities; a zero row costs nothing."""
    return -(target * logits.float().log_softmax(dim=1)).sum(dim=1).mean()


def _known_binary(logits: torch.Tensor, target: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Mean of the binary cross-entropy (B, N), each row weighted by how far it is known.

    ``target`` comes multiplied with ``known``.
    """
    share = known[:, None]
    wanted = target / share.clamp_min(1e-6)
    each = functional.binary_cross_entropy_with_logits(logits.float(), wanted, reduction="none")
    return (share * each).mean()


class RunningAverage(nn.Module):
    """Exponential running average of what moves in a detector: weights and BatchNorm statistics.

    Its tensors are buffers, so they travel with every saved state.

    Args:
        detector: Followed, not owned.
        decay: Share of the old average a step keeps; less in the first steps.
    """

    steps: torch.Tensor

    def __init__(self, detector: Detector, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.names = list(_moving(detector))
        for name, tensor in _moving(detector).items():
            self.register_buffer(_buffer(name), tensor.detach().clone())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The averages by the detector's names."""
        return {name: getattr(self, _buffer(name)) for name in self.names}

    @torch.no_grad()
    def update(self, detector: Detector) -> None:
        """Take a step's weights into the average."""
        self.steps += 1
        step = int(self.steps)
        decay = min(self.decay, (1 + step) / (10 + step))
        current = _moving(detector)
        for name, average in self.tensors().items():
            average.lerp_(current[name].to(average.dtype), 1 - decay)


def _buffer(name: str) -> str:
    return name.replace(".", "|")


def _moving(detector: Detector) -> Mapping[str, torch.Tensor]:
    """Trainable parameters, and the statistics of BatchNorm layers that have such parameters."""
    moving: dict[str, Any] = {n: p for n, p in detector.named_parameters() if p.requires_grad}
    for prefix, module in detector.named_modules():
        if isinstance(module, BATCH_NORMS) and f"{prefix}.weight" in moving:
            moving[f"{prefix}.running_mean"] = module.running_mean
            moving[f"{prefix}.running_var"] = module.running_var
    return moving


def moving_groups(objective: Objective) -> dict[str, int]:
    """How many values train in each group of parameters, for the record."""
    counts: dict[str, int] = {}
    for name, parameter in objective.named_weights().items():
        if parameter.requires_grad:
            group = group_of(name)
            counts[group] = counts.get(group, 0) + parameter.numel()
    return counts
