"""Which item comes when: the order of each epoch, the frames of videos, the batches of a process.

Every random choice is drawn from a generator seeded by (seed, stream, epoch, …), so neither worker
processes, nor the number of training processes, nor a resumed run change what an epoch shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from m2f2cli.data.samples import SampleSet
from m2f2cli.errors import InputError

# Streams of random numbers, the second number of every seed.
ORDER, AUGMENT, MIXUP, FRAME = 1, 2, 3, 4


class Place(NamedTuple):
    """What stands at one place of an epoch; all count from 0, a picture has frame 0 alone."""

    epoch: int
    position: int
    sample: int
    frame: int


class EpochOrder:
    """The order of one epoch after another; item ``epoch * len + position`` is a ``Place``.

    An epoch has every picture once, and ``frames_per_video`` frames of every video, drawn anew in
    each epoch without repeating one. With ``balance`` real and forged ones take turns, and the
    rarer class goes round until the other is through; a video shows other frames in each round.
    With ``pairs`` every forged one comes once, behind a real one of the same identity (of any,
    where there is none).

    ``frames_per_video`` of 0 takes all frames.
    """

    def __init__(
        self,
        samples: SampleSet,
        *,
        seed: int,
        balance: bool = False,
        pairs: bool = False,
        frames_per_video: int = 1,
    ) -> None:
        self.seed = seed
        self.balance = balance
        self._partners: list[np.ndarray] = []
        self._frames = np.array([sample.frames for sample in samples.samples])
        self._takes = np.minimum(self._frames, frames_per_video or self._frames)
        # One entry for each picture and each frame that is taken of a video.
        self._owner = np.repeat(np.arange(len(self._takes)), self._takes)
        starts = np.cumsum(self._takes) - self._takes
        self._draw = np.arange(len(self._owner)) - starts[self._owner]
        labels = samples.labels()[self._owner]
        self._by_class = np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)
        larger = max(len(members) for members in self._by_class)
        self._length = 2 * larger if balance else len(labels)
        if pairs:
            reals, fakes = self._by_class
            self._length = 2 * len(fakes)
            at_home: dict[str, list[int]] = {}
            for entry in reals:
                for person in samples.samples[self._owner[entry]].identities:
                    at_home.setdefault(person, []).append(int(entry))
            for entry in fakes:
                people = samples.samples[self._owner[entry]].identities
                own = next((at_home[person] for person in people if person in at_home), None)
                self._partners.append(reals if own is None else np.array(own))
        self._current: tuple[int, np.ndarray, np.ndarray] = (-1, labels, labels)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Place:
        epoch, position = divmod(index, self._length)
        if self._current[0] != epoch:
            self._current = (epoch, *self._order(epoch))
        _, entries, rounds = self._current
        entry = int(entries[position])
        sample = int(self._owner[entry])
        draw = int(rounds[position] * self._takes[sample] + self._draw[entry])
        total, frame = int(self._frames[sample]), 0
        if total > 1:
            rng = np.random.default_rng((self.seed, FRAME, epoch, sample))
            frame = int(rng.permutation(total)[draw % total])
        return Place(epoch, position, sample, frame)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The entries of an epoch in their order, and in which round each of them stands."""
        rng = np.random.default_rng((self.seed, ORDER, epoch))
        entries: np.ndarray = rng.permutation(len(self._owner))
        rounds = np.zeros(self._length, dtype=np.int64)
        if self._partners:
            drawn = rng.permutation(len(self._partners))
            fakes = self._by_class[1][drawn]
            entries = np.empty(self._length, dtype=np.int64)
            entries[0::2] = [rng.choice(self._partners[number]) for number in drawn]
            entries[1::2] = fakes
        elif self.balance:
            half = self._length // 2
            entries = np.empty(self._length, dtype=np.int64)
            for first, own in enumerate(self._by_class):
                laps = [rng.permutation(own) for _ in range(-(-half // len(own)))]
                entries[first::2] = np.concatenate(laps)[:half]
                rounds[first::2] = np.arange(half) // len(own)
        return entries, rounds


class BatchSampler(Sampler[list[int]]):
    """The batches of one process in one epoch, as item numbers ``epoch * length + position``.

    A step takes the next ``batch * accumulate * processes`` items, whatever the number of
    processes. The last one takes the rest; if that is less than an item a process, the step before
    takes it too. Each step is dealt out evenly, so that every item is seen exactly once.

    Args:
        length: Items an epoch.
        batch: Items a batch.
        accumulate: Batches whose gradients make one step together.
        processes: How many train together.
        process: Which of them this is, from 0.
        together: Items in a row that one batch holds, 1 or 2; ``length`` and ``batch`` are
            multiples of it.

    Attributes:
        steps: Optimizer steps an epoch.

    Raises:
        InputError: There are fewer items than processes.
    """

    def __init__(
        self,
        length: int,
        batch: int,
        accumulate: int = 1,
        processes: int = 1,
        process: int = 0,
        together: int = 1,
    ) -> None:
        if length < processes * together:
            raise InputError(
                f"{length} pictures cannot be dealt out to {processes} processes.",
                "empty",
                "Start fewer processes.",
            )
        self.length = length
        self.batch = batch
        self.accumulate = accumulate
        self.processes = processes
        self.process = process
        self.together = together
        full, rest = divmod(length, self._size)
        self.steps = full + (rest >= processes * together or not full)
        self.start(0)

    def start(self, epoch: int, step: int = 0) -> None:
        """Let the next iteration give an epoch's batches, both from 0, from a step of it on."""
        self.epoch = epoch
        self.first = step

    def __len__(self) -> int:
        return sum(len(self.batches(step)) for step in range(self.first, self.steps))

    def __iter__(self) -> Iterator[list[int]]:
        start = self.epoch * self.length
        for step in range(self.first, self.steps):
            for positions in self.batches(step):
                yield [start + position for position in positions]

    def batches(self, step: int) -> list[range]:
        """Positions of this process's batches of a step; none is empty."""
        low, high, parts = self._deal(step)
        units = (high - low) // self.together
        cuts = [low + units * part // parts * self.together for part in range(parts + 1)]
        mine = range(self.process, parts, self.processes)
        return [range(cuts[part], cuts[part + 1]) for part in mine]

    def weight(self, position: int, count: int) -> float:
        """What the mean loss of a batch counts, by the position of its first item and their number.

        With it a step's gradient is the mean over its items.
        """
        low, high, parts = self._deal(min(position // self._size, self.steps - 1))
        return count * parts / (high - low)

    @property
    def _size(self) -> int:
        return self.batch * self.accumulate * self.processes

    def _deal(self, step: int) -> tuple[int, int, int]:
        """First and past-the-last position of a step, and in how many batches it is cut."""
        low = step * self._size
        high = self.length if step == self.steps - 1 else low + self._size
        each = min(-(-(high - low) // (self.batch * self.processes)), self.accumulate)
        each = max(1, min(each, (high - low) // self.together // self.processes))
        return low, high, each * self.processes
