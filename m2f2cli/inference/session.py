"""A model that stays loaded: verdicts on one item after another, and explanations of them later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from m2f2cli.errors import UsageError
from m2f2cli.inference.pipeline import (
    Judge,
    Judged,
    Scorer,
    judge,
    load,
    rule_of,
    settings_of,
)
from m2f2cli.inference.sources import Decoder, Source
from m2f2cli.options.explain import ExplainOptions
from m2f2cli.records import Box, Explanation, Settings

if TYPE_CHECKING:
    from m2f2cli.inference.explain import ExplainPipeline, Loaded, TextChunk


class Session:
    """A loaded detector or explainer. It is asked by one thread at a time.

    Args:
        model: A checkpoint's name, of a detector or an explainer; or either, loaded.
        options: How to judge and, given an explainer, to ask.

    Attributes:
        explains: Whether the model gives reasons.
        rule: Turns its scores into verdicts.

    Raises:
        M2F2Error: The model is unusable.
    """

    def __init__(
        self, model: str | Judge | Loaded, *, options: ExplainOptions | None = None
    ) -> None:
        self.options = options or ExplainOptions()
        self._pipeline = self._load_explainer(model)
        if self._pipeline is not None:
            detector: Judge = self._pipeline.model.detector
            self._scorer = self._pipeline.scorer
        else:
            assert not isinstance(model, tuple)
            detector = load(model, self.options.detect)
            self._scorer = Scorer(detector, maps=True)
        self.name = model if isinstance(model, str) else type(detector).__name__
        self.rule = rule_of(detector, self.options.detect)

    def _load_explainer(self, model: str | Judge | Loaded) -> ExplainPipeline | None:
        if isinstance(model, str):
            from m2f2cli.checkpoints.load import is_explainer

            if not is_explainer(model):
                return None
        elif not isinstance(model, tuple):
            return None
        from m2f2cli.inference.explain import ExplainPipeline
        from m2f2cli.inference.questions import choose

        pipeline = ExplainPipeline(model, self.options, maps=True)
        pipeline.reserve(choose(self.options))
        return pipeline

    @property
    def explains(self) -> bool:
        """Whether the model gives reasons."""
        return self._pipeline is not None

    @property
    def settings(self) -> Settings:
        """What verdicts depend on, as every record tells it."""
        found = settings_of(self.name, self._scorer.detector, self.options.detect)
        if self._pipeline is None:
            return found
        return replace(found, model_fingerprint=self._pipeline.model.fingerprint)

    def judge(self, source: Source) -> Judged:
        """Read, crop and judge one item; a bad file is a record with another status than ``ok``.

        Its views keep their pixels to be drawn on, its scores their forgery maps.
        """
        options = self.options.detect
        with Decoder([source], options, keep="everything") as decoder:
            found = judge(decoder, self._scorer, options=options, settings=self.settings)
            return next(item for item in found if item is not None)

    def explain(
        self,
        judged: Judged,
        *,
        face: Box | None = None,
        regions: Sequence[str] = (),
        questions: Sequence[str] = (),
        on_text: Callable[[TextChunk], object] | None = None,
    ) -> Explanation:
        """Ask about one face of a judged item.

        Args:
            judged: From ``judge``, with status ``ok``.
            face: ``crop`` of a face of a picture; None takes the one that decides. Of a video it
                is always the one that decides the frame with the highest fake probability.
            regions: As in ``ExplainOptions``.
            questions: As in ``ExplainOptions``.
            on_text: Is called with each answer's text while it is generated.

        Raises:
            UsageError: The model is a detector, or a question impossible.
        """
        from m2f2cli.inference.explain import Request, explanation
        from m2f2cli.inference.questions import choose

        if self._pipeline is None:
            raise UsageError(
                "This model is a detector, which judges without words.",
                "Name an explainer with --model.",
            )
        options = replace(self.options, regions=tuple(regions), questions=tuple(questions))
        pipeline = self._pipeline.asking(options)
        faces = pipeline.faces(judged)
        if judged.record.kind != "video":
            box = face or judged.record.faces[0].crop
            faces = [one for one in faces if one.crop.crop == box][:1]
        request = Request(judged, faces, choose(options))
        _, answers = next(pipeline.answers([request], on_text=on_text))
        return explanation(request, answers, pipeline.settings(self.name))
