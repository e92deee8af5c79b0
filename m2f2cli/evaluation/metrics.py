"""Figures of merit of fake probabilities against true labels. NumPy only.

Labels are 0 real, 1 fake; a score is larger the more a picture looks forged.
"""

from __future__ import annotations

import numpy as np


def roc_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: how often a forged picture scores above a real one.

    Args:
        labels: (N,), 0 or 1.
        scores: (N,), any monotone scale; a tie counts half.

    Returns:
        In [0, 1], higher is better; NaN if one class is empty.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    positives = int((labels == 1).sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    above = ranks[labels == 1].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the precision-recall curve for finding forged pictures, without interpolation.

    Args:
        labels: (N,), 0 or 1.
        scores: (N,); pictures of one score enter together.

    Returns:
        In [0, 1], higher is better; NaN without forged pictures.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    positives = int((labels == 1).sum())
    if not positives:
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(labels[order] == 1)
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    precision = hits[last] / (last + 1)
    recall = hits[last] / positives
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))
