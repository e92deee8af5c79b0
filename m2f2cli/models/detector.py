"""The detector: one definition, used alone and inside the explainer.

logits = head([alpha_text · forgery map, alpha_vision · class token, backbone feature] (+ bridge)),
the arithmetic of the published explainer's detector (M2F2-Det, CVPR 2025, arXiv 2503.20188).

Parts can be left out or changed by the configuration: no backbone; a prompt without a text tower;
class token and patch mean of several CLIP blocks in the head (as DINO's linear probes read them);
an L2-normalized feature before the head (GenD, arXiv 2508.06248); a logit for each kind of forgery.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from m2f2cli.compat import attention_of
from m2f2cli.data.transforms import CLIP_MEAN as CLIP_MEAN
from m2f2cli.data.transforms import CLIP_STD as CLIP_STD
from m2f2cli.errors import ConfigError
from m2f2cli.models.backbone import Backbone
from m2f2cli.models.bridge import Bridge
from m2f2cli.models.clip import ClipTower
from m2f2cli.models.domain import Domain
from m2f2cli.models.forgery_prompt import ForgeryPrompt, forgery_map
from m2f2cli.models.schema import DETECTOR, check_detector


class DetectorConfig(PretrainedConfig):
    """What a detector is and how its answers are to be read.

    Args:
        backbone: A timm architecture; None for a detector that reads CLIP alone.
        backbone_kwargs: Further arguments of ``timm.create_model``.
        clip: The CLIP tower's spec (see ``models.clip.ClipTower``); None means a tiny random tower.
        hidden_size: Width of the projected CLIP and backbone features.
        prompt_tokens: Number of learnable prompt tokens.
        vision_layer: The CLIP hidden state read; -2 as published.
        clip_blocks: CLIP blocks, counted from 1, whose class token and patch mean the head reads;
            empty as published, where it reads the projected class token of ``vision_layer``.
        forgery_map: Whether the head sees the forgery map; without it there is no text part. A
            ``clip`` spec without ``text`` makes the mean of the prompt tokens the prompt's feature.
        head_normalize: Whether the head's input is divided by its L2 norm.
        head_hidden: Width of a hidden layer (GELU) before the head's last; None as published.
        kinds: Names of the kinds of forgery the head has a logit for; the fake logit is the largest
            of them, the real logit is 0. None: two logits, real and fake.
        kind_margin: How far the largest logit of a kind must lead the second for a fake verdict to
            name that kind, 0 or more; None: it is never named, nor is it with fewer than two kinds.
        license: A sentence on what the weights may be used for, or None; ``m2f2 info`` shows it.
        bridge: ``{"width", "heads", "size", "clip_layers": [three block numbers]}`` or None.
        image_size: Side of the input in pixels.
        image_mean: Mean of the three channels taken off the input, in [0, 1].
        image_std: Deviation of the three channels the input is divided by.
        crop: The face-crop recipe the training pictures were made with.
        threshold: Fake probability from which the verdict is fake, in [0, 1].
        uncertain: ``[low, high]``: probabilities between give the verdict uncertain; or None.
        score_temperature: Divides the logits before the softmax; above 0.
        domain: ``{"limit", "size"}`` of the domain check (``models.domain``): the largest distance
            inside, and the number of directions; ``{"mean", "basis", "limit"}`` of the check of
            textures that detectors had before (``data.domain``); or None.

    Raises:
        ConfigError: A field is unknown, of another type, out of its range, or contradicts another
            (``models.schema``).
    """

    model_type = DETECTOR

    def __init__(  # noqa: PLR0913 - a configuration is its fields
        self,
        *,
        backbone: str | None = "densenet121",
        backbone_kwargs: dict[str, Any] | None = None,
        clip: Mapping[str, Any] | None = None,
        hidden_size: int = 1024,
        prompt_tokens: int = 7,
        vision_layer: int = -2,
        clip_blocks: Sequence[int] = (),
        forgery_map: bool = True,
        head_normalize: bool = False,
        head_hidden: int | None = None,
        kinds: Sequence[str] | None = None,
        kind_margin: float | None = None,
        bridge: dict[str, Any] | None = None,
        image_size: int = 336,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        crop: dict[str, Any] | None = None,
        threshold: float = 0.5,
        uncertain: list[float] | None = None,
        score_temperature: float = 1.0,
        domain: dict[str, Any] | None = None,
        license: str | None = None,
        **kwargs: Any,
    ) -> None:
        given = locals()
        names = DetectorConfig.__init__.__kwdefaults__ or {}
        check_detector(kwargs | {name: given[name] for name in names})
        self.backbone = backbone
        self.backbone_kwargs = dict(backbone_kwargs or {})
        self.clip = dict(clip) if clip is not None else _tiny_clip(image_size)
        self.hidden_size = hidden_size
        self.prompt_tokens = prompt_tokens
        self.vision_layer = vision_layer
        self.clip_blocks = list(clip_blocks)
        self.forgery_map = forgery_map
        self.head_normalize = head_normalize
        self.head_hidden = head_hidden
        self.kinds = list(kinds) if kinds else None
        self.kind_margin = kind_margin
        self.bridge = dict(bridge) if bridge else None
        self.image_size = image_size
        self.image_mean = list(image_mean or CLIP_MEAN)
        self.image_std = list(image_std or CLIP_STD)
        self.crop = dict(crop or {"detector": "dlib", "margin": 0.3})
        self.threshold = threshold
        self.uncertain = list(uncertain) if uncertain else None
        self.score_temperature = score_temperature
        self.domain = dict(domain) if domain else None
        self.license = license
        super().__init__(**kwargs)


def _tiny_clip(image_size: int) -> dict[str, Any]:
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return {
        "library": "transformers",
        "vision": {**shape, "image_size": image_size, "patch_size": max(image_size // 8, 1)},
        "text": {**shape, "vocab_size": 64, "max_position_embeddings": 16},
    }


@dataclass
class DetectorOutput(ModelOutput):
    """What a detector says of B pictures.

    Attributes:
        loss: Mean cross-entropy, when labels were given.
        logits: (B, 2), order (real, fake).
        forgery_map: (B, g, g) cosine similarities in [-1, 1] of patches with the forgery prompt.
        features: (B, F), what the head saw.
        pooled: (B, C), the pooled backbone features; None without a backbone.
        kind_logits: (B, K), one for each of ``config.kinds``; None without kinds.
        domain_distance: float32 (B,), see ``models.domain``; None without a domain check.
        clip_hidden: (B, 1 + g², W), the CLIP hidden state read, class token first; when asked for.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    forgery_map: torch.Tensor | None = None
    features: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    kind_logits: torch.Tensor | None = None
    domain_distance: torch.Tensor | None = None
    clip_hidden: torch.Tensor | None = None


class Detector(PreTrainedModel):
    """CLIP with a learnable forgery prompt, a CNN backbone and a linear head.

    Args:
        config: Its sizes and parts.
    """

    config_class = DetectorConfig
    base_model_prefix = "detector"
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _supports_flash_attn = True
    config: DetectorConfig

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        bridge = config.bridge
        self.backbone: Backbone | None = None
        if config.backbone is not None:
            stages = [-3, -2, -1] if bridge else []
            self.backbone = Backbone(config.backbone, config.backbone_kwargs, stages=stages)
            self.backbone.check_side(config.image_size)
        elif bridge:
            raise ConfigError("A bridge needs a backbone.", "Leave out the bridge.")
        self.clip = ClipTower(
            config.clip,
            config.vision_layer,
            text=config.forgery_map and "text" in config.clip,
            attention=attention_of(config) or "sdpa",
        )
        seen = self.clip.vision
        size = 0
        if config.forgery_map or not config.clip_blocks:
            self.vision_proj = _projection(seen.width, width)
        if self.backbone is not None:
            self.backbone_proj = _projection(self.backbone.channels, width)
            size += width
        if config.clip_blocks:
            reads = 2 * len(config.clip_blocks)
            self.block_norms = nn.ModuleList(nn.LayerNorm(seen.width) for _ in range(reads))
            size += reads * seen.width
        else:
            self.alpha_vision = nn.Parameter(torch.tensor(0.5))
            size += width
        self.forgery_prompt: ForgeryPrompt | None = None
        if config.forgery_map:
            text = self.clip.text
            prompt_width = width if text is None else text.width
            self.forgery_prompt = ForgeryPrompt(config.prompt_tokens, prompt_width)
            self.text_proj = nn.Identity() if text is None else _projection(prompt_width, width)
            self.alpha_text = nn.Parameter(torch.tensor(4.0))
            size += seen.grid**2
        self.bridge: Bridge | None = None
        if bridge and self.backbone is not None:
            self.bridge = Bridge(
                self.backbone.stage_channels,
                seen.width,
                width=bridge["width"],
                heads=bridge["heads"],
                size=bridge["size"],
            )
            size += bridge["size"]
        self.hidden: nn.Module = nn.Identity()
        if config.head_hidden:
            self.hidden = nn.Sequential(nn.Linear(size, config.head_hidden), nn.GELU())
        self.head = _linear(config.head_hidden or size, len(config.kinds) if config.kinds else 2)
        directions = (config.domain or {}).get("size")
        self.domain = Domain(size, directions) if directions else None
        self.fingerprint: str | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Parts initialize themselves when built; a checkpoint must bring every tensor."""

    def train(self, mode: bool = True) -> Detector:
        """Set the mode; a part without a trainable parameter stays in evaluation mode."""
        super().train(mode)
        for part in self.children():
            parameters = list(part.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                part.eval()
        return self

    def text_feature(self) -> torch.Tensor:
        """The projected forgery prompt, (1, hidden_size)."""
        if self.forgery_prompt is None:
            raise ConfigError("This detector has no forgery prompt.")
        feature: torch.Tensor = self.text_proj(self.forgery_prompt(self.clip.text))
        return feature

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        backbone_pixel_values: torch.Tensor | None = None,
        return_hidden: bool = False,
        **_: Any,
    ) -> DetectorOutput:
        """Judge pictures.

        Args:
            pixel_values: (B, 3, S, S) in the model's dtype, normalized with ``config.image_mean``
                and ``config.image_std``.
            labels: (B,) int64, 0 real and 1 fake.
            backbone_pixel_values: What the backbone sees, where that differs from what CLIP sees.
            return_hidden: Whether to give the CLIP hidden state too.

        Returns:
            Logits and what they were made from.
        """
        config = self.config
        layers = list(config.clip_blocks) + (config.bridge["clip_layers"] if config.bridge else [])
        hidden, extra = self.clip(pixel_values, layers)
        states, extra = extra[: len(config.clip_blocks)], extra[len(config.clip_blocks) :]
        parts, pooled, where, maps = [], None, None, []
        if self.forgery_prompt is not None or not config.clip_blocks:
            projected = self.vision_proj(hidden)
        if self.forgery_prompt is not None:
            scores = forgery_map(projected[:, 1:], self.text_feature())
            parts.append(self.alpha_text * scores)
            grid = self.clip.vision.grid
            where = scores.unflatten(1, (grid, grid))
        if config.clip_blocks:
            read = [part for state in states for part in (state[:, 0], state[:, 1:].mean(1))]
            parts += [norm(part) for norm, part in zip(self.block_norms, read, strict=True)]
        else:
            parts.append(self.alpha_vision * projected[:, 0])
        if self.backbone is not None:
            pooled, maps = self.backbone(
                pixel_values if backbone_pixel_values is None else backbone_pixel_values
            )
            parts.append(self.backbone_proj(pooled))
        if self.bridge is not None:
            parts.append(self.bridge(maps, extra))
        features = torch.cat(parts, dim=1)
        if config.head_normalize:
            features = nn.functional.normalize(features)
        logits, kind_logits = self.classify(features)
        loss = nn.functional.cross_entropy(logits.float(), labels) if labels is not None else None
        return DetectorOutput(
            loss=loss,
            logits=logits,
            forgery_map=where,
            features=features,
            pooled=pooled,
            kind_logits=kind_logits,
            domain_distance=None if self.domain is None else self.domain(features),
            clip_hidden=hidden if return_hidden else None,
        )

    def classify(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the head.

        Args:
            features: (B, F), as ``DetectorOutput.features``.

        Returns:
            logits: (B, 2), order (real, fake).
            kind_logits: (B, K), or None without kinds.
        """
        return self.to_logits(self.head(self.hidden(features)))

    def to_logits(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What ``head`` gives, as ``classify`` returns it."""
        if not self.config.kinds:
            return scores, None
        largest = scores.max(dim=1).values
        return torch.stack([torch.zeros_like(largest), largest], dim=1), scores

    def leading_kinds(self, kind_logits: torch.Tensor) -> list[tuple[str, float] | None]:
        """The kind of forgery with the largest logit, and how far it leads the second.

        Args:
            kind_logits: (B, K), as ``DetectorOutput.kind_logits``.

        Returns:
            B of them; None where there are fewer than two kinds.
        """
        names = self.config.kinds or []
        if len(names) < 2:
            return [None] * len(kind_logits)
        top, which = kind_logits.float().topk(2, dim=1)
        leads = (top[:, 0] - top[:, 1]).tolist()
        return [(names[k], lead) for k, lead in zip(which[:, 0].tolist(), leads, strict=True)]

    def fake_probability(self, logits: torch.Tensor) -> torch.Tensor:
        """Softmax over (real, fake) at the stored temperature: (B, 2) logits to (B,) float32."""
        return (logits.float() / self.config.score_temperature).softmax(dim=-1)[:, 1]


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


def _projection(inputs: int, outputs: int) -> nn.Sequential:
    """Linear and LayerNorm, initialized N(0, 0.01) and 0 as published."""
    return nn.Sequential(_linear(inputs, outputs), nn.LayerNorm(outputs))
