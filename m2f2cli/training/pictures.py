"""The pictures of a training: checked and kept, changed in an epoch's order, put in batches.

Every random choice is drawn from a generator seeded by (seed, epoch, position), so neither worker
processes nor a resumed run change what the network sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from m2f2cli.data.augment import augment, compress_h264
from m2f2cli.data.clips import FrameReader
from m2f2cli.data.images import read_picture
from m2f2cli.data.readers.ddvqa import read_judgements
from m2f2cli.data.samples import REAL, Sample, SampleSet, check_classes
from m2f2cli.data.synthesis import Forgery, forge
from m2f2cli.data.transforms import preprocess
from m2f2cli.data.video import evenly
from m2f2cli.errors import ConfigError, InputError
from m2f2cli.files import parse_json
from m2f2cli.models.detector import Detector, DetectorConfig
from m2f2cli.options.train_detector import TrainDetectorOptions
from m2f2cli.training.sampler import AUGMENT, MIXUP, BatchSampler, EpochOrder

Item = dict[str, np.ndarray]

_CACHE_BYTES = 2 * 2**30
_NOTIFY_EVERY = 10_000  # pictures, while they are checked
_AHEAD = 256  # pictures decoded before the reader has taken them


class PictureStore:
    """Pixels of a sample set, from memory or from its files.

    Every picture, and one frame of every video, is decoded once at the start, so a broken one is
    known before training begins. Frames of videos are never kept: their files are opened in each
    process that reads them, and one frame is read at a time.

    Args:
        samples: The pictures and videos.
        cache: ``always`` or ``never`` keep pictures decoded, or ``auto``: if they take at most
            2 GiB.
        skip: Leave out what cannot be read, instead of failing.
        notify: Called with a message for the user after every 10,000 pictures.

    Attributes:
        samples: What can be read.
        skipped: Names of what cannot.

    Raises:
        InputError: Something cannot be read and ``skip`` is off; it is named.
    """

    def __init__(
        self,
        samples: SampleSet,
        cache: str,
        *,
        skip: bool,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self._clips = FrameReader()
        self._kept: dict[int, np.ndarray] = {}
        keep, taken = cache != "never", 0
        good: list[int] = []
        failed: list[tuple[Sample, InputError]] = []
        for index, result in enumerate(self._read_all(samples.samples)):
            if notify and index and index % _NOTIFY_EVERY == 0:
                notify(f"checked {index:,} of {len(samples):,} pictures of '{samples.root}'")
            if isinstance(result, InputError):
                failed.append((samples.samples[index], result))
                continue
            if samples.samples[index].clip is None:
                taken += result.nbytes
                keep = keep and (cache == "always" or taken <= _CACHE_BYTES)
                if keep:
                    self._kept[len(good)] = result
                else:
                    self._kept.clear()
            good.append(index)
        if failed and not skip:
            sample, error = failed[0]
            raise InputError(
                f"{len(failed)} of {len(samples)} pictures cannot be read, '{sample.name}' of "
                f"'{samples.root}' first: {error.message}",
                error.status,
                "Repair or remove them, or leave them out with --unreadable skip.",
            )
        self.skipped = [sample.name for sample, _ in failed]
        self.samples = samples.subset(good)
        check_classes(self.samples, f"'{samples.root}' that can be read")

    def read(self, index: int, frame: int | None = None) -> np.ndarray:
        """Pixels uint8 (H, W, 3) RGB of a picture, or of a frame of a video: by default the middle.

        Raises:
            InputError: It cannot be read.
        """
        kept = self._kept.get(index)
        return self._read(self.samples.samples[index], frame) if kept is None else kept

    def _read(self, sample: Sample, frame: int | None) -> np.ndarray:
        if sample.clip is None:
            return read_picture(sample.path).pixels
        frame = sample.frames // 2 if frame is None else frame
        return self._clips.frame(sample.path, sample.clip, frame)

    def _read_all(self, samples: Sequence[Sample]) -> Iterator[np.ndarray | InputError]:
        """Read in threads, a bounded number ahead of the reader."""

        def attempt(sample: Sample) -> np.ndarray | InputError:
            try:
                return self._read(sample, None)
            except InputError as error:
                return error

        with ThreadPoolExecutor() as pool:
            for start in range(0, len(samples), _AHEAD):
                yield from pool.map(attempt, samples[start : start + _AHEAD])


@dataclass(frozen=True)
class Targets:
    """What there is to learn beside real and fake; everything empty is not learnt.

    Attributes:
        grid: Edge of the forgery map, for its target; 0 for none.
        kinds: Manipulations to tell apart, without ``real``.
        judgements: Annotators' judgements by sample name, each float32 (J,) in [0, 1].
        soft: Teachers' fake probabilities by sample name, in [0, 1].
    """

    grid: int = 0
    kinds: tuple[str, ...] = ()
    judgements: Mapping[str, np.ndarray] = field(default_factory=dict)
    soft: Mapping[str, float] = field(default_factory=dict)


def read_targets(options: TrainDetectorOptions, detector: Detector, train: SampleSet) -> Targets:
    """The targets that the options ask for.

    Raises:
        InputError: Annotations or soft labels are unreadable or speak of none of the pictures.
        ConfigError: The detector has no forgery map to train.
    """
    aims, annotations = options.objective, options.data.annotations
    judgements = {}
    if aims.judgement_weight and annotations is not None:
        judged = read_judgements(annotations, [s.path.stem for s in train.samples])
        known = [s for s in train.samples if s.path.stem in judged]
        # Nothing is wrong with a real picture.
        judgements = {s.name: judged[s.path.stem] * s.label for s in known}
        if not judgements:
            raise InputError(f"'{annotations}' speaks of no picture in '{train.root}'.")
    if aims.map_weight and not detector.config.forgery_map:
        raise ConfigError("--map-weight needs the forgery map, which the --model detector lacks.")
    return Targets(
        grid=detector.clip.vision.grid if aims.map_weight else 0,
        kinds=tuple(detector.config.kinds or (train.kinds() if aims.kind_weight else ())),
        judgements=judgements,
        soft=_soft_labels(aims.soft_labels, train) if aims.soft_labels else {},
    )


def _soft_labels(path: Path, train: SampleSet) -> dict[str, float]:
    """Mean teacher probability of each training picture that has one."""
    found: dict[str, list[float]] = {}
    try:
        for line in path.read_text(encoding="utf-8-sig").splitlines():
            if line.strip():
                row = parse_json(line)
                found.setdefault(row["sample"], []).append(float(row["fake_probability"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(
            f"The soft labels '{path}' cannot be read: {type(error).__name__} {error}.",
            hint='Each line is {"sample": "fake/1.png", "fake_probability": 0.9}.',
        ) from error
    if any(not 0 <= p <= 1 for values in found.values() for p in values):
        raise InputError(f"A fake_probability in '{path}' is not between 0 and 1.")
    names = found.keys() & {sample.name for sample in train.samples}
    if not names:
        raise InputError(f"'{path}' speaks of no picture to train on in '{train.root}'.")
    return {name: sum(found[name]) / len(found[name]) for name in names}


class TrainingPictures(Dataset[Item]):
    """An epoch after another of changed pictures; item ``epoch * len + position``.

    The options say how they are ordered and changed, ``config`` size, mean and deviation of the
    network's input.
    """

    def __init__(
        self,
        store: PictureStore,
        options: TrainDetectorOptions,
        config: DetectorConfig,
        targets: Targets,
    ) -> None:
        self.store = store
        self.options = options
        self.config = config
        self.targets = targets
        self.order = EpochOrder(
            store.samples,
            seed=options.run.seed,
            balance=options.objective.balance,
            pairs=options.objective.pairs,
            frames_per_video=options.data.frames_per_video,
        )
        self.together = 2 if options.objective.pairs else 1  # items that share a batch
        self._samples = store.samples.samples
        self._reals = np.flatnonzero(store.samples.labels() == 0)

    def __len__(self) -> int:
        """Items an epoch."""
        return len(self.order)

    def __getitem__(self, index: int) -> Item:
        """One item.

        Returns:
            ``index`` and ``labels`` int64 (); ``pixel_values`` float32 (3, S, S); ``target``
            float32 (), the fake probability to learn. Where asked for, and zero where unknown:
            ``kind`` (K,) one-hot, ``judgement`` (J,) with ``judgement_known`` (), ``map`` (g, g)
            with ``map_known`` ().
        """
        place = self.order[index]
        rng = np.random.default_rng((self.order.seed, AUGMENT, place.epoch, place.position))
        sample = self._samples[place.sample]
        forgery = self._forgery(sample, rng)
        pixels = forgery.pixels if forgery else self.store.read(place.sample, place.frame)
        mask = forgery.mask if forgery else None
        pixels, mask = augment(pixels, mask, self.options.augment, rng)
        item = self._targets(sample, forgery, mask)
        item["index"] = np.array(index, dtype=np.int64)
        item["pixel_values"] = _preprocess(pixels, self.config)
        return item

    def _forgery(self, sample: Sample, rng: np.random.Generator) -> Forgery | None:
        """The pseudo-fake that takes a forged picture's place, if it is drawn."""
        pseudo = self.options.pseudo
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
        targets = self.targets
        target = float(sample.label)
        if forgery is None and sample.name in targets.soft:
            target += self.options.objective.soft_weight * (targets.soft[sample.name] - target)
        item: Item = {
            "labels": np.array(sample.label, dtype=np.int64),
            "target": np.array(target, dtype=np.float32),
        }
        if targets.kinds:
            kinds = (REAL, *targets.kinds)
            item["kind"] = np.zeros(len(kinds), dtype=np.float32)
            if forgery is None and sample.kind in kinds:
                item["kind"][kinds.index(sample.kind)] = 1.0
        if targets.judgements:
            judged = targets.judgements.get(sample.name) if forgery is None else None
            blank = np.zeros_like(next(iter(targets.judgements.values())))
            item["judgement"] = blank if judged is None else judged
            item["judgement_known"] = np.array(judged is not None, dtype=np.float32)
        if targets.grid:
            item["map"] = _pool(mask, targets.grid)
            known = forgery is not None or sample.label == 0
            item["map_known"] = np.array(known, dtype=np.float32)
        return item


def _preprocess(pixels: np.ndarray, config: DetectorConfig) -> np.ndarray:
    return preprocess(pixels, size=config.image_size, mean=config.image_mean, std=config.image_std)


def _pool(mask: np.ndarray | None, grid: int) -> np.ndarray:
    """Mean of a mask over the cells of a grid; float32 (grid, grid)."""
    if mask is None:
        return np.zeros((grid, grid), dtype=np.float32)
    edge = min(mask.shape)
    top, left = (mask.shape[0] - edge) // 2, (mask.shape[1] - edge) // 2
    square = np.ascontiguousarray(mask[top : top + edge, left : left + edge], dtype=np.float32)
    return np.asarray(Image.fromarray(square).resize((grid, grid), Image.Resampling.BOX))


class ValidationPictures(Dataset[Item]):
    """Pictures, and evenly spaced frames of videos (0 for all), as the detector will see them.

    Attributes:
        labels: 0 real, 1 fake of every item: int64 (N,).
    """

    def __init__(self, store: PictureStore, frames: int, config: DetectorConfig) -> None:
        self.store = store
        self.config = config
        self._places = [
            (number, frame)
            for number, sample in enumerate(store.samples.samples)
            for frame in evenly(sample.frames, frames or sample.frames)
        ]
        self.labels = store.samples.labels()[[number for number, _ in self._places]]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Item:
        """``pixel_values`` float32 (3, S, S) and ``labels`` int64 () only."""
        pixels = self.store.read(*self._places[index])
        return {"pixel_values": _preprocess(pixels, self.config), "labels": self.labels[index]}


class PictureCollator:
    """Puts items in a batch of tensors and mixes them (mixup).

    Args:
        alpha: Of mixup's Beta distribution; 0 mixes nothing.
        seed: Of the share and the partners, with the first item's number.
        sampler: Decides what a batch counts in its step.
    """

    def __init__(self, alpha: float, seed: int, sampler: BatchSampler) -> None:
        self.alpha = alpha
        self.seed = seed
        self.sampler = sampler

    def __call__(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """Stack items along a new first axis; all but ``labels`` are mixed, targets linearly.

        Returns:
            What the items have, without ``index``; training items also get ``weight`` float32 (),
            what the batch's mean loss counts in its step.
        """
        batch = {key: np.stack([item[key] for item in items]) for key in items[0]}
        index = batch.pop("index", None)
        if self.alpha > 0 and index is not None:
            rng = np.random.default_rng((self.seed, MIXUP, int(index[0])))
            drawn = rng.beta(self.alpha, self.alpha)
            share = np.float32(max(drawn, 1 - drawn))
            partners = rng.permutation(len(items))
            for key, values in batch.items():
                if key != "labels":
                    batch[key] = share * values + (1 - share) * values[partners]
        tensors = {key: torch.from_numpy(values) for key, values in batch.items()}
        if index is not None:
            weight = self.sampler.weight(int(index[0]) % self.sampler.length, len(items))
            tensors["weight"] = torch.tensor(weight, dtype=torch.float32)
        return tensors
