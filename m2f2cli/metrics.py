"""Figures of merit of fake probabilities against true labels. NumPy only.

Labels are 0 real, 1 fake; a score is larger the more a picture looks forged. A figure that does not
exist (one class only) is NaN here; the protocols turn it into "undefined" and the reason.

Everything about ranking is read from one curve, and every function takes many curves at once: with
``weights`` of shape (R, N), row r counts picture n ``weights[r, n]`` times, which is what a
bootstrap resample is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BINS = 10  # of equal width over [0, 1], for calibration


class Curve(NamedTuple):
    """What is called fake at each distinct score, from the highest down.

    Attributes:
        scores: (U,) the distinct scores, falling.
        hits: (..., U) forged pictures with at least that score.
        alarms: (..., U) real pictures with at least that score.
    """

    scores: np.ndarray
    hits: np.ndarray
    alarms: np.ndarray

    def rates(self) -> tuple[np.ndarray, np.ndarray]:
        """False and true positive rate, each (..., U + 1), starting at (0, 0)."""
        return _from_zero(_shares(self.alarms)), _from_zero(_shares(self.hits))


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
        """The operating points.

        Args:
            weights: (..., columns), how often each picture counts; None for once each.
        """
        if weights is None:
            weights = np.ones(self._columns.max(initial=-1) + 1)
        if not len(self._scores):  # no pictures: a point where nothing was counted
            nothing = np.zeros((*weights.shape[:-1], 1))
            return Curve(np.zeros(1), nothing, nothing)
        counted = np.take(weights, self._columns, axis=-1).astype(np.float64, copy=False)
        hits = np.cumsum(counted * self._fake, axis=-1)[..., self._last]
        alarms = np.cumsum(counted * self._real, axis=-1)[..., self._last]
        return Curve(self._scores, hits, alarms)


def area(curve: Curve) -> np.ndarray:
    """Area under the ROC curve by trapezoids: a tie counts half; NaN with one class only."""
    fpr, tpr = curve.rates()
    return np.sum(np.diff(fpr, axis=-1) * (tpr[..., 1:] + tpr[..., :-1]) / 2, axis=-1)


def precision_area(curve: Curve) -> np.ndarray:
    """Average precision: mean precision over the forged pictures, without interpolation."""
    called = curve.hits + curve.alarms
    precision = np.divide(curve.hits, called, out=np.zeros_like(called), where=called > 0)
    return np.sum(np.diff(_from_zero(_shares(curve.hits)), axis=-1) * precision, axis=-1)


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


def detection_rate(curve: Curve, false_alarms: float) -> np.ndarray:
    """The largest true positive rate whose false positive rate is at most ``false_alarms``.

    Only thresholds that exist are looked at: nothing is interpolated, and pictures of one score
    are called fake together or not at all.
    """
    fpr, tpr = curve.rates()
    # A share such as 3 / 300 must not miss 0.01 by its last bit.
    reached = np.where(fpr <= false_alarms + 1e-12, tpr, 0.0).max(axis=-1)
    undefined = np.isnan(fpr[..., -1]) | np.isnan(tpr[..., -1])
    return np.where(undefined, np.nan, reached)


class Confusion(NamedTuple):
    """How many pictures were called what; ``hits`` are forged ones called fake.

    Each is a number or an array of one shape. A ratio whose denominator is 0 is NaN.
    """

    hits: np.ndarray
    alarms: np.ndarray
    misses: np.ndarray
    passes: np.ndarray

    @property
    def accuracy(self) -> np.ndarray:
        """Share of pictures called rightly."""
        right = self.hits + self.passes
        return _ratio(right, right + self.alarms + self.misses)

    @property
    def balanced_accuracy(self) -> np.ndarray:
        """Mean of the shares called rightly among forged and among real pictures."""
        return (self.recall + _ratio(self.passes, self.passes + self.alarms)) / 2

    @property
    def precision(self) -> np.ndarray:
        """Share of forged pictures among those called fake."""
        return _ratio(self.hits, self.hits + self.alarms)

    @property
    def recall(self) -> np.ndarray:
        """Share of forged pictures called fake."""
        return _ratio(self.hits, self.hits + self.misses)

    @property
    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall; NaN if nothing is forged nor called so."""
        return _ratio(2 * self.hits, 2 * self.hits + self.alarms + self.misses)


def confusion(labels: np.ndarray, called_fake: np.ndarray) -> Confusion:
    """Count calls.

    Args:
        labels: (N,), 0 or 1.
        called_fake: (N,) bool.
    """
    fake, called = np.asarray(labels) == 1, np.asarray(called_fake, dtype=bool)
    counts = [np.asarray((a & b).sum()) for a in (called, ~called) for b in (fake, ~fake)]
    return Confusion(*counts)


class Reliability(NamedTuple):
    """How often pictures of about one probability are forged, one entry a bin.

    Attributes:
        edges: (bins + 1,) from 0 to 1; a bin holds its lower edge, the last one also 1.
        counts: (bins,) pictures.
        probability: (bins,) their mean fake probability; NaN in an empty bin.
        frequency: (bins,) share of forged ones; NaN in an empty bin.
    """

    edges: np.ndarray
    counts: np.ndarray
    probability: np.ndarray
    frequency: np.ndarray


def bin_of(probabilities: np.ndarray, bins: int = BINS) -> np.ndarray:
    """The number of the bin each probability falls into, (N,) in [0, bins)."""
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    return np.searchsorted(edges, np.asarray(probabilities, dtype=np.float64), side="right")


def reliability(labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> Reliability:
    """Compare probabilities with frequencies, bin by bin.

    Args:
        labels: (N,), 0 or 1.
        probabilities: (N,) of being fake, in [0, 1].
        bins: Of equal width over [0, 1].
    """
    where = bin_of(probabilities, bins)
    counts, summed, fakes = (
        np.bincount(where, weights=values, minlength=bins)
        for values in (None, np.asarray(probabilities, dtype=np.float64), np.asarray(labels) == 1)
    )
    return Reliability(
        np.linspace(0, 1, bins + 1), counts, _ratio(summed, counts), _ratio(fakes, counts)
    )


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error of the fake probability: mean distance in ``reliability``.

    Returns:
        In [0, 1]: over the pictures, how far the mean probability of a picture's bin lies from the
        share of forged ones in it. NaN without pictures.
    """
    found = reliability(labels, probabilities, bins)
    if not found.counts.sum():
        return float("nan")
    distance = np.abs(found.probability - found.frequency)
    return float(np.nansum(found.counts * distance) / found.counts.sum())


def roc_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: how often a forged picture scores above a real one.

    Args:
        labels: (N,), 0 or 1.
        scores: (N,), any monotone scale; a tie counts half.

    Returns:
        In [0, 1], higher is better; NaN if one class is empty.
    """
    return float(area(Ranking(labels, scores).curve()))


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the precision-recall curve for finding forged pictures, without interpolation.

    Args:
        labels: (N,), 0 or 1.
        scores: (N,); pictures of one score enter together.

    Returns:
        In [0, 1], higher is better; NaN without forged pictures.
    """
    return float(precision_area(Ranking(labels, scores).curve()))


def _shares(counts: np.ndarray) -> np.ndarray:
    """Running counts as shares of the last one; NaN where that is 0."""
    return _ratio(counts, counts[..., -1:])


def _from_zero(rates: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros((*rates.shape[:-1], 1)), rates], axis=-1)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(above, below)
