"""What is learnt: which parameters train in which stage, and the detector with its loss terms.

Names of parameters are those of ``Detector.named_parameters()``; what only exists while training
(heads of auxiliary tasks) stands under ``heads.``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from m2f2cli.errors import ConfigError
from m2f2cli.models.backbone import Backbone
from m2f2cli.models.clip import VisionPart
from m2f2cli.models.detector import Detector
from m2f2cli.options.train_detector import TrainDetectorOptions

# Group of parameters -> how their names begin. Every parameter is in exactly one group.
PARAMETER_GROUPS: dict[str, str] = {
    "backbone": r"backbone\.",
    "projections": r"(backbone_proj|vision_proj|text_proj|block_norms|bridge|hidden|head)\.",
    "prompt_tokens": r"forgery_prompt\.",
    "alpha_vision": "alpha_vision",
    "alpha_text": "alpha_text",
    "clip_norms": r"clip\.vision\.(.*\.)?(ln_|layer_norm|pre_layrnorm)",
    "clip_lora": r"clip\.vision\..*\.lora_",
    "clip": r"clip\.(?!vision\.(.*\.)?(ln_|layer_norm|pre_layrnorm|lora_))",
    "auxiliary": r"heads\.",
}

_LIGHT = ("prompt_tokens", "alpha_vision", "alpha_text")

# --train -> the groups that move; all others stay as they are, BatchNorm statistics included.
STAGES: dict[str, tuple[str, ...]] = {
    "published": ("backbone", "projections", *_LIGHT, "clip_lora", "auxiliary"),
    "head": ("projections", *_LIGHT, "auxiliary"),
    "norms": ("projections", *_LIGHT, "clip_norms", "clip_lora", "auxiliary"),
    "prompt": (*_LIGHT, "auxiliary"),
    "everything": tuple(PARAMETER_GROUPS),
}


# Turns a cosine similarity into the logit of "forged here": ±1 becomes ±10.
_MAP_SHARPNESS = 10.0
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def group_of(name: str) -> str:
    """The group of ``PARAMETER_GROUPS`` that a parameter belongs to.

    Raises:
        LookupError: The table has no group for it, or two.
    """
    homes = [group for group, begin in PARAMETER_GROUPS.items() if re.match(begin, name)]
    if len(homes) != 1:
        raise LookupError(f"Parameter '{name}' is in {len(homes)} groups of PARAMETER_GROUPS.")
    return homes[0]


def backbone_layers(backbone: Backbone | None) -> dict[str, int]:
    """The stage of each backbone parameter by its name: 0 the stem, then 1 for the first stage on.

    Its timm network says which of its parts are stages; None has no parameter.
    """
    if backbone is None:
        return {}
    from timm.models import group_parameters

    layers = group_parameters(backbone.net, backbone.net.group_matcher(coarse=True))
    return {
        f"backbone.net.{name}": int(number) for number, names in layers.items() for name in names
    }


class Objective(nn.Module):
    """A detector in training: loss terms, heads of auxiliary tasks, running average of the weights.

    Args:
        detector: Trained in place; its parameters are frozen or freed by ``options.model.train``.
        options: What trains and towards what.
        kinds: Manipulations to tell apart, without ``real``.
        judgements: Columns of the annotators' judgements.
    """

    def __init__(
        self, detector: Detector, options: TrainDetectorOptions, kinds: int, judgements: int
    ) -> None:
        super().__init__()
        self.detector = detector
        # Depthwise convolutions train twice as fast on the CPU with channels last.
        backbone = detector.backbone
        if backbone is not None:
            backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.options = options
        if options.model.clip_lora:
            _add_lora(detector, options.model.clip_lora)
        channels = detector.head.in_features if backbone is None else backbone.channels
        self.heads = nn.ModuleDict()
        if options.objective.kind_weight:
            self.heads["kind"] = nn.Linear(channels, 1 + kinds)
        if options.objective.judgement_weight:
            self.heads["judgement"] = nn.Linear(channels, judgements)
        moving, frozen = STAGES[options.model.train], options.model.freeze_stages
        layers = backbone_layers(backbone) if frozen else {}
        for name, parameter in self.named_weights().items():
            in_frozen_stage = layers.get(name, frozen + 1) <= frozen
            parameter.requires_grad_(group_of(name) in moving and not in_frozen_stage)
        decay = options.optimizer.ema_decay
        self.average = RunningAverage(detector, decay) if decay else None

    def named_weights(self) -> dict[str, nn.Parameter]:
        """Every parameter by its detector name, training-only heads under ``heads.``."""
        own = dict(self.detector.named_parameters())
        return own | {f"heads.{name}": p for name, p in self.heads.named_parameters()}

    def trained_values(self) -> dict[str, int]:
        """How many values train in each group of parameters."""
        counts: dict[str, int] = {}
        for name, parameter in self.named_weights().items():
            if parameter.requires_grad:
                group = group_of(name)
                counts[group] = counts.get(group, 0) + parameter.numel()
        return counts

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups: every trainable parameter exactly once.

        Returns:
            Dictionaries with ``params``, ``group``, ``lr`` and ``weight_decay``.
        """
        options = self.options.optimizer
        head_lr = options.learning_rate if options.head_lr is None else options.head_lr
        rates = {
            "backbone": options.learning_rate,
            "projections": head_lr,
            "prompt_tokens": options.prompt_lr,
            "alpha_vision": options.vision_alpha_lr,
            "alpha_text": options.text_alpha_lr,
            "clip": options.clip_lr,
            "clip_norms": options.clip_lr,
            "clip_lora": options.clip_lr,
            "auxiliary": head_lr,
        }
        layers = backbone_layers(self.detector.backbone) if options.layer_decay < 1 else {}
        last = max(layers.values(), default=0)
        found: dict[tuple[str, float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_weights().items():
            if parameter.requires_grad:
                group = group_of(name)
                rate = rates[group] * options.layer_decay ** (last - layers.get(name, last))
                decay = options.weight_decay if options.decay_all or parameter.ndim > 1 else 0.0
                found.setdefault((group, rate, decay), []).append(parameter)
        return [
            {"params": params, "group": group, "lr": rate, "weight_decay": decay}
            for (group, rate, decay), params in found.items()
        ]

    def train(self, mode: bool = True) -> Objective:
        """Set the mode; whatever is frozen keeps its BatchNorm statistics."""
        super().train(mode)
        for module in self.detector.modules():
            if isinstance(module, _BATCH_NORMS):
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
            pixel_values: (B, 3, S, S), normalized.
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
        logits, kind_logits, features = output.logits, output.kind_logits, output.features
        if aims.dropout:
            dropped = functional.dropout(features, aims.dropout)
            logits, kind_logits = self.detector.classify(dropped)
        pooled = features if output.pooled is None else output.pooled
        target = target * (1 - aims.label_smoothing) + aims.label_smoothing / 2
        loss = _soft_cross_entropy(logits, torch.stack([1 - target, target], dim=1))
        if aims.alignment:
            loss = loss + aims.alignment * alignment(features, labels)
        if aims.uniformity:
            loss = loss + aims.uniformity * uniformity(features)
        if kind_logits is not None and "kind" in more:
            each = _known_binary(kind_logits, more["kind"][:, 1:], more["kind"].sum(1))
            loss = loss + each
        if "kind" in self.heads:
            kind = _soft_cross_entropy(self.heads["kind"](pooled), more["kind"])
            loss = loss + aims.kind_weight * kind
        if "judgement" in more:
            scores = self.heads["judgement"](pooled)
            judged = _known_binary(scores, more["judgement"], more["judgement_known"])
            loss = loss + aims.judgement_weight * judged
        if "map" in more:
            scores = _MAP_SHARPNESS * output.forgery_map.flatten(1)
            mapped = _known_binary(scores, more["map"].flatten(1), more["map_known"])
            loss = loss + aims.map_weight * mapped
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
        if self.options.model.clip_lora:
            tensors = _folded_lora(tensors)
        return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _add_lora(detector: Detector, rank: int) -> None:
    """Give the query and value layers of the CLIP tower's vision part LoRA factors.

    Raises:
        ConfigError: The tower is one of open_clip, whose layers are not separate.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if not isinstance(detector.clip.vision, VisionPart):
        raise ConfigError("--clip-lora needs a CLIP tower of transformers, not of open_clip.")
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj", "v_proj"])
    inject_adapter_in_model(lora, detector.clip.vision)


def alignment(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean squared distance on the unit sphere between pictures of one class (arXiv 2005.10242).

    ``features`` (B, F), ``labels`` (B,) int64. Without two pictures of a class it is 0.
    """
    distances = _squared_distances(features)
    pairs = (labels[:, None] == labels[None, :]).triu(1)
    return (distances * pairs).sum() / pairs.sum().clamp_min(1)


def uniformity(features: torch.Tensor) -> torch.Tensor:
    """Log of the mean of exp(-2 d²) over the pairs of a batch (B, F), on the unit sphere; as above.

    A single picture has no pair: 0.
    """
    count = len(features)
    rows, columns = torch.triu_indices(count, count, 1, device=features.device)
    if not len(rows):
        return features.sum() * 0
    return _squared_distances(features)[rows, columns].mul(-2).exp().mean().log()


def _squared_distances(features: torch.Tensor) -> torch.Tensor:
    unit = functional.normalize(features.float())
    return (2 - 2 * unit @ unit.T).clamp_min(0)


def _folded_lora(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LoRA's factors multiplied out into the layers they change, under the layers' own names.

    LoRA's alpha equals its rank here, so the factors' product is the change.
    """
    found = {name: t for name, t in tensors.items() if ".lora_" not in name}
    for name in list(found):
        if name.endswith(".base_layer.weight"):
            layer = name.removesuffix(".base_layer.weight")
            down, up = (tensors[f"{layer}.lora_{x}.default.weight"].float() for x in "AB")
            weight = found.pop(name)
            found[f"{layer}.weight"] = (weight.float() + up @ down).to(weight.dtype)
        elif name.endswith(".base_layer.bias"):
            found[name.replace(".base_layer.", ".")] = found.pop(name)
    return found


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
        self._buffer_of = {name: name.replace(".", "|") for name in _moving(detector)}
        for name, tensor in _moving(detector).items():
            self.register_buffer(self._buffer_of[name], tensor.detach().clone())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The averages by the detector's names."""
        return {name: getattr(self, buffer) for name, buffer in self._buffer_of.items()}

    @torch.no_grad()
    def update(self, detector: Detector) -> None:
        """Take a step's weights into the average."""
        self.steps += 1
        step = int(self.steps)
        decay = min(self.decay, (1 + step) / (10 + step))
        current = _moving(detector)
        for name, average in self.tensors().items():
            average.lerp_(current[name].to(average.dtype), 1 - decay)


def _moving(detector: Detector) -> dict[str, torch.Tensor]:
    """Trainable parameters, and the statistics of BatchNorm layers that have such parameters."""
    moving: dict[str, Any] = {n: p for n, p in detector.named_parameters() if p.requires_grad}
    for prefix, module in detector.named_modules():
        if isinstance(module, _BATCH_NORMS) and f"{prefix}.weight" in moving:
            moving[f"{prefix}.running_mean"] = module.running_mean
            moving[f"{prefix}.running_var"] = module.running_var
    return moving
