"""How far a figure may lie off by chance: the bootstrap over videos or pictures.

A resample draws as many groups (videos, or pictures that stand alone) with replacement as there
are, real and forged ones apart, so that every resample has the set's share of forged ones. It is a
row of weights: how often each group was drawn. The interval is the percentile interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

RESAMPLES, SEED, LEVEL = 2000, 0, 0.95
_CELLS = 4_000_000  # weights held at a time: resamples in a batch times items

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
        """Draw resamples in batches.

        Yields:
            (R, G), how often each group was drawn; equal seeds give equal rows, whatever the
            batches.
        """
        kinds = np.unique(self.strata)
        streams = [np.random.default_rng([seed, number]) for number in range(len(kinds))]
        batch = max(1, _CELLS // max(1, len(self.of_item)))
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
    """The figures of every resample.

    Args:
        groups: What is drawn.
        measure: Gives the figures for rows of weights.
        resamples: How many; 0 gives empty arrays.
        seed: Decides which.

    Returns:
        For each figure, (resamples,); NaN where a resample left it undefined.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for weights in groups.weights(resamples, seed):
        for name, values in measure(weights).items():
            parts.setdefault(name, []).append(values)
    return {name: np.concatenate(values) for name, values in parts.items()}


def interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float] | None:
    """The percentile interval of resampled values.

    Args:
        values: (R,).
        level: Share of the resamples inside, in (0, 1).

    Returns:
        Its ends; None when more than half the resamples are undefined, or there are none.
    """
    defined = values[~np.isnan(values)]
    if 2 * len(defined) <= len(values):
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
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
