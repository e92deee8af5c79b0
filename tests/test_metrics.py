"""Every metric against a twin that counts, on random data with many ties."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2f2cli import metrics
from m2f2cli.metrics import (
    Ranking,
    area,
    average_precision,
    calibration_error,
    confusion,
    detection_rate,
    equal_error_rate,
    precision_area,
    reliability,
    roc_auc,
)


@st.composite
def judged(draw, levels=12):
    """Labels of both classes with scores on a coarse scale, so that ties are common."""
    size = draw(st.integers(2, 40))
    labels = draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
    labels[0], labels[-1] = 0, 1
    scores = draw(st.lists(st.integers(0, levels), min_size=size, max_size=size))
    return np.array(labels), np.array(scores) / levels


def points(labels, scores):
    """(false positive rate, true positive rate) of every threshold that exists, by counting."""
    found = [(0.0, 0.0)]
    for threshold in sorted(set(scores.tolist()), reverse=True):
        called = scores >= threshold
        found.append((called[labels == 0].mean(), called[labels == 1].mean()))
    return found


@given(judged())
def test_auc_counts_pairs(data):
    labels, scores = data
    pairs = [(f > r) + (f == r) / 2 for f in scores[labels == 1] for r in scores[labels == 0]]
    assert roc_auc(labels, scores) == pytest.approx(np.mean(pairs), abs=1e-12)


@given(judged(), st.sampled_from([np.exp, lambda s: s**3 - 7, lambda s: np.log(s + 0.1)]))
def test_ranking_figures_survive_monotone_maps(data, increasing):
    labels, scores = data
    before, after = (Ranking(labels, s).curve() for s in (scores, increasing(scores)))
    for figure in (area, precision_area, equal_error_rate, lambda c: detection_rate(c, 0.05)):
        assert figure(before) == figure(after)


@given(judged())
def test_turning_labels_and_scores_round_keeps_the_auc(data):
    labels, scores = data
    assert roc_auc(1 - labels, -scores) == pytest.approx(roc_auc(labels, scores), abs=1e-12)


@given(judged())
def test_average_precision_is_the_mean_precision_over_forged_pictures(data):
    labels, scores = data
    at = [(labels[scores >= s] == 1).mean() for s in scores[labels == 1]]
    assert average_precision(labels, scores) == pytest.approx(np.mean(at), abs=1e-12)


@given(judged())
def test_equal_error_rate_is_where_the_line_crosses(data):
    labels, scores = data
    path = points(labels, scores)
    for (x0, y0), (x1, y1) in pairwise(path):
        if x1 + y1 >= 1:
            # x0 + t (x1 - x0) = 1 - y0 - t (y1 - y0)
            share = (1 - x0 - y0) / ((x1 - x0) + (y1 - y0))
            expected = x0 + share * (x1 - x0)
            break
    assert equal_error_rate(Ranking(labels, scores).curve()) == pytest.approx(expected, abs=1e-12)


@given(judged(), st.sampled_from([0.0, 0.01, 0.05, 0.3, 1.0]))
def test_detection_rate_is_the_best_threshold_within_the_false_alarms(data, limit):
    labels, scores = data
    best = max(tpr for fpr, tpr in points(labels, scores) if fpr <= limit)
    assert detection_rate(Ranking(labels, scores).curve(), limit) == pytest.approx(best, abs=1e-12)


def test_three_of_three_hundred_is_one_percent():
    labels = np.array([0] * 300 + [1])
    scores = np.array([0.9] * 3 + [0.1] * 297 + [0.9])
    assert detection_rate(Ranking(labels, scores).curve(), 0.01) == 1


@given(judged())
def test_calibration_error_by_hand(data):
    labels, scores = data
    error = 0.0
    for number in range(10):
        inside = [i for i, s in enumerate(scores) if min(int(np.floor(s * 10 + 1e-9)), 9) == number]
        if inside:
            error += abs(scores[inside].mean() - labels[inside].mean()) * len(inside)
    assert calibration_error(labels, scores) == pytest.approx(error / len(labels), abs=1e-12)


def test_reliability_bins():
    found = reliability(np.array([0, 1, 1]), np.array([0.1, 0.15, 1.0]))
    assert found.counts.tolist() == [0, 2, 0, 0, 0, 0, 0, 0, 0, 1]
    assert found.frequency[[1, 9]].tolist() == [0.5, 1.0]
    assert found.probability[1] == pytest.approx(0.125)
    assert np.isnan(found.frequency[0])


@given(judged(), st.integers(0, 1000))
def test_weights_count_pictures_several_times(data, seed):
    labels, scores = data
    times = np.random.default_rng(seed).integers(0, 3, len(labels))
    times[[0, -1]] = 1
    weighted = Ranking(labels, scores).curve(np.stack([times, np.ones_like(times)]))
    repeated = Ranking(np.repeat(labels, times), np.repeat(scores, times)).curve()
    for figure in (area, precision_area, equal_error_rate, lambda c: detection_rate(c, 0.05)):
        first, second = figure(weighted)
        assert first == pytest.approx(figure(repeated), abs=1e-12)
        assert second == pytest.approx(figure(Ranking(labels, scores).curve()), abs=1e-12)


@given(judged(), st.floats(0, 1))
def test_confusion_by_hand(data, threshold):
    labels, scores = data
    called = scores >= threshold
    found = confusion(labels, called)
    assert found.accuracy == pytest.approx((called == labels).mean())
    recalls = [(called == labels)[labels == label].mean() for label in (0, 1)]
    assert found.balanced_accuracy == pytest.approx(np.mean(recalls))
    assert found.recall == pytest.approx(recalls[1])
    if called.any():
        assert found.precision == pytest.approx(labels[called].mean())
        if found.true_positives:
            harmonic = 2 / (1 / found.precision + 1 / found.recall)
            assert found.f1 == pytest.approx(harmonic)
    else:
        assert np.isnan(found.precision)


@pytest.mark.parametrize("labels", [[], [0, 0], [1, 1]])
def test_what_needs_two_classes_is_undefined_without_them(labels):
    scores = np.linspace(0, 1, len(labels))
    curve = Ranking(np.array(labels, dtype=int), scores).curve()
    assert np.isnan([area(curve), equal_error_rate(curve), detection_rate(curve, 0.05)]).all()
    assert np.isnan(precision_area(curve)) == (1 not in labels)
    assert np.isnan(calibration_error(np.array(labels), scores)) == (not labels)


def test_risk_against_coverage_by_hand() -> None:
    wrong, sure = np.array([1, 0, 0, 1]), np.array([2.0, 3.0, 2.0, 1.0])
    coverage, risk = metrics.risk_coverage(metrics.Ranking(wrong, sure).curve())
    assert coverage.tolist() == [0.25, 0.75, 1.0]  # equal confidences are given together
    assert risk == pytest.approx([0, 1 / 3, 1 / 2])
    area = metrics.risk_area(metrics.Ranking(wrong, sure).curve())
    assert area == pytest.approx(0.25 * 0 + 0.5 / 3 + 0.25 / 2)
    assert np.isnan(metrics.risk_area(metrics.Ranking(wrong[:0], sure[:0]).curve()))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 3)), min_size=1))
def test_the_area_of_risk_counts_weights_as_repeats(rows: list[tuple[bool, int, int]]) -> None:
    wrong, sure, times = (np.array(column).astype(int) for column in zip(*rows, strict=True))
    weighted = metrics.risk_area(metrics.Ranking(wrong, sure).curve(times[None].astype(float)))[0]
    repeated = metrics.Ranking(wrong.repeat(times), sure.repeat(times)).curve()
    assert weighted == pytest.approx(metrics.risk_area(repeated), nan_ok=True)
    assert np.isnan(weighted) or 0 <= weighted <= 1


def test_confidence_is_the_distance_from_the_threshold_on_the_logit_scale() -> None:
    found = metrics.confidence(np.array([0.9, 0.5, 0.1, 0.0, 1.0]), 0.5)
    assert found == pytest.approx([np.log(9), 0, np.log(9), *[np.log(1 / 0.5e-6 - 1)] * 2])
    assert metrics.confidence(np.array([0.8]), 0.8) == 0
    assert np.isfinite(metrics.confidence(np.array([0.0, 1.0]), 1.0)).all()
