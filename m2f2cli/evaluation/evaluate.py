"""``m2f2 evaluate``: a data set is judged if need be, the answers are measured and reported.

What judging writes are the records of ``m2f2 detect``, one a picture or frame, with the name inside
the data set as ``path``: a file of predictions that fits the data wherever it lies. Answers that
exist are measured without torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from m2f2cli.checkpoints import io
from m2f2cli.data.clips import FrameReader
from m2f2cli.data.images import Picture, read_picture
from m2f2cli.data.samples import SampleSet, read_samples, split_by_identity
from m2f2cli.errors import InputError, UsageError
from m2f2cli.evaluation import report as reports
from m2f2cli.evaluation.predictions import Predictions, read_predictions
from m2f2cli.evaluation.protocols import paper, standard
from m2f2cli.evaluation.truth import (
    Item,
    Joined,
    Truth,
    ddvqa_truth,
    file_truth,
    frames_truth,
    join,
    read_crops,
)
from m2f2cli.inference.pipeline import DetectPipeline, judge_sources
from m2f2cli.inference.recordfile import RecordFile, Tally, record_new
from m2f2cli.inference.sources import Source
from m2f2cli.options.detect import DetectOptions
from m2f2cli.options.evaluate import (
    DdvqaData,
    EvaluateOptions,
    ImagesData,
    MeasureOptions,
)
from m2f2cli.runtime import Advance, Progress, no_progress

if TYPE_CHECKING:
    from m2f2cli.evaluation.calibrate import Calibration
    from m2f2cli.evaluation.robustness import Sweep
    from m2f2cli.models.detector import Detector

RECORDS = "predictions.jsonl"
SPLITS = ("all", "train", "validation", "test")
_COMPARED = 64  # records of a resumed file whose pictures are looked at again


class Evaluation(NamedTuple):
    """What came of an evaluation."""

    report: dict[str, Any]  # of report.build_report
    scored: Joined  # the joined items
    tripped: tuple[str, ...] = ()  # the gates that tripped, a sentence each
    calibration: Calibration | None = None  # what calibrate stored
    sweep: Sweep | None = None  # what robustness measured

    @property
    def unanswered(self) -> int:
        """Items without an answer: missing from the predictions, or not to be judged."""
        return len(self.scored.missing) + int(self.report["counts"].get("failed", 0))


def evaluate(options: EvaluateOptions, progress: Progress = no_progress) -> Evaluation:
    """Judge a data set if need be, measure the answers, and write the report.

    Raises:
        M2F2Error: Something named is missing or broken, predictions and truth do not fit, a file
            cannot be written, or the report's extra is not installed.
    """
    subject = read_subject(options)
    with progress("Judging", subject.steps) as advance:
        return measure(subject, advance)


class Subject(NamedTuple):
    """What is measured; all that is named is there and fits, before any work."""

    options: MeasureOptions  # how
    detect: DetectOptions  # how a model judges
    expectation: reports.Expectation | None  # what the figures should be
    samples: SampleSet | None  # what the model is to judge; None with predictions
    truth: Truth | None  # none where only the predictions tell

    @property
    def steps(self) -> int:
        """How many pictures are to be judged."""
        return 0 if self.samples is None else count_items(self.samples, self.detect)


def read_subject(options: MeasureOptions) -> Subject:
    """Read and check everything that options name but the predictions.

    Raises:
        M2F2Error: Something named is missing or broken, or the report's extra is not installed.
    """
    expectation = reports.read_expectation(options.expected) if options.expected else None
    if options.report is not None:
        from m2f2cli.evaluation import page  # noqa: F401 - tells now that matplotlib is missing

        reports.check_folder(options.report)
    samples = _to_judge(options) if options.predictions is None else None
    detect = DetectOptions(
        faces=options.faces,
        batch_size=options.batch_size,
        frames=_frames(options, samples),
        device=options.device,
        dtype=options.dtype,
    )
    if samples is None:
        return Subject(options, detect, expectation, None, None)
    truth = read_truth(options, detect, samples, None)
    return Subject(options, detect, expectation, samples, truth)


def _to_judge(options: MeasureOptions) -> SampleSet:
    """The pictures or videos that a model is to judge: no videos where no faces are looked for.

    Raises:
        UsageError: Then nothing would be left.
    """
    samples = read_set(options)
    pictures = samples.without_videos()
    if options.faces != "none" or len(pictures) == len(samples):
        return samples
    if {sample.label for sample in pictures.samples} == {0, 1}:
        left_out = f"{len(samples) - len(pictures)} videos in '{samples.root}'"
        return replace(pictures, remark="; ".join(filter(None, [pictures.remark, left_out])))
    raise UsageError(
        f"'{samples.root}' holds videos, in which faces have to be found.",
        "Add --faces auto; or cut the faces out first, with m2f2 prepare faces.",
    )


def _frames(options: MeasureOptions, samples: SampleSet | None) -> int:
    """How many frames of a video are judged; 1 where there are none."""
    if isinstance(options.data, DdvqaData):
        return 1
    if samples is None or any(sample.is_video or sample.clip for sample in samples.samples):
        return options.data.frames
    return 1


def read_set(options: MeasureOptions) -> SampleSet:
    """The pictures or videos of a data set's split."""
    data = options.data
    if isinstance(data, DdvqaData):
        return read_crops(data.data or Path(), data.split)
    folder = data.folder or Path()
    if isinstance(data, ImagesData):
        if data.split not in ("train", "validation"):
            return read_split(folder, data.split)
        from m2f2cli.checkpoints.hub import resolve_checkpoint

        return read_split(folder, data.split, model=resolve_checkpoint(options.model))
    from m2f2cli.data.readers.ffpp import read_ffpp

    return read_ffpp(
        folder,
        compression=data.compression,
        manipulations=data.manipulations,
        split=data.split,
        splits=data.splits,
    )


def read_truth(
    options: MeasureOptions,
    detect: DetectOptions,
    samples: SampleSet | None,
    predictions: Predictions | None,
) -> Truth:
    """What is true: from ``--truth``, else from the data, else from the answers themselves.

    ``predictions`` are None before a model has judged.

    Raises:
        UsageError: Nothing was named that tells.
        InputError: It cannot be read.
    """
    data, file = options.data, options.truth
    if isinstance(data, DdvqaData):
        # The published figures take the labels from the paths of the answers.
        as_published = options.protocol == "paper" and not (file or data.data)
        return ddvqa_truth(
            task=predictions.task if predictions else "scores",
            file=file,
            data=data.data,
            predictions=predictions,
            from_names=data.truth_from_names or as_published,
            split=data.split,
        )
    dataset = "images" if isinstance(data, ImagesData) else "ffpp"
    if file is not None:
        return file_truth(file, dataset=dataset, split=data.split)
    if data.folder is not None:
        return truth_of(samples or read_set(options), detect, data.split)
    if predictions is not None and predictions.layout == "frames":
        return frames_truth(predictions)
    raise UsageError(
        "Nothing was named that says which frames are real.",
        "Add the folder of HDF5 files, or --truth FILE.jsonl.",
    )


def measure(subject: Subject, advance: Advance) -> Evaluation:
    """Judge if need be, measure, and write the report.

    Raises:
        M2F2Error: Predictions and truth do not fit, or a file cannot be written.
    """
    options, folder = subject.options, subject.options.report
    kept = options.predictions or options.output or (folder and folder / RECORDS)
    with ExitStack() as stack:
        file = kept or Path(stack.enter_context(TemporaryDirectory(prefix="m2f2-"))) / RECORDS
        if subject.samples is not None:
            score_set(
                subject.samples,
                model=options.model,
                output=file,
                options=subject.detect,
                overwrite=options.overwrite,
                advance=advance,
            )
        predictions = read_predictions(file)
        truth = subject.truth or read_truth(options, subject.detect, None, predictions)
        scored = join(truth, predictions)
        if options.protocol == "paper":
            measures = paper(scored)
        else:
            measures = standard(scored, resamples=options.resamples, seed=options.seed)
        report = reports.build_report(scored, measures, predictions=file)
    if not kept:
        report["predictions"]["file"] = None
    if folder is not None:
        from m2f2cli.evaluation.page import render_page

        reports.write_report(folder, report, scored, render_page(report, scored))
    tripped = reports.tripped(
        report,
        subject.expectation,
        min_auc=options.min_auc,
        min_accuracy=options.min_accuracy,
    )
    return Evaluation(report, scored, tuple(tripped))


def score_set(
    samples: SampleSet,
    *,
    model: str | Detector,
    output: Path,
    options: DetectOptions | None = None,
    overwrite: bool = False,
    advance: Advance | None = None,
) -> Tally:
    """Judge every picture, or evenly spaced frames of every video, into a file of records.

    Run again to resume: what has a record is left out. A picture that cannot be read becomes a
    record with its status, and the run goes on.

    Args:
        samples: Pictures, video files, or videos in HDF5 files; of each of the latter
            ``options.frames`` frames are read one by one, evenly spaced, each an item of its own
            (``Deepfakes/000_003/17``).
        model: As for ``detect``.
        output: The ``.jsonl`` file.
        options: How to judge; by default every picture is a crop (``faces="none"``).
        overwrite: Replace ``output`` instead of resuming it.
        advance: Called after each new record.

    Raises:
        UsageError: ``output`` holds records of another model, other settings or other data.
        M2F2Error: The model cannot be loaded, or the disk refuses.
    """
    chosen = options or DetectOptions(faces="none")
    tally = Tally()
    with FrameReader() as reader:
        sources = list_sources(samples, reader, frames=chosen.frames)
        with RecordFile(output, overwrite=overwrite) as log:
            check_same_data(log, sources)
            for _ in record_new(
                sources,
                run=partial(judge_sources, model=model, options=chosen),
                settings=lambda: DetectPipeline(model, chosen).settings,
                log=log,
                tally=tally,
            ):
                if advance is not None:
                    advance()
    return tally


def count_items(samples: SampleSet, options: DetectOptions) -> int:
    """How many records ``score_set`` writes for a set."""
    return sum(min(options.frames, sample.frames) for sample in samples.samples)


def list_sources(samples: SampleSet, reader: FrameReader, *, frames: int) -> list[Source]:
    """The items of a set, ``frames`` of each video; ``reader`` must outlive their use."""
    found: list[Source] = []
    reads: dict[str, Callable[[], Picture]] = {}
    for item in samples.samples:
        if item.is_video:
            found.append(Source(str(item.path), "video", PurePosixPath(item.name)))
        elif item.clip is None:
            reads[item.name] = partial(read_picture, item.path)
        else:
            for index in item.spread(frames):
                reads[item.frame_name(index)] = partial(_frame, reader, item.path, item.clip, index)
    found += (Source(name, "image", PurePosixPath(name), read) for name, read in reads.items())
    return found


def _frame(reader: FrameReader, file: Path, key: str, index: int) -> Picture:
    pixels = reader.frame(file, key, index)
    note = f"frame {index} of '{key}' in {file.name}; sha256 of its pixels"
    return Picture(pixels, sha256(pixels.tobytes()).hexdigest(), "HDF5", note)


def check_same_data(log: RecordFile, sources: list[Source]) -> None:
    """Refuse to resume records of other pictures: names must fit, and some contents too.

    Raises:
        UsageError: They do not.
    """
    known = {source.path: source for source in sources}
    hint = "Choose another --output, or add --overwrite to start anew."
    strange = [name for name in log.done if name not in known]
    if strange:
        raise UsageError(
            f"'{log.path}' has records of {len(strange)} pictures that are not in this data set, "
            f"'{strange[0]}' first.",
            hint,
        )
    # What follows the last line end is a cut record.
    lines = log.path.read_bytes().split(b"\n")[:-1] if log.done else []
    rows = map(json.loads, filter(bytes.strip, lines))
    digests = {row["path"]: row["sha256"] for row in rows if row.get("sha256")}
    for name in list(digests)[:: max(1, len(digests) // _COMPARED)]:
        try:
            now = known[name].picture().sha256
        except InputError:
            continue
        if now != digests[name]:
            raise UsageError(
                f"'{log.path}' has a record of '{name}' with another content: it was made from "
                f"other data, or the picture has changed.",
                hint,
            )


def read_split(
    data: str | Path, split: str, *, model: Path | None = None, identities: Path | None = None
) -> SampleSet:
    """Read the part of a set of pictures that a figure is to be taken from.

    Args:
        data: As for ``data.samples.read_samples``.
        split: ``all`` and ``test`` take every picture. ``train`` and ``validation`` repeat the cut
            between identities that a detector's training made, from what its ``stage.json`` says,
            and make sure that it is the same cut of the same pictures.
        model: The detector's folder, for these two.
        identities: The CSV file that the training was given as ``--identities``, if it was; by
            default the one its ``stage.json`` names.

    Raises:
        UsageError: An unknown split, or no model to ask for the cut.
        InputError: The data cannot be read, the model tells of no cut, or it was trained on other
            pictures.
    """
    if split not in SPLITS:
        raise UsageError(f"There is no split '{split}'.", f"Use one of: {', '.join(SPLITS)}.")
    if split in ("all", "test"):
        return read_samples(data, identities)
    if model is None:
        raise UsageError(
            f"--split {split} needs the model whose training made the cut.", "Add --model DIR."
        )
    stage = io.read_stage(model)
    options = _options_of_cut(stage, model, split)
    people = identities or (Path(options["identities"]) if options.get("identities") else None)
    whole = read_samples(data, people).without_videos()
    parts = split_by_identity(whole, float(options["validation-share"]), int(options["split-seed"]))
    chosen = parts[("train", "validation").index(split)]
    if stage["data"][split].get("fingerprint") != chosen.fingerprint():
        raise InputError(
            f"'{data}' is not what '{model}' was trained on: its {split} part has another "
            f"fingerprint than stage.json records.",
            hint="Give the folder it was trained with, unchanged; for other data use --split all.",
        )
    return chosen


def _options_of_cut(stage: Mapping[str, Any], model: Path, split: str) -> Mapping[str, Any]:
    """The training's options, if they decide its cut alone."""
    options: Mapping[str, Any] = stage.get("options", {})
    fault = None
    if "validation-share" not in options or not isinstance(stage.get("data"), dict):
        fault = "its stage.json tells of no training on pictures"
    elif options.get("validation") is not None:
        fault = f"it was measured on a folder of its own, {options['validation']}"
    elif isinstance(options.get("data"), list):
        fault = "it was trained on several folders"
    elif options.get("limit"):
        fault = f"its training used {options['limit']} pictures of each class, drawn by chance"
    if fault:
        raise InputError(
            f"The split '{split}' of '{model}' cannot be repeated: {fault}.",
            hint="Give the folder of those pictures, with --split all.",
        )
    return options


def truth_of(samples: SampleSet, options: DetectOptions, split: str = "all") -> Truth:
    """What is true of the items that ``score_set`` writes for a set, by the same names.

    Reports call the split as said here, but a test set ``test`` whatever is said.
    """
    marked = "test" if is_test_set(samples, split) else split
    items = []
    for one in samples.samples:
        if one.clip is None:
            items.append(Item(one.name, one.label, one.kind, one.name, file=one.path))
        else:
            names = (one.frame_name(index) for index in one.spread(options.frames))
            items += [Item(name, one.label, one.kind, one.name) for name in names]
    dataset = samples.layout if samples.layout in ("ffpp", "ddvqa") else "images"
    notes = (f"Left out: {samples.remark}.",) if samples.remark else ()
    return Truth(dataset, tuple(items), marked, notes=notes)


def is_test_set(samples: SampleSet, split: str = "all") -> bool:
    """Whether figures of a set are a test's, so that nothing may be tuned on it.

    A set is one when ``split`` says so, when it holds the official test videos of FaceForensics++
    (``split`` test, or files that are named ``_test_only``), or when its folder is called ``test``,
    as DD-VQA's ``images/c40/test`` is.
    """
    if split == "test" or samples.split == "test":
        return True
    if samples.layout == "ffpp":
        return any(clip.path.stem.endswith("_test_only") for clip in samples.samples)
    return samples.root.resolve().name.lower() == "test"
