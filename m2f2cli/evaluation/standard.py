"""The standard protocol: what m2f2 reports about probabilities, judgements and explanations.

``docs/metrics.md`` defines every figure. Intervals come from a bootstrap over videos, or over
pictures where they stand alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from m2f2cli import metrics
from m2f2cli.data.conversations import plain
from m2f2cli.errors import UsageError
from m2f2cli.evaluation.truth import DEFAULT_THRESHOLD, FAKE, REAL, Figure, Joined, Measures
from m2f2cli.metrics import (
    BINS,
    LEVEL,
    RESAMPLES,
    SEED,
    Confusion,
    Groups,
    Measure,
    Ranking,
    area,
    bin_of,
    detection_rate,
    equal_error_rate,
    precision_area,
)

FALSE_POSITIVE_RATES = [0.01, 0.05]  # of tpr_at_fpr_1 and tpr_at_fpr_5


class Weighted(NamedTuple):
    """What figures are computed from, for R rows of weights at once.

    Attributes:
        frames: Operating points over pictures or frames; None without probabilities.
        videos: The same over videos, by the mean of their frames; None without videos.
        bins: (R, BINS, 3): pictures, sum of their probabilities, forged ones; None as ``frames``.
        calls: What was called fake; no answer counts as a wrong one.
    """

    frames: Any
    videos: Any
    bins: Any
    calls: Confusion


class Metric(NamedTuple):
    """One figure of the standard protocol.

    Attributes:
        needs: The attribute of ``Weighted`` without which the figure is left out.
        compute: Gives (R,), NaN where it is undefined.
        undefined: Why it may be undefined; None for "one class only", as ``reasons`` words it.
    """

    needs: str
    compute: Callable[[Weighted], np.ndarray]
    undefined: str | None = None


def _binned_error(of: Weighted) -> np.ndarray:
    counts, probability, fakes = np.moveaxis(of.bins, -1, 0)
    with np.errstate(invalid="ignore"):
        return np.abs(probability - fakes).sum(axis=-1) / counts.sum(axis=-1)


# Every figure of a set of pictures, in the order of a report. A new one is an entry here.
METRICS = {
    "frame_auc": Metric("frames", lambda of: area(of.frames)),
    "video_auc": Metric("videos", lambda of: area(of.videos)),
    "ap": Metric("frames", lambda of: precision_area(of.frames)),
    "eer": Metric("frames", lambda of: equal_error_rate(of.frames)),
    "tpr_at_fpr_1": Metric("frames", lambda of: detection_rate(of.frames, 0.01)),
    "tpr_at_fpr_5": Metric("frames", lambda of: detection_rate(of.frames, 0.05)),
    "calibration_error": Metric("bins", _binned_error),
    "accuracy": Metric("calls", lambda of: of.calls.accuracy, "there are no pictures"),
    "balanced_accuracy": Metric("calls", lambda of: of.calls.balanced_accuracy, "one class only"),
    "f1": Metric("calls", lambda of: of.calls.f1, "nothing is forged and nothing was called so"),
    "precision": Metric("calls", lambda of: of.calls.precision, "nothing was called fake"),
    "recall": Metric("calls", lambda of: of.calls.recall, "there are no forged pictures"),
}


class Pictures:
    """Everything that is needed to measure a set again and again with other weights.

    Args:
        scored: Of the task ``scores`` or ``judgement``.

    Attributes:
        groups: What the weights are of.
    """

    def __init__(self, scored: Joined) -> None:
        items = scored.items
        self._labels = np.array([item.label for item in items], dtype=np.int64)
        self._kinds = np.array([item.kind for item in items])
        given = [item.fake_probability for item in items]
        self._has = np.array([score is not None for score in given], dtype=bool)
        self._scores = np.array([0.0 if score is None else score for score in given])
        self.groups = Groups([item.group for item in items], self._labels.tolist())
        self._ranks = scored.task == "scores" or bool(self._has.any())
        called, answered = self._scores, self._has
        if scored.task == "judgement":
            verdicts = np.array([item.verdict or "" for item in items])
            called, answered = verdicts == "fake", verdicts != ""
        else:
            threshold = DEFAULT_THRESHOLD if scored.threshold is None else scored.threshold
            called = self._scores >= threshold
        fake = self._labels == FAKE
        called = np.where(answered, called, ~fake)  # no answer is the wrong answer
        cells = np.stack([called & fake, called & ~fake, ~called & fake, ~called & ~fake], axis=1)
        self._cells = self.groups.sums(cells)
        self._right = {
            kind: self.groups.sums(
                np.stack([called == fake, np.ones_like(fake)], axis=1) * of[:, None]
            )
            for kind, of in self._members().items()
        }
        if self._ranks:
            self._prepare_ranks()

    def _members(self) -> dict[str, np.ndarray]:
        """For each kind, real first, which items are of it: (N,) bool."""
        kinds = sorted(set(self._kinds.tolist()), key=lambda kind: (kind != "real", kind))
        return {kind: self._kinds == kind for kind in kinds}

    def _prepare_ranks(self) -> None:
        has, column, real = self._has, self.groups.of_item, self._labels == REAL
        self._frames = Ranking(self._labels[has], self._scores[has], column[has])
        frames = self.groups.sums(has)
        self._videos = None
        means = np.divide(self.groups.sums(self._scores * has), np.maximum(frames, 1))
        if len(self.groups) < len(self._labels):
            seen = np.flatnonzero(frames)
            self._videos = Ranking(self.groups.strata[seen], means[seen], seen)
        self._of_kind = {}
        for kind, of in self._members().items():
            if kind == "real":
                continue
            keep = has & (of | real)
            self._of_kind[kind] = Ranking(self._labels[keep], self._scores[keep], column[keep])
        bins = np.zeros((len(has), BINS, 3))
        facts = np.stack([np.ones(len(has)), self._scores, self._labels == FAKE], axis=1)
        bins[np.arange(len(has)), bin_of(self._scores)] = facts * has[:, None]
        self._bins = self.groups.sums(bins)

    def measure(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """The figures of weighted groups.

        Args:
            weights: (R, G), how often each group counts.

        Returns:
            Each figure, (R,), NaN where it is undefined; ``KIND.figure`` for one manipulation.
        """
        frames = videos = bins = None
        if self._ranks:
            frames, bins = self._frames.curve(weights), np.tensordot(weights, self._bins, 1)
            videos = self._videos.curve(weights) if self._videos is not None else None
        calls = Confusion(*np.moveaxis(weights @ self._cells, -1, 0))
        of = Weighted(frames, videos, bins, calls)
        found = {
            name: metric.compute(of)
            for name, metric in METRICS.items()
            if getattr(of, metric.needs) is not None
        }
        for kind, right in self._right.items():
            if self._ranks and kind in self._of_kind:
                found[f"{kind}.auc"] = area(self._of_kind[kind].curve(weights))
            sums = weights @ right
            with np.errstate(invalid="ignore"):
                found[f"{kind}.accuracy"] = sums[:, 0] / sums[:, 1]
        return found

    def reasons(self) -> Mapping[str, str]:
        """Why a figure is undefined, if it is."""
        answered = self._labels[self._has] if self._ranks else self._labels
        if self._ranks and not len(answered):
            lacks = "no picture has a probability"
        else:
            words = {FAKE: "forged", REAL: "real"}
            absent = [word for label, word in words.items() if label not in answered]
            lacks = f"one class only: no {' and no '.join(absent)} pictures with an answer"
        return {
            **{f"{kind}.auc": lacks for kind in self._right},
            **{name: metric.undefined or lacks for name, metric in METRICS.items()},
        }


PROTOCOL = "standard"


def measure(
    scored: Joined,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    level: float = LEVEL,
    java: bool = True,
) -> Measures:
    """Measure a set of answers.

    Args:
        scored: Items with truth and answers.
        resamples: Of the bootstrap; 0 for no metrics.
        seed: Of the bootstrap.
        level: Of the intervals, in (0, 1).
        java: Explanations: whether METEOR and SPICE are tried.

    Raises:
        UsageError: ``resamples`` or ``level`` is out of range.
        MissingExtraError: The task is explanation and pycocoevalcap is not installed.
    """
    if resamples < 0:
        raise UsageError(f"The number of resamples must be at least 0, not {resamples}.")
    if not 0 < level < 1:
        raise UsageError(f"The level of the intervals must lie between 0 and 1, not {level}.")
    definition = {
        "task": scored.task,
        "interval": "percentile bootstrap over groups (videos, or pictures), by class",
        "resamples": resamples,
        "seed": seed,
        "level": level,
    }
    groups, figures_of, reasons = _sampler(scored)
    seen = figures_of(np.ones((1, len(groups))))
    drawn: Mapping[str, np.ndarray] = {}
    if len(groups) > 1:  # a lone group is drawn as itself, which says nothing about chance
        drawn = metrics.resample(groups, figures_of, resamples=resamples, seed=seed)
    found = {
        name: _figure(float(values[0]), drawn.get(name), level, reasons.get(name))
        for name, values in seen.items()
    }
    figures, per_kind = _by_kind(found, scored)
    if scored.task == "explanation":
        more, definition_of_task = _texts(scored, java)
        figures |= more
    else:
        definition_of_task = _decisions(scored)
    return Measures(
        PROTOCOL,
        figures,
        per_kind,
        counts(scored),
        definition | definition_of_task,
        (*scored.notes, *_notes(scored)),
    )


def difference(
    first: Joined,
    second: Joined,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    level: float = LEVEL,
) -> dict[str, tuple[float, float, float] | None]:
    """Compare two sets of answers to the same items by a paired bootstrap.

    Returns:
        For each figure of both (``KIND.figure`` for those of one manipulation): second minus
        first and the interval of that; None where it is undefined.

    Raises:
        UsageError: They are of different items or tasks.
    """
    names = [[item.name for item in scored.items] for scored in (first, second)]
    same = names[0] == names[1] and first.data_fingerprint == second.data_fingerprint
    if not same or first.task != second.task:
        raise UsageError(
            "The two evaluations are not of the same task and items in one order.",
            "Evaluate both models on the same data and truth.",
        )
    (groups, one, _), (_, other, _) = _sampler(first), _sampler(second)
    return metrics.difference(groups, (one, other), resamples=resamples, seed=seed, level=level)


def counts(scored: Joined) -> dict[str, int]:
    """How many items of which sort; ``videos`` is 0 where no group has several items."""
    items = scored.items
    groups = len({item.group for item in items})
    answered = [i for i in items if i.fake_probability is not None or i.answer is not None]
    missing = set(scored.missing)
    return {
        "items": len(items),
        "real": sum(item.label == REAL for item in items),
        "fake": sum(item.label == FAKE for item in items),
        "videos": groups if groups < len(items) and scored.task != "explanation" else 0,
        "answered": len(answered),
        "missing": len(scored.missing),
        "duplicates": len(scored.duplicates),
        "unknown": len(scored.unknown),
        "unparsed": sum(i.answer is not None and i.verdict is None for i in answered)
        if scored.task == "judgement"
        else 0,
        "failed": len(items) - len(answered) - len(missing),
        "uncertain": sum(item.verdict == "uncertain" for item in items),
    }


def _sampler(scored: Joined) -> tuple[Groups, Measure, Mapping[str, str]]:
    """The groups, what measures weighted groups, and why a figure may be undefined."""
    if scored.task != "explanation":
        pictures = Pictures(scored)
        return pictures.groups, pictures.measure, pictures.reasons()
    from m2f2cli.evaluation.language import score_texts

    texts = score_texts(_references(scored), _answers(scored))
    groups = Groups([i.group for i in scored.items], [i.label for i in scored.items])

    def by_answer(weights: np.ndarray) -> dict[str, np.ndarray]:
        return texts.measure(weights[:, groups.of_item])

    return groups, by_answer, {}


def _references(scored: Joined) -> dict[str, tuple[str, ...]]:
    return {item.name: scored.references[item.name] for item in scored.items}


def _answers(scored: Joined) -> dict[str, str]:
    return {item.name: plain(item.answer or "") for item in scored.items}


def _figure(value: float, drawn: np.ndarray | None, level: float, reason: str | None) -> Figure:
    if np.isnan(value):
        return Figure(None, note=reason or "undefined")
    ends = metrics.interval(drawn, level) if drawn is not None else None
    return Figure(value, *(ends or (None, None)))


def _by_kind(
    found: Mapping[str, Figure], scored: Joined
) -> tuple[dict[str, Figure], dict[str, dict[str, Figure]]]:
    figures = {name: figure for name, figure in found.items() if "." not in name}
    per_kind: dict[str, dict[str, Figure]] = {}
    for name, figure in found.items():
        kind, dot, short = name.rpartition(".")
        if dot:
            per_kind.setdefault(kind, {})[short] = figure
    for kind, own in per_kind.items():
        own["count"] = Figure(float(sum(item.kind == kind for item in scored.items)))
    return figures, per_kind


def _texts(scored: Joined, java: bool) -> tuple[dict[str, Figure], dict[str, Any]]:
    """METEOR and SPICE, and how explanations are measured."""
    from m2f2cli.evaluation.language import JAVA_PROGRAMS, TOKENISER, java_score

    figures = {}
    for name in JAVA_PROGRAMS:
        if not java:
            figures[name] = Figure(None, note="skipped: not asked for")
            continue
        score = java_score(name, _references(scored), _answers(scored))
        figures[name] = Figure(score.value, note=score.reason or "no interval is computed")
    return figures, {
        "tokeniser": TOKENISER,
        "marks_removed": ["<s>", "</s>"],
        "unanswered": "an empty text",
        "repeated": "the last answer counts",
        "cider_document_frequency": "over the references of all items, also in resamples",
    }


def _decisions(scored: Joined) -> dict[str, Any]:
    """How probabilities and judgements are measured."""
    definition: dict[str, Any] = {
        "unanswered": "wrong in what counts calls, left out of what ranks scores",
        "repeated": "the last answer counts",
    }
    if scored.task == "judgement":
        definition["parser"] = "words with negations, the first claim stands"
    else:
        known = scored.threshold is not None
        definition["threshold"] = scored.threshold if known else DEFAULT_THRESHOLD
        definition["threshold_from"] = "the predictions" if known else "the default"
        definition["uncertain"] = "called by the threshold"
    if any(item.fake_probability is not None for item in scored.items):
        definition |= {
            "video_score": "mean fake probability of its frames",
            "eer": "ROC curve straight between operating points",
            "tpr_at_fpr": {"false_positive_rates": FALSE_POSITIVE_RATES, "between": "none"},
            "calibration_bins": BINS,
        }
    return definition


def _notes(scored: Joined) -> list[str]:
    found = counts(scored)
    as_what = "an empty text" if scored.task == "explanation" else "wrong"
    said = {
        "missing": f"Items without an answer, taken as {as_what}",
        "failed": "Items that could not be judged (no face, unreadable), taken as wrong",
        "unparsed": "Answers that say neither real nor fake, taken as wrong",
        "unknown": "Predictions about nothing in the truth, left out",
        "uncertain": "Uncertain verdicts, called by the threshold",
    }
    notes = [f"{text}: {found[name]:,}." for name, text in said.items() if found[name]]
    if scored.task == "scores" and scored.threshold is None:
        notes.append(f"The predictions name no threshold: {DEFAULT_THRESHOLD} is used.")
    if found["videos"] and (mixed := _mixed_videos(scored)):
        notes.append(
            f"Videos with both real and forged frames, left out of the video AUC: {mixed:,}."
        )
    return notes


def _mixed_videos(scored: Joined) -> int:
    labels: dict[str, set[int]] = {}
    for item in scored.items:
        labels.setdefault(item.group, set()).add(item.label)
    return sum(len(found) > 1 for found in labels.values())
