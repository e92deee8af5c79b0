"""The pictures of a training: taken in an epoch's order, changed, and put in batches.

Every random choice is drawn from a generator seeded by (seed, epoch, position), so neither worker
processes nor a resumed run change what the network sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from m2f2cli.data.augment import augment
from m2f2cli.data.samples import REAL, Sample
from m2f2cli.data.synthesis import Forgery, compress_h264, forge
from m2f2cli.data.transforms import preprocess
from m2f2cli.data.video import evenly
from m2f2cli.options.training_pictures import AugmentOptions, PseudoFakeOptions
from m2f2cli.training.epochs import Epochs, Steps
from m2f2cli.training.picture_store import PictureStore

Item = dict[str, np.ndarray]

_CHANGE, _MIX = 2, 3  # streams of random numbers; ``training.epochs`` has the others


@dataclass(frozen=True)
class PictureSettings:
    """How a training item is made of pictures.

    Attributes:
        seed: Of every random choice.
        size: Edge of the network's input in pixels.
        mean: Of the three channels.
        std: Of the three channels.
        augment: Changes of every picture.
        pseudo: Pseudo-fakes.
        balance: Whether real and forged pictures take turns.
        frames_per_video: Frames of a video in an epoch; 0 for all.
        validation_frames: Frames of a video to measure on; 0 for all.
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
    frames_per_video: int = 1
    validation_frames: int = 0
    grid: int = 0
    kinds: tuple[str, ...] = ()
    judgements: Mapping[str, np.ndarray] = field(default_factory=dict)
    soft: Mapping[str, float] = field(default_factory=dict)
    soft_weight: float = 0.5


class TrainingPictures(Dataset[Item]):
    """An epoch after another of changed pictures; item ``epoch * len + position``.

    Args:
        store: The pictures.
        settings: What is made of them.

    Attributes:
        epochs: Which picture stands where.
    """

    def __init__(self, store: PictureStore, settings: PictureSettings) -> None:
        self.store = store
        self.settings = settings
        self.epochs = Epochs(
            store.samples,
            seed=settings.seed,
            balance=settings.balance,
            frames_per_video=settings.frames_per_video,
        )
        self._samples = store.samples.samples
        self._reals = np.flatnonzero(store.samples.labels() == 0)

    def __len__(self) -> int:
        """Items an epoch."""
        return len(self.epochs)

    def __getitem__(self, index: int) -> Item:
        """One item.

        Returns:
            ``index`` and ``labels`` int64 (); ``pixel_values`` float32 (3, S, S); ``target``
            float32 (), the fake probability to learn. Where asked for, and zero where unknown:
            ``kind`` (K,) one-hot, ``judgement`` (J,) with ``judgement_known`` (), ``map`` (g, g)
            with ``map_known`` ().
        """
        turn = self.epochs[index]
        rng = np.random.default_rng((self.settings.seed, _CHANGE, turn.epoch, turn.position))
        sample = self._samples[turn.sample]
        forgery = self._forgery(sample, rng)
        pixels = forgery.pixels if forgery else self.store.read(turn.sample, turn.frame)
        mask = forgery.mask if forgery else None
        pixels, mask = augment(pixels, mask, self.settings.augment, rng)
        item = self._targets(sample, forgery, mask)
        item["index"] = np.array(index, dtype=np.int64)
        item["pixel_values"] = preprocess(
            pixels, size=self.settings.size, mean=self.settings.mean, std=self.settings.std
        )
        return item

    def _forgery(self, sample: Sample, rng: np.random.Generator) -> Forgery | None:
        """The pseudo-fake that takes a forged picture's place, if the dice say so."""
        pseudo = self.settings.pseudo
        draw = rng.random()
        if sample.label == 0 or draw >= pseudo.total:
            return None
        for kind, share in pseudo.shares().items():  # noqa: B007 - the last kind stays
            draw -= share
            if draw < 0:
                break
        base = int(rng.choice(self._reals))
        other = None
        if kind == "swap_blend":
            people = set(self._samples[base].identities)
            order = (int(number) for number in rng.permutation(self._reals))
            strangers = (n for n in order if people.isdisjoint(self._samples[n].identities))
            other = self._any_frame(next(strangers, base), rng)
        forgery = forge(self._any_frame(base, rng), rng, kind=kind, other=other)
        if rng.random() < pseudo.pseudo_h264:
            low, high = pseudo.pseudo_crf
            crf = int(rng.integers(low, high, endpoint=True))
            forgery = forgery._replace(pixels=compress_h264(forgery.pixels, crf))
        return forgery

    def _any_frame(self, number: int, rng: np.random.Generator) -> np.ndarray:
        """Pixels of a picture, or of a random frame of a video."""
        frames = self._samples[number].frames
        return self.store.read(number, int(rng.integers(frames)) if frames > 1 else 0)

    def _targets(self, sample: Sample, forgery: Forgery | None, mask: np.ndarray | None) -> Item:
        settings = self.settings
        target = float(sample.label)
        if forgery is None and sample.name in settings.soft:
            target += settings.soft_weight * (settings.soft[sample.name] - target)
        item: Item = {
            "labels": np.array(sample.label, dtype=np.int64),
            "target": np.array(target, dtype=np.float32),
        }
        if settings.kinds:
            kinds = (REAL, *settings.kinds)
            item["kind"] = np.zeros(len(kinds), dtype=np.float32)
            if forgery is None and sample.kind in kinds:
                item["kind"][kinds.index(sample.kind)] = 1.0
        if settings.judgements:
            judged = settings.judgements.get(sample.name) if forgery is None else None
            length = len(next(iter(settings.judgements.values())))
            blank = np.zeros(length, dtype=np.float32)
            item["judgement"] = blank if judged is None else judged
            item["judgement_known"] = np.array(judged is not None, dtype=np.float32)
        if settings.grid:
            item["map"] = _pool(mask, settings.grid)
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
    """Pictures, and evenly spaced frames of videos, as the detector will see them.

    Args:
        store: The pictures.
        settings: Gives size, mean and deviation, and the frames of a video.
    """

    def __init__(self, store: PictureStore, settings: PictureSettings) -> None:
        self.store = store
        self.settings = settings
        self._places = [
            (number, frame)
            for number, sample in enumerate(store.samples.samples)
            for frame in evenly(sample.frames, settings.validation_frames or sample.frames)
        ]

    def labels(self) -> np.ndarray:
        """0 real, 1 fake of every item: int64 (N,)."""
        samples = self.store.samples.samples
        return np.array([samples[number].label for number, _ in self._places])

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Item:
        """``pixel_values`` float32 (3, S, S) and ``labels`` int64 () only."""
        number, frame = self._places[index]
        pixels = preprocess(
            self.store.read(number, frame),
            size=self.settings.size,
            mean=self.settings.mean,
            std=self.settings.std,
        )
        label = self.store.samples.samples[number].label
        return {"pixel_values": pixels, "labels": np.array(label, dtype=np.int64)}


class Batcher:
    """Puts items in a batch of tensors and mixes them (mixup).

    Args:
        alpha: Of mixup's Beta distribution; 0 mixes nothing.
        seed: Of the share and the partners, with the first item's number.
        steps: How items are dealt out to batches, which decides what a batch counts.
    """

    def __init__(self, alpha: float, seed: int, steps: Steps) -> None:
        self.alpha = alpha
        self.seed = seed
        self.steps = steps

    def __call__(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """Stack items along a new first axis; all but ``labels`` are mixed, targets linearly.

        Returns:
            What the items have, without ``index``; training items also get ``weight`` float32 (),
            what the batch's mean loss counts in its step.
        """
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
        tensors = {key: torch.from_numpy(values) for key, values in batch.items()}
        if index is not None:
            weight = self.steps.weight(int(index[0]) % self.steps.length, len(items))
            tensors["weight"] = torch.tensor(weight, dtype=torch.float32)
        return tensors
