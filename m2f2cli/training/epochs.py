"""Which picture comes when: the order of each epoch, its frames of videos, its batches.

Every random choice is drawn from a generator seeded by (seed, epoch, …), so neither worker
processes, nor the number of training processes, nor a resumed run change what an epoch shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from m2f2cli.data.samples import SampleSet
from m2f2cli.errors import InputError

_ORDER, _FRAME = 1, 4  # streams of random numbers; ``training.pictures`` has the others


class Turn(NamedTuple):
    """What stands at one place of an epoch.

    Attributes:
        epoch: From 0.
        position: From 0.
        sample: Number of the sample.
        frame: Frame of a video; 0 of a picture.
    """

    epoch: int
    position: int
    sample: int
    frame: int


class Epochs:
    """The order of an epoch after another; place ``epoch * len + position``.

    An epoch has every picture once, and ``frames_per_video`` frames of every video, drawn anew in
    each epoch without repeating one. With ``balance`` real and forged ones take turns, and the
    rarer class goes round until the other is through; a video shows other frames in each round.

    Args:
        samples: The pictures and videos.
        seed: Of every choice.
        balance: Whether the classes take turns.
        frames_per_video: Frames of a video in a round; 0 for all it has.
    """

    def __init__(
        self, samples: SampleSet, *, seed: int, balance: bool = False, frames_per_video: int = 1
    ) -> None:
        self.seed = seed
        self.balance = balance
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
        self._plan: tuple[int, np.ndarray, np.ndarray] = (-1, labels, labels)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Turn:
        epoch, position = divmod(index, self._length)
        if self._plan[0] != epoch:
            self._plan = (epoch, *self._order(epoch))
        _, entries, rounds = self._plan
        entry = int(entries[position])
        sample = int(self._owner[entry])
        draw = int(rounds[position] * self._takes[sample] + self._draw[entry])
        return Turn(epoch, position, sample, self._frame(epoch, sample, draw))

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The entries of an epoch in their order, and in which round each of them stands."""
        rng = np.random.default_rng((self.seed, _ORDER, epoch))
        entries: np.ndarray = rng.permutation(len(self._owner))
        rounds = np.zeros(self._length, dtype=np.int64)
        if self.balance:  # real and forged take turns
            half = self._length // 2
            entries = np.empty(self._length, dtype=np.int64)
            for first, own in enumerate(self._by_class):
                turns = [rng.permutation(own) for _ in range(-(-half // len(own)))]
                entries[first::2] = np.concatenate(turns)[:half]
                rounds[first::2] = np.arange(half) // len(own)
        return entries, rounds

    def _frame(self, epoch: int, sample: int, draw: int) -> int:
        total = int(self._frames[sample])
        if total == 1:
            return 0
        rng = np.random.default_rng((self.seed, _FRAME, epoch, sample))
        return int(rng.permutation(total)[draw % total])


@dataclass(frozen=True)
class Steps:
    """How the items of an epoch are dealt out to optimiser steps, processes and batches.

    A step takes the next ``batch * accumulate * processes`` items, whatever the number of
    processes. The last one takes the rest; if that is less than an item a process, the step before
    takes it too. Each step is dealt out evenly, so that every item is seen exactly once.

    Attributes:
        length: Items an epoch.
        batch: Items a batch.
        accumulate: Batches whose gradients make one step together.
        processes: How many train together.

    Raises:
        InputError: There are fewer items than processes.
    """

    length: int
    batch: int
    accumulate: int = 1
    processes: int = 1

    def __post_init__(self) -> None:
        if self.length < self.processes:
            raise InputError(
                f"{self.length} pictures cannot be dealt out to {self.processes} processes.",
                "empty",
                "Start fewer processes.",
            )

    @property
    def size(self) -> int:
        """Items of a full step."""
        return self.batch * self.accumulate * self.processes

    def __len__(self) -> int:
        """Steps an epoch."""
        full, rest = divmod(self.length, self.size)
        return full + (rest >= self.processes or not full)

    def batches(self, step: int, process: int) -> list[range]:
        """Positions of a process's batches of a step; none is empty."""
        low, high, parts = self._deal(step)
        cuts = [low + (high - low) * part // parts for part in range(parts + 1)]
        mine = range(process, parts, self.processes)
        return [range(cuts[part], cuts[part + 1]) for part in mine]

    def weight(self, position: int, count: int) -> float:
        """What a batch's mean loss counts, so that a step's gradient is the mean over its items.

        Args:
            position: Of its first item.
            count: Its items.
        """
        low, high, parts = self._deal(min(position // self.size, len(self) - 1))
        return count * parts / (high - low)

    def _deal(self, step: int) -> tuple[int, int, int]:
        """First and past-the-last position of a step, and in how many batches it is cut."""
        low = step * self.size
        high = self.length if step == len(self) - 1 else low + self.size
        each = min(-(-(high - low) // (self.batch * self.processes)), self.accumulate)
        each = max(1, min(each, (high - low) // self.processes))
        return low, high, each * self.processes


class BatchSampler(Sampler[list[int]]):
    """The batches of one process in one epoch, as item numbers ``epoch * length + position``.

    Args:
        steps: How items are dealt out.
        process: Which process this is, from 0.

    Attributes:
        steps: How items are dealt out.
        process: Which process this is.
    """

    def __init__(self, steps: Steps, process: int = 0) -> None:
        self.steps = steps
        self.process = process
        self.start(0)

    def start(self, epoch: int, step: int = 0) -> None:
        """Let the next iteration give an epoch's batches, both from 0, from a step of it on."""
        self.epoch = epoch
        self.first = step

    def __len__(self) -> int:
        return sum(1 for _ in self._positions())

    def __iter__(self) -> Iterator[list[int]]:
        start = self.epoch * self.steps.length
        for positions in self._positions():
            yield [start + position for position in positions]

    def _positions(self) -> Iterator[range]:
        for step in range(self.first, len(self.steps)):
            yield from self.steps.batches(step, self.process)
