"""The explainer: a LLaMA that sees the picture's patches and the detector's answer.

``<image>`` becomes one token a patch, made by ``mm_projector`` from the hidden states of the
detector's own CLIP tower (class token left out), ``<deepfake>`` becomes one token, made by
``forgery_projector`` from the softmax of the detector's logits. Source: M2F2-Det (arXiv 2503.20188)
and LLaVA-1.5 (arXiv 2310.03744), on transformers' LLaMA.

State-dict keys, with what the published explainer calls them:

    language_model.model.embed_tokens.weight        model.embed_tokens.weight
    language_model.model.layers.N.{}                model.layers.N.{}
    language_model.model.norm.weight                model.norm.weight
    language_model.lm_head.weight                   lm_head.weight
    mm_projector.{0,2}.{weight,bias}                model.mm_projector.{0,2}.{weight,bias}
    forgery_projector.{0,2}.{weight,bias}           deepfake_projector.{0,2}.{weight,bias}
    detector.clip.vision.{}                         model.vision_tower.vision_tower.vision_model.{}
    detector.{}  (every other key of Detector)      deepfake_encoder.{}  (detector B)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from m2f2cli.errors import ConfigError, UsageError
from m2f2cli.models.detector import Detector, DetectorConfig
from m2f2cli.models.projector import Projector
from m2f2cli.models.schema import EXPLAINER, check_detector, check_explainer, check_llama

ASPECTS = ("pad", "square")
# What the installed transformers calls the keys and values of what was seen.
CACHE = next(name for name in ("cache", "past_key_values") if hasattr(CausalLMOutputWithPast, name))


class ExplainerConfig(PretrainedConfig):
    """What an explainer is and how it is asked.

    Args:
        detector_config: The detector, as ``DetectorConfig`` or its fields.
        text_config: The language model, as ``LlamaConfig`` or its fields.
        template: The conversation template it was trained with (``models.conversation``).
        image_aspect: What CLIP sees of a picture that is not square: ``pad`` all of it on a
            square, ``square`` its center. The backbone always sees the center.
        image_token_id: Stands for a patch in ``input_ids``; no word of the vocabulary.
        deepfake_token_id: Stands for the detector's answer; no word of the vocabulary.

    Raises:
        ConfigError: See ``DetectorConfig``.
    """

    model_type = EXPLAINER
    sub_configs = {"detector_config": DetectorConfig, "text_config": LlamaConfig}  # noqa: RUF012

    def __init__(
        self,
        *,
        detector_config: DetectorConfig | dict[str, Any] | None = None,
        text_config: LlamaConfig | dict[str, Any] | None = None,
        template: str = "vicuna_v1",
        image_aspect: str = "pad",
        image_token_id: int = -200,
        deepfake_token_id: int = -300,
        **kwargs: Any,
    ) -> None:
        if not isinstance(detector_config, DetectorConfig):
            check_detector(detector_config or {}, "detector_config.")
            detector_config = DetectorConfig(**(detector_config or {}))
        if not isinstance(text_config, LlamaConfig):
            text_config = _llama_config(text_config or {})
        if image_aspect not in ASPECTS:
            raise ConfigError(
                f"Unknown image aspect '{image_aspect}'.", f"Use {' or '.join(ASPECTS)}."
            )
        ids = {"image_token_id": image_token_id, "deepfake_token_id": deepfake_token_id}
        check_explainer({**kwargs, **ids, "template": template}, text_config.vocab_size)
        self.detector_config = detector_config
        self.text_config: Any = text_config
        self.template = template
        self.image_aspect = image_aspect
        self.image_token_id = image_token_id
        self.deepfake_token_id = deepfake_token_id
        super().__init__(**kwargs)

    @property
    def patches(self) -> int:
        """How many tokens one picture becomes."""
        spec = self.detector_config.clip["vision"]
        size = spec.get("image_size", self.detector_config.image_size)
        grid: int = size // spec["patch_size"]
        return grid**2


def _llama_config(fields: dict[str, Any]) -> LlamaConfig:
    check_llama(fields, "text_config.")
    try:
        return LlamaConfig(**fields)
    except (StrictDataclassError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"text_config is not that of a LLaMA ({said}).") from error


@dataclass(frozen=True)
class PictureFeatures:
    """What the language model is shown of N pictures, and what the detector said.

    Args:
        patches: (N, P, W) projected patch features.
        forgery: (N, W) the projected answer of the detector.
        logits: (N, 2) the detector's logits, order (real, fake).
        forgery_map: (N, g, g) cosine similarities in [-1, 1], or None (see ``DetectorOutput``).
        domain_distance: (N,), or None, as above.
    """

    patches: torch.Tensor
    forgery: torch.Tensor
    logits: torch.Tensor
    forgery_map: torch.Tensor | None = None
    domain_distance: torch.Tensor | None = None

    def rows(self, begin: int, end: int) -> PictureFeatures:
        """Those of the pictures from ``begin`` up to and without ``end``."""
        cut = slice(begin, end)
        found = {name: part for name, part in vars(self).items() if part is not None}
        return PictureFeatures(**{name: part[cut] for name, part in found.items()})


@dataclass
class ExplainerOutput(CausalLMOutputWithPast):
    """What an explainer gives for B sequences of T tokens: what a LLaMA gives, and one more.

    Attributes:
        detector_logits: (N, 2), order (real, fake), when pictures were given.
    """

    detector_logits: torch.Tensor | None = None


class Explainer(PreTrainedModel, GenerationMixin):
    """A LLaMA with a detector, and two projectors between them.

    Args:
        config: Its detector, its language model and how the two meet.
    """

    config_class = ExplainerConfig
    config: ExplainerConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # Never split over devices by device_map, nor quantized but for the language model's layers.
    _no_split_modules = ["LlamaDecoderLayer", "Detector", "Projector"]  # noqa: RUF012
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: ExplainerConfig) -> None:
        super().__init__(config)
        self.detector = Detector(config.detector_config)
        self.language_model = LlamaForCausalLM(config.text_config)
        width = config.text_config.hidden_size
        self.mm_projector = Projector(self.detector.clip.vision.width, width)
        self.forgery_projector = Projector(2, width)
        self.fingerprint: str | None = None
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        """The word embeddings of the language model."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        """Replace the word embeddings of the language model."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> torch.nn.Module:
        """The head of the language model."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: torch.nn.Module) -> None:
        """Replace the head of the language model."""
        self.language_model.set_output_embeddings(new_embeddings)

    def encode_pictures(
        self, pixel_values: torch.Tensor, backbone_pixel_values: torch.Tensor | None = None
    ) -> PictureFeatures:
        """Run detector and projectors, CLIP once for both.

        Args:
            pixel_values: (N, 3, S, S), what CLIP sees.
            backbone_pixel_values: (N, 3, S, S), what the backbone sees; None means the same.
        """
        trained = any(p.requires_grad for p in self.detector.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            seen = self.detector(
                pixel_values, backbone_pixel_values=backbone_pixel_values, return_hidden=True
            )
        patches = seen.clip_hidden[:, 1:]
        believed = seen.logits.float().softmax(dim=-1).to(patches.dtype)
        return PictureFeatures(
            self.mm_projector(patches),
            self.forgery_projector(believed),
            seen.logits,
            seen.forgery_map,
            seen.domain_distance,
        )

    def embed(self, input_ids: torch.Tensor, features: PictureFeatures | None) -> torch.Tensor:
        """Word embeddings with the pictures put in the places held for them.

        Each row takes as many pictures as it has places for, in order; the k-th detector place
        of a row belongs to its k-th picture.

        Args:
            input_ids: (B, T) int64 with ``config.image_token_id`` once a patch.
            features: The pictures of all rows, in the order of the rows.

        Returns:
            (B, T, W).

        Raises:
            UsageError: Places and pictures do not match.
        """
        ids = self.config
        here, verdict = input_ids == ids.image_token_id, input_ids == ids.deepfake_token_id
        words: torch.Tensor = self.get_input_embeddings()(input_ids.masked_fill(here | verdict, 0))
        if features is None:
            if bool((here | verdict).any()):
                raise UsageError(
                    "The prompt has <image> or <deepfake> in it, but no picture was given.",
                    "Give the pictures, or leave the placeholders out.",
                )
            return words
        shown, told = _match_pictures(here, verdict, features.patches)
        patches, forgery = features.patches[shown].to(words), features.forgery[told].to(words)
        words = words.masked_scatter(here[..., None].to(words.device), patches)
        return words.masked_scatter(verdict[..., None].to(words.device), forgery)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        backbone_pixel_values: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ExplainerOutput:
        """Predict the next tokens.

        Args:
            input_ids: (B, T) int64, as ``models.processing`` makes them.
            attention_mask: (B, seen + T), 0 where there is padding.
            position_ids: (B, T); None counts from what was seen.
            inputs_embeds: (B, T, W) in the place of ``input_ids`` and pictures.
            pixel_values: (N, 3, S, S) the pictures of all rows in order, as CLIP sees them.
            backbone_pixel_values: The same as the backbone sees them; None means no difference.
            kwargs: ``labels`` (B, T) with -100 where nothing is to be learnt, ``CACHE`` with what
                was seen before, and the rest of what ``LlamaForCausalLM`` takes.

        Raises:
            UsageError: The places in ``input_ids`` and the pictures do not match.
        """
        features = None
        if inputs_embeds is None:
            if input_ids is None:
                raise UsageError("An explainer needs input_ids or inputs_embeds.")
            if pixel_values is not None:
                features = self.encode_pictures(pixel_values, backbone_pixel_values)
            inputs_embeds = self.embed(input_ids, features)
        out = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{**kwargs, "return_dict": True},
        )
        return ExplainerOutput(
            **out, detector_logits=features.logits if features is not None else None
        )

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Continue prompts; see ``GenerationMixin.generate`` for the options.

        Args:
            input_ids: (B, T) int64, padded on the left where ``attention_mask`` is 0.
            kwargs: ``pixel_values`` and ``backbone_pixel_values`` as for ``forward``, or
                ``inputs_embeds`` in their place, and the options of ``GenerationMixin.generate``.

        Returns:
            (B, new) int64: what was said, without the prompt; or a ``ModelOutput`` with
            ``sequences`` when ``return_dict_in_generate`` is set.

        Raises:
            UsageError: The places in ``input_ids`` and the pictures do not match.
        """
        pixels, seen = kwargs.pop("pixel_values", None), kwargs.pop("backbone_pixel_values", None)
        if input_ids is not None:
            features = None if pixels is None else self.encode_pictures(pixels, seen)
            kwargs["inputs_embeds"] = self.embed(input_ids, features)
        if self.generation_config.pad_token_id is None:
            kwargs.setdefault("pad_token_id", 0)  # fills rows after their end; any token does
        return super().generate(**kwargs)

    def end_tokens(self) -> frozenset[int]:
        """The tokens that end an answer."""
        ends = self.generation_config.eos_token_id
        return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


def _match_pictures(
    here: torch.Tensor, verdict: torch.Tensor, patches: torch.Tensor
) -> tuple[list[int], list[int]]:
    """The pictures whose patches are shown, and those the detector places speak of, in order."""
    count, size = patches.shape[:2]
    shown: list[int] = []
    told: list[int] = []
    begin = 0
    for places, verdicts in zip(here.sum(dim=1).tolist(), verdict.sum(dim=1).tolist(), strict=True):
        if places % size:
            raise UsageError(
                f"A prompt holds {places} places for patches; a picture has {size}.",
                "It was cut in the middle of a picture: shorten the text.",
            )
        pictures = places // size or verdicts
        if verdicts > pictures:
            raise UsageError(
                f"A prompt asks for {verdicts} detector answers, but has {pictures} pictures.",
                "Write <deepfake> once for each picture.",
            )
        shown += range(begin, begin + places // size)
        told += range(begin, begin + verdicts)
        begin += pictures
    if begin != count:
        raise UsageError(
            f"The prompts have places for {begin} pictures; {count} were given.",
            "Write <image> once for each picture.",
        )
    return shown, told


AutoConfig.register(ExplainerConfig.model_type, ExplainerConfig, exist_ok=True)
AutoModelForCausalLM.register(ExplainerConfig, Explainer, exist_ok=True)
