"""Which items were answered wrongly, or not at all."""

from __future__ import annotations

from typing import NamedTuple

from m2f2cli.evaluation.pictures import DEFAULT_THRESHOLD
from m2f2cli.evaluation.scored import FAKE, Scored, ScoredSet


class Mistake(NamedTuple):
    """An item that was answered wrongly, or not at all.

    Attributes:
        item: The item.
        confidence: Probability given to the wrong class, in [0, 1]; 1 where there is only a word.
        words: What was said.
    """

    item: Scored
    confidence: float
    words: str


def threshold_of(scored: ScoredSet) -> float:
    """Fake from here on: what the predictions name, else the default."""
    return DEFAULT_THRESHOLD if scored.threshold is None else scored.threshold


def call_of(item: Scored, scored: ScoredSet) -> str | None:
    """What an item counts as: ``real``, ``fake``, or None without an answer.

    A probability is held against the threshold, whatever its verdict; a text counts as it says.
    """
    if scored.task == "judgement":
        return item.verdict
    if item.fake_probability is None:
        return None
    return "fake" if item.fake_probability >= threshold_of(scored) else "real"


def find_mistakes(scored: ScoredSet) -> list[Mistake]:
    """Items answered wrongly or not at all, the most confident first, then in the truth's order.

    Explanations have no right or wrong: of them only those without words are listed.
    """
    found = []
    for item in scored.items:
        if scored.task == "explanation":
            if not (item.answer or "").strip():
                found.append(Mistake(item, 0.0, "no answer"))
            continue
        call = call_of(item, scored)
        if call is None:
            found.append(Mistake(item, 0.0, _silence(item)))
        elif call != ("fake" if item.label == FAKE else "real"):
            found.append(_mistake(item, call))
    return sorted(found, key=lambda mistake: -mistake.confidence)


def _mistake(item: Scored, call: str) -> Mistake:
    score = item.fake_probability
    if score is None:
        return Mistake(item, 1.0, f"called {call}")
    confidence = score if call == "fake" else 1 - score
    return Mistake(item, confidence, f"fake probability {score:.3f}")


def _silence(item: Scored) -> str:
    if item.status != "ok":
        return f"not judged: {item.status}"
    return "no answer" if item.answer is None else "the answer says neither real nor fake"
