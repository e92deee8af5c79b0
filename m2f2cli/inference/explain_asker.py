"""Crops and questions to an explainer's scores and words: each picture's beginning once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from m2f2cli.checkpoints.load import load_explainer
from m2f2cli.data.transforms import explainer_views, normalize
from m2f2cli.inference.explain_sampling import SeededDraws, seed_of
from m2f2cli.inference.optimize_cpu import optimize_for_cpu
from m2f2cli.inference.prepare import Crop, Recipe
from m2f2cli.inference.scoring import AT_ONCE_ON_CPU, Score, score_of
from m2f2cli.models.conversation import Template, template
from m2f2cli.models.explainer import Explainer, PictureFeatures
from m2f2cli.models.prefix import SharedPrompts
from m2f2cli.models.processing import ExplainerProcessor
from m2f2cli.models.tokenizer import decode
from m2f2cli.options.explain import ExplainOptions

Loaded = tuple[Explainer, ExplainerProcessor]
Hear = Callable[[int, str], object]


class Said(NamedTuple):
    """One answer.

    Attributes:
        text: Without the tokeniser's marks.
        complete: Whether it ended by itself.
    """

    text: str
    complete: bool


class Asker:
    """An explainer with everything that is needed to ask it.

    Args:
        model: A checkpoint's name (see ``checkpoints.load.load_explainer``), or an
            explainer with its processor.
        options: How to ask.

    Raises:
        M2F2Error: The checkpoint is none of an explainer, or damaged.
    """

    def __init__(self, model: str | Loaded, options: ExplainOptions) -> None:
        if isinstance(model, str):
            where = options.detect
            explainer, folder = load_explainer(
                model, device=where.device, dtype=where.dtype, quantize=options.quantize
            )
            optimize_for_cpu(explainer.detector)
            model = (
                explainer,
                ExplainerProcessor.from_folder(folder, explainer.config, explainer_views),
            )
        self.model, self.processor = model
        self.options = options
        self.template: Template = template(options.template or self.model.config.template)
        self._room = options.max_new_tokens

    def recipe(self) -> Recipe:
        """How the explainer wants its crops."""
        finds = self.options.detect.faces != "none"
        found = Recipe.of(self.model.detector.config, finds_faces=finds)
        return found._replace(pads=self.model.config.image_aspect == "pad")

    def length(self, prompt: str) -> int:
        """How many tokens a prompt about one picture has.

        Raises:
            UsageError: Its placeholders do not fit one picture, or it is too long.
        """
        return len(self.processor.tokens(prompt, 1))

    def leave_room(self, lengths: Iterable[int]) -> None:
        """Let answers end where the model's context does.

        Args:
            lengths: Of all prompts of a run: the longest sets the room of every answer, so that
                none depends on what it is asked beside.
        """
        limit = self.model.config.text_config.max_position_embeddings
        self._room = min(self.options.max_new_tokens, limit - max(lengths))

    def look(self, crops: Sequence[Crop]) -> tuple[list[Score], PictureFeatures]:
        """Run the detector and what shows its sight to the language model.

        Args:
            crops: N of them, of the model's input size.

        Returns:
            What the detector says of each, and the features for ``answer``.
        """
        detector = self.model.detector
        config = detector.config
        centre = [normalize(c.pixels, config.image_mean, config.image_std) for c in crops]
        clip = [
            seen if c.padded is None else normalize(c.padded, config.image_mean, config.image_std)
            for c, seen in zip(crops, centre, strict=True)
        ]
        at_once = AT_ONCE_ON_CPU if detector.device.type == "cpu" else len(crops)
        parts = []
        for first in range(0, len(crops), at_once):
            some = slice(first, first + at_once)
            views = [self._tensor(clip[some])]
            if any(crop.padded is not None for crop in crops[some]):
                views.append(self._tensor(centre[some]))
            with torch.no_grad():
                parts.append(self.model.encode_pictures(*views))
        seen = _joined(parts)
        probabilities = detector.fake_probability(seen.logits).tolist()
        return [score_of(*row) for row in zip(crops, probabilities, strict=True)], seen

    def _tensor(self, pixels: Sequence[np.ndarray]) -> torch.Tensor:
        detector = self.model.detector
        return torch.from_numpy(np.stack(pixels)).to(detector.device, detector.dtype)

    def answer(
        self,
        crops: Sequence[Crop],
        features: PictureFeatures,
        prompts: Sequence[Sequence[str]],
        *,
        hear: Hear | None = None,
    ) -> list[list[Said]]:
        """Ask about crops, all questions about one going on from the same beginning.

        Args:
            crops: N of them.
            features: Theirs, from ``look``.
            prompts: For each crop what is asked, inside the template.
            hear: Is told (number of the prompt, new words) as they come; the prompts are then
                answered one by one.

        Returns:
            The answers to each crop's prompts.
        """
        groups = [[self.processor.tokens(prompt, 1) for prompt in texts] for texts in prompts]
        seen = [features.rows(n, n + 1) for n in range(len(crops))]
        shared = SharedPrompts(self.model, groups, seen)
        places = [(n, q) for n, texts in enumerate(prompts) for q in range(len(texts))]
        at_once = 1 if hear else self.options.detect.batch_size
        words: list[list[int]] = []
        for first in range(0, len(places), at_once):
            some = places[first : first + at_once]
            seeds = [(crops[n].digest, prompts[n][q]) for n, q in some]
            listener = _Words(self.processor.tokenizer, hear, first) if hear else None
            words += shared.ask(some, **self._generation(seeds), streamer=listener)
        said: list[list[Said]] = [[] for _ in crops]
        for (n, _), ids in zip(places, words, strict=True):
            text = decode(self.processor.tokenizer, ids)
            said[n].append(Said(text, len(ids) < self._room))
        return said

    def _generation(self, about: Sequence[tuple[bytes, str]]) -> dict[str, Any]:
        chosen: dict[str, Any] = {
            "max_new_tokens": self._room,
            "do_sample": False,
            "num_beams": 1,
            "temperature": None,
            "top_p": None,
            "top_k": None,
        }
        if sampling := self.options.sampling():
            seed = int(sampling["seed"])
            draws = SeededDraws(
                [seed_of(seed, *which) for which in about],
                temperature=sampling["temperature"],
                top_p=sampling["top_p"],
            )
            chosen["logits_processor"] = LogitsProcessorList([draws])
        return chosen


class _Words(BaseStreamer):
    """Tells the words of one answer as its tokens come."""

    def __init__(self, tokenizer: Any, hear: Hear, number: int) -> None:
        self._tokenizer, self._hear, self._number = tokenizer, hear, number
        self._ids: list[int] = []
        self._told = ""
        self._hear(number, "")

    def put(self, value: torch.Tensor) -> None:
        """Take the next tokens; the prompt's, which come first, are empty."""
        self._ids += value.flatten().tolist()
        text = decode(self._tokenizer, self._ids)
        # An unfinished character changes when its next byte comes.
        if text != self._told and text.startswith(self._told) and not text.endswith("\ufffd"):
            self._hear(self._number, text[len(self._told) :])
            self._told = text

    def end(self) -> None:
        """Nothing is held back."""


def _joined(parts: Sequence[PictureFeatures]) -> PictureFeatures:
    if len(parts) == 1:
        return parts[0]
    return PictureFeatures(
        torch.cat([part.patches for part in parts]),
        torch.cat([part.forgery for part in parts]),
        torch.cat([part.logits for part in parts]),
    )
