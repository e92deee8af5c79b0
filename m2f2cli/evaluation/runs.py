"""Run a detector over a labelled set, and find the part of a set that a figure may be taken from.

What is written are the records of ``m2f2 detect``, one a picture or frame, with the name inside the
data set as ``path``: a file of predictions that fits the data wherever it lies.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from m2f2cli.checkpoints import io
from m2f2cli.data.clips import FrameReader
from m2f2cli.data.images import Picture, read_picture
from m2f2cli.data.samples import SampleSet, read_samples, split_by_identity
from m2f2cli.errors import InputError, UsageError
from m2f2cli.evaluation.truth import Item, Truth
from m2f2cli.inference.pipeline import DetectPipeline, judge_sources
from m2f2cli.inference.recordfile import RecordFile, Tally, record_new
from m2f2cli.inference.sources import Source
from m2f2cli.options.detect import DetectOptions

if TYPE_CHECKING:
    from m2f2cli.models.detector import Detector

SPLITS = ("all", "train", "validation", "test")
_COMPARED = 64  # records of a resumed file whose pictures are looked at again


def score_set(
    samples: SampleSet,
    *,
    model: str | Detector,
    output: Path,
    options: DetectOptions | None = None,
    overwrite: bool = False,
    advance: Callable[[], object] | None = None,
) -> Tally:
    """Judge every picture, or evenly spaced frames of every video, into a file of records.

    Run again to resume: what has a record is left out. A picture that cannot be read becomes a
    record with its status, and the run goes on.

    Args:
        samples: Pictures, or videos in HDF5 files; of each video ``options.frames`` frames are read
            one by one, evenly spaced, each an item of its own (``Deepfakes/000_003/17``).
        model: As for ``detect``.
        output: The ``.jsonl`` file.
        options: How to judge; by default every picture is a crop (``faces="none"``).
        overwrite: Replace ``output`` instead of resuming it.
        advance: Called after each new record.

    Returns:
        How many items came out how, those of an earlier run included.

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
    """The items of a set for the detecting pipeline.

    Args:
        samples: Pictures, or videos in HDF5 files.
        reader: Reads the frames; it must stay open while the sources are used.
        frames: Of each video, evenly spaced.
    """
    found = []
    for item in samples.samples:
        if item.clip is None:
            found.append(_source(item.name, partial(read_picture, item.path)))
            continue
        for index in item.spread(frames):
            read = partial(_frame, reader, item.path, item.clip, index)
            found.append(_source(item.frame_name(index), read))
    return found


def _source(name: str, read: Callable[[], Picture]) -> Source:
    return Source(name, "image", PurePosixPath(name), read)


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
    digests = _digests(log.path) if log.done else {}
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


def _digests(file: Path) -> dict[str, str]:
    """The sha256 of every judged picture of a record file, by name; a cut last line is left out."""
    rows = (json.loads(line) for line in file.read_bytes().split(b"\n")[:-1])
    return {row["path"]: row["sha256"] for row in rows if row.get("sha256")}


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
    options = _cut_of(stage, model, split)
    people = identities or (Path(options["identities"]) if options.get("identities") else None)
    whole = read_samples(data, people)
    parts = split_by_identity(whole, float(options["validation-share"]), int(options["split-seed"]))
    chosen = dict(zip(("train", "validation"), parts, strict=True))[split]
    if stage["data"][split].get("fingerprint") != chosen.fingerprint():
        raise InputError(
            f"'{data}' is not what '{model}' was trained on: its {split} part has another "
            f"fingerprint than stage.json records.",
            hint="Give the folder it was trained with, unchanged; for other data use --split all.",
        )
    return chosen


def _cut_of(stage: Mapping[str, Any], model: Path, split: str) -> Mapping[str, Any]:
    """The training options that decide a model's cut."""
    options = stage.get("options", {})
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
    checked: Mapping[str, Any] = options
    return checked


def truth_of(samples: SampleSet, options: DetectOptions, split: str = "all") -> Truth:
    """What is true of the items that ``score_set`` writes for a set, by the same names.

    Args:
        samples: Pictures, or videos in HDF5 files.
        options: Says how many frames of a video.
        split: As the report shall call it; a test set is called ``test`` whatever is said here.
    """
    marked = "test" if is_test_set(samples, split) else split
    if samples.layout == "ffpp":
        items = [
            Item(clip.frame_name(index), clip.label, clip.kind, clip.name)
            for clip in samples.samples
            for index in clip.spread(options.frames)
        ]
        return Truth("ffpp", tuple(items), marked)
    dataset = "ddvqa" if samples.layout == "ddvqa" else "images"
    pictures = [Item(s.name, s.label, s.kind, s.name, file=s.path) for s in samples.samples]
    return Truth(dataset, tuple(pictures), marked)


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
