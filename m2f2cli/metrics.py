"""Figures of merit of fake probabilities against true labels. NumPy only.

Labels are 0 real, 1 fake; a score is larger the more a picture looks forged. A figure that does not
exist (one class only) is NaN here; the protocols turn it into "undefined" and the reason.

Everything about ranking is read from one curve, and every function takes many curves at once: with
``weights`` of shape (R, N), row r counts picture n ``weights[r, n]`` times, which is what a
bootstrap resample is. The figures that reports have are the table ``METRICS``.

A resample draws as many groups (videos, or pictures that stand alone) with replacement as there
are, real and forged ones apart, so that every resample has the set's share of forged ones. It is a
row of weights: how often each group was drawn. The interval is the percentile interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

SATURATED = 0.5e-6  # what a probability of 0 in a record, which has six digits, stands for at most
BINS = 10  # of equal width over [0, 1], for calibration


class Curve(NamedTuple):
    """What is called fake at each distinct score, from the highest down."""

    scores: np.ndarray  # (U,) the distinct scores, falling
    true_positives: np.ndarray  # (..., U) forged pictures with at least that score
    false_positives: np.ndarray  # (..., U) real pictures with at least that score

    def rates(self) -> tuple[np.ndarray, np.ndarray]:
        """False and true positive rate, each (..., U + 1), starting at (0, 0)."""
        return _from_zero(_shares(self.false_positives)), _from_zero(_shares(self.true_positives))


class Ranking:
    """Labels and scores sorted once, to draw curves for any weights.

    Args:
        labels: (N,), 0 or 1.
        scores: (N,), any monotone scale; pictures of one score enter together.
        columns: (N,) int, which column of the weights counts each picture; None for its own.
    """

    def __init__(
        self, labels: np.ndarray, scores: np.ndarray, columns: np.ndarray | None = None
    ) -> None:
        labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
        order = np.argsort(-scores, kind="stable")
        ordered = scores[order]
        self._columns = order if columns is None else columns[order]
        self._last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
        self._scores = ordered[self._last] if len(ordered) else ordered
        self._fake, self._real = (labels[order] == label for label in (1, 0))

    def curve(self, weights: np.ndarray | None = None) -> Curve:
        """The operating points, for weights (..., columns): how often each picture counts."""
        if weights is None:
            weights = np.ones(self._columns.max(initial=-1) + 1)
        if not len(self._scores):  # no pictures: a point where nothing was counted
            nothing = np.zeros((*weights.shape[:-1], 1))
            return Curve(np.zeros(1), nothing, nothing)
        counted = np.take(weights, self._columns, axis=-1).astype(np.float64, copy=False)
        true_positives = np.cumsum(counted * self._fake, axis=-1)[..., self._last]
        false_positives = np.cumsum(counted * self._real, axis=-1)[..., self._last]
        return Curve(self._scores, true_positives, false_positives)


def area(curve: Curve) -> np.ndarray:
    """Area under the ROC curve by trapezoids: a tie counts half; NaN with one class only."""
    fpr, tpr = curve.rates()
    return np.sum(np.diff(fpr, axis=-1) * (tpr[..., 1:] + tpr[..., :-1]) / 2, axis=-1)


def precision_area(curve: Curve) -> np.ndarray:
    """Average precision: mean precision over the forged pictures, without interpolation."""
    called = curve.true_positives + curve.false_positives
    precision = np.divide(curve.true_positives, called, out=np.zeros_like(called), where=called > 0)
    return np.sum(np.diff(_from_zero(_shares(curve.true_positives)), axis=-1) * precision, axis=-1)


def log_odds(probabilities: np.ndarray | float) -> np.ndarray:
    """Logits of probabilities in [0, 1], which are taken as no closer to an end than SATURATED."""
    clipped = np.clip(np.asarray(probabilities, dtype=np.float64), SATURATED, 1 - SATURATED)
    return np.log(clipped) - np.log1p(-clipped)


def confidence(probabilities: np.ndarray, threshold: float) -> np.ndarray:
    """How sure calls by a threshold are, (N,): the distance of the two on the logit scale."""
    return np.abs(log_odds(probabilities) - log_odds(threshold))


def risk_coverage(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """What is wrong of the calls given in order of confidence, from the surest down.

    Args:
        curve: Ranks wrong calls (label 1) and right ones (label 0) by their confidence.

    Returns:
        Coverage, the share of calls given, and risk, the share of those that is wrong; each
        (..., U), one for each distinct confidence. Coverage is NaN where there are no calls.
    """
    given = curve.true_positives + curve.false_positives
    risk = np.divide(curve.true_positives, given, out=np.zeros_like(given), where=given > 0)
    return _shares(given), risk


def risk_area(curve: Curve) -> np.ndarray:
    """Area under risk against coverage, without interpolation; arguments as there."""
    coverage, risk = risk_coverage(curve)
    return np.sum(np.diff(_from_zero(coverage), axis=-1) * risk, axis=-1)


def equal_error_rate(curve: Curve) -> np.ndarray:
    """The error rate where as many real pictures are called fake as forged ones are missed.

    Between the two operating points around the crossing the ROC curve is taken as straight.
    """
    fpr, tpr = curve.rates()
    gap = fpr + tpr - 1  # false positive rate minus false negative rate, rising from -1 to 1
    after = np.argmax(gap >= 0, axis=-1)[..., None]
    before = np.maximum(after - 1, 0)
    low, high = (np.take_along_axis(gap, at, -1)[..., 0] for at in (before, after))
    start, end = (np.take_along_axis(fpr, at, -1)[..., 0] for at in (before, after))
    steep = high > low
    share = np.divide(-low, high - low, out=np.zeros_like(low), where=steep)
    rate = start + share * (end - start)
    return np.where(np.isnan(gap[..., -1]), np.nan, rate)


def detection_rate(curve: Curve, false_positive_rate: float) -> np.ndarray:
    """The largest true positive rate whose false positive rate is at most ``false_positive_rate``.

    Only thresholds that exist are looked at: nothing is interpolated, and pictures of one score
    are called fake together or not at all.
    """
    fpr, tpr = curve.rates()
    # A share such as 3 / 300 must not miss 0.01 by its last bit.
    reached = np.where(fpr <= false_positive_rate + 1e-12, tpr, 0.0).max(axis=-1)
    undefined = np.isnan(fpr[..., -1]) | np.isnan(tpr[..., -1])
    return np.where(undefined, np.nan, reached)


class Confusion(NamedTuple):
    """How many pictures were called what; ``true_positives`` are forged ones called fake.

    Each is a number or an array of one shape. A ratio whose denominator is 0 is NaN.
    """

    true_positives: np.ndarray
    false_positives: np.ndarray
    false_negatives: np.ndarray
    true_negatives: np.ndarray

    @property
    def accuracy(self) -> np.ndarray:
        """Share of pictures called rightly."""
        right = self.true_positives + self.true_negatives
        return ratio(right, right + self.false_positives + self.false_negatives)

    @property
    def balanced_accuracy(self) -> np.ndarray:
        """Mean of the shares called rightly among forged and among real pictures."""
        return (
            self.recall + ratio(self.true_negatives, self.true_negatives + self.false_positives)
        ) / 2

    @property
    def precision(self) -> np.ndarray:
        """Share of forged pictures among those called fake."""
        return ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> np.ndarray:
        """Share of forged pictures called fake."""
        return ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall; NaN if nothing is forged nor called so."""
        return ratio(
            2 * self.true_positives,
            2 * self.true_positives + self.false_positives + self.false_negatives,
        )


def confusion(labels: np.ndarray, called_fake: np.ndarray) -> Confusion:
    """Count calls: labels (N,), 0 or 1, and whether each was called fake, (N,) bool."""
    fake, called = np.asarray(labels) == 1, np.asarray(called_fake, dtype=bool)
    counts = [np.asarray((a & b).sum()) for a in (called, ~called) for b in (fake, ~fake)]
    return Confusion(*counts)


class Reliability(NamedTuple):
    """How often pictures of about one probability are forged, one entry a bin."""

    counts: np.ndarray  # (BINS,) pictures
    probability: np.ndarray  # (BINS,) their mean fake probability; NaN in an empty bin
    frequency: np.ndarray  # (BINS,) share of forged ones; NaN in an empty bin


def binned(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """What each picture adds to the bin that its probability falls into.

    A bin holds its lower edge, the last one also 1.

    Args:
        labels: (N,), 0 or 1.
        probabilities: (N,) of being fake, in [0, 1].

    Returns:
        (N, BINS, 3): 1, the probability and the label, in the picture's own bin; 0 elsewhere.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    bins = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], probabilities, side="right")
    found = np.zeros((len(probabilities), BINS, 3))
    facts = [np.ones(len(probabilities)), probabilities, np.asarray(labels)]
    found[np.arange(len(probabilities)), bins] = np.stack(facts, axis=1)
    return found


def reliability(labels: np.ndarray, probabilities: np.ndarray) -> Reliability:
    """Compare probabilities with frequencies, bin by bin; arguments as for ``binned``."""
    counts, summed, fakes = binned(labels, probabilities).sum(axis=0).T
    return Reliability(counts.astype(int), ratio(summed, counts), ratio(fakes, counts))


def binned_error(bins: np.ndarray) -> np.ndarray:
    """Expected calibration error of added-up ``binned`` facts, (..., BINS, 3): (...)."""
    counts, probability, fakes = np.moveaxis(bins, -1, 0)
    return ratio(np.abs(probability - fakes).sum(axis=-1), counts.sum(axis=-1))


def calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Expected calibration error of the fake probability; arguments as for ``binned``.

    In [0, 1]: over the pictures, how far the mean probability of a picture's bin lies from the
    share of forged ones in it. NaN without pictures.
    """
    found = reliability(labels, probabilities)
    distance = np.abs(found.probability - found.frequency)
    return float(ratio(np.nansum(found.counts * distance), found.counts.sum()))


def roc_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: how often a forged picture scores above a real one, in [0, 1].

    Labels (N,) are 0 or 1, scores (N,) on any monotone scale; a tie counts half. NaN if one class
    is empty.
    """
    return float(area(Ranking(labels, scores).curve()))


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the precision-recall curve for finding forged pictures, in [0, 1].

    Pictures of one score enter together, nothing is interpolated. NaN without forged pictures.
    """
    return float(precision_area(Ranking(labels, scores).curve()))


class Weighted(NamedTuple):
    """What figures are computed from, for R rows of weights at once."""

    frames: Any  # operating points over pictures or frames; None without probabilities
    videos: Any  # the same over videos, by the mean of their frames; None without videos
    bins: Any  # (R, BINS, 3), added-up binned facts; None as frames
    calls: Confusion  # what was called fake; no answer counts as a wrong one
    risks: Any = None  # wrong calls against right ones by confidence; None as frames
    # (R, 3): pictures with a probability, of those with the verdict real or fake, of those wrong
    decided: Any = None


class Metric(NamedTuple):
    """One figure of a set of pictures."""

    needs: str  # the attribute of Weighted without which the figure is left out
    compute: Callable[[Weighted], np.ndarray]  # gives (R,), NaN where it is undefined
    # Why it may be undefined; None for "one class only" with the class that is absent
    undefined: str | None = None


FALSE_POSITIVE_RATES = [0.01, 0.05]  # of tpr_at_fpr_1 and tpr_at_fpr_5
# Every figure of a set of pictures, in the order of a report. A new one is an entry here.
METRICS = {
    "frame_auc": Metric("frames", lambda of: area(of.frames)),
    "video_auc": Metric("videos", lambda of: area(of.videos)),
    "ap": Metric("frames", lambda of: precision_area(of.frames)),
    "eer": Metric("frames", lambda of: equal_error_rate(of.frames)),
    "tpr_at_fpr_1": Metric("frames", lambda of: detection_rate(of.frames, 0.01)),
    "tpr_at_fpr_5": Metric("frames", lambda of: detection_rate(of.frames, 0.05)),
    "calibration_error": Metric("bins", lambda of: binned_error(of.bins)),
    "aurc": Metric("risks", lambda of: risk_area(of.risks), "no picture has a probability"),
    "coverage": Metric(
        "decided",
        lambda of: ratio(of.decided[..., 1], of.decided[..., 0]),
        "no picture has a probability",
    ),
    "risk": Metric(
        "decided", lambda of: ratio(of.decided[..., 2], of.decided[..., 1]), "nothing was decided"
    ),
    "accuracy": Metric("calls", lambda of: of.calls.accuracy, "there are no pictures"),
    "balanced_accuracy": Metric("calls", lambda of: of.calls.balanced_accuracy, "one class only"),
    "f1": Metric("calls", lambda of: of.calls.f1, "nothing is forged and nothing was called so"),
    "precision": Metric("calls", lambda of: of.calls.precision, "nothing was called fake"),
    "recall": Metric("calls", lambda of: of.calls.recall, "there are no forged pictures"),
}


def _shares(counts: np.ndarray) -> np.ndarray:
    """Running counts as shares of the last one; NaN where that is 0."""
    return ratio(counts, counts[..., -1:])


def _from_zero(rates: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros((*rates.shape[:-1], 1)), rates], axis=-1)


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Divide; NaN where both are 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(above, below)


def wilson_interval(hits: float, total: float) -> tuple[float, float]:
    """The 95 % interval of Wilson (1927) for a share that ``hits`` of ``total`` estimate."""
    z = 1.959964
    share, extra = hits / total, z * z / total
    center = (share + extra / 2) / (1 + extra)
    half = z / (1 + extra) * math.sqrt(share * (1 - share) / total + extra / (4 * total))
    return max(0.0, center - half), min(1.0, center + half)


RESAMPLES, SEED, LEVEL = 2000, 0, 0.95
WEIGHTS_HELD = 4_000_000  # at a time: resamples in a batch times items

# From (R, G) weights of groups to the figures' values, (R,) each.
Measure = Callable[[np.ndarray], Mapping[str, np.ndarray]]


class Groups:
    """Which items are resampled together.

    Args:
        names: (N,) the group of each item.
        labels: (N,) the label of each item; groups of one class are drawn among themselves. A
            group with items of both classes belongs to a third one.

    Attributes:
        names: (G,) in order of appearance.
        of_item: (N,) int, the position of each item's group.
        strata: (G,) int, the class of each group.
    """

    def __init__(self, names: Sequence[str], labels: Sequence[int]) -> None:
        positions: dict[str, int] = {}
        self.of_item = np.array([positions.setdefault(n, len(positions)) for n in names], np.int64)
        self.names = tuple(positions)
        low = np.full(len(positions), np.iinfo(np.int64).max)
        high = np.full(len(positions), np.iinfo(np.int64).min)
        np.minimum.at(low, self.of_item, np.asarray(labels, np.int64))
        np.maximum.at(high, self.of_item, np.asarray(labels, np.int64))
        self.strata = np.where(low == high, low, high + 1)

    def __len__(self) -> int:
        return len(self.names)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Add up items' values, (N, ...), by group: (G, ...)."""
        added = np.zeros((len(self), *np.shape(values)[1:]))
        np.add.at(added, self.of_item, values)
        return added

    def weights(self, resamples: int, seed: int) -> Iterator[np.ndarray]:
        """Draw resamples in batches (R, G): how often each group was drawn.

        Equal seeds give equal rows, whatever the batches.
        """
        kinds = np.unique(self.strata)
        streams = [np.random.default_rng([seed, number]) for number in range(len(kinds))]
        batch = max(1, WEIGHTS_HELD // max(1, len(self.of_item)))
        for start in range(0, resamples, batch):
            rows = min(batch, resamples - start)
            drawn = np.zeros((rows, len(self)))
            for kind, stream in zip(kinds, streams, strict=True):
                members = np.flatnonzero(self.strata == kind)
                chances = np.full(len(members), 1 / len(members))
                drawn[:, members] = stream.multinomial(len(members), chances, size=rows)
            yield drawn


def resample(
    groups: Groups, measure: Measure, *, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, np.ndarray]:
    """Each figure of every resample, (resamples,); NaN where a resample left it undefined."""
    parts: dict[str, list[np.ndarray]] = {}
    for weights in groups.weights(resamples, seed):
        for name, values in measure(weights).items():
            parts.setdefault(name, []).append(values)
    return {name: np.concatenate(values) for name, values in parts.items()}


def interval(
    values: np.ndarray, level: float = LEVEL, *, around: float | None = None
) -> tuple[float, float] | None:
    """The ends between which a share ``level`` of the resampled values (R,) lies.

    ``around`` is the value itself, where resampling biases it: their median is moved there, and the
    ends stay in [0, 1]. None when more than half the resamples are undefined, or there are none.
    """
    defined = values[~np.isnan(values)]
    if 2 * len(defined) <= len(values):
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    if around is not None:
        bias = np.median(defined) - around
        low, high = np.clip([low - bias, high - bias], 0.0, 1.0)
    return float(low), float(high)


def difference(
    groups: Groups,
    measures: tuple[Measure, Measure],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    level: float = LEVEL,
) -> dict[str, tuple[float, float, float] | None]:
    """Compare two sets of answers on the same items by a paired bootstrap.

    Each resample is drawn once and measured twice, so what makes both better or worse cancels.

    Args:
        groups: Of the items, which must be the same for both.
        measures: Of the first and of the second set.
        resamples: How many.
        seed: Decides which.
        level: Of the interval.

    Returns:
        For each figure that both have, (second minus first, low, high); None where one is
        undefined.
    """

    def changes(weights: np.ndarray) -> dict[str, np.ndarray]:
        first, second = (measure(weights) for measure in measures)
        return {name: second[name] - first[name] for name in first.keys() & second.keys()}

    seen = changes(np.ones((1, len(groups))))
    drawn = resample(groups, changes, resamples=resamples, seed=seed)
    found: dict[str, tuple[float, float, float] | None] = {}
    for name in sorted(seen):
        ends = interval(drawn[name], level) if name in drawn else None
        value = float(seen[name][0])
        found[name] = None if ends is None or np.isnan(value) else (value, *ends)
    return found
