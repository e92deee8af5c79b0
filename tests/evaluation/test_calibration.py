from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from m2f2cli.errors import InputError, UsageError
from m2f2cli.evaluation.calibrate import (
    FEWEST,
    TEMPERATURES,
    find_threshold,
    fit,
    highest_excluded,
)
from m2f2cli.metrics import roc_auc, wilson_interval
from tests.evaluation.reports import calibrated


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def synthetic(count: int, *, stretch: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from true log-odds, and probabilities with ``stretch`` times those."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 1.5, count)
    labels = (rng.random(count) < sigmoid(z)).astype(int)
    return labels, np.round(sigmoid(z * stretch), 6)


@settings(max_examples=12, deadline=None)
@given(
    stretch=st.floats(0.3, 4), temperature=st.sampled_from([0.8, 1.0, 3.0]), seed=st.integers(0, 99)
)
def test_a_known_temperature_is_recovered(stretch, temperature, seed):
    labels, scores = synthetic(8000, stretch=stretch, seed=seed)
    found = fit(labels, scores, temperature=temperature, band_level=0)
    assert found.temperature == pytest.approx(temperature * stretch, rel=0.12)
    assert found.nll[1] <= found.nll[0] + 1e-12
    assert found.calibration_error[1] < 0.03


scores_of_both = st.tuples(
    st.lists(st.integers(1, 999), min_size=FEWEST, max_size=60),
    st.lists(st.integers(1, 999), min_size=FEWEST, max_size=60),
    st.sampled_from([0.05, 0.1, 0.25, 0.5, 0.9]),
)


@settings(max_examples=150, deadline=None)
@given(drawn=scores_of_both)
def test_order_and_false_positives_after_any_calibration(drawn):
    real, fake, target = drawn
    labels = np.array([0] * len(real) + [1] * len(fake))
    scores = np.array(real + fake) / 1000
    found = fit(labels, scores, target_fpr=target, band_level=0)
    after = calibrated(found, scores)
    order = np.argsort(scores, kind="stable")
    assert (np.diff(after[order]) >= 0).all()
    assert found.nll[1] <= found.nll[0] + 1e-9
    called = after >= found.threshold
    assert called[labels == 0].sum() == found.false_positives <= target * len(real) + 1e-9
    assert called[labels == 1].sum() == found.detected
    if found.temperature >= 1:  # sharper ones may round different scores to one
        assert roc_auc(labels, after) == pytest.approx(roc_auc(labels, scores), abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(drawn=scores_of_both)
def test_no_lower_threshold_would_do(drawn):
    real, fake, target = drawn
    scores = np.array(real + fake) / 1000
    is_real = np.arange(len(scores)) < len(real)
    threshold = find_threshold(scores, is_real, target)
    reals = scores[is_real]
    highest_below = max((s for s in reals if s < threshold), default=None)
    assert np.mean(reals >= threshold) <= target + 1e-9
    assert highest_below is not None
    assert np.mean(reals >= highest_below) > target
    between = scores[(scores > highest_below) & (scores < threshold)]
    assert not len(between)  # so it calls what the smallest threshold of all calls


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.integers(1, 50), min_size=3, max_size=30),
    target=st.sampled_from([0.05, 0.2, 0.5]),
    seed=st.integers(0, 1000),
)
def test_weighted_thresholds_are_those_of_repeated_pictures(scores, target, seed):
    values = np.array(scores) / 100
    weights = np.random.default_rng(seed).integers(0, 4, (5, len(values)))
    assume((weights.sum(1) > 0).all())
    found = highest_excluded(values, weights, target)
    for row, below in zip(weights, found, strict=True):
        repeated = np.repeat(values, row)
        assert np.mean(repeated > below) <= target + 1e-9
        assert np.mean(repeated >= below) > target


def test_the_threshold_lies_between_two_scores():
    scores = np.array([*np.linspace(0.1, 0.4, 20), *np.linspace(0.6, 0.9, 20)])
    threshold = find_threshold(scores, np.arange(40) < 20, 0.04)
    assert threshold == pytest.approx(0.5)
    adjacent = np.array([0.5] * 20 + [0.500001] * 20)
    assert find_threshold(adjacent, np.arange(40) < 20, 0.04) == 0.500001


def test_the_band_holds_the_threshold_and_narrows_with_more_pictures():
    widths = []
    for count in (200, 5000):
        labels, scores = synthetic(count)
        found = fit(labels, scores, target_fpr=0.1)
        assert found.uncertain is not None
        low, high = found.uncertain
        assert 0 <= low <= found.threshold <= high <= 1
        widths.append(high - low)
    assert widths[0] > 2.5 * widths[1] > 0


def test_frames_of_one_video_count_as_one_witness():
    labels, scores = synthetic(120, seed=3)
    labels, scores = np.repeat(labels, 10), np.repeat(scores, 10)
    videos = [f"video{n // 10}" for n in range(1200)]
    alone, together = fit(labels, scores), fit(labels, scores, groups=videos)
    assert together.threshold == alone.threshold
    assert together.uncertain is not None
    assert alone.uncertain is not None
    assert np.ptp(together.uncertain) > 1.5 * np.ptp(alone.uncertain)


def test_the_same_scores_give_the_same_calibration():
    labels, scores = synthetic(300)
    assert fit(labels, scores) == fit(labels, scores)
    assert fit(labels, scores, seed=1).threshold == fit(labels, scores).threshold


def test_scores_that_separate_the_classes_stop_at_the_lower_bound():
    scores = [0.2 + n / 1000 for n in range(40)] + [0.7 + n / 1000 for n in range(40)]
    found = fit([0] * 40 + [1] * 40, scores)
    assert found.temperature == TEMPERATURES[0]
    assert "lower bound" in " ".join(found.sentences())


def test_scores_that_tell_the_opposite_stop_at_the_upper_bound():
    labels, scores = synthetic(400)
    found = fit(1 - labels, scores, temperature=3)
    assert found.temperature == TEMPERATURES[1]
    assert "upper bound" in " ".join(found.notes)


def test_saturated_scores_are_counted():
    labels, scores = synthetic(400)
    scores[labels == 1] = np.where(scores[labels == 1] > 0.9, 1.0, scores[labels == 1])
    assert any("are 0 or 1" in note for note in fit(labels, scores).notes)


@pytest.mark.parametrize(
    ("labels", "target", "words"),
    [
        ([1] * 50, 0.05, "0 real pictures"),
        ([0] * 50, 0.05, "0 forged pictures"),
        ([0] * 19 + [1] * 50, 0.1, "19 real pictures"),
        ([0] * 50 + [1] * 5, 0.1, "5 forged pictures"),
        ([0] * 50 + [1] * 50, 0.01, "takes at least 100"),
        ([0] * 68 + [1] * 50, 0.0145, "takes at least 69"),
    ],
)
def test_too_few_pictures_are_refused(labels, target, words):
    with pytest.raises(InputError, match=words) as caught:
        fit(labels, np.linspace(0.1, 0.9, len(labels)), target_fpr=target)
    assert caught.value.hint


def test_a_target_that_just_can_be_told_is_met():
    labels, scores = [0] * 20 + [1] * 20, np.linspace(0.1, 0.9, 40)
    assert fit(labels, scores, target_fpr=0.05).false_positives <= 1


def test_a_detector_that_errs_with_certainty_is_refused():
    scores = [1.0] * 10 + [0.1] * 30 + [0.9] * 40
    with pytest.raises(InputError, match="probability 1"):
        find_threshold(np.array(scores), np.arange(80) < 40, 0.05)


@pytest.mark.parametrize("changes", [{"target_fpr": 0}, {"target_fpr": 1}, {"band_level": 1}])
def test_impossible_settings_are_refused(changes):
    with pytest.raises(UsageError):
        fit(*synthetic(100), **changes)


def test_the_interval_of_a_share():
    assert wilson_interval(5, 50) == pytest.approx((0.0435, 0.2136), abs=1e-4)  # Wilson, by hand
    assert wilson_interval(0, 20)[0] == 0
    assert wilson_interval(20, 20)[1] == 1
