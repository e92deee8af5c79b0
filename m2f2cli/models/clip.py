"""The CLIP tower: a vision part and a text part, from transformers or from open_clip.

Both libraries stand behind one small interface. ``vision(pixels, layers)`` returns hidden states
with the class token first; ``text(tokens)`` encodes ready-made token embeddings. Blocks above the
last hidden state used do not exist here, nor do CLIP's projections and word embeddings: the
detector needs none of them.

Source: transformers ``modeling_clip`` and open_clip ``transformer``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from m2f2cli.compat import set_attention
from m2f2cli.errors import CheckpointError, ConfigError
from m2f2cli.files import read_json
from m2f2cli.models.schema import OPEN_CLIP_TOKENIZER, check_clip, refuse_code


def blocks_needed(total: int, layer: int) -> int:
    """How many blocks produce hidden state ``layer`` of a tower with ``total`` blocks.

    Hidden states are counted as transformers does: 0 is the embedding, ``total`` (or -1) the last.

    Raises:
        ConfigError: There is no such hidden state.
    """
    index = layer if layer >= 0 else total + 1 + layer
    if not 0 <= index <= total:
        raise ConfigError(f"Hidden state {layer} does not exist in a tower of {total} blocks.")
    return index


class _VisionEmbeddings(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        size: Any = config.image_size  # one number here; transformers allows two
        patch: Any = config.patch_size
        self.grid: int = size // patch
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, patch, bias=False)
        self.position_embedding = nn.Embedding(self.grid**2 + 1, width)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class _TextEmbeddings(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)


class _Encoder(nn.Module):
    def __init__(self, config: Any, blocks: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([CLIPEncoderLayer(config) for _ in range(blocks)])


class VisionPart(nn.Module):
    """transformers' CLIP vision transformer, cut after the last block used.

    Args:
        config: The tower's vision settings.
        blocks: How many of its blocks to build.
    """

    def __init__(self, config: CLIPVisionConfig, blocks: int) -> None:
        super().__init__()
        self.width: int = config.hidden_size
        self.embeddings = _VisionEmbeddings(config)
        self.grid = self.embeddings.grid
        self.pre_layrnorm = nn.LayerNorm(self.width, eps=config.layer_norm_eps)
        self.encoder = _Encoder(config, blocks)

    def forward(self, pixel_values: torch.Tensor, blocks: Sequence[int]) -> list[torch.Tensor]:
        """Hidden states after the given numbers of blocks, each (B, 1 + grid², width)."""
        hidden = self.pre_layrnorm(self.embeddings(pixel_values))
        states = {0: hidden}
        for number, layer in enumerate(self.encoder.layers, start=1):
            hidden = layer(hidden, None)
            if number in blocks:
                states[number] = hidden
        return [states[number] for number in blocks]


class TextPart(nn.Module):
    """transformers' CLIP text transformer, fed embeddings instead of word ids.

    Args:
        config: The tower's text settings.
    """

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.width: int = config.hidden_size
        self.embeddings = _TextEmbeddings(config)
        self.encoder = _Encoder(config, config.num_hidden_layers)
        self.final_layer_norm = nn.LayerNorm(self.width, eps=config.layer_norm_eps or 1e-5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Encode token embeddings (N, T, width) into the last position's feature (N, width)."""
        length = tokens.shape[1]
        hidden = tokens + self.embeddings.position_embedding.weight[:length]
        mask = torch.full((length, length), float("-inf"), dtype=hidden.dtype, device=hidden.device)
        mask = mask.triu(1)[None, None]
        for layer in self.encoder.layers:
            hidden = layer(hidden, mask)
        return self.final_layer_norm(hidden)[:, -1]


class OpenClipVisionPart(nn.Module):
    """open_clip's vision transformer behind the interface of ``VisionPart``."""

    def __init__(self, visual: Any, blocks: int) -> None:
        super().__init__()
        if not hasattr(visual, "transformer"):
            raise ConfigError("This open_clip model's vision part is not a plain ViT.")
        self.grid = int(visual.grid_size[0])
        self.width = int(visual.conv1.out_channels)
        visual.transformer.resblocks = visual.transformer.resblocks[:blocks]
        visual.ln_post = nn.Identity()
        visual.proj = None
        self.visual = visual

    def forward(self, pixel_values: torch.Tensor, blocks: Sequence[int]) -> list[torch.Tensor]:
        """Hidden states after the given numbers of blocks, each (B, 1 + grid², width)."""
        if any(number < 1 for number in blocks):
            raise ConfigError("open_clip towers give hidden states from 1 on.")
        wanted = sorted(set(blocks))
        out = self.visual.forward_intermediates(
            pixel_values,
            indices=[number - 1 for number in wanted],
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        joined = [
            torch.cat([prefix, patches], dim=1)
            for prefix, patches in zip(
                out["image_intermediates_prefix"], out["image_intermediates"], strict=True
            )
        ]
        return [joined[wanted.index(number)] for number in blocks]


class OpenClipTextPart(nn.Module):
    """open_clip's text transformer behind the interface of ``TextPart``."""

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.width = int(text.positional_embedding.shape[1])
        self.positional_embedding = text.positional_embedding
        self.transformer = text.transformer
        self.ln_final = text.ln_final

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Encode token embeddings (N, T, width) into the last position's feature (N, width)."""
        length = tokens.shape[1]
        mask = torch.full((length, length), float("-inf"), dtype=tokens.dtype, device=tokens.device)
        hidden = self.transformer(
            tokens + self.positional_embedding[:length], attn_mask=mask.triu(1)
        )
        return self.ln_final(hidden)[:, -1]


class ClipTower(nn.Module):
    """A CLIP vision part and, where wanted, its text part.

    Args:
        spec: ``{"library": "transformers", "vision": {…}, "text": {…}}`` with the fields of
            transformers' CLIP configurations, or ``{"library": "open_clip", "vision": {…},
            "text": {…}, "embed_dim": n, "quick_gelu": bool}`` with those of open_clip's.
        layer: The hidden state the detector reads; negative counts from the last.
        text: Whether to build the text part.
        attention: The attention implementation of transformers' blocks.

    Raises:
        ConfigError: The library is unknown or the hidden state does not exist.
    """

    def __init__(
        self, spec: Mapping[str, Any], layer: int, *, text: bool = True, attention: str = "sdpa"
    ) -> None:
        super().__init__()
        check_clip(spec)
        self.text: TextPart | OpenClipTextPart | None = None
        self.vision: VisionPart | OpenClipVisionPart
        if spec.get("library", "transformers") == "transformers":
            vision = CLIPVisionConfig(**spec["vision"])
            set_attention(vision, attention)
            self.block = blocks_needed(vision.num_hidden_layers, layer)
            self.vision = VisionPart(vision, self.block)
            if text:
                # No word ids are used, so special tokens may lie outside a small vocabulary.
                words = CLIPTextConfig(
                    **{"bos_token_id": None, "eos_token_id": None, **spec["text"]}
                )
                set_attention(words, "sdpa")
                self.text = TextPart(words)
        else:
            model = _open_clip_model(spec)
            self.block = blocks_needed(len(model.visual.transformer.resblocks), layer)
            self.vision = OpenClipVisionPart(model.visual, self.block)
            if text:
                self.text = OpenClipTextPart(model.text)

    def forward(
        self, pixel_values: torch.Tensor, extra: Sequence[int] = ()
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run the vision part.

        Args:
            pixel_values: (B, 3, S, S), normalized with CLIP's mean and deviation.
            extra: Further hidden states to return, as block numbers up to ``self.block``.

        Returns:
            The chosen hidden state, (B, 1 + grid², width), class token first, and the extra ones.
        """
        states = self.vision(pixel_values, [self.block, *extra])
        return states[0], states[1:]


def _open_clip_model(spec: Mapping[str, Any]) -> Any:
    from open_clip.model import CustomTextCLIP

    text = {k: v for k, v in spec["text"].items() if k not in OPEN_CLIP_TOKENIZER}
    return CustomTextCLIP(
        embed_dim=spec["embed_dim"],
        vision_cfg=dict(spec["vision"]),
        text_cfg=text,
        quick_gelu=bool(spec.get("quick_gelu", False)),
    )


def load_clip(source: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a pre-trained CLIP for a new detector.

    Args:
        source: A folder (or Hub id) with transformers' ``CLIPModel``, a folder with its
            ``CLIPVisionModel`` (then there is no text part), or
            ``openclip:NAME[/PRETRAINED]`` with an open_clip architecture and, optionally, the tag
            or file of its weights.

    Returns:
        The spec for ``ClipTower`` and the tensors of a whole tower under ``vision.`` and ``text.``.

    Raises:
        CheckpointError: The folder holds no CLIP model.
        ConfigError: open_clip has no such architecture.
    """
    if source.startswith("openclip:"):
        return _load_open_clip(source.removeprefix("openclip:"))
    from transformers import CLIPModel, CLIPVisionModel

    folder, kind = Path(source), None
    if folder.exists() and not (folder / "config.json").is_file():
        raise CheckpointError(f"'{source}' has no config.json, so it is no CLIP folder.")
    if folder.exists():
        fields = read_json(folder / "config.json")
        refuse_code(fields)
        kind = fields.get("model_type")
        if kind not in ("clip", "clip_vision_model"):
            raise CheckpointError(f"'{source}' holds a model of type '{kind}', not CLIP.")
    if kind == "clip_vision_model":
        part = CLIPVisionModel.from_pretrained(source)
        state = part.state_dict().items()
        return {"library": "transformers", "vision": _plain(part.config)}, {
            f"vision.{key.removeprefix('vision_model.')}": tensor for key, tensor in state
        }
    model = CLIPModel.from_pretrained(source)
    spec = {
        "library": "transformers",
        "vision": _plain(model.config.vision_config),
        "text": _plain(model.config.text_config),
    }
    tensors = {}
    for key, tensor in model.state_dict().items():
        side, _, rest = key.partition("_model.")
        if side in ("vision", "text") and rest:
            tensors[f"{side}.{rest}"] = tensor
    return spec, tensors


_SHARED_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
)
_VISION_FIELDS = (*_SHARED_FIELDS, "num_channels", "image_size", "patch_size")
_TEXT_FIELDS = (*_SHARED_FIELDS, "vocab_size", "max_position_embeddings")


def _plain(config: Any) -> dict[str, Any]:
    fields = _VISION_FIELDS if isinstance(config, CLIPVisionConfig) else _TEXT_FIELDS
    return {name: getattr(config, name) for name in fields}


def _load_open_clip(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    import open_clip

    architecture, _, pretrained = name.partition("/")
    config = open_clip.get_model_config(architecture)
    if config is None:
        raise ConfigError(
            f"open_clip has no architecture named '{architecture}'.",
            "See open_clip.list_models() for the valid names.",
        )
    spec = {
        "library": "open_clip",
        "embed_dim": config["embed_dim"],
        "vision": config["vision_cfg"],
        "text": config["text_cfg"],
        "quick_gelu": bool(config.get("quick_gelu", False)) or pretrained == "openai",
    }
    check_clip(spec)
    model = open_clip.create_model(
        architecture, pretrained=pretrained or None, force_custom_text=True
    )
    tensors = {}
    for key, tensor in model.state_dict().items():
        if key.startswith("visual."):
            tensors[f"vision.{key}"] = tensor
        elif key.startswith("text."):
            tensors[key] = tensor
    return spec, tensors
