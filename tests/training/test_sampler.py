from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2f2cli.data.samples import Sample, SampleSet
from m2f2cli.errors import InputError
from m2f2cli.training.sampler import BatchSampler, EpochOrder


def videos(*frames: tuple[int, int]) -> SampleSet:
    """Samples of (label, frames)."""
    rows = [
        Sample(Path("x.h5"), f"{n:04d}", label, str(label), (str(n),), f"{n:03d}", count)
        for n, (label, count) in enumerate(frames)
    ]
    return SampleSet(Path("x"), "ffpp", tuple(rows))


def places(order: EpochOrder, epoch: int) -> list[tuple[int, int]]:
    start = epoch * len(order)
    found = [order[start + position] for position in range(len(order))]
    assert [(place.epoch, place.position) for place in found] == [
        (epoch, position) for position in range(len(order))
    ]
    return [(place.sample, place.frame) for place in found]


@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_each_epoch_draws_other_frames_of_every_video(wanted):
    samples = videos((0, 50), (1, 50), (1, 2), (0, 1))
    order = EpochOrder(samples, seed=1, frames_per_video=wanted)
    seen = [places(order, epoch) for epoch in range(4)]
    for shown in seen:
        assert len(shown) == len(set(shown)) == 2 * wanted + min(2, wanted) + 1
        assert Counter(sample for sample, _ in shown)[0] == wanted
    assert len({tuple(sorted(shown)) for shown in seen}) == 4
    assert seen == [
        places(EpochOrder(samples, seed=1, frames_per_video=wanted), epoch) for epoch in range(4)
    ]
    assert seen[0] != places(EpochOrder(samples, seed=2, frames_per_video=wanted), 0)


def test_all_frames_once():
    order = EpochOrder(videos((0, 3), (1, 7), (1, 1)), seed=0, frames_per_video=0)
    wanted = [(0, n) for n in range(3)] + [(1, n) for n in range(7)] + [(2, 0)]
    for epoch in (0, 5):
        assert sorted(places(order, epoch)) == wanted


def test_over_time_every_frame_is_drawn_about_equally_often():
    order = EpochOrder(videos((0, 5), (1, 5)), seed=0, frames_per_video=1)
    counts = Counter(place for epoch in range(1000) for place in places(order, epoch))
    assert len(counts) == 10
    assert all(150 < count < 250 for count in counts.values())


def test_balance_repeats_the_rarer_class_with_other_frames():
    samples = videos((0, 6), *[(1, 6)] * 4)  # as in FaceForensics++, one original to four
    order = EpochOrder(samples, seed=0, balance=True, frames_per_video=1)
    shown = places(order, 3)
    assert len(shown) == 8
    labels = samples.labels()
    assert [int(labels[sample]) for sample, _ in shown] == [0, 1] * 4
    assert Counter(sample for sample, _ in shown) == {0: 4, 1: 1, 2: 1, 3: 1, 4: 1}
    assert len({frame for sample, frame in shown if sample == 0}) == 4


def test_a_million_frames_take_little_memory():
    import tracemalloc

    samples = videos(*[(0, 300)] * 720, *[(1, 300)] * 2880)
    tracemalloc.start()
    order = EpochOrder(samples, seed=0, frames_per_video=0)
    found = order[len(order) + 17]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(order) == 3600 * 300
    assert 0 <= found.frame < 300
    assert peak < 100 * 2**20


SIZES = st.tuples(st.integers(1, 70), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))


@given(SIZES)
@settings(max_examples=200)
def test_every_item_is_dealt_out_exactly_once(sizes):
    length, batch, accumulate, processes = sizes
    if length < processes:
        with pytest.raises(InputError, match="cannot be dealt out"):
            BatchSampler(*sizes)
        return
    samplers = [BatchSampler(*sizes, process) for process in range(processes)]
    first = samplers[0]
    seen = []
    for step in range(first.steps):
        dealt = [sampler.batches(step) for sampler in samplers]
        assert len({len(batches) for batches in dealt}) == 1  # else processes wait for each other
        assert 1 <= len(dealt[0]) <= accumulate
        assert step == first.steps - 1 or len(dealt[0]) == accumulate
        flat = [positions for batches in dealt for positions in batches]
        assert all(positions for positions in flat)
        assert step == first.steps - 1 or all(len(p) == batch for p in flat)
        weights = [first.weight(p[0], len(p)) for p in flat]
        items = sum(len(p) for p in flat)
        for positions, weight in zip(flat, weights, strict=True):  # mean over batches = over items
            assert np.isclose(weight / len(flat) / len(positions), 1 / items)
        seen += [position for positions in flat for position in positions]
    assert sorted(seen) == list(range(length))
    whole = BatchSampler(length, batch * accumulate * processes)
    assert 0 <= whole.steps - first.steps <= 1
    for sampler in samplers:
        assert len(sampler) == len(list(sampler))
        assert -(-len(sampler) // accumulate) == first.steps


def test_processes_share_the_same_steps():
    one = BatchSampler(23, 6)
    two = [BatchSampler(23, 3, 1, 2, process) for process in (0, 1)]
    for sampler in (one, *two):
        sampler.start(1)
    pairs = [sorted(a + b) for a, b in zip(*two, strict=True)]
    assert pairs == list(one)
