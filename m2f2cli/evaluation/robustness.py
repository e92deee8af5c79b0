"""How a detector's figures fall as pictures get worse: every corruption at every severity.

Pictures are decoded once, corrupted in memory and judged as ``m2f2 detect`` judges them. Each
condition has its own file of records, so a killed sweep goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2f2cli.data.clips import FrameReader
from m2f2cli.data.corruptions import CORRUPTIONS, SEVERITIES, find_corruption
from m2f2cli.data.images import Picture
from m2f2cli.data.samples import SampleSet
from m2f2cli.environment import library_versions
from m2f2cli.errors import InputError, MissingExtraError, UsageError
from m2f2cli.evaluation.predictions import read_predictions
from m2f2cli.evaluation.protocols import Figure, standard
from m2f2cli.evaluation.report import read_json
from m2f2cli.evaluation.runs import check_same_data, count_items, list_sources, truth_of
from m2f2cli.evaluation.truth import Joined, Truth, fingerprint, join
from m2f2cli.files import atomic_write, json_bytes
from m2f2cli.inference.pipeline import DetectPipeline, judge_sources
from m2f2cli.inference.recordfile import RecordFile
from m2f2cli.inference.sources import Source
from m2f2cli.metrics import LEVEL, RESAMPLES, SEED
from m2f2cli.options.detect import DetectOptions
from m2f2cli.records import Settings

if TYPE_CHECKING:
    from m2f2cli.models.detector import Detector

SCHEMA_VERSION, KIND = 1, "robustness"
REPORT, PLOT, RECORDS, PLAN = "robustness.json", "robustness.svg", "records", "plan.json"
CLEAN = ("none", 0)
_CHUNK = 16  # pictures that are decoded and then taken through all conditions

Condition = tuple[str, int]


@dataclass(frozen=True)
class SweepOptions:
    """What is swept and how it is measured.

    Attributes:
        corruptions: Names in ``data.corruptions.CORRUPTIONS``.
        split: What the set is, as reports call it.
        resamples: Of the bootstrap; 0 for no metrics.
        seed: Of the bootstrap.
        level: Of the metrics.
    """

    corruptions: tuple[str, ...] = tuple(CORRUPTIONS)
    split: str = "all"
    resamples: int = RESAMPLES
    seed: int = SEED
    level: float = LEVEL

    def conditions(self) -> list[Condition]:
        """Untouched pictures first, then each corruption from mild to severe."""
        corrupted = [
            (find_corruption(name).name, s) for name in self.corruptions for s in SEVERITIES
        ]
        return [CLEAN, *dict.fromkeys(corrupted)]


@dataclass(frozen=True)
class Row:
    """One condition's figures.

    Attributes:
        corruption: Its name; ``none`` for untouched pictures.
        severity: 1 to 5; 0 for untouched pictures.
        value: The corruption's number at that severity; None as above.
        auc: Area under the ROC curve over pictures or frames.
        accuracy: At the stored threshold; a picture without an answer counts as wrong.
        uncertain: Share of the judged whose verdict is uncertain; None if none was judged.
        in_domain: Share that resembles the training pictures; None without a domain check.
        judged: How many have a probability.
        failed: How many have none.
    """

    corruption: str
    severity: int
    value: float | None
    auc: Figure
    accuracy: Figure
    uncertain: float | None
    in_domain: float | None
    judged: int
    failed: int


@dataclass(frozen=True)
class Sweep:
    """A finished sweep.

    Attributes:
        rows: One a condition, untouched pictures first.
        clean: The untouched pictures' answers with their truth.
        options: How it was measured.
        folder: Where its files are.
        notes: What to know about it.
    """

    rows: tuple[Row, ...]
    clean: Joined
    options: SweepOptions
    folder: Path
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The content of ``robustness.json``; ``docs/robustness.md`` describes the schema."""
        labels = [item.label for item in self.clean.items]
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "versions": library_versions(),
            "model": {
                "name": self.clean.model,
                "fingerprint": self.clean.model_fingerprint,
                "threshold": self.clean.threshold,
            },
            "data": {
                "dataset": self.clean.dataset,
                "split": self.clean.split,
                "fingerprint": self.clean.data_fingerprint,
                "real": labels.count(0),
                "fake": labels.count(1),
            },
            "interval": {
                "resamples": self.options.resamples,
                "seed": self.options.seed,
                "level": self.options.level,
            },
            "corruptions": _definitions(self.options.corruptions),
            "rows": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
        }

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Headings and rows for people; a heading that ends in ``>`` is aligned to the right."""
        heads = (
            "Corruption", "Severity>", "Value>", "AUC>", "Interval>", "Accuracy>", "Uncertain>",
            "In domain>", "Failed>",
        )  # fmt: skip
        return heads, [
            (
                row.corruption,
                str(row.severity) if row.severity else "",
                "" if row.value is None else f"{row.value:.3g}",
                "-" if row.auc.value is None else f"{row.auc.value:.3f}",
                "-" if row.auc.low is None else f"{row.auc.low:.3f} to {row.auc.high:.3f}",
                "-" if row.accuracy.value is None else f"{row.accuracy.value:.3f}",
                _percent(row.uncertain),
                _percent(row.in_domain),
                str(row.failed),
            )
            for row in self.rows
        ]


def sweep(
    samples: SampleSet,
    *,
    model: str | Detector,
    folder: Path,
    options: SweepOptions | None = None,
    detect: DetectOptions | None = None,
    advance: Callable[[], object] | None = None,
) -> Sweep:
    """Judge a set under every corruption, measure it, and write table, plot and records.

    Run again to resume: what has a record is not judged again. A picture that cannot be read is a
    record with its status in every condition.

    Args:
        samples: Pictures, or videos in HDF5 files (``detect.frames`` of each).
        model: As for ``detect``.
        folder: Gets ``robustness.json``, ``robustness.svg`` and ``records/``, one file a condition.
        options: What is swept.
        detect: How to judge; by default every picture is a crop.
        advance: Called after each new record; see ``count_records``.

    Raises:
        UsageError: ``folder`` holds a sweep of other data, another model or other settings.
        ConfigError: A corruption is unknown.
        M2F2Error: The model cannot be loaded, or the disk refuses.
    """
    options, detect = options or SweepOptions(), detect or DetectOptions(faces="none")
    conditions = options.conditions()
    truth = truth_of(samples, detect, options.split)
    _claim(folder, truth)
    with FrameReader() as reader, ExitStack() as stack:
        logs = {c: stack.enter_context(RecordFile(_records(folder, c))) for c in conditions}
        pictures = list_sources(samples, reader, frames=detect.frames)
        check_same_data(logs[CLEAN], pictures)
        work = [
            (condition, source)
            for condition, source in _corrupted(pictures, conditions)
            if source.path not in logs[condition].done
        ]
        if not work:
            _bind(logs, DetectPipeline(model, detect).settings)
        records = judge_sources([s for _, s in work], model=model, options=detect) if work else ()
        for (condition, _), record in zip(work, records, strict=True):
            _bind(logs, record.settings)  # the first record does; all must be of these settings
            logs[condition].append(record)
            if advance is not None:
                advance()
    return _finish(folder, truth, options)


def count_records(samples: SampleSet, options: SweepOptions, detect: DetectOptions) -> int:
    """How many records a whole sweep has."""
    return len(options.conditions()) * count_items(samples, detect)


def _corrupted(
    pictures: Sequence[Source], conditions: Sequence[Condition]
) -> Iterator[tuple[Condition, Source]]:
    """Every picture under every condition, a few at a time so that each is decoded once."""

    @lru_cache(maxsize=2 * _CHUNK)
    def decoded(number: int) -> Picture:
        return pictures[number].picture()

    def corrupt(number: int, condition: Condition) -> Picture:
        picture = decoded(number)
        if condition == CLEAN:
            return picture
        name, severity = condition
        pixels = CORRUPTIONS[name].apply(picture.pixels, severity, picture.sha256)
        return replace(picture, pixels=pixels, note=f"{name}, severity {severity}")

    for start in range(0, len(pictures), _CHUNK):
        for condition in conditions:
            for number in range(start, min(start + _CHUNK, len(pictures))):
                yield (
                    condition,
                    replace(pictures[number], read=partial(corrupt, number, condition)),
                )


def _bind(logs: Mapping[Condition, RecordFile], settings: Settings) -> None:
    """Make every file writable, or refuse because one was made with other settings."""
    for log in logs.values():
        log.bind(settings)


def _records(folder: Path, condition: Condition) -> Path:
    name, severity = condition
    return folder / RECORDS / f"{name}-{severity}.jsonl"


def _definitions(names: Sequence[str]) -> dict[str, Any]:
    return {
        name: {
            "parameter": CORRUPTIONS[name].parameter,
            "values": list(CORRUPTIONS[name].values),
            "source": CORRUPTIONS[name].source,
        }
        for name in names
    }


def _claim(folder: Path, truth: Truth) -> None:
    """Note what a folder's records are of, or make sure that they are of the same."""
    plan = {
        "schema_version": SCHEMA_VERSION,
        "data": fingerprint(truth.items),
        "corruptions": _definitions(tuple(CORRUPTIONS)),
    }
    file = folder / PLAN
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"'{folder}' is a file, not a folder.", "Choose another folder.")
    try:
        found = read_json(file) if file.exists() else None
    except InputError:
        found = {}
    if found is None:
        if folder.is_dir() and any(folder.iterdir()):
            raise UsageError(
                f"'{folder}' is not empty and holds no sweep.", "Choose another folder."
            )
        atomic_write(file, json_bytes(plan))
    elif found != plan:
        raise UsageError(
            f"'{folder}' holds a sweep of other data or other severities.", "Choose another folder."
        )


def _finish(folder: Path, truth: Truth, options: SweepOptions) -> Sweep:
    """Measure the records of a whole sweep and write what is made of them."""
    answers = {c: join(truth, read_predictions(_records(folder, c))) for c in options.conditions()}
    rows = tuple(_row(condition, scored, options) for condition, scored in answers.items())
    found = Sweep(rows, answers[CLEAN], options, folder)
    try:
        from m2f2cli.evaluation.plots import sweep_curves

        atomic_write(folder / PLOT, sweep_curves(found.rows))
    except MissingExtraError as error:
        found = replace(found, notes=(f"No plot: {error.message} {error.hint}",))
    atomic_write(folder / REPORT, json_bytes(found.to_dict()))
    return found


def _row(condition: Condition, scored: Joined, options: SweepOptions) -> Row:
    name, severity = condition
    measures = standard(scored, resamples=options.resamples, seed=options.seed, level=options.level)
    judged = [item for item in scored.items if item.fake_probability is not None]
    inside = [item.in_domain for item in judged if item.in_domain is not None]
    return Row(
        corruption=name,
        severity=severity,
        value=CORRUPTIONS[name].value(severity) if severity else None,
        auc=measures.figures["frame_auc"],
        accuracy=measures.figures["accuracy"],
        uncertain=_share([item.verdict == "uncertain" for item in judged]),
        in_domain=_share(inside),
        judged=len(judged),
        failed=len(scored.items) - len(judged),
    )


def _share(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
