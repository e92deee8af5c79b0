"""Which items were answered wrongly, or not at all. Standard library only."""

from __future__ import annotations

from typing import NamedTuple

from m2f2cli.evaluation.scored import FAKE, REAL, Scored, ScoredSet

DEFAULT_THRESHOLD = 0.5


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


def find_mistakes(scored: ScoredSet) -> list[Mistake]:
    """Items answered wrongly or not at all, the most confident first, then in the truth's order.

    A probability is held against the threshold; a text against its verdict. Explanations have no
    right or wrong: of them only those without words are listed.
    """
    threshold = DEFAULT_THRESHOLD if scored.threshold is None else scored.threshold
    found = []
    for item in scored.items:
        if scored.task == "explanation":
            if not (item.answer or "").strip():
                found.append(Mistake(item, 0.0, "no answer"))
        elif item.fake_probability is not None:
            called = FAKE if item.fake_probability >= threshold else REAL
            if called != item.label:
                sure = item.fake_probability if called == FAKE else 1 - item.fake_probability
                found.append(Mistake(item, sure, f"fake probability {item.fake_probability:.3f}"))
        elif item.verdict is None:
            found.append(Mistake(item, 0.0, _silence(item)))
        elif item.verdict != ("fake" if item.label == FAKE else "real"):
            found.append(Mistake(item, 1.0, f"called {item.verdict}"))
    return sorted(found, key=lambda mistake: -mistake.confidence)


def _silence(item: Scored) -> str:
    if item.status != "ok":
        return f"not judged: {item.status}"
    return "no answer" if item.answer is None else "the answer says neither real nor fake"
