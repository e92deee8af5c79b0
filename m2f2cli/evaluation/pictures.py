"""The figures of labelled pictures with probabilities or judgements, for any weights of groups."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from m2f2cli.evaluation.intervals import Groups
from m2f2cli.evaluation.scored import FAKE, REAL, ScoredSet
from m2f2cli.metrics import (
    BINS,
    Confusion,
    Ranking,
    area,
    bin_of,
    detection_rate,
    equal_error_rate,
    precision_area,
)

DEFAULT_THRESHOLD = 0.5  # where the predictions name none
FALSE_ALARMS = {"tpr_at_fpr_1": 0.01, "tpr_at_fpr_5": 0.05}


class Pictures:
    """Everything that is needed to measure a set again and again with other weights.

    Args:
        scored: Of the task ``scores`` or ``judgement``.

    Attributes:
        groups: What the weights are of.
    """

    def __init__(self, scored: ScoredSet) -> None:
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
        found = {}
        if self._ranks:
            curve = self._frames.curve(weights)
            found["frame_auc"] = area(curve)
            if self._videos is not None:
                found["video_auc"] = area(self._videos.curve(weights))
            found["ap"] = precision_area(curve)
            found["eer"] = equal_error_rate(curve)
            for name, rate in FALSE_ALARMS.items():
                found[name] = detection_rate(curve, rate)
            found["calibration_error"] = self._calibration_error(weights)
        called = Confusion(*np.moveaxis(weights @ self._cells, -1, 0))
        for name in ("accuracy", "balanced_accuracy", "f1", "precision", "recall"):
            found[name] = getattr(called, name)
        for kind, right in self._right.items():
            if self._ranks and kind in self._of_kind:
                found[f"{kind}.auc"] = area(self._of_kind[kind].curve(weights))
            sums = weights @ right
            with np.errstate(invalid="ignore"):
                found[f"{kind}.accuracy"] = sums[:, 0] / sums[:, 1]
        return found

    def _calibration_error(self, weights: np.ndarray) -> np.ndarray:
        counts, probability, fakes = np.moveaxis(np.tensordot(weights, self._bins, 1), -1, 0)
        with np.errstate(invalid="ignore"):
            return np.abs(probability - fakes).sum(axis=-1) / counts.sum(axis=-1)

    def reasons(self) -> Mapping[str, str]:
        """Why a figure is undefined, if it is."""
        answered = self._labels[self._has] if self._ranks else self._labels
        if self._ranks and not len(answered):
            lacks = "no picture has a probability"
        else:
            words = {FAKE: "forged", REAL: "real"}
            absent = [word for label, word in words.items() if label not in answered]
            lacks = f"one class only: no {' and no '.join(absent)} pictures with an answer"
        ranked = ("frame_auc", "video_auc", "ap", "eer", *FALSE_ALARMS, "calibration_error")
        kinds = {f"{kind}.auc": lacks for kind in self._right}
        return {
            **dict.fromkeys(ranked, lacks),
            **kinds,
            "accuracy": "there are no pictures",
            "balanced_accuracy": "one class only",
            "precision": "nothing was called fake",
            "recall": "there are no forged pictures",
            "f1": "nothing is forged and nothing was called so",
        }
