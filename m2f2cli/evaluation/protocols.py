"""The two protocols that answers are measured by.

``standard`` is what m2f2 reports about probabilities, judgements and explanations, with intervals
from a bootstrap over videos, or over pictures where they stand alone. ``paper`` is what the
published evaluation computes, faults included, for comparison with published numbers only; its
faults are named in the notes of the figures, and frames are measured a second time without them.

``docs/metrics.md`` defines every figure; those of pictures are in the table ``metrics.METRICS``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from m2f2cli import metrics
from m2f2cli.data.conversations import parse_as_published, plain
from m2f2cli.errors import UsageError
from m2f2cli.evaluation.predictions import Predictions
from m2f2cli.evaluation.truth import FAKE, REAL, Joined
from m2f2cli.metrics import BINS, LEVEL, METRICS, RESAMPLES, SEED, Confusion, Groups, Ranking


@dataclass(frozen=True)
class Figure:
    """One measured number."""

    value: float | None  # none when it is undefined; never NaN
    low: float | None = None  # lower end of its interval; None without one
    high: float | None = None  # upper end
    note: str | None = None  # why it is undefined, or what to know about it

    def __post_init__(self) -> None:
        for number in (self.value, self.low, self.high):
            if number is not None and not math.isfinite(number):
                raise ValueError("a figure is finite or None")


def _figure(value: Any, undefined: str | None, ends: tuple[float, float] | None = None) -> Figure:
    """A number with its interval, or for NaN the reason."""
    if np.isnan(value):
        return Figure(None, note=undefined or "undefined")
    return Figure(float(value), *(ends or (None, None)))


@dataclass(frozen=True)
class Measures:
    """All figures of one set under one protocol."""

    protocol: str  # standard or paper
    figures: Mapping[str, Figure]  # name to figure
    per_kind: Mapping[str, Mapping[str, Figure]]  # manipulation to its figures
    counts: Mapping[str, int]  # how many items of which sort
    definition: Mapping[str, Any]  # everything the figures depend on besides the data
    notes: tuple[str, ...] = ()  # what to know about them

    @property
    def protocol_hash(self) -> str:
        """``sha256:…`` of the protocol's name and definition as canonical JSON."""
        whole = {"protocol": self.protocol, "definition": self.definition}
        text = json.dumps(
            whole, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
        return f"sha256:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"


def standard(
    scored: Joined,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    level: float = LEVEL,
    java: bool = True,
) -> Measures:
    """Measure a set of answers by the standard protocol.

    Args:
        scored: Items with truth and answers.
        resamples: Of the bootstrap; 0 for no intervals.
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
    subject = _subject(scored)
    seen = subject.measure(np.ones((1, len(subject.groups))))
    drawn: Mapping[str, np.ndarray] = {}
    if len(subject.groups) > 1:  # a lone group is drawn as itself, which says nothing about chance
        drawn = metrics.resample(subject.groups, subject.measure, resamples=resamples, seed=seed)
    figures: dict[str, Figure] = {}
    per_kind: dict[str, dict[str, Figure]] = {}
    for name, values in seen.items():
        kind, dot, short = name.rpartition(".")
        # Chance alone makes this error larger in every resample: its interval is moved back.
        around = values[0] if short == "calibration_error" else None
        ends = metrics.interval(drawn[name], level, around=around) if name in drawn else None
        home = per_kind.setdefault(kind, {}) if dot else figures
        home[short] = _figure(values[0], subject.undefined.get(name), ends)
    for kind, own in per_kind.items():
        own["count"] = Figure(float(sum(item.kind == kind for item in scored.items)))
    if isinstance(subject, _Texts):
        figures |= subject.java_figures(java)
    counts = count_items(scored)
    definition = {
        "task": scored.task,
        "interval": "percentile bootstrap over groups (videos, or pictures), by class",
        "resamples": resamples,
        "seed": seed,
        "level": level,
        **subject.definition,
    }
    notes = (*scored.notes, *_notes(scored, counts))
    return Measures("standard", figures, per_kind, counts, definition, notes)


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
        For each standard figure of both (``KIND.figure`` for those of one manipulation): second
        minus first and the interval of that; None where it is undefined.

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
    one, other = _subject(first), _subject(second)
    return metrics.difference(
        one.groups, (one.measure, other.measure), resamples=resamples, seed=seed, level=level
    )


def risk_curve(scored: Joined) -> dict[str, list[float]] | None:
    """Risk against coverage (see ``metrics.risk_coverage``), at about each percent of coverage.

    None where the answers carry no probabilities.
    """
    given = [i for i in scored.items if i.fake_probability is not None]
    if scored.task != "scores" or not given:
        return None
    scores = np.array([item.fake_probability for item in given], dtype=np.float64)
    fake = np.array([item.label == FAKE for item in given])
    wrong = (scores >= scored.threshold_used) != fake
    sure = metrics.confidence(scores, scored.threshold_used)
    coverage, risk = metrics.risk_coverage(Ranking(wrong.astype(np.int64), sure).curve())
    kept = np.unique(np.searchsorted(coverage, np.linspace(0.01, 1, 100) - 1e-9))
    return {"coverage": coverage[kept].tolist(), "risk": risk[kept].tolist()}


def count_items(scored: Joined) -> dict[str, int]:
    """How many items of which sort; ``videos`` is 0 where no group has several items."""
    items = scored.items
    groups = len({item.group for item in items})
    answered = [i for i in items if i.fake_probability is not None or i.answer is not None]
    texts = answered if scored.task == "judgement" else []
    return {
        "items": len(items),
        "real": sum(item.label == REAL for item in items),
        "fake": sum(item.label == FAKE for item in items),
        "videos": groups if groups < len(items) and scored.task != "explanation" else 0,
        "answered": len(answered),
        "missing": len(scored.missing),
        "duplicates": len(scored.duplicates),
        "unknown": len(scored.unknown),
        "unparsed": sum(i.answer is not None and i.verdict is None for i in texts),
        "failed": len(items) - len(answered) - len(set(scored.missing)),
        "uncertain": sum(item.verdict == "uncertain" for item in items),
    }


def _notes(scored: Joined, counts: Mapping[str, int]) -> list[str]:
    as_what = "an empty text" if scored.task == "explanation" else "wrong"
    said = {
        "missing": f"Items without an answer, taken as {as_what}",
        "failed": "Items that could not be judged (no face, unreadable), taken as wrong",
        "unparsed": "Answers that say neither real nor fake, taken as wrong",
        "unknown": "Predictions about nothing in the truth, left out",
        "uncertain": "Uncertain verdicts, called by the threshold",
    }
    notes = [f"{text}: {counts[name]:,}." for name, text in said.items() if counts[name]]
    if scored.task == "scores" and scored.threshold is None:
        notes.append(f"The predictions name no threshold: {scored.threshold_used} is used.")
    if counts["videos"]:
        labels: dict[str, set[int]] = {}
        for item in scored.items:
            labels.setdefault(item.group, set()).add(item.label)
        if mixed := sum(len(found) > 1 for found in labels.values()):
            notes.append(
                f"Videos with both real and forged frames, left out of the video AUC: {mixed:,}."
            )
    return notes


def _subject(scored: Joined) -> _Pictures | _Texts:
    """What is needed to measure a set again and again with other weights of its groups."""
    return _Texts(scored) if scored.task == "explanation" else _Pictures(scored)


class _Pictures:
    """Probabilities or judgements.

    Attributes:
        groups: What the weights are of.
        undefined: Why a figure is undefined, if it is.
        definition: How they are measured.
    """

    def __init__(self, scored: Joined) -> None:
        items = scored.items
        labels = np.array([item.label for item in items], dtype=np.int64)
        given = [item.fake_probability for item in items]
        has = np.array([score is not None for score in given], dtype=bool)
        scores = np.array([0.0 if score is None else score for score in given])
        self.groups = Groups([item.group for item in items], labels.tolist())
        self._ranks = scored.task == "scores" or bool(has.any())
        if scored.task == "judgement":
            verdicts = np.array([item.verdict or "" for item in items])
            called, answered = verdicts == "fake", verdicts != ""
        else:
            called, answered = scores >= scored.threshold_used, has
        fake = labels == FAKE
        called = np.where(answered, called, ~fake)  # no answer is the wrong answer
        cells = np.stack([called & fake, called & ~fake, ~called & fake, ~called & ~fake], axis=1)
        self._cells = self.groups.sums(cells)
        right = np.stack([called == fake, np.ones_like(fake)], axis=1)
        kinds = np.array([item.kind for item in items])
        self._right, self._kind_ranks = {}, {}
        for kind in sorted(set(kinds.tolist()), key=lambda kind: (kind != "real", kind)):
            self._right[kind] = self.groups.sums(right * (kinds == kind)[:, None])
            if self._ranks and kind != "real":
                keep = has & ((kinds == kind) | ~fake)
                self._kind_ranks[kind] = self._ranking(labels, scores, keep)
        self._videos: Ranking | None = None
        self._risks: Ranking | None = None
        self._decided: np.ndarray | None = None
        if scored.task == "scores":
            self._judge(scored, called != fake, has)
        if self._ranks:
            self._frames = self._ranking(labels, scores, has)
            self._bins = self.groups.sums(metrics.binned(fake, scores) * has[:, None, None])
            if len(self.groups) < len(items):
                frames = self.groups.sums(has)
                means = np.divide(self.groups.sums(scores * has), np.maximum(frames, 1))
                seen = np.flatnonzero(frames)
                self._videos = Ranking(self.groups.strata[seen], means[seen], seen)
        self.undefined = self._reasons(labels[has] if self._ranks else labels)
        self.definition = self._define(scored, bool(has.any()))

    def _judge(self, scored: Joined, wrong: np.ndarray, has: np.ndarray) -> None:
        """Note which calls are wrong by their confidence, and what the stored rule decided."""
        scores = np.array([item.fake_probability or 0.0 for item in scored.items])
        sure = metrics.confidence(scores, scored.threshold_used)
        self._risks = self._ranking(wrong.astype(np.int64), sure, has)
        verdicts = np.array([item.verdict or "" for item in scored.items])
        if (verdicts != "").any():
            decided = has & ((verdicts == "real") | (verdicts == "fake"))
            words = np.where([item.label == FAKE for item in scored.items], "fake", "real")
            facts = [has, decided, decided & (verdicts != words)]
            self._decided = self.groups.sums(np.stack(facts, axis=1))

    def _ranking(self, labels: np.ndarray, scores: np.ndarray, keep: np.ndarray) -> Ranking:
        return Ranking(labels[keep], scores[keep], self.groups.of_item[keep])

    def measure(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """The figures of weighted groups.

        Args:
            weights: (R, G), how often each group counts.

        Returns:
            Each figure, (R,), NaN where it is undefined; ``KIND.figure`` for one manipulation.
        """
        frames = self._frames.curve(weights) if self._ranks else None
        videos = self._videos.curve(weights) if self._videos else None
        bins = np.tensordot(weights, self._bins, 1) if self._ranks else None
        calls = Confusion(*np.moveaxis(weights @ self._cells, -1, 0))
        risks = self._risks.curve(weights) if self._risks else None
        decided = weights @ self._decided if self._decided is not None else None
        of = metrics.Weighted(frames, videos, bins, calls, risks, decided)
        found = {
            name: metric.compute(of)
            for name, metric in METRICS.items()
            if getattr(of, metric.needs) is not None
        }
        for kind, right in self._right.items():
            if kind in self._kind_ranks:
                found[f"{kind}.auc"] = metrics.area(self._kind_ranks[kind].curve(weights))
            found[f"{kind}.accuracy"] = metrics.ratio(*np.moveaxis(weights @ right, -1, 0))
        return found

    def _reasons(self, answered: np.ndarray) -> dict[str, str]:
        """Why a figure is undefined, if it is, from the labels that have an answer."""
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

    def _define(self, scored: Joined, has_scores: bool) -> dict[str, Any]:
        definition: dict[str, Any] = {
            "unanswered": "wrong in what counts calls, left out of what ranks scores",
            "repeated": "the last answer counts",
        }
        if scored.task == "judgement":
            definition["parser"] = "words with negations, the first claim stands"
        else:
            known = scored.threshold is not None
            definition["threshold"] = scored.threshold_used
            definition["threshold_from"] = "the predictions" if known else "the default"
            definition["uncertain"] = "called by the threshold"
        if has_scores:
            rates = {"false_positive_rates": metrics.FALSE_POSITIVE_RATES, "between": "none"}
            definition |= {
                "video_score": "mean fake probability of its frames",
                "eer": "ROC curve straight between operating points",
                "tpr_at_fpr": rates,
                "calibration_bins": BINS,
            }
        return definition


_TEXTS = {
    "tokeniser": "none: raw strings split at blanks, case kept",
    "marks_removed": ["<s>", "</s>"],
}


class _Texts:
    """Explanations against their references; attributes as of ``_Pictures``."""

    def __init__(self, scored: Joined) -> None:
        from m2f2cli.evaluation.language import score_texts

        self._references = {item.name: scored.references[item.name] for item in scored.items}
        self._answers = {item.name: plain(item.answer or "") for item in scored.items}
        self._scores = score_texts(self._references, self._answers)
        self.groups = Groups([i.group for i in scored.items], [i.label for i in scored.items])
        self.undefined: dict[str, str] = {}
        self.definition = {
            **_TEXTS,
            "unanswered": "an empty text",
            "repeated": "the last answer counts",
            "cider_document_frequency": "over the references of all items, also in resamples",
        }

    def measure(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """As of ``_Pictures``."""
        return self._scores.measure(weights[:, self.groups.of_item])

    def java_figures(self, wanted: bool) -> dict[str, Figure]:
        """METEOR and SPICE, which are of the whole set only."""
        from m2f2cli.evaluation.language import JAVA_PROGRAMS, java_score

        if not wanted:
            return dict.fromkeys(JAVA_PROGRAMS, Figure(None, note="skipped: not asked for"))
        scores = {n: java_score(n, self._references, self._answers) for n in JAVA_PROGRAMS}
        return {
            name: Figure(score, note=reason or "no interval is computed")
            for name, (score, reason) in scores.items()
        }


REAL_PREFIX = "./utils/DDVQA_images/c40/test/5"  # a picture is real if its path starts so
TRIMMED = 10  # frames dropped at each end of a video's sorted scores
THRESHOLDS, _STEP = 11_000, 10_000  # tried for the best accuracy: 0, 0.0001, 0.0002, …
_TOO_SHORT = f"a video of at most {2 * TRIMMED} frames has none left after trimming"

References = Mapping[str, Sequence[str]]


class Video(NamedTuple):
    """A run of frames."""

    scores: tuple[float, ...]  # probability of real, each frame
    real: bool  # whether it is real


def paper(found: Predictions | Joined, *, references: References | None = None) -> Measures:
    """Measure answers as the published code does.

    Args:
        found: A file of answers, or a set joined from one; a joined set of probabilities is taken
            in its own order, its groups as the videos.
        references: Explanations: key to reference answers; a joined set brings its own.

    Raises:
        UsageError: There is nothing that the published code measures: probabilities without
            truth, explanations without references, or texts that were joined without their file.
        MissingExtraError: Explanations are measured and pycocoevalcap is not installed.
    """
    if isinstance(found, Joined):
        if found.task == "scores":
            frames = [
                (item.group, item.label == REAL, 1 - item.fake_probability)
                for item in found.items
                if item.fake_probability is not None
            ]
            return _videos(frames, dropped=len(found.items) - len(frames))
        if found.predictions is None:
            raise UsageError(
                "The paper protocol counts the rows of the file of answers, which are not kept in "
                "a report.",
                "Evaluate the file of answers itself: --predictions FILE.jsonl.",
            )
        references = references or found.references
        found = found.predictions
    if found.layout == "judgements":
        return _judgements(found)
    if found.layout == "explanations":
        if not references:
            raise UsageError(
                "Explanations are measured against reference answers, and none were named.",
                "Add --truth with the file of test questions.",
            )
        return _explanations(found, references)
    if found.layout == "frames":
        frames = [
            (row.name.rpartition("_")[0], found.labels[row.name] == REAL, 1 - row.fake_probability)
            for row in found.rows
            if row.fake_probability is not None
        ]
        return _videos(frames, dropped=0)
    raise UsageError(
        "Records of 'm2f2 detect' hold no truth, which the paper protocol needs.",
        "Name the data set or --truth FILE.jsonl.",
    )


def _judgements(found: Predictions) -> Measures:
    read = [(row.name, parse_as_published(row.answer or "")) for row in found.rows]
    kept = [(name, verdict) for name, verdict in read if verdict is not None]
    labels = np.array([not name.startswith(REAL_PREFIX) for name, _ in kept], dtype=np.int64)
    called = metrics.confusion(labels, np.array([verdict == "fake" for _, verdict in kept], bool))
    reason = "a denominator is 0"
    if not kept:
        reason = "no answer says real or fake: the published code divides by zero"
    figures = {
        name: _figure(getattr(called, name), reason)
        for name in ("accuracy", "f1", "precision", "recall")
    }
    cells = zip(("true_fake", "false_fake", "false_real", "true_real"), called, strict=True)
    counts = {
        "items": len(found.rows),
        "real": int((labels == REAL).sum()),
        "fake": int((labels == FAKE).sum()),
        "answered": len(kept),
        "unparsed": len(read) - len(kept),
        **{name: int(count) for name, count in cells},
    }
    notes = [
        "Published rule: a text with the letters 'real' says real ('unrealistic' too).",
        f"Published truth: a picture is real if its path starts with '{REAL_PREFIX}'.",
    ]
    if counts["unparsed"]:
        notes.append(f"Rows left out because no verdict was read: {counts['unparsed']:,}.")
    if repeated := len(found.rows) - len({row.name for row in found.rows}):
        notes.append(f"Rows about a picture seen before, counted again: {repeated:,}.")
    if labels.size and labels.min() == FAKE:
        notes.append("No path starts as the published code expects: every picture counts as fake.")
    definition = {
        "task": "judgement",
        "parser": "'real' as a substring first, then 'fake' or 'computer-generated'",
        "truth": f"real if the path starts with {REAL_PREFIX}",
        "unparsed": "left out",
        "repeated": "counted again",
    }
    return Measures("paper", figures, {}, counts, definition, (*found.notes, *notes))


def _explanations(found: Predictions, references: References) -> Measures:
    from m2f2cli.evaluation.language import FIGURES, score_texts

    answers = {row.name: plain(row.answer or "") for row in found.rows}
    missing, extra = references.keys() - answers.keys(), answers.keys() - references.keys()
    if missing or extra:
        reason = (
            f"the published code stops: {len(missing):,} questions without an answer, "
            f"{len(extra):,} answers to unknown questions"
        )
        figures = dict.fromkeys(FIGURES, Figure(None, note=reason))
    else:
        values = score_texts(references, answers).measure(np.ones((1, len(references))))
        figures = {name: Figure(float(values[name][0])) for name in FIGURES}
    notes = list(found.notes)
    if repeated := len(found.rows) - len(answers):
        notes.append(f"Answers to a question seen before, which replace the earlier: {repeated:,}.")
    counts = {
        "items": len(references),
        "answered": len(answers.keys() & references.keys()),
        "missing": len(missing),
        "unknown": len(extra),
        "duplicates": repeated,
    }
    definition = {
        "task": "explanation",
        **_TEXTS,
        "keys": "must be those of the references",
        "repeated": "the last answer counts",
    }
    return Measures("paper", figures, {}, counts, definition, tuple(notes))


def _videos(frames: Sequence[tuple[str, bool, float]], *, dropped: int) -> Measures:
    """Measure frames given as (video, whether real, probability of real), in the file's order."""
    published, whole = _published_videos(frames), _whole_videos(frames)
    stops = any(len(video.scores) <= 2 * TRIMMED for video in published)
    as_published = _video_figures(published, f"the published code stops: {_TOO_SHORT}" * stops)
    figures = dict(zip(("video_auc", "best_accuracy"), as_published, strict=True))
    fixed = _video_figures(whole)
    figures |= dict(zip(("video_auc_fixed", "best_accuracy_fixed"), fixed, strict=True))
    notes = [
        "Published fault: a video is scored when the next one begins, with the next one's label; "
        "the last video is never scored.",
        "Published accuracy: the best of 11,000 thresholds, chosen on this very set.",
        "The figures named *_fixed have each video's own label and count every video.",
    ]
    short = sum(len(video.scores) <= 2 * TRIMMED for video in whole)
    if short:
        notes.append(
            f"Videos of at most {2 * TRIMMED} frames: {short:,}; *_fixed takes the mean of all of "
            "their frames."
        )
    if dropped:
        notes.append(f"Frames without a probability, left out: {dropped:,}.")
    counts = {
        "items": len(frames),
        "real": sum(real for _, real, _ in frames),
        "fake": sum(not real for _, real, _ in frames),
        "videos": len(whole),
        "videos_as_published": len(published),
    }
    definition = {
        "task": "scores",
        "positive": "real",
        "video_score": f"mean without the {TRIMMED} highest and lowest frames",
        "label_as_published": "of the first frame of the next video",
        "last_video_as_published": "left out",
        "thresholds": {"count": THRESHOLDS, "step": 1 / _STEP},
    }
    return Measures("paper", figures, {}, counts, definition, tuple(notes))


def _published_videos(frames: Iterable[tuple[str, bool, float]]) -> list[Video]:
    """Videos as the published reader cuts them: at each change of the name, labelled too late."""
    videos = []
    scores: list[float] = []
    before: str | None = None
    for name, real, score in frames:
        if before is not None and name != before:
            videos.append(Video(tuple(scores), real))
            scores = []
        scores.append(score)
        before = name
    return videos


def _whole_videos(frames: Iterable[tuple[str, bool, float]]) -> list[Video]:
    """Every video with its own label, wherever its frames stand."""
    scores: dict[tuple[str, bool], list[float]] = {}
    for name, real, score in frames:
        scores.setdefault((name, real), []).append(score)
    return [Video(tuple(found), real) for (_, real), found in scores.items()]


def _video_figures(videos: Sequence[Video], undefined: str = "") -> tuple[Figure, Figure]:
    """AUC, and accuracy at the best threshold."""
    if not undefined and len({video.real for video in videos}) < 2:
        undefined = "one class only among the videos"
    if undefined:
        return Figure(None, note=undefined), Figure(None, note=undefined)
    scores = np.array([_trimmed_mean(video.scores) for video in videos])
    real = np.array([video.real for video in videos])
    steps = np.arange(THRESHOLDS) / _STEP
    # What is right at a threshold: real videos above it, and the others.
    right = real.sum() - np.searchsorted(np.sort(scores[real]), steps, "right")
    right = right + np.searchsorted(np.sort(scores[~real]), steps, "right")
    return (
        Figure(metrics.roc_auc(real.astype(np.int64), scores)),
        Figure(float(right.max() / len(scores)), note="threshold chosen on this set"),
    )


def _trimmed_mean(scores: Sequence[float]) -> float:
    kept = sorted(scores)[TRIMMED:-TRIMMED]
    return float(np.mean(kept if kept else scores))
