"""From files to records: decode, find faces, crop, judge in batches, decide, record.

``detect``, ``explain``, ``evaluate`` and the page all go through ``judge``. Crops are batched
across items; records leave in the order of the items, as soon as they can. No torch at import.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np

from m2f2cli.data.transforms import normalize
from m2f2cli.errors import M2F2Error
from m2f2cli.inference.recordfile import Job, RecordFile, Tally, record_new
from m2f2cli.inference.render import Renderer
from m2f2cli.inference.sources import PATIENCE, Crop, CropRule, Decoder, Prepared, Source, expand
from m2f2cli.inference.verdict import DIGITS, Rule, assemble
from m2f2cli.options.detect import DetectOptions
from m2f2cli.records import Box, Detection, Settings

if TYPE_CHECKING:
    import torch

AT_ONCE_ON_CPU = 4  # crops; the feature maps of more outgrow its cache
_BACKLOG = 2  # batches' worth of items that wait for a batch to fill
_REMEMBERED = 65_536  # crops whose scores are kept for another appearance

T = TypeVar("T")
Key = TypeVar("Key", bound=Hashable)
Work = TypeVar("Work")
Result = TypeVar("Result")


def detect(
    paths: Sequence[str],
    *,
    model: str | Judge = "lite",
    options: DetectOptions | None = None,
    recursive: bool = False,
) -> Iterator[Detection]:
    """Judge files, folders, globs, lists and videos.

    Args:
        paths: See ``sources.expand``.
        model: A checkpoint's name (see ``checkpoints.load.load_detector``), loaded while the first
            pictures are decoded; or a detector.
        options: How to judge.
        recursive: Enter sub-folders.

    Yields:
        One record an item, in order. A bad item is a record with another status than ``ok``.

    Raises:
        M2F2Error: Nothing to judge, a wrong option, or an unusable model.
    """
    sources = expand(paths, recursive=recursive)
    yield from judge_sources(sources, model=model, options=options or DetectOptions())


def judge_sources(
    sources: Sequence[Source], *, model: str | Judge, options: DetectOptions
) -> Iterator[Detection]:
    """``detect`` for sources already listed; arguments and records as there."""
    renderer = Renderer(options.heatmap, options.annotate, sources)
    with Decoder(sources, options, keep="judged" if renderer.draws else "nothing") as decoder:
        detector = load(model, options)
        renderer.check(detector.config)
        scorer = Scorer(detector, maps=options.heatmap is not None)
        settings = settings_of(model, detector, options)
        for item in judge(decoder, scorer, options=options, settings=settings):
            if item is not None:
                yield renderer.draw(item)


def load(model: str | Judge, options: DetectOptions) -> Judge:
    """The detector behind a name, or the detector itself."""
    if not isinstance(model, str):
        return model
    from m2f2cli.checkpoints.load import load_detector
    from m2f2cli.inference.optimize_cpu import optimize_for_cpu

    detector: Judge = optimize_for_cpu(
        load_detector(model, device=options.device, dtype=options.dtype)
    )
    return detector


def settings_of(model: str | Judge, detector: Judge, options: DetectOptions) -> Settings:
    """What the verdicts of a run depend on, as every record tells it.

    Args:
        model: As the user named or gave it.
        detector: The same, loaded.
        options: How to judge.
    """
    rule = rule_of(detector, options)
    finds = options.faces != "none"
    crops = CropRule.of(detector.config, finds_faces=finds)
    return Settings(
        model=model if isinstance(model, str) else type(detector).__name__,
        model_fingerprint=detector.fingerprint,
        dtype=str(detector.dtype).removeprefix("torch."),
        threshold=rule.threshold,
        uncertain=rule.uncertain,
        temperature=float(detector.config.score_temperature),
        faces_mode=options.faces,
        crop_detector="dlib" if finds else None,
        crop_margin=crops.margin if finds else None,
        frames_asked=options.frames,
    )


def rule_of(detector: Judge, options: DetectOptions) -> Rule:
    """The verdict rule of a run with a loaded detector."""
    config = detector.config
    chosen = options.threshold if options.threshold is not None else config.threshold
    band = config.uncertain if options.uncertain == "checkpoint" else options.uncertain
    return Rule(
        0.5 if chosen is None else float(chosen),
        (float(band[0]), float(band[1])) if band else None,
        float(config.domain["limit"]) if config.domain else None,
    )


class Judge(Protocol):
    """What the pipeline asks of a detector; ``models.detector.Detector`` is one."""

    config: Any
    fingerprint: str | None

    @property
    def device(self) -> torch.device:
        """Where its weights are."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""

    def __call__(self, pixel_values: torch.Tensor) -> Any:
        """Give ``logits`` and ``forgery_map`` of (B, 3, S, S) pictures."""

    def fake_probability(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, 2), order (real, fake), to (B,) float32 in [0, 1]."""


class Score(NamedTuple):
    """What the model says of one crop.

    Attributes:
        fake_probability: In [0, 1], rounded to ``verdict.DIGITS``.
        domain_distance: 0 or more, rounded alike; None where it has no check.
        forgery_map: float32 (g, g), cosines in [-1, 1]; None when absent or not asked for.
        features: What an explainer's language model is shown of the crop, as
            ``models.explainer.PictureFeatures`` of one picture; None without one.
    """

    fake_probability: float
    domain_distance: float | None = None
    forgery_map: np.ndarray | None = None
    features: Any = None


class Scorer:
    """Scores crops with a detector, alone or inside an explainer.

    Args:
        detector: In evaluation mode.
        explainer: The ``models.explainer.Explainer`` that it belongs to; None for none.
        maps: Keep the forgery maps, where the detector has one.
    """

    def __init__(self, detector: Judge, *, explainer: Any = None, maps: bool = False) -> None:
        self.detector = detector
        self.explainer = explainer
        self.maps = maps

    def crop_rule(self, options: DetectOptions) -> CropRule:
        """How the model wants its crops."""
        pads = self.explainer is not None and self.explainer.config.image_aspect == "pad"
        finds = options.faces != "none"
        return CropRule.of(self.detector.config, finds_faces=finds, pads=pads)

    def score(self, crops: Sequence[Crop]) -> list[Score]:
        """Judge crops; a GPU takes them in one batch.

        Args:
            crops: At least one, all of the model's input size.

        Raises:
            M2F2Error: The model answers with something that is no number.
        """
        import torch

        at_once = AT_ONCE_ON_CPU if self.detector.device.type == "cpu" else len(crops)
        scores: list[Score] = []
        # Features go on into a generation, which inference mode would forbid.
        with torch.inference_mode() if self.explainer is None else torch.no_grad():
            for first in range(0, len(crops), at_once):
                some = crops[first : first + at_once]
                seen = self._look(some)
                chances = self.detector.fake_probability(seen.logits).tolist()
                maps: Iterable[np.ndarray | None] = [None] * len(some)
                if self.maps and seen.forgery_map is not None:
                    maps = seen.forgery_map.float().cpu().numpy()
                for row, (crop, chance, where) in enumerate(zip(some, chances, maps, strict=True)):
                    features = None if self.explainer is None else seen.rows(row, row + 1)
                    scores.append(_score(crop, chance, where, features))
        return scores

    def _look(self, crops: Sequence[Crop]) -> Any:
        """Logits, forgery maps and, of an explainer, features of some crops."""
        center = self._pixels([crop.pixels for crop in crops])
        if self.explainer is None:
            return self.detector(pixel_values=center)
        if all(crop.padded is None for crop in crops):
            return self.explainer.encode_pictures(center)
        whole = [crop.pixels if crop.padded is None else crop.padded for crop in crops]
        return self.explainer.encode_pictures(self._pixels(whole), center)

    def _pixels(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        import torch

        config = self.detector.config
        values = [normalize(pixels, config.image_mean, config.image_std) for pixels in pictures]
        tensor = torch.from_numpy(np.stack(values))
        return tensor.to(self.detector.device, self.detector.dtype)


def _score(crop: Crop, chance: float, forgery_map: np.ndarray | None, features: Any) -> Score:
    """A model's answer, checked and rounded."""
    if not 0 <= chance <= 1:
        raise M2F2Error(
            "The model's answer is not a number.", "Try --dtype float32 or another model."
        )
    if forgery_map is not None and crop.turn:
        forgery_map = np.rot90(forgery_map, -crop.turn)  # as the picture is
    distance = crop.domain_distance
    rounded = None if distance is None else round(distance, DIGITS)
    return Score(round(chance, DIGITS), rounded, forgery_map, features)


def in_batches(
    items: Iterable[tuple[T, Mapping[Key, Work]] | None],
    run: Callable[[Mapping[Key, Work]], Sequence[Result]],
    *,
    size: int,
    rows: Callable[[Key], int] = lambda key: 1,
    remember: int = _REMEMBERED,
    reduce: Callable[[Result], Result] = lambda result: result,
) -> Iterator[tuple[T, dict[Key, Result]] | None]:
    """Run the work of successive items in batches, equal work once, and give items back in order.

    A batch runs when it is full; when its first work has waited ``PATIENCE`` seconds, or when twice
    as many items wait as a batch has rows, so that items without work never pile up behind it.

    Args:
        items: Items, each with its work by key; None says that the next one takes its time.
        run: Gives the results of a batch, in order.
        size: Rows of a batch.
        rows: Rows that a piece of work has.
        remember: How many results are kept for another appearance of their key.
        reduce: What is kept of a result for that.

    Yields:
        Each item with its results; and every None.
    """
    known: OrderedDict[Key, Result] = OrderedDict()
    waiting: deque[tuple[T, dict[Key, Result | None]]] = deque()
    batch: dict[Key, Work] = {}
    held, since = 0, 0.0  # rows of the batch, and when it got its first

    def flush() -> None:
        nonlocal held
        if not batch:
            return
        done = dict(zip(batch, run(batch), strict=True))
        batch.clear()
        held = 0
        for _, found in waiting:
            found.update((key, done[key]) for key in found.keys() & done.keys())
        known.update((key, reduce(result)) for key, result in done.items())
        while len(known) > remember:
            known.popitem(last=False)

    def completed() -> Iterator[tuple[T, dict[Key, Result]]]:
        while waiting and all(result is not None for result in waiting[0][1].values()):
            item, found = waiting.popleft()
            yield item, {key: result for key, result in found.items() if result is not None}

    for entry in items:
        if entry is not None:
            item, work = entry
            found = {key: known.get(key) for key in work}
            waiting.append((item, found))
            for key, what in work.items():
                if found[key] is not None or key in batch:
                    continue
                if held + rows(key) > size:
                    flush()
                since = since if batch else time.monotonic()
                batch[key] = what
                held += rows(key)
                if held >= size:
                    flush()
        if len(waiting) > _BACKLOG * size or time.monotonic() - since > PATIENCE:
            flush()
        yield from completed()
        if entry is None:
            yield None
    flush()
    yield from completed()


@dataclass(frozen=True)
class Judged:
    """An item with its verdict, and all that is needed to draw and to explain it.

    Attributes:
        record: As ``m2f2 detect`` gives it.
        prepared: The item as read, with its crops.
        scores: By the crops' digests.
    """

    record: Detection
    prepared: Prepared
    scores: Mapping[bytes, Score]

    def crop(self, box: Box, frame: int | None = None) -> Crop:
        """The crop at a place of the picture, or of one frame of a video."""
        views = self.prepared.views
        here = [view for view in views if frame is None or view.index == frame]
        return next(crop for view in here for crop in view.crops if crop.crop == box)

    def reduced(self) -> Judged:
        """The same without kept pixels and features, to be kept for long."""
        views = tuple(replace(view, pixels=None) for view in self.prepared.views)
        scores = {digest: _without_features(score) for digest, score in self.scores.items()}
        return replace(self, prepared=replace(self.prepared, views=views), scores=scores)


def _without_features(score: Score) -> Score:
    return score._replace(features=None)


def judge(
    decoder: Decoder, scorer: Scorer, *, options: DetectOptions, settings: Settings
) -> Iterator[Judged | None]:
    """Judge every item of a decoder, in order.

    Args:
        decoder: The items.
        scorer: The model.
        options: How to judge.
        settings: What the records say of the run.

    Yields:
        Each item; None whenever the next one takes its time.
    """
    rule = rule_of(scorer.detector, options)
    crops = (
        None
        if prepared is None
        else (prepared, {c.digest: c for view in prepared.views for c in view.crops})
        for prepared in decoder.prepared(scorer.crop_rule(options))
    )
    for entry in in_batches(
        crops,
        lambda batch: scorer.score(list(batch.values())),
        size=options.batch_size,
        reduce=_without_features,
    ):
        if entry is None:
            yield None
            continue
        prepared, scores = entry
        yield Judged(assemble(prepared, scores, rule, settings), prepared, scores)


def detect_job(
    paths: Sequence[str],
    *,
    options: DetectOptions,
    model: str | Judge = "lite",
    recursive: bool = False,
    output: Path | None = None,
    overwrite: bool = False,
) -> Job[Detection]:
    """Everything one run of ``m2f2 detect`` does; arguments as for ``detect`` and ``Job``."""
    return Job(
        expand(paths, recursive=recursive),
        run=lambda left: judge_sources(left, model=model, options=options),
        settings=lambda: settings_of(model, load(model, options), options),
        output=output,
        overwrite=overwrite,
    )


def judge_and_record(
    sources: Sequence[Source],
    *,
    model: str | Judge,
    options: DetectOptions,
    log: RecordFile | None,
    tally: Tally,
) -> Iterator[Detection]:
    """Judge, record and yield every source that has no record yet, in order.

    Args:
        sources: Every item; told apart by ``path``.
        model: A checkpoint's name, or a detector.
        options: How to judge.
        log: Where records are and go; opened, and closed by the caller. None keeps no records.
        tally: Counts every item, those recorded earlier first.

    Raises:
        M2F2Error: The records were made with other settings, the model cannot be loaded, or the
            disk refuses.
    """
    return record_new(
        sources,
        run=lambda left: judge_sources(left, model=model, options=options),
        settings=lambda: settings_of(model, load(model, options), options),
        log=log,
        tally=tally,
    )
