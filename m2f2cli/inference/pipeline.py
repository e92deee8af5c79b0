"""From files to records: decode, find faces, crop, judge in batches, decide, record.

``detect``, ``explain``, ``evaluate`` and the page all call ``DetectPipeline.judge``. Decoding and
face search run in threads, ahead of the model and while it loads. Crops are batched across items;
records leave in the order of the items, as soon as they can. No torch at import.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from m2f2cli.data.faces import Crop, CropRule, find_faces, smallest_face
from m2f2cli.data.images import DECODE_ERRORS, sharing_memory
from m2f2cli.data.transforms import normalize
from m2f2cli.data.video import read_frames
from m2f2cli.errors import InputError, M2F2Error, UsageError
from m2f2cli.inference.recordfile import Job
from m2f2cli.inference.render import Renderer
from m2f2cli.inference.sources import Items, Source, expand
from m2f2cli.inference.verdict import DIGITS, Rule, assemble
from m2f2cli.options.detect import DetectOptions
from m2f2cli.records import Box, Detection, Explanation, Settings
from m2f2cli.runtime import processors

if TYPE_CHECKING:
    import torch

    from m2f2cli.models.detector import Detector

SHOWN_SIDE = 2048  # pixels; longest side of what is kept of a picture to be drawn on
PATIENCE = 2.0  # seconds that what is ready waits for more
AT_ONCE_ON_CPU = 4  # crops; the feature maps of more outgrow its cache
_BACKLOG = 2  # batches' worth of items that wait for a batch to fill
_REMEMBERED = 65_536  # crops whose scores are kept for another appearance
_MOST_WORKERS = 8
_SMALL = 40  # pixels; of smaller faces a crop shows little
_MOST_KEPT = 32  # items ahead of the model whose pixels are kept; 12 MB each at most
_FRAMES_AS_ONE = 16  # frames of a video whose crops take as much memory as a few pictures'

Keep = Literal["nothing", "judged", "everything"]

T = TypeVar("T")
Key = TypeVar("Key", bound=Hashable)
Work = TypeVar("Work")
Result = TypeVar("Result")


def detect(
    paths: Items,
    *,
    model: str | Detector = "lite",
    options: DetectOptions | None = None,
    recursive: bool = False,
) -> Iterator[Detection]:
    """Judge files, folders, globs, lists and videos.

    Args:
        paths: One or several names, Pillow images or arrays; see ``sources.expand``.
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
    sources: Sequence[Source], *, model: str | Detector, options: DetectOptions
) -> Iterator[Detection]:
    """``detect`` for sources already listed; arguments and records as there."""
    renderer = Renderer(options)
    with Decoder(sources, options, keep="judged" if renderer.draws else "nothing") as decoder:
        pipeline = DetectPipeline(model, options, maps=options.heatmap is not None)
        renderer.check(pipeline.detector.config)
        for item in pipeline.judge(decoder):
            if item is not None:
                yield renderer.draw(item)


def detect_job(
    paths: Sequence[str],
    *,
    options: DetectOptions,
    model: str | Detector = "lite",
    recursive: bool = False,
    output: Path | None = None,
    overwrite: bool = False,
) -> Job[Detection]:
    """Everything one run of ``m2f2 detect`` does; arguments as for ``detect`` and ``Job``."""
    return Job(
        expand(paths, recursive=recursive),
        run=lambda left: judge_sources(left, model=model, options=options),
        settings=lambda: DetectPipeline(model, options).settings,
        output=output,
        overwrite=overwrite,
    )


@dataclass(frozen=True)
class View:
    """A picture, or one frame of a video.

    Attributes:
        crops: What is to be judged in it.
        faces_found: Faces the finder saw, which may be more.
        index: Number of the frame, from 0.
        time: Seconds from the start of the video.
        pixels: uint8 (H, W, 3), RGB, to draw on, ``SHOWN_SIDE`` at most; None when not kept.
        scale: Kept pixels per pixel of the picture, in (0, 1].
    """

    crops: tuple[Crop, ...]
    faces_found: int
    index: int = 0
    time: float = 0.0
    pixels: np.ndarray | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Prepared:
    """A source, read; or the reason why it could not be.

    ``status``, ``message``, ``note`` and ``sha256`` are as in ``records.Detection``; ``size`` is
    (width, height) upright, in pixels. A picture has one view, a video one a frame.
    """

    source: Source
    status: str = "ok"
    message: str | None = None
    sha256: str | None = None
    size: tuple[int, int] | None = None
    views: tuple[View, ...] = ()
    note: str | None = None


def prepare(
    source: Source, options: DetectOptions, rule: Future[CropRule], *, keep: Keep = "nothing"
) -> Prepared:
    """Read a source and cut its crops. A bad file gives a status, never an exception.

    Args:
        source: A picture or a video.
        options: Which faces, and how many frames of a video.
        rule: Waited for after decoding and face search, which need no model.
        keep: Of which views pixels are kept to draw on: none, those with crops, or all.
    """
    try:
        with sharing_memory():
            return _read(source, options, rule, keep)
    except InputError as error:
        return Prepared(source, error.status, error.message)
    except DECODE_ERRORS as error:
        words = " ".join(str(error).split())[:200] or "no further words"
        message = f"'{source.path}' cannot be read: {type(error).__name__}, {words}."
        return Prepared(source, "unreadable", message)


def _read(source: Source, options: DetectOptions, rule: Future[CropRule], keep: Keep) -> Prepared:
    if source.kind == "image":
        picture = source.picture()
        view = _view(picture.pixels, options, rule, keep)
        notes = [picture.note] if picture.note else []
        if turn := max((crop.turn for crop in view.crops), default=0):
            notes.append(f"faces were found with the picture turned by {90 * turn} degrees")
        note = "; ".join(notes) or None
        found = Prepared(source, "ok", None, picture.sha256, picture.size, (view,), note)
        where = "the picture"
    else:
        views = []
        with read_frames(Path(source.path), count=options.frames) as video:
            for frame in video.frames:
                view = _view(frame.pixels, options, rule, keep)
                views.append(replace(view, index=frame.index, time=frame.time))
                height, width = frame.pixels.shape[:2]
            found = Prepared(
                source, "ok", None, video.sha256, (width, height), tuple(views), video.note
            )
        where = f"any of the {len(views)} frames looked at"
    if any(view.crops for view in found.views):
        return found
    seen = smallest_face(max(found.size or (1,)))
    smallest = min(seen, options.min_face or seen)
    message = f"No face was found in {where}; faces from {smallest} pixels on were looked for"
    hint = "" if smallest <= _SMALL else " (m2f2 detect --min-face looks for smaller ones)"
    return replace(found, status="no_face", message=f"{message}{hint}.")


def _view(pixels: np.ndarray, options: DetectOptions, rule: Future[CropRule], keep: Keep) -> View:
    found = [] if options.faces == "none" else find_faces(pixels, smallest=options.min_face)
    crops = rule.result().crops(pixels, found, options.faces)
    view = View(crops, len(found))
    if keep == "nothing" or (keep == "judged" and not crops):
        return view
    height, width = pixels.shape[:2]
    scale = min(1.0, SHOWN_SIDE / max(width, height))
    if scale < 1:
        small = Image.fromarray(pixels).resize((round(width * scale), round(height * scale)))
        pixels = np.asarray(small)
    return replace(view, pixels=pixels, scale=scale)


class Decoder:
    """Prepares sources in threads; the first from the moment it is made, while the model loads.

    Args:
        sources: The items.
        options: Which faces, and how many frames of a video.
        keep: As for ``prepare``; kept pixels limit how far it goes ahead.
    """

    def __init__(
        self, sources: Sequence[Source], options: DetectOptions, *, keep: Keep = "nothing"
    ) -> None:
        self._options, self._keep = options, keep
        self._left = iter(sources)
        self._rule: Future[CropRule] = Future()
        self._queue: deque[tuple[int, Future[Prepared]]] = deque()
        self._workers = min(_MOST_WORKERS, processors())
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="m2f2-decode")
        self._fill(self._workers)

    def _fill(self, size: int) -> None:
        """Begin further items until ``size`` are under way; a video with kept frames is many."""
        held = sum(weight for weight, _ in self._queue)
        frames = self._options.frames
        many = frames if self._keep != "nothing" else -(-frames // _FRAMES_AS_ONE)
        while held < size and (source := next(self._left, None)) is not None:
            weight = many if source.kind == "video" else 1
            future = self._pool.submit(prepare, source, self._options, self._rule, keep=self._keep)
            self._queue.append((weight, future))
            held += weight

    def prepared(self, rule: CropRule) -> Iterator[Prepared | None]:
        """Every source, read and cut, in order; None whenever the next takes over ``PATIENCE``."""
        self._rule.set_result(rule)
        ahead = self._options.batch_size
        if self._keep != "nothing":
            ahead = min(ahead, _MOST_KEPT)
        window = 2 * self._workers + ahead
        self._fill(window)
        while self._queue:
            future = self._queue[0][1]
            wait([future], timeout=PATIENCE)
            if not future.done():
                yield None
                continue
            self._queue.popleft()
            self._fill(window)
            yield future.result()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._rule.cancel()
        self._pool.shutdown(wait=kind is None, cancel_futures=True)


class Score(NamedTuple):
    """What the model says of one crop, rounded to ``verdict.DIGITS``.

    Attributes:
        fake_probability: In [0, 1].
        domain_distance: 0 or more; None where the model has no check.
        forgery_map: float32 (g, g), cosines in [-1, 1]; None when absent or not asked for.
        kind: The likeliest kind of forgery, and how far its logit leads the second, 0 or more; None
            of a model that does not tell two kinds apart.
    """

    fake_probability: float
    domain_distance: float | None = None
    forgery_map: np.ndarray | None = None
    kind: tuple[str, float] | None = None


@dataclass(frozen=True)
class Judged:
    """An item with its record, and all that is needed to draw and to explain it.

    ``scores`` are by the digests of the crops that ``prepared`` holds.
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
        """The same without pixels to draw on, to be kept for long."""
        views = tuple(replace(view, pixels=None) for view in self.prepared.views)
        return replace(self, prepared=replace(self.prepared, views=views))


class DetectPipeline:
    """A loaded detector with everything that is needed to judge items.

    Args:
        model: A checkpoint's name (see ``checkpoints.load.load_detector``), or a detector.
        options: How to judge.
        maps: Keep the forgery maps, where the detector has one.

    Attributes:
        name: Of the model, as records tell it.
        fingerprint: Of the model; None when it has none.
        detector: In evaluation mode.
        rule: Turns its scores into verdicts.
        crops: How it wants its crops.
        explains: Whether the model gives reasons.

    Raises:
        M2F2Error: The model is unusable.
    """

    explains = False

    def __init__(
        self, model: str | Detector, options: DetectOptions, *, maps: bool = False
    ) -> None:
        if isinstance(model, str):
            from m2f2cli.checkpoints.load import load_detector
            from m2f2cli.inference.optimize_cpu import optimize_for_cpu

            self.name = model
            self.detector: Detector = optimize_for_cpu(
                load_detector(model, device=options.device, dtype=options.dtype)
            )
        else:
            self.name, self.detector = type(model).__name__, model
        self.fingerprint = self.detector.fingerprint
        self.judging, self._maps = options, maps
        config = self.detector.config
        self.crops = CropRule.of(config, finds_faces=options.faces != "none")
        chosen = options.threshold if options.threshold is not None else config.threshold
        band = config.uncertain if options.uncertain == "checkpoint" else options.uncertain
        self.rule = Rule(
            0.5 if chosen is None else float(chosen),
            (float(band[0]), float(band[1])) if band else None,
            float(config.domain["limit"]) if config.domain else None,
            config.kind_margin,
        )

    @property
    def settings(self) -> Settings:
        """What the verdicts of a run depend on, as every record tells it."""
        finds = self.judging.faces != "none"
        smallest = self.judging.min_face
        finder = "dlib" if smallest is None else f"dlib, from {smallest} pixels on"
        return Settings(
            model=self.name,
            model_fingerprint=self.fingerprint,
            dtype=str(self.detector.dtype).removeprefix("torch."),
            threshold=self.rule.threshold,
            uncertain=self.rule.uncertain,
            temperature=float(self.detector.config.score_temperature),
            faces_mode=self.judging.faces,
            crop_detector=finder if finds else None,
            crop_margin=self.crops.margin if finds else None,
            frames_asked=self.judging.frames,
        )

    def judge(self, decoder: Decoder) -> Iterator[Judged | None]:
        """Judge every item of a decoder, in order.

        Yields:
            Each item as soon as its verdict is known; None whenever the next one takes its time.
        """
        settings = self.settings
        items = (
            None if found is None else (found, {c.digest: c for v in found.views for c in v.crops})
            for found in decoder.prepared(self.crops)
        )
        for entry in in_batches(items, self.score, size=self.judging.batch_size):
            if entry is None:
                yield None
                continue
            prepared, scores = entry
            yield Judged(assemble(prepared, scores, self.rule, settings), prepared, scores)

    def judge_one(self, source: Source) -> Judged:
        """Judge one item; its views keep their pixels to be drawn on."""
        with Decoder([source], self.judging, keep="everything") as decoder:
            return next(item for item in self.judge(decoder) if item is not None)

    def explain(self, *asked: Any, **how: Any) -> Explanation:
        """See ``ExplainPipeline.explain``; a detector alone raises ``UsageError``."""
        raise UsageError(
            "This model is a detector, which judges without words.",
            "Name an explainer with --model.",
        )

    def score(self, crops: Sequence[Crop]) -> list[Score]:
        """Judge crops of the model's input size; a GPU takes them in one batch.

        Raises:
            M2F2Error: The model answers with something that is no number.
        """
        at_once = AT_ONCE_ON_CPU if self.detector.device.type == "cpu" else len(crops)
        scores: list[Score] = []
        for first in range(0, len(crops), at_once):
            some = crops[first : first + at_once]
            seen = self._look(some)
            chances = self.detector.fake_probability(seen.logits).tolist()
            maps: Iterable[np.ndarray | None] = [None] * len(some)
            if self._maps and seen.forgery_map is not None:
                found = seen.forgery_map.float().cpu().numpy()
                # As the picture is, where the crop was turned.
                maps = [np.rot90(m, -crop.turn) for m, crop in zip(found, some, strict=True)]
            kinds: Iterable[tuple[str, float] | None] = [None] * len(some)
            if (logits := getattr(seen, "kind_logits", None)) is not None:
                kinds = self.detector.leading_kinds(logits)
            for crop, chance, where, kind in zip(some, chances, maps, kinds, strict=True):
                if not 0 <= chance <= 1:
                    raise M2F2Error(
                        "The model's answer is not a number.",
                        "Try --dtype float32 or another model.",
                    )
                distance = crop.domain_distance
                rounded = None if distance is None else round(distance, DIGITS)
                kind = kind and (kind[0], round(kind[1], DIGITS))
                scores.append(Score(round(chance, DIGITS), rounded, where, kind))
        return scores

    def _look(self, crops: Sequence[Crop]) -> Any:
        """What the model gives for some crops: at least ``logits`` and ``forgery_map``."""
        import torch

        with torch.inference_mode():
            return self.detector(pixel_values=self._pixels([crop.pixels for crop in crops]))

    def _pixels(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        """uint8 (S, S, 3) each to (N, 3, S, S), ready for the detector."""
        import torch

        config = self.detector.config
        values = [normalize(pixels, config.image_mean, config.image_std) for pixels in pictures]
        tensor = torch.from_numpy(np.stack(values))
        return tensor.to(self.detector.device, self.detector.dtype)


def in_batches(
    items: Iterable[tuple[T, Mapping[Key, Work]] | None],
    run: Callable[[list[Work]], Sequence[Result]],
    *,
    size: int,
    rows: Callable[[Key], int] = lambda key: 1,
    remember: int = _REMEMBERED,
) -> Iterator[tuple[T, dict[Key, Result]] | None]:
    """Run the work of successive items in batches, equal work once, and give items back in order.

    A batch runs when it is full; when its first work has waited ``PATIENCE`` seconds, or when twice
    as many items wait as a batch has rows, so that items without work never pile up behind it.

    Args:
        items: Items, each with its work by key; None says that the next one takes its time.
        run: Gives the results of a batch, in order.
        size: Rows of a batch.
        rows: How many of them the work of a key takes.
        remember: How many results are kept for another appearance of their key.

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
        done = dict(zip(batch, run(list(batch.values())), strict=True))
        batch.clear()
        held = 0
        for _, found in waiting:
            found.update((key, done[key]) for key in found.keys() & done.keys())
        known.update(done)
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
