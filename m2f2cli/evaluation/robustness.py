"""``m2f2 robustness``: how a detector's figures fall as pictures get worse.

Pictures are decoded once, corrupted in memory and judged as ``m2f2 detect`` judges them, under
every corruption at every severity and after every chain. Each condition has its own file of
records, so a killed sweep goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from m2f2cli.data.clips import FrameReader
from m2f2cli.data.corruptions import GROUPS, find_corruptions
from m2f2cli.data.images import Picture
from m2f2cli.data.samples import SampleSet
from m2f2cli.environment import library_versions
from m2f2cli.errors import InputError, MissingExtraError, UsageError
from m2f2cli.evaluation.evaluate import (
    Evaluation,
    check_same_data,
    list_sources,
    measure,
    read_subject,
    truth_of,
)
from m2f2cli.evaluation.predictions import read_predictions
from m2f2cli.evaluation.protocols import Figure, standard
from m2f2cli.evaluation.report import read_object
from m2f2cli.evaluation.truth import Joined, Truth, fingerprint, join
from m2f2cli.files import atomic_write, json_bytes
from m2f2cli.inference.pipeline import DetectPipeline, judge_sources
from m2f2cli.inference.recordfile import RecordFile
from m2f2cli.inference.sources import Source
from m2f2cli.metrics import LEVEL, RESAMPLES, SEED, wilson_interval
from m2f2cli.options.detect import DetectOptions
from m2f2cli.options.evaluate import RobustnessOptions
from m2f2cli.runtime import Progress, no_progress

if TYPE_CHECKING:
    from m2f2cli.models.detector import Detector

SCHEMA_VERSION, KIND = 1, "robustness"
REPORT, PLOT, RECORDS, PLAN = "robustness.json", "robustness.svg", "records", "plan.json"
CLEAN = ("none", 0)
_CHUNK = 16  # pictures that are decoded and then taken through all conditions

Condition = tuple[str, int]


def robustness(options: RobustnessOptions, progress: Progress = no_progress) -> Evaluation:
    """Measure and report a set as ``evaluate`` does, and under every corruption.

    Raises:
        M2F2Error: As from ``evaluate`` and ``sweep``.
    """
    subject = read_subject(options)
    if subject.samples is None or subject.truth is None:
        raise UsageError("Corrupted pictures are judged by a model, not measured by predictions.")
    whole = subject.steps * (1 + len(conditions(options.corruptions)))
    with progress("Judging", whole) as advance:
        found = measure(subject, advance)
        swept = sweep(
            subject.samples,
            model=options.model,
            folder=options.robustness_dir or Path(options.report or "") / "robustness",
            corruptions=options.corruptions,
            split=subject.truth.split,
            resamples=options.resamples,
            seed=options.seed,
            detect=subject.detect,
            advance=advance,
        )
    return found._replace(sweep=swept)


def conditions(corruptions: Sequence[str]) -> list[Condition]:
    """Untouched pictures first, then each corruption from mild to severe.

    Raises:
        ConfigError: A corruption is unknown.
    """
    found = find_corruptions(corruptions).items()
    return [CLEAN, *((name, n) for name, one in found for n in range(1, 1 + len(one.values)))]


@dataclass(frozen=True)
class Row:
    """One condition's figures."""

    corruption: str  # its name; none for untouched pictures
    severity: int  # from 1 on; 0 for untouched pictures
    value: float | None  # the corruption's number at that severity; None as above
    auc: Figure  # area under the ROC curve over pictures or frames
    accuracy: Figure  # at the stored threshold; a picture without an answer counts as wrong
    # Share of the judged whose verdict is uncertain; None if none was judged
    uncertain: float | None
    # Share that resembles the training pictures; None without a domain check
    in_domain: float | None
    # Share whose verdict went from real to fake or back, of those with one here and untouched
    flipped: Figure
    now_uncertain: Figure  # share of the same that was decided untouched and is uncertain here
    judged: int  # how many have a probability
    failed: int  # how many have none


class Sweep(NamedTuple):
    """A finished sweep."""

    rows: tuple[Row, ...]  # one a condition, untouched pictures first
    notes: tuple[str, ...] = ()  # what to know about it

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Headings and rows for people; a heading that ends in ``>`` is aligned to the right."""
        heads = (
            "Corruption", "Severity>", "Value>", "AUC>", "Interval>", "Accuracy>", "Flipped>",
            "Interval>", "Now uncertain>", "Interval>", "Uncertain>", "In domain>", "Failed>",
        )  # fmt: skip
        return heads, [
            (
                row.corruption,
                str(row.severity) if row.severity else "",
                "" if row.value is None else f"{row.value:.3g}",
                *_cells(row.auc),
                *_cells(row.accuracy)[:1],
                *_cells(row.flipped),
                *_cells(row.now_uncertain),
                "-" if row.uncertain is None else f"{row.uncertain:.0%}",
                "-" if row.in_domain is None else f"{row.in_domain:.0%}",
                str(row.failed),
            )
            for row in self.rows
        ]


def _cells(figure: Figure) -> tuple[str, str]:
    value = "-" if figure.value is None else f"{figure.value:.3f}"
    return value, "-" if figure.low is None else f"{figure.low:.3f} to {figure.high:.3f}"


def sweep(
    samples: SampleSet,
    *,
    model: str | Detector,
    folder: Path,
    corruptions: Sequence[str] = tuple(GROUPS),
    split: str = "all",
    detect: DetectOptions | None = None,
    advance: Callable[[], object] | None = None,
    **bootstrap: Any,
) -> Sweep:
    """Judge a set under every corruption, measure it, and write table, plot and records.

    Run again to resume: what has a record is not judged again. A picture that cannot be read is a
    record with its status in every condition.

    Args:
        samples: Pictures, or videos in HDF5 files (``detect.frames`` of each).
        model: As for ``detect``.
        folder: Gets ``robustness.json``, ``robustness.svg`` and ``records/``, one file a condition.
        corruptions: As for ``data.corruptions.find_corruptions``; all by default.
        split: What the set is, as reports call it.
        detect: How to judge; by default every picture is a crop.
        advance: Called after each new record: of each picture in each of ``conditions``.
        **bootstrap: ``resamples`` and ``seed``, as of ``protocols.standard``.

    Raises:
        UsageError: ``folder`` holds a sweep of other data, another model or other settings.
        ConfigError: A corruption is unknown.
        M2F2Error: The model cannot be loaded, or the disk refuses.
    """
    detect = detect or DetectOptions(faces="none")
    every = conditions(corruptions)
    if any(sample.is_video for sample in samples.samples):
        raise UsageError(
            f"'{samples.root}' holds videos; crops of faces are what is corrupted.",
            f"m2f2 prepare faces '{samples.root}' --output CROPS, then measure CROPS.",
        )
    truth = truth_of(samples, detect, split)
    _claim(folder, truth)
    with FrameReader() as reader, ExitStack() as stack:
        logs = {c: stack.enter_context(RecordFile(_records(folder, c))) for c in every}
        pictures = list_sources(samples, reader, frames=detect.frames)
        check_same_data(logs[CLEAN], pictures)
        work = [
            (condition, source)
            for condition, source in _corrupted(pictures, every)
            if source.path not in logs[condition].done
        ]
        # Every file becomes writable, or is refused because it was made with other settings.
        if not work:
            settings = DetectPipeline(model, detect).settings
            for log in logs.values():
                log.bind(settings)
        records = judge_sources([s for _, s in work], model=model, options=detect) if work else ()
        for (condition, _), record in zip(work, records, strict=True):
            for log in logs.values():
                log.bind(record.settings)
            logs[condition].append(record)
            if advance is not None:
                advance()
    answers = {c: join(truth, read_predictions(_records(folder, c))) for c in every}
    rows = tuple(_row(c, scored, answers[CLEAN], bootstrap) for c, scored in answers.items())
    found = Sweep(rows)
    try:
        from m2f2cli.evaluation.page import sweep_curves

        if any(row.severity > 1 for row in rows):  # chains have one severity, which is no curve
            atomic_write(folder / PLOT, sweep_curves(rows))
    except MissingExtraError as error:
        found = Sweep(rows, (f"No plot: {error.message} {error.hint}",))
    interval = {"resamples": RESAMPLES, "seed": SEED, "level": LEVEL} | bootstrap
    report = _report(found, answers[CLEAN], interval, corruptions)
    atomic_write(folder / REPORT, json_bytes(report))
    return found


def _corrupted(
    pictures: Sequence[Source], every: Sequence[Condition]
) -> Iterator[tuple[Condition, Source]]:
    """Every picture under every condition, a few at a time so that each is decoded once."""
    every_one = find_corruptions(GROUPS)

    @lru_cache(maxsize=2 * _CHUNK)
    def decoded(number: int) -> Picture:
        return pictures[number].picture()

    def corrupt(number: int, condition: Condition) -> Picture:
        picture = decoded(number)
        if condition == CLEAN:
            return picture
        name, severity = condition
        pixels = every_one[name].apply(picture.pixels, severity, picture.sha256)
        return replace(picture, pixels=pixels, note=f"{name}, severity {severity}")

    for start in range(0, len(pictures), _CHUNK):
        for condition in every:
            for number in range(start, min(start + _CHUNK, len(pictures))):
                read = partial(corrupt, number, condition)
                yield condition, replace(pictures[number], read=read)


def _records(folder: Path, condition: Condition) -> Path:
    name, severity = condition
    return folder / RECORDS / f"{name}-{severity}.jsonl"


def _definitions(names: Iterable[str]) -> dict[str, Any]:
    return {
        name: {"parameter": one.parameter, "values": list(one.values), "source": one.source}
        for name, one in find_corruptions(names).items()
    }


def _claim(folder: Path, truth: Truth) -> None:
    """Note what a folder's records are of, or make sure that they are of the same."""
    plan: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "data": fingerprint(truth.items),
        "corruptions": _definitions(GROUPS),
    }
    file = folder / PLAN
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"'{folder}' is a file, not a folder.", "Choose another folder.")
    if not file.exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise UsageError(
                f"'{folder}' is not empty and holds no sweep.", "Choose another folder."
            )
        atomic_write(file, json_bytes(plan))
        return
    try:
        found: Mapping[str, Any] = read_object(file)
    except InputError:
        found = {}
    known = found.get("corruptions")
    if isinstance(known, dict):  # of an older version, which knew fewer
        found = {**found, "corruptions": plan["corruptions"] | known}
    if found != plan:
        raise UsageError(
            f"'{folder}' holds a sweep of other data or other severities.", "Choose another folder."
        )
    if known != plan["corruptions"]:
        atomic_write(file, json_bytes(plan))


def _row(condition: Condition, scored: Joined, clean: Joined, bootstrap: Mapping[str, Any]) -> Row:
    name, severity = condition
    value = find_corruptions([name])[name].value(severity) if severity else None
    pairs = list(zip(clean.items, scored.items, strict=True))
    kept = [(old, new) for old, new in pairs if old.verdict and new.verdict]
    decided = [(old, new) for old, new in kept if old.verdict != "uncertain"]
    flips = [old for old, new in decided if {old.verdict, new.verdict} == {"real", "fake"}]
    lost = [old for old, new in decided if new.verdict == "uncertain"]
    groups = len({old.group for old, _ in kept})
    figures = standard(scored, **bootstrap).figures
    judged = [item for item in scored.items if item.fake_probability is not None]
    return Row(
        corruption=name,
        severity=severity,
        value=value,
        auc=figures["frame_auc"],
        accuracy=figures["accuracy"],
        uncertain=_share([item.verdict == "uncertain" for item in judged]),
        in_domain=_share([item.in_domain for item in judged if item.in_domain is not None]),
        flipped=_part(len(flips), len(kept), groups),
        now_uncertain=_part(len(lost), len(kept), groups),
        judged=len(judged),
        failed=len(scored.items) - len(judged),
    )


def _part(hits: int, total: int, groups: int) -> Figure:
    """A share with Wilson's interval, for as many independent trials as there are groups."""
    if not total:
        return Figure(None, note="no picture has a verdict both untouched and here")
    return Figure(hits / total, *wilson_interval(hits / total * groups, groups))


def _share(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None


def _report(
    found: Sweep, clean: Joined, interval: Mapping[str, Any], corruptions: Sequence[str]
) -> dict[str, Any]:
    """The content of ``robustness.json``; ``docs/robustness.md`` describes the schema."""
    labels = [item.label for item in clean.items]
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "versions": library_versions(),
        "model": {
            "name": clean.model,
            "fingerprint": clean.model_fingerprint,
            "threshold": clean.threshold,
        },
        "data": {
            "dataset": clean.dataset,
            "split": clean.split,
            "fingerprint": clean.data_fingerprint,
            "real": labels.count(0),
            "fake": labels.count(1),
        },
        "interval": interval,
        "corruptions": _definitions(corruptions),
        "rows": [asdict(row) for row in found.rows],
        "notes": list(found.notes),
    }
