"""Asks about crops in batches across items, equal crops once, and gives items back in order."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from m2f2cli.inference.explain_asker import Asker, Said
from m2f2cli.inference.explain_questions import Question
from m2f2cli.inference.prepare import Crop, Prepared
from m2f2cli.inference.scoring import Score
from m2f2cli.inference.verdict import Judgement, Rule
from m2f2cli.records import Box

_REMEMBERED = 4096  # interviews kept for another appearance of an equal crop

Key = tuple[bytes, tuple[Question, ...]]


class Interview(NamedTuple):
    """What detector and language model said of one crop.

    Attributes:
        score: The detector's.
        verdict: The detector's.
        told: What the questions said of the face; None when nothing.
        asked: The questions, with what they told.
        prompts: The same with placeholders, inside the template.
        said: The answers.
    """

    score: Score
    verdict: Judgement
    told: str | None
    asked: tuple[str, ...]
    prompts: tuple[str, ...]
    said: tuple[Said, ...]


class Heard(NamedTuple):
    """Words of an answer while it is written.

    Attributes:
        crop: Of the face.
        score: The detector's.
        verdict: The detector's.
        question: What is answered.
        asked: The same in words.
        words: New ones; empty when the answer begins.
    """

    crop: Box
    score: Score
    verdict: str
    question: Question
    asked: str
    words: str


@dataclass
class Plan:
    """What is to be asked about one item.

    Attributes:
        prepared: The item.
        crops: What is asked about.
        questions: What is asked about each.
        scores: Of crops that were judged already, by digest.
        frame: Number of the video's frame the crops are from; None for a picture.
    """

    prepared: Prepared
    crops: tuple[Crop, ...] = ()
    questions: tuple[Question, ...] = ()
    scores: dict[bytes, Score] = field(default_factory=dict)
    frame: int | None = None


class Interviewer:
    """Collects what is to be asked until a batch is full.

    Args:
        asker: The explainer.
        rule: Turns scores into verdicts.
        hear: Is told words as they come; answers are then written one by one.
    """

    def __init__(
        self, asker: Asker, rule: Rule, *, hear: Callable[[Heard], object] | None = None
    ) -> None:
        self._asker = asker
        self._rule = rule
        self._hear = hear
        self._known: OrderedDict[Key, Interview] = OrderedDict()
        self._batch: dict[Key, Crop] = {}
        self._rows = 0

    def conduct(self, plans: Iterable[Plan]) -> Iterator[tuple[Plan, list[Interview]]]:
        """Ask everything that is planned.

        Args:
            plans: One an item.

        Yields:
            Each plan with the interviews of its crops, in order.
        """
        waiting: deque[tuple[Plan, dict[Key, Interview | None]]] = deque()
        for plan in plans:
            keys = [(crop.digest, plan.questions) for crop in plan.crops]
            waiting.append((plan, dict.fromkeys(keys)))
            for key, crop in zip(keys, plan.crops, strict=True):
                if key not in self._known and key not in self._batch:
                    if self._rows + len(plan.questions) > self._asker.options.detect.batch_size:
                        self._ask()
                    self._batch[key] = crop
                    self._rows += len(plan.questions)
            yield from self._completed(waiting)
        self._ask()
        yield from self._completed(waiting)

    def _completed(
        self, waiting: deque[tuple[Plan, dict[Key, Interview | None]]]
    ) -> Iterator[tuple[Plan, list[Interview]]]:
        for _, found in waiting:
            found.update({key: self._known[key] for key in found if key in self._known})
        while waiting and None not in waiting[0][1].values():
            plan, found = waiting.popleft()
            keys = [(crop.digest, plan.questions) for crop in plan.crops]
            yield plan, [interview for key in keys if (interview := found[key]) is not None]
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def _ask(self) -> None:
        if not self._batch:
            return
        crops = list(self._batch.values())
        scores, features = self._asker.look(crops)
        drafts = [
            self._draft(score, questions)
            for score, (_, questions) in zip(scores, self._batch, strict=True)
        ]
        said = self._asker.answer(
            crops, features, [draft.prompts for draft in drafts], hear=self._listener(drafts)
        )
        for key, draft, answers in zip(self._batch, drafts, said, strict=True):
            self._known[key] = draft._replace(said=tuple(answers))
        self._batch, self._rows = {}, 0

    def _draft(self, score: Score, questions: tuple[Question, ...]) -> Interview:
        """What is going to be asked about a crop with that score."""
        verdict = self._rule.judge(score.fake_probability, score.domain_distance)
        decided = verdict.verdict if verdict.verdict in ("real", "fake") else None
        told = decided if self._asker.options.condition == "detector" else None
        template = self._asker.template
        return Interview(
            score,
            verdict,
            told,
            tuple(question.words(template, told) for question in questions),
            tuple(question.prompt(template, told) for question in questions),
            (),
        )

    def _listener(self, drafts: Sequence[Interview]) -> Callable[[int, str], object] | None:
        if self._hear is None:
            return None
        tell = self._hear
        places = [
            Heard(crop.crop, draft.score, draft.verdict.verdict, question, asked, "")
            for (_, questions), crop, draft in zip(
                self._batch, self._batch.values(), drafts, strict=True
            )
            for question, asked in zip(questions, draft.asked, strict=True)
        ]
        return lambda number, words: tell(places[number]._replace(words=words))
