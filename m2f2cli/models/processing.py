"""The explainer's processor: prompts and pictures in, tensors out, for asking and for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import BatchFeature

from m2f2cli.errors import CheckpointError, UsageError
from m2f2cli.models.conversation import (
    DEEPFAKE,
    DEEPFAKE_ID,
    IGNORED,
    IMAGE,
    IMAGE_ID,
    Turn,
    encode,
    encode_with_labels,
    template,
)
from m2f2cli.models.explainer import ExplainerConfig
from m2f2cli.models.tokenizer import load_tokenizer

# A picture: uint8 (H, W, 3) RGB, or what ``Views`` made of it.
Picture = np.ndarray | tuple[np.ndarray, np.ndarray]


class Views(Protocol):
    """What CLIP and the backbone see of a picture: ``data.transforms.explainer_views``."""

    def __call__(
        self,
        pixels: np.ndarray,
        *,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        aspect: str,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Turn uint8 (H, W, 3) into two float32 (3, S, S)."""


class ExplainerProcessor:
    """Turns prompts and pictures into what an ``Explainer`` takes.

    Args:
        tokenizer: As ``models.tokenizer.load_tokenizer`` gives it.
        config: The explainer's.
        views: How a picture becomes pixels; without it pictures must come as ready views.

    Raises:
        CheckpointError: The tokenizer knows more words than the language model.
    """

    def __init__(self, tokenizer: Any, config: ExplainerConfig, views: Views | None = None) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.template = template(config.template)
        self._views = views
        rows = config.text_config.vocab_size
        if len(tokenizer) > rows:
            raise CheckpointError(
                f"The tokenizer has {len(tokenizer)} tokens, the language model {rows}.",
                "Take the tokenizer's files from the folder of the same model.",
            )

    @classmethod
    def from_folder(
        cls, folder: Path, config: ExplainerConfig, views: Views | None = None
    ) -> ExplainerProcessor:
        """The processor of a checkpoint folder.

        Raises:
            CheckpointError: The tokenizer is missing, damaged or of another model.
        """
        return cls(load_tokenizer(folder), config, views)

    def __call__(
        self,
        text: str | Sequence[str],
        pictures: Sequence[Any] | None = None,
    ) -> BatchFeature:
        """Prepare prompts for ``Explainer.generate``.

        Args:
            text: One prompt or B of them, as ``Template.render`` writes them.
            pictures: The pictures of the prompt; for several prompts a list for each.

        Returns:
            ``input_ids`` and ``attention_mask`` (B, T), padded on the left, and for N pictures
            ``pixel_values`` (N, 3, S, S) and, where it differs, ``backbone_pixel_values``.

        Raises:
            UsageError: A prompt's placeholders do not match its pictures, or it is too long.
        """
        prompts = [text] if isinstance(text, str) else list(text)
        groups: list[Sequence[Picture]] = [()] * len(prompts)
        if pictures is not None:
            groups = [pictures] if isinstance(text, str) else list(pictures)
        if len(groups) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts came with {len(groups)} lists of pictures.")
        rows = [
            {"input_ids": self.tokens(prompt, len(group))}
            for prompt, group in zip(prompts, groups, strict=True)
        ]
        flat = [picture for group in groups for picture in group]
        return BatchFeature({**self.pad(rows, side="left"), **self.pixels(flat)})

    def tokens(self, prompt: str, pictures: int) -> list[int]:
        """Token ids of one prompt, with a place for each patch of its pictures.

        Args:
            prompt: With ``<image>`` and ``<deepfake>``.
            pictures: How many pictures it is about.

        Raises:
            UsageError: The placeholders do not match the pictures, or the prompt is too long.
        """
        check_placeholders(prompt, pictures)
        ids = self._expand(encode(prompt, self.tokenizer))
        limit = self.config.text_config.max_position_embeddings
        if len(ids) >= limit:
            raise UsageError(
                f"The prompt has {len(ids)} tokens with its pictures; the model reads {limit}, "
                "its answer included.",
                "Shorten the question or ask about fewer pictures.",
            )
        return ids

    def sample(
        self, turns: Sequence[Turn], pictures: Sequence[Picture] = (), *, max_length: int = 2048
    ) -> dict[str, Any]:
        """One conversation to learn from, in the checkpoint's template.

        Args:
            turns: All answered.
            pictures: The pictures it is about.
            max_length: Longer ones lose their end; in tokens, patches counted.

        Returns:
            ``input_ids`` and ``labels``, lists of the same length, and the pictures' pixels.

        Raises:
            UsageError: See ``tokens`` and ``Template.render``; or no answer is left to learn.
        """
        text, answers = self.template.render(turns, end=self.tokenizer.eos_token)
        check_placeholders(text, len(pictures))
        ids, labels = encode_with_labels(text, answers, self.tokenizer)
        pairs = [
            (place, label if place == token else IGNORED)
            for token, label in zip(ids, labels, strict=True)
            for place in self._expand([token])
        ]
        kept, cut = pairs[:max_length], pairs[max_length:]
        held = {self.config.image_token_id, self.config.deepfake_token_id}
        if any(place in held for place, _ in cut) or all(label == IGNORED for _, label in kept):
            raise UsageError(
                f"Of a conversation of {len(pairs)} tokens, the first {max_length} hold "
                "no answer or not all of its pictures.",
                "Raise the maximal length or drop the conversation.",
            )
        return {
            "input_ids": [place for place, _ in kept],
            "labels": [label for _, label in kept],
            **self.pixels(pictures),
        }

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch to learn from, padded on the right; see ``sample``."""
        batch = self.pad(samples, side="right")
        for name in ("pixel_values", "backbone_pixel_values"):
            parts = [s.get(name, s["pixel_values"]) for s in samples if "pixel_values" in s]
            if any(name in s for s in samples):
                batch[name] = torch.cat(parts)
        return batch

    def pad(self, rows: Sequence[Mapping[str, Any]], *, side: str) -> dict[str, torch.Tensor]:
        """Bring rows of ``input_ids`` (and ``labels``) to one length.

        Args:
            rows: With lists of integers.
            side: Where the padding goes, ``left`` or ``right``.

        Returns:
            (B, T) int64 each, and ``attention_mask`` with 0 where there is padding.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        fills = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        batch: dict[str, torch.Tensor] = {}
        for name in [n for n in fills if n == "attention_mask" or n in rows[0]]:
            lines = []
            for row in rows:
                line = list(row.get(name, [1] * len(row["input_ids"])))
                gap = [fills[name]] * (longest - len(line))
                lines.append(gap + line if side == "left" else line + gap)
            batch[name] = torch.tensor(lines, dtype=torch.long)
        return batch

    def pixels(self, pictures: Sequence[Picture]) -> dict[str, torch.Tensor]:
        """The pixels of N pictures: nothing for none.

        Returns:
            ``pixel_values`` (N, 3, S, S) as CLIP sees them and, where that differs,
            ``backbone_pixel_values`` as the backbone does.

        Raises:
            UsageError: A picture is not ready, and no ``views`` was given.
        """
        if not pictures:
            return {}
        pairs = [self.view(picture) for picture in pictures]
        batch = {"pixel_values": torch.from_numpy(np.stack([clip for clip, _ in pairs]))}
        if any(clip is not seen for clip, seen in pairs):
            seen_by_backbone = np.stack([seen for _, seen in pairs])
            batch["backbone_pixel_values"] = torch.from_numpy(seen_by_backbone)
        return batch

    def view(self, picture: Picture) -> tuple[np.ndarray, np.ndarray]:
        """What CLIP and the backbone see of a picture, float32 (3, S, S) each."""
        if isinstance(picture, tuple):
            return picture
        if self._views is None:
            raise UsageError("This processor takes ready views of pictures only.")
        seen = self.config.detector_config
        return self._views(
            picture,
            size=seen.image_size,
            mean=seen.image_mean,
            std=seen.image_std,
            aspect=self.config.image_aspect,
        )

    def _expand(self, ids: Sequence[int]) -> list[int]:
        """Hold a place for each patch of each picture."""
        places = {
            IMAGE_ID: [self.config.image_token_id] * self.config.patches,
            DEEPFAKE_ID: [self.config.deepfake_token_id],
        }
        return [place for token in ids for place in places.get(token, [token])]


def check_placeholders(prompt: str, pictures: int) -> None:
    """Refuse a prompt whose placeholders do not match its pictures.

    A prompt names each picture by one ``<image>``, or none of them; ``<deepfake>`` stands at most
    once for each picture, the k-th for the k-th.

    Raises:
        UsageError: Says what is wrong.
    """
    images, verdicts = prompt.count(IMAGE), prompt.count(DEEPFAKE)
    if pictures and not images and not verdicts:
        raise UsageError(
            f"The prompt has no {IMAGE} or {DEEPFAKE}, so the model would not see the picture.",
            f"Begin the question with '{IMAGE}' and '{DEEPFAKE}', each on a line of its own.",
        )
    if images not in (0, pictures):
        raise UsageError(
            f"The prompt has {images} {IMAGE} for {pictures} pictures.",
            f"Write {IMAGE} once for each picture.",
        )
    if verdicts > pictures or (not images and verdicts != pictures):
        raise UsageError(
            f"The prompt has {verdicts} {DEEPFAKE} for {pictures} pictures.",
            f"Write {DEEPFAKE} once for each picture: it stands for the detector's answer.",
        )
