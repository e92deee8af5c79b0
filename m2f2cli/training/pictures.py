"""The pictures of a training: read, kept in memory where they fit, changed, and put in batches.

Every random choice is drawn from a generator seeded by (seed, epoch, position), so neither worker
processes nor a resumed run change what the network sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from m2f2cli.data.augment import Augment
from m2f2cli.data.images import read_picture
from m2f2cli.data.samples import REAL, Sample, SampleSet, check_classes
from m2f2cli.data.synthesis import Forgery, compress_h264, forge
from m2f2cli.data.transforms import preprocess
from m2f2cli.errors import InputError
from m2f2cli.training.picture_options import AugmentOptions, PseudoFakeOptions

Item = dict[str, np.ndarray]

_CACHE_BYTES = 2 * 2**30
_AHEAD = 256  # pictures decoded before the reader has taken them
_ORDER, _CHANGE, _MIX = 1, 2, 3  # streams of random numbers that never meet


class PictureStore:
    """Decoded pictures of a sample set, from memory or from their files.

    Every picture is decoded once at the start, so a broken one is known before training begins.

    Args:
        samples: The pictures.
        cache: ``always`` or ``never`` keep them decoded, or ``auto``: if they take at most 2 GiB.
        skip: Leave out pictures that cannot be read, instead of failing.

    Attributes:
        samples: The pictures that can be read.
        skipped: Names of those that cannot.

    Raises:
        InputError: A picture cannot be read and ``skip`` is off; it is named.
    """

    def __init__(self, samples: SampleSet, cache: str, *, skip: bool) -> None:
        keep, taken = cache != "never", 0
        self._kept: list[np.ndarray] = []
        good: list[int] = []
        failed: list[tuple[Sample, InputError]] = []
        for index, result in enumerate(_decode_all(samples.samples)):
            if isinstance(result, InputError):
                failed.append((samples.samples[index], result))
                continue
            good.append(index)
            taken += result.nbytes
            keep = keep and (cache == "always" or taken <= _CACHE_BYTES)
            if keep:
                self._kept.append(result)
            else:
                self._kept.clear()
        if failed and not skip:
            sample, error = failed[0]
            raise InputError(
                f"{len(failed)} of {len(samples)} pictures cannot be read, '{sample.path}' first: "
                f"{error.message}",
                error.status,
                "Mend or remove them, or leave them out with --unreadable skip.",
            )
        self.skipped = [sample.name for sample, _ in failed]
        self.samples = samples.subset(good)
        check_classes(self.samples, f"'{samples.root}' that can be read")

    def __getitem__(self, index: int) -> np.ndarray:
        """Pixels of a picture, uint8 (H, W, 3) RGB."""
        if self._kept:
            return self._kept[index]
        return read_picture(self.samples.samples[index].path).pixels


def _decode_all(samples: Sequence[Sample]) -> Iterator[np.ndarray | InputError]:
    """Decode in threads, a bounded number ahead of the reader."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(samples), _AHEAD):
            yield from pool.map(_decode, samples[start : start + _AHEAD])


def _decode(sample: Sample) -> np.ndarray | InputError:
    try:
        return read_picture(sample.path).pixels
    except InputError as error:
        return error


@dataclass(frozen=True)
class Recipe:
    """How a training item is made of pictures.

    Attributes:
        seed: Of every random choice.
        size: Edge of the network's input in pixels.
        mean: Of the three channels.
        std: Of the three channels.
        augment: Changes of every picture.
        pseudo: Pseudo-fakes.
        balance: Whether real and forged pictures take turns.
        grid: Edge of the forgery map, for its target; 0 for none.
        kinds: Manipulations told apart, without ``real``; empty for none.
        judgements: Annotators' judgements by sample name, each float32 (J,); empty for none.
        soft: Teachers' fake probabilities by sample name.
        soft_weight: Their share of the target, in [0, 1].
    """

    seed: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: AugmentOptions
    pseudo: PseudoFakeOptions
    balance: bool = False
    grid: int = 0
    kinds: tuple[str, ...] = ()
    judgements: Mapping[str, np.ndarray] = field(default_factory=dict)
    soft: Mapping[str, float] = field(default_factory=dict)
    soft_weight: float = 0.5


class TrainingPictures(Dataset[Item]):
    """An epoch after another of changed pictures; item ``epoch * len + position``.

    Args:
        store: The pictures.
        recipe: What is made of them.
    """

    def __init__(self, store: PictureStore, recipe: Recipe) -> None:
        self.store = store
        self.recipe = recipe
        self._samples = store.samples.samples
        self._augment = Augment(**asdict(recipe.augment))
        labels = store.samples.labels()
        self._by_class = np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)
        larger = max(len(members) for members in self._by_class)
        self._length = 2 * larger if recipe.balance else len(labels)
        self._plan: tuple[int, np.ndarray] = (-1, labels)

    def __len__(self) -> int:
        """Items an epoch."""
        return self._length

    def __getitem__(self, index: int) -> Item:
        """One item.

        Returns:
            ``index`` and ``labels`` int64 (); ``pixel_values`` float32 (3, S, S); ``target``
            float32 (), the fake probability to learn. Where asked for, and zero where unknown:
            ``kind`` (K,) one-hot, ``judgement`` (J,) with ``judgement_known`` (), ``map`` (g, g)
            with ``map_known`` ().
        """
        epoch, position = divmod(index, self._length)
        number = int(self._order(epoch)[position])
        rng = np.random.default_rng((self.recipe.seed, _CHANGE, epoch, position))
        sample = self._samples[number]
        forgery = self._forgery(sample, rng)
        pixels = forgery.pixels if forgery else self.store[number]
        mask = forgery.mask if forgery else None
        pixels, mask = self._augment.apply(pixels, mask, rng)
        item = self._targets(sample, forgery, mask)
        item["index"] = np.array(index, dtype=np.int64)
        item["pixel_values"] = preprocess(
            pixels, size=self.recipe.size, mean=self.recipe.mean, std=self.recipe.std
        )
        return item

    def _order(self, epoch: int) -> np.ndarray:
        """Positions in the sample set, in the order of an epoch."""
        if self._plan[0] != epoch:
            rng = np.random.default_rng((self.recipe.seed, _ORDER, epoch))
            order: np.ndarray = rng.permutation(len(self._samples))
            if self.recipe.balance:  # real and forged take turns
                half = self._length // 2
                order = np.empty(self._length, dtype=np.int64)
                for first, own in enumerate(self._by_class):
                    rounds = [rng.permutation(own) for _ in range(-(-half // len(own)))]
                    order[first::2] = np.concatenate(rounds)[:half]
            self._plan = (epoch, order)
        return self._plan[1]

    def _forgery(self, sample: Sample, rng: np.random.Generator) -> Forgery | None:
        """The pseudo-fake that takes a forged picture's place, if the dice say so."""
        pseudo = self.recipe.pseudo
        draw = rng.random()
        if sample.label == 0 or draw >= pseudo.total:
            return None
        for kind, share in pseudo.shares().items():  # noqa: B007 - the last kind stays
            draw -= share
            if draw < 0:
                break
        reals = self._by_class[0]
        base = int(rng.choice(reals))
        other = None
        if kind == "swap_blend":
            people = set(self._samples[base].identities)
            order = (int(number) for number in rng.permutation(reals))
            strangers = (n for n in order if people.isdisjoint(self._samples[n].identities))
            other = self.store[next(strangers, base)]
        forgery = forge(self.store[base], rng, kind=kind, other=other)
        if rng.random() < pseudo.pseudo_h264:
            low, high = pseudo.pseudo_crf
            crf = int(rng.integers(low, high, endpoint=True))
            forgery = forgery._replace(pixels=compress_h264(forgery.pixels, crf))
        return forgery

    def _targets(self, sample: Sample, forgery: Forgery | None, mask: np.ndarray | None) -> Item:
        recipe = self.recipe
        target = float(sample.label)
        if forgery is None and sample.name in recipe.soft:
            target += recipe.soft_weight * (recipe.soft[sample.name] - target)
        item: Item = {
            "labels": np.array(sample.label, dtype=np.int64),
            "target": np.array(target, dtype=np.float32),
        }
        if recipe.kinds:
            kinds = (REAL, *recipe.kinds)
            item["kind"] = np.zeros(len(kinds), dtype=np.float32)
            if forgery is None and sample.kind in kinds:
                item["kind"][kinds.index(sample.kind)] = 1.0
        if recipe.judgements:
            judged = recipe.judgements.get(sample.name) if forgery is None else None
            length = len(next(iter(recipe.judgements.values())))
            blank = np.zeros(length, dtype=np.float32)
            item["judgement"] = blank if judged is None else judged
            item["judgement_known"] = np.array(judged is not None, dtype=np.float32)
        if recipe.grid:
            item["map"] = _pool(mask, recipe.grid)
            known = forgery is not None or sample.label == 0
            item["map_known"] = np.array(known, dtype=np.float32)
        return item


def _pool(mask: np.ndarray | None, grid: int) -> np.ndarray:
    """Mean of a mask over the cells of a grid; float32 (grid, grid)."""
    if mask is None:
        return np.zeros((grid, grid), dtype=np.float32)
    edge = min(mask.shape)
    top, left = (mask.shape[0] - edge) // 2, (mask.shape[1] - edge) // 2
    square = np.ascontiguousarray(mask[top : top + edge, left : left + edge], dtype=np.float32)
    return np.asarray(Image.fromarray(square).resize((grid, grid), Image.Resampling.BOX))


class MeasuringPictures(Dataset[Item]):
    """Pictures as the detector will see them; ``pixel_values`` and ``labels`` only.

    Args:
        store: The pictures.
        recipe: Gives size, mean and deviation.
    """

    def __init__(self, store: PictureStore, recipe: Recipe) -> None:
        self.store = store
        self.recipe = recipe

    def __len__(self) -> int:
        return len(self.store.samples)

    def __getitem__(self, index: int) -> Item:
        pixels = preprocess(
            self.store[index], size=self.recipe.size, mean=self.recipe.mean, std=self.recipe.std
        )
        label = self.store.samples.samples[index].label
        return {"pixel_values": pixels, "labels": np.array(label, dtype=np.int64)}


class EpochSampler(Sampler[int]):
    """Item numbers of one epoch of ``TrainingPictures``, in order.

    Args:
        length: Items an epoch.

    Attributes:
        epoch: The epoch whose items the next iteration gives, from 0.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * self.length
        return iter(range(start, start + self.length))


class Batcher:
    """Puts items in a batch of tensors and mixes them (mixup).

    Args:
        alpha: Of mixup's Beta distribution; 0 mixes nothing.
        seed: Of the share and the partners, with the first item's number.
    """

    def __init__(self, alpha: float, seed: int) -> None:
        self.alpha = alpha
        self.seed = seed

    def __call__(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """Stack items along a new first axis; all but ``labels`` are mixed, targets linearly."""
        batch = {key: np.stack([item[key] for item in items]) for key in items[0]}
        index = batch.pop("index", None)
        if self.alpha > 0 and index is not None:
            rng = np.random.default_rng((self.seed, _MIX, int(index[0])))
            drawn = rng.beta(self.alpha, self.alpha)
            share = np.float32(max(drawn, 1 - drawn))
            partners = rng.permutation(len(items))
            for key, values in batch.items():
                if key != "labels":
                    batch[key] = share * values + (1 - share) * values[partners]
        return {key: torch.from_numpy(values) for key, values in batch.items()}
