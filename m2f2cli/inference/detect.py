"""Judge pictures and videos: decoding and face search in threads, crops in batches across items."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from m2f2cli.inference.assemble import assemble
from m2f2cli.inference.decoding import Decoder
from m2f2cli.inference.prepare import Crop, Prepared, Recipe
from m2f2cli.inference.render import Renderer
from m2f2cli.inference.scoring import Judge, Score, Scorer
from m2f2cli.inference.sources import Source, expand
from m2f2cli.inference.verdict import Rule
from m2f2cli.options.detect import DetectOptions
from m2f2cli.records import Detection, Settings


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
        model: A checkpoint's name (see ``models.loading.load_detector``), loaded while the first
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
    sources: Sequence[Source],
    *,
    model: str | Judge,
    options: DetectOptions,
) -> Iterator[Detection]:
    """``detect`` for sources already listed; arguments and records as there."""
    with Decoder(sources, faces=options.faces, frames=options.frames) as decoder:
        judge = load(model, options)
        run = _Run(judge, settings_of(model, judge, options), options, sources)
        recipe = Recipe.of(judge.config, finds_faces=options.faces != "none")
        for prepared in decoder.prepared(recipe, ahead=options.batch_size):
            yield from run.take(prepared)
        yield from run.finish()


def load(model: str | Judge, options: DetectOptions) -> Judge:
    """The detector behind a name, or the detector itself."""
    if not isinstance(model, str):
        return model
    from m2f2cli.checkpoints.load import load_detector
    from m2f2cli.inference.optimize_cpu import optimize_for_cpu

    judge: Judge = optimize_for_cpu(
        load_detector(model, device=options.device, dtype=options.dtype)
    )
    return judge


def settings_of(model: str | Judge, judge: Judge, options: DetectOptions) -> Settings:
    """What the verdicts of a run depend on, as every record tells it.

    Args:
        model: As the user named or gave it.
        judge: The same, loaded.
        options: How to judge.
    """
    rule = rule_of(judge, options)
    finds = options.faces != "none"
    recipe = Recipe.of(judge.config, finds_faces=finds)
    return Settings(
        model=model if isinstance(model, str) else type(judge).__name__,
        model_fingerprint=judge.fingerprint,
        dtype=str(judge.dtype).removeprefix("torch."),
        threshold=rule.threshold,
        uncertain=rule.uncertain,
        temperature=float(judge.config.score_temperature),
        faces_mode=options.faces,
        crop_detector="dlib" if finds else None,
        crop_margin=recipe.margin if finds else None,
        frames_asked=options.frames,
    )


def rule_of(model: Judge, options: DetectOptions) -> Rule:
    """The verdict rule of a run with a loaded detector."""
    config = model.config
    limit = float(config.domain["limit"]) if config.domain else None
    chosen = options.threshold if options.threshold is not None else config.threshold
    band = config.uncertain if options.uncertain == "checkpoint" else options.uncertain
    return Rule(
        0.5 if chosen is None else float(chosen),
        (float(band[0]), float(band[1])) if band else None,
        limit,
    )


_WAITING = 2  # batches' worth of items that wait for a batch to fill


@dataclass
class _Item:
    """A prepared source whose crops are being scored."""

    prepared: Prepared
    scores: dict[bytes, Score] = field(default_factory=dict)
    open: set[bytes] = field(default_factory=set)


class _Run:
    """Groups the crops of successive items into batches and gives items back in order."""

    def __init__(
        self, model: Judge, settings: Settings, options: DetectOptions, sources: Sequence[Source]
    ) -> None:
        self.settings = settings
        self.rule = rule_of(model, options)
        self.batch_size = options.batch_size
        self.renderer = Renderer(options.heatmap, options.annotate, sources)
        self.renderer.check(model.config)
        self.scorer = Scorer(model, maps=options.heatmap is not None)
        self.items: deque[_Item] = deque()
        self.batch: dict[bytes, Crop] = {}

    def take(self, prepared: Prepared) -> Iterator[Detection]:
        item = _Item(prepared)
        self.items.append(item)
        for view in prepared.views:
            for crop in view.crops:
                known = self.scorer.known(crop)
                if known is not None:
                    item.scores[crop.digest] = known
                else:
                    item.open.add(crop.digest)
                    self.batch[crop.digest] = crop
                    if len(self.batch) >= self.batch_size:
                        self._flush()
        # Items without new crops must not pile up behind a batch that they never fill.
        if len(self.items) > _WAITING * self.batch_size:
            self._flush()
        yield from self._completed()

    def finish(self) -> Iterator[Detection]:
        self._flush()
        yield from self._completed()

    def _flush(self) -> None:
        if not self.batch:
            return
        scores = dict(zip(self.batch, self.scorer.score(list(self.batch.values())), strict=True))
        self.batch = {}
        for item in self.items:
            for digest in item.open & scores.keys():
                item.scores[digest] = scores[digest]
            item.open -= scores.keys()

    def _completed(self) -> Iterator[Detection]:
        while self.items and not self.items[0].open:
            item = self.items.popleft()
            record = assemble(item.prepared, item.scores, self.rule, self.settings)
            yield self.renderer.draw(item.prepared, item.scores, record)
