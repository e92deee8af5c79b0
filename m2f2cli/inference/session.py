"""A model that stays loaded: verdicts on one item after another, and the words about it later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from m2f2cli.errors import UsageError
from m2f2cli.inference.assemble import assemble
from m2f2cli.inference.detect import load, rule_of, settings_of
from m2f2cli.inference.prepare import Crop, Prepared, Recipe, prepare
from m2f2cli.inference.scoring import Judge, Score, Scorer
from m2f2cli.inference.sources import Source
from m2f2cli.options.explain import ExplainOptions
from m2f2cli.records import Box, Detection, Explanation, Settings

if TYPE_CHECKING:
    from m2f2cli.inference.explain_asker import Asker, Loaded
    from m2f2cli.inference.explain_interviews import Heard


@dataclass(frozen=True)
class Judged:
    """An item with its verdict, and all that is needed to draw and to explain it.

    Attributes:
        record: As ``m2f2 detect`` gives it.
        prepared: The item as read, with its crops.
        scores: By the crops' digests, with forgery maps where the model has them.
    """

    record: Detection
    prepared: Prepared
    scores: dict[bytes, Score]

    def crop(self, box: Box, frame: int | None = None) -> Crop:
        """The crop at a place of the picture, or of one frame of a video."""
        views = self.prepared.views
        here = [view for view in views if frame is None or view.index == frame]
        return next(crop for view in here for crop in view.crops if crop.crop == box)


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
        self._asker = self._load_asker(model)
        if self._asker is not None:
            self._judge: Judge = self._asker.model.detector
        else:
            assert not isinstance(model, tuple)
            self._judge = load(model, self.options.detect)
        self.name = model if isinstance(model, str) else type(self._judge).__name__
        self.rule = rule_of(self._judge, self.options.detect)

    def _load_asker(self, model: str | Judge | Loaded) -> Asker | None:
        if isinstance(model, str):
            from m2f2cli.checkpoints.load import is_explainer

            if not is_explainer(model):
                return None
        elif not isinstance(model, tuple):
            return None
        from m2f2cli.inference.explain import ready

        return ready(model, self.options)

    @property
    def explains(self) -> bool:
        """Whether the model gives reasons."""
        return self._asker is not None

    @property
    def settings(self) -> Settings:
        """What verdicts depend on, as every record tells it."""
        found = settings_of(self.name, self._judge, self.options.detect)
        if self._asker is None:
            return found
        return replace(found, model_fingerprint=self._asker.model.fingerprint)

    def judge(self, source: Source) -> Judged:
        """Read, crop and judge one item; a bad file is a record with another status than ``ok``."""
        detect = self.options.detect
        recipe: Future[Recipe] = Future()
        if self._asker is not None:
            recipe.set_result(self._asker.recipe())
        else:
            finds = detect.faces != "none"
            recipe.set_result(Recipe.of(self._judge.config, finds_faces=finds))
        found = prepare(source, faces=detect.faces, frames=detect.frames, recipe=recipe)
        crops = list({c.digest: c for view in found.views for c in view.crops}.values())
        scores: dict[bytes, Score] = {}
        for first in range(0, len(crops), detect.batch_size):
            some = crops[first : first + detect.batch_size]
            scores.update(zip((crop.digest for crop in some), self._score(some), strict=True))
        return Judged(assemble(found, scores, self.rule, self.settings), found, scores)

    def _score(self, crops: Sequence[Crop]) -> list[Score]:
        if self._asker is None:
            return Scorer(self._judge, maps=self._judge.config.forgery_map).score(crops)
        scores, seen = self._asker.look(crops)
        if seen.forgery_map is None:
            return scores
        maps = seen.forgery_map.float().cpu().numpy()
        pairs = zip(scores, maps, strict=True)
        return [score._replace(forgery_map=where) for score, where in pairs]

    def explain(
        self,
        judged: Judged,
        *,
        face: Box | None = None,
        regions: Sequence[str] = (),
        questions: Sequence[str] = (),
        hear: Callable[[Heard], object] | None = None,
    ) -> Explanation:
        """Ask about one face of a judged item.

        Args:
            judged: From ``judge``, with status ``ok``.
            face: ``crop`` of a face of a picture; None takes the one that decides. Of a video it
                is always the one that decides the frame with the highest fake probability.
            regions: As in ``ExplainOptions``.
            questions: As in ``ExplainOptions``.
            hear: Is told the words of each answer as they are written.

        Raises:
            UsageError: The model is a detector, or a question impossible.
        """
        from m2f2cli.inference.explain import explain_settings, most_fake, ready, with_words
        from m2f2cli.inference.explain_interviews import Interviewer, Plan
        from m2f2cli.inference.explain_questions import choose

        if self._asker is None:
            raise UsageError(
                "This model is a detector, which judges without words.",
                "Name an explainer with --model.",
            )
        options = replace(self.options, regions=tuple(regions), questions=tuple(questions))
        asker = ready((self._asker.model, self._asker.processor), options)
        chosen = choose(options)
        if judged.record.kind == "video":
            frame, crop = most_fake(judged.prepared, judged.scores, self.rule)
            plan = Plan(judged.prepared, (crop,), chosen, judged.scores, frame.index)
        else:
            crop = judged.crop(face or judged.record.faces[0].crop)
            plan = Plan(judged.prepared, (crop,), chosen, judged.scores)
        found = replace(judged.record, settings=explain_settings(self.name, asker))
        _, interviews = next(Interviewer(asker, self.rule, hear=hear).conduct([plan]))
        return with_words(found, plan, interviews)
