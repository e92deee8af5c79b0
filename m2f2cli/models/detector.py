"""The detector: one definition, used alone and inside the explainer.

logits = head([alpha_text · forgery map, alpha_vision · class token, backbone feature] (+ bridge)),
the arithmetic of the published explainer's detector (M2F2-Det, CVPR 2025, arXiv 2503.20188).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from m2f2cli.compat import attention_of, weights_version
from m2f2cli.data.transforms import CLIP_MEAN as CLIP_MEAN
from m2f2cli.data.transforms import CLIP_STD as CLIP_STD
from m2f2cli.errors import ConfigError
from m2f2cli.models.backbone import Backbone
from m2f2cli.models.bridge import Bridge
from m2f2cli.models.clip import ClipTower
from m2f2cli.models.forgery_prompt import ForgeryPrompt, forgery_map


class DetectorConfig(PretrainedConfig):
    """What a detector is and how its answers are to be read.

    Args:
        backbone: A timm architecture.
        backbone_kwargs: Further arguments of ``timm.create_model``.
        clip: The CLIP tower's spec (see ``models.clip.ClipTower``); None means a tiny random tower.
        hidden_size: Width of the projected CLIP and backbone features.
        prompt_tokens: Number of learnable prompt tokens.
        vision_layer: The CLIP hidden state read; -2 as published.
        forgery_map: Whether the head sees the forgery map; without it there is no text part.
        bridge: ``{"width", "heads", "size", "clip_layers": [three block numbers]}`` or None.
        image_size: Side of the input in pixels.
        image_mean: Mean of the three channels taken off the input, in [0, 1].
        image_std: Deviation of the three channels the input is divided by.
        crop: The face-crop recipe the training pictures were made with.
        threshold: Fake probability from which the verdict is fake, in [0, 1].
        uncertain: ``[low, high]``: probabilities between give the verdict uncertain; or None.
        score_temperature: Divides the logits before the softmax; above 0.
        domain: ``{"mean", "basis", "limit"}`` of the domain check (``data.domain``), or None.
    """

    model_type = "m2f2_detector"

    def __init__(  # noqa: PLR0913 - a configuration is its fields
        self,
        *,
        backbone: str = "densenet121",
        backbone_kwargs: dict[str, Any] | None = None,
        clip: Mapping[str, Any] | None = None,
        hidden_size: int = 1024,
        prompt_tokens: int = 7,
        vision_layer: int = -2,
        forgery_map: bool = True,
        bridge: dict[str, Any] | None = None,
        image_size: int = 336,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        crop: dict[str, Any] | None = None,
        threshold: float = 0.5,
        uncertain: list[float] | None = None,
        score_temperature: float = 1.0,
        domain: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.backbone = backbone
        self.backbone_kwargs = dict(backbone_kwargs or {})
        self.clip = dict(clip) if clip is not None else _tiny_clip(image_size)
        self.hidden_size = hidden_size
        self.prompt_tokens = prompt_tokens
        self.vision_layer = vision_layer
        self.forgery_map = forgery_map
        self.bridge = dict(bridge) if bridge else None
        self.image_size = image_size
        self.image_mean = list(image_mean or CLIP_MEAN)
        self.image_std = list(image_std or CLIP_STD)
        self.crop = dict(crop or {"detector": "dlib", "margin": 0.3})
        self.threshold = threshold
        self.uncertain = list(uncertain) if uncertain else None
        self.score_temperature = score_temperature
        self.domain = dict(domain) if domain else None
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
        pooled: (B, C), the pooled backbone features.
        clip_hidden: (B, 1 + g², W), the CLIP hidden state read, class token first; when asked for.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    forgery_map: torch.Tensor | None = None
    features: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
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
        bridge_stages = [-3, -2, -1] if bridge else []
        self.backbone = Backbone(config.backbone, config.backbone_kwargs, stages=bridge_stages)
        self.clip = ClipTower(
            config.clip,
            config.vision_layer,
            text=config.forgery_map,
            attention=attention_of(config) or "sdpa",
        )
        self.vision_proj = _projection(self.clip.vision.width, width)
        self.backbone_proj = _projection(self.backbone.channels, width)
        self.alpha_vision = nn.Parameter(torch.tensor(0.5))
        size = 2 * width
        self.forgery_prompt: ForgeryPrompt | None = None
        if self.clip.text is not None:
            self.forgery_prompt = ForgeryPrompt(config.prompt_tokens, self.clip.text.width)
            self.text_proj = _projection(self.clip.text.width, width)
            self.alpha_text = nn.Parameter(torch.tensor(4.0))
            size += self.clip.vision.grid**2
        self.bridge: Bridge | None = None
        if bridge:
            self.bridge = Bridge(
                self.backbone.stage_channels,
                self.clip.vision.width,
                width=bridge["width"],
                heads=bridge["heads"],
                size=bridge["size"],
            )
            size += bridge["size"]
        self.head = _linear(size, 2)
        self.fingerprint: str | None = None
        self._text_cache: tuple[tuple[int, ...], torch.Tensor] | None = None
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
        """The projected forgery prompt, (1, hidden_size).

        Without gradients it is computed once and reused until one of its weights changes.
        """
        prompt, text = self.forgery_prompt, self.clip.text
        if prompt is None or text is None:
            raise ConfigError("This detector has no forgery prompt.")
        if torch.is_grad_enabled():
            projected: torch.Tensor = self.text_proj(prompt(text))
            return projected
        weights = [*prompt.parameters(), *text.parameters(), *self.text_proj.parameters()]
        if any(w.is_inference() for w in weights):
            return self.text_proj(prompt(text))
        key = tuple(n for w in weights for n in (w.data_ptr(), weights_version(w)))
        if self._text_cache is None or self._text_cache[0] != key:
            self._text_cache = (key, self.text_proj(prompt(text)))
        return self._text_cache[1]

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
        layers = self.config.bridge["clip_layers"] if self.config.bridge else []
        hidden, extra = self.clip(pixel_values, layers)
        projected = self.vision_proj(hidden)
        pooled, maps = self.backbone(
            pixel_values if backbone_pixel_values is None else backbone_pixel_values
        )
        parts = [self.alpha_vision * projected[:, 0], self.backbone_proj(pooled)]
        where = None
        if self.forgery_prompt is not None:
            scores = forgery_map(projected[:, 1:], self.text_feature())
            parts.insert(0, self.alpha_text * scores)
            grid = self.clip.vision.grid
            where = scores.unflatten(1, (grid, grid))
        if self.bridge is not None:
            parts.append(self.bridge(maps, extra))
        features = torch.cat(parts, dim=1)
        logits = self.head(features)
        loss = nn.functional.cross_entropy(logits.float(), labels) if labels is not None else None
        return DetectorOutput(
            loss=loss,
            logits=logits,
            forgery_map=where,
            features=features,
            pooled=pooled,
            clip_hidden=hidden if return_hidden else None,
        )

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
