"""The bootstrap: what is drawn, that it repeats, and that its intervals cover."""

from __future__ import annotations

import time

import numpy as np
import pytest

from m2f2cli.evaluation.protocols import standard
from m2f2cli.evaluation.truth import Item
from m2f2cli.metrics import Groups, difference, interval, resample
from tests.evaluation.reports import as_set

NAMES = ["a", "a", "b", "c", "c", "c", "d"]
LABELS = [0, 0, 0, 1, 1, 1, 1]


def test_groups_keep_their_items_together():
    groups = Groups(NAMES, LABELS)
    assert groups.names == ("a", "b", "c", "d")
    assert groups.of_item.tolist() == [0, 0, 1, 2, 2, 2, 3]
    assert groups.strata.tolist() == [0, 0, 1, 1]
    assert groups.sums(np.arange(7)).tolist() == [1, 2, 12, 6]


def test_a_group_of_both_classes_is_a_class_of_its_own():
    assert Groups(["a", "a", "b", "c"], [0, 1, 1, 0]).strata.tolist() == [2, 1, 0]


def test_every_resample_has_as_many_groups_of_each_class():
    groups = Groups(NAMES, LABELS)
    weights = np.concatenate(list(groups.weights(500, seed=1)))
    assert weights.shape == (500, 4)
    assert (weights[:, :2].sum(axis=1) == 2).all()
    assert (weights[:, 2:].sum(axis=1) == 2).all()
    assert weights.mean(axis=0) == pytest.approx(1, abs=0.15)


def test_resamples_depend_on_the_seed_alone(monkeypatch):
    groups = Groups(NAMES, LABELS)
    first = np.concatenate(list(groups.weights(50, seed=3)))
    monkeypatch.setattr("m2f2cli.metrics.WEIGHTS_HELD", 7 * 8)  # batches of 8 rows
    batches = list(groups.weights(50, seed=3))
    assert len(batches) == 7
    assert (np.concatenate(batches) == first).all()
    assert (np.concatenate(list(groups.weights(50, seed=4))) != first).any()


def test_interval_is_of_percentiles_and_needs_defined_values():
    values = np.arange(101.0)
    assert interval(values, 0.9) == pytest.approx((5, 95))
    assert interval(np.where(values < 40, np.nan, values), 0.9) == pytest.approx((43, 97))
    assert interval(np.where(values < 60, np.nan, values)) is None
    assert interval(np.zeros(0)) is None


def test_interval_of_a_mean_covers_it():
    """In 200 repetitions a 90 % interval of a mean of 60 values misses it about 20 times."""
    random = np.random.default_rng(0)
    missed = 0
    for _ in range(200):
        values = random.normal(size=60)
        groups = Groups([str(n) for n in range(60)], [0] * 60)
        found = resample(groups, lambda w, v=values: {"mean": w @ v / 60}, resamples=300)
        low, high = interval(found["mean"], 0.9)
        missed += not low <= 0 <= high
    assert 8 <= missed <= 36


def test_paired_difference_is_narrower_than_the_two_intervals():
    random = np.random.default_rng(0)
    shared = random.normal(size=100)
    first, second = shared, shared + 0.1 + 0.05 * random.normal(size=100)
    groups = Groups([str(n) for n in range(100)], [0] * 100)
    measures = tuple(lambda w, v=v: {"mean": w @ v / 100} for v in (first, second))
    value, low, high = difference(groups, measures, resamples=500)["mean"]
    assert value == pytest.approx(second.mean() - first.mean())
    assert 0 < low < value < high < 0.12
    alone = resample(groups, measures[0], resamples=500)["mean"]
    assert np.ptp(alone) > 10 * (high - low)


def test_difference_leaves_out_what_one_lacks_and_says_undefined():
    groups = Groups(["a", "b"], [0, 1])

    def first(weights):
        return {"x": np.full(len(weights), np.nan), "y": weights[:, 0], "z": weights[:, 0]}

    def second(weights):
        return {"x": weights[:, 0], "y": weights[:, 1]}

    assert difference(groups, (first, second), resamples=10) == {"x": None, "y": (0.0, 0.0, 0.0)}


def test_many_resamples_of_few_pictures_take_no_time():
    groups = Groups([str(n) for n in range(144)], [n % 2 for n in range(144)])
    started = time.perf_counter()
    for _ in groups.weights(2000, seed=0):
        pass
    assert time.perf_counter() - started < 2


def test_the_interval_of_the_calibration_error_holds_it():
    """Resampling a set makes its bins differ more, so their errors are all larger than its own."""
    rng = np.random.default_rng(0)
    items = []
    for number in range(200):
        score = (number + 0.5) / 200
        label = int(rng.random() < score)
        name = f"{number:03d}.jpg"
        items.append(Item(name, label, "fake" if label else "real", name, fake_probability=score))
    scored = as_set(items, task="scores", threshold=0.5)
    figure = standard(scored, resamples=300).figures["calibration_error"]
    assert 0 <= figure.low <= figure.value <= figure.high <= 1
    assert figure.low < figure.high
