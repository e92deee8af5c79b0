"""The rows that verbs write and read: one JSON object an item. Standard library only."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from m2f2cli.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self

SCHEMA_VERSION = 1

STATUSES: Mapping[str, str] = {
    "ok": "judged",
    "no_face": "read, but no face was found in it",
    "missing": "there is no such file",
    "unreadable": "the file cannot be opened or decoded",
    "empty": "the file has no bytes",
    "not_an_image": "the content is of no supported picture format",
    "truncated": "the file ends too early",
    "too_large": "more pixels than are decoded",
    "no_frames": "a video without a single decodable frame",
}
VERDICTS = ("real", "fake", "uncertain")

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class FaceScore:
    """One judged crop of a picture.

    Attributes:
        box: (x0, y0, x1, y1) of the face as found, pixels of the upright picture; None when the
            whole picture was taken as the crop. It may reach beyond the picture.
        crop: (x0, y0, x1, y1) of what was judged, same pixels.
        fake_probability: In [0, 1].
        verdict: One of ``VERDICTS``.
        reason: Why the verdict is uncertain; None otherwise.
        in_domain: Whether the crop resembles the training crops; None where the model has no check.
        domain_distance: What ``in_domain`` was decided by, 0 or more; None as above.
        finder_score: The face finder's confidence; None without a box.
        forgery: The kind of forgery; None unless it is fake and the model tells kinds apart there.
    """

    box: Box | None
    crop: Box
    fake_probability: float
    verdict: str
    reason: str | None = None
    in_domain: bool | None = None
    domain_distance: float | None = None
    finder_score: float | None = None
    forgery: str | None = None


@dataclass(frozen=True)
class FrameScore:
    """One sampled frame of a video, represented by the face that decides it.

    Attributes:
        index: Number of the frame, from 0.
        time: Seconds from the start.
        faces_found: Faces in the frame.
        fake_probability: In [0, 1]; None when the frame shows no face, like what follows.
        crop: (x0, y0, x1, y1) judged.
        in_domain: As in ``FaceScore``, like ``domain_distance`` and ``forgery``.
    """

    index: int
    time: float
    faces_found: int
    fake_probability: float | None = None
    crop: Box | None = None
    in_domain: bool | None = None
    domain_distance: float | None = None
    forgery: str | None = None


@dataclass(frozen=True)
class Settings:
    """What a run's verdicts depend on besides the inputs; part of every record.

    Attributes:
        model: The model as the user named it.
        model_fingerprint: ``sha256:…`` of its configuration and tensors.
        dtype: Arithmetic of the network, such as ``float32``.
        threshold: Fake probability from which the verdict is fake, in [0, 1].
        uncertain: (low, high): probabilities in it give the verdict uncertain; None for no band.
        temperature: What the logits were divided by.
        faces_mode: ``auto``, ``all``, ``largest`` or ``none``.
        crop_detector: The face finder; None with ``faces_mode`` none.
        crop_margin: Share of the face box's side added around it; None as above.
        frames_asked: Frames sampled from each video.
    """

    model: str
    model_fingerprint: str | None
    dtype: str
    threshold: float
    uncertain: tuple[float, float] | None
    temperature: float
    faces_mode: str
    crop_detector: str | None
    crop_margin: float | None
    frames_asked: int


@dataclass(frozen=True)
class Detection:
    """The record of one item, a picture or a video. See ``docs/detect.md`` for every key.

    Attributes:
        path: As given, or found under the given folder.
        kind: ``image`` or ``video``.
        status: A key of ``STATUSES``.
        settings: Written flat into the record.
        message: Why there is no verdict; None when ``status`` is ok.
        note: What to know about how the file was read; None mostly.
        sha256: Of the file's bytes; None when they could not be read.
        width, height: Of the upright picture or frame, pixels; None when not decoded.
        verdict: One of ``VERDICTS``; None unless ``status`` is ok.
        fake_probability: In [0, 1]: of the face that decides, for a video the mean over frames with
            a face; None as above.
        reason: Why the verdict is uncertain; None otherwise.
        in_domain: Of the face that decides; for a video, of at least half the frames.
        domain_distance: Of the face that decides; for a video the mean.
        forgery: The kind of forgery of the face that decides; for a fake video, of more than half
            of the frames with a named kind; None as in ``FaceScore``.
        crop: Of the face that decides; None for videos.
        crop_source: ``face`` (found) or ``picture`` (taken whole); None for videos.
        faces_found: Faces found in the picture; in a video, in the frame that has most.
        faces: Judged crops, the one that decides first; empty for videos.
        frames: Sampled frames in order; empty for pictures.
        heatmap, annotated: Files that map and boxes were drawn into, if any.
    """

    path: str
    kind: str
    status: str
    settings: Settings
    message: str | None = None
    note: str | None = None
    sha256: str | None = None
    width: int | None = None
    height: int | None = None
    verdict: str | None = None
    fake_probability: float | None = None
    reason: str | None = None
    in_domain: bool | None = None
    domain_distance: float | None = None
    forgery: str | None = None
    crop: Box | None = None
    crop_source: str | None = None
    faces_found: int | None = None
    faces: tuple[FaceScore, ...] = ()
    frames: tuple[FrameScore, ...] = ()
    heatmap: str | None = None
    annotated: str | None = None

    SETTINGS: ClassVar[type[Settings]] = Settings
    PARTS: ClassVar[Mapping[str, type[Any]]] = {"faces": FaceScore, "frames": FrameScore}

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values, ``settings`` flattened, every key always present."""
        row: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
        for item in fields(self):
            value = getattr(self, item.name)
            row |= plain(value) if item.name == "settings" else {item.name: _json(value)}
        return row

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """Read a record back.

        Raises:
            InputError: It has another schema version, lacks a key or has an unknown one.
        """
        if row.get("schema_version") != SCHEMA_VERSION:
            raise InputError(
                f"A record has schema version {row.get('schema_version')}, not {SCHEMA_VERSION}.",
                hint="Read it with the m2f2 version that wrote it.",
            )
        own = {k: v for k, v in row.items() if k != "schema_version"}
        settings = {f.name: own.pop(f.name, None) for f in fields(cls.SETTINGS)}
        try:
            own["settings"] = cls.SETTINGS(**{k: _tuple(v) for k, v in settings.items()})
            for name, kind in cls.PARTS.items():
                own[name] = tuple(_part(kind, part) for part in own.get(name, ()))
            own["crop"] = _tuple(own.get("crop"))
            return cls(**own)
        except (TypeError, AttributeError) as error:
            raise InputError(f"A record is malformed: {error}.") from error


@dataclass(frozen=True)
class ExplainSettings(Settings):
    """What the words of a run depend on besides the inputs; part of every record.

    Attributes:
        template: The conversation template the model is asked in.
        condition: What questions tell the model about the face: ``detector``, ``none``, ``truth``.
        questions: What is asked besides the judgement, in order, before ``condition`` is applied;
            of a data set the ``sha256:…`` of its file.
        max_new_tokens: Longest answer.
        sampling: ``{"temperature", "top_p", "seed"}``; None takes the likeliest word each time.
        quantised: ``4bit`` or ``8bit`` for the language model's layers; None for neither.
    """

    template: str
    condition: str
    questions: tuple[str, ...]
    max_new_tokens: int
    sampling: Mapping[str, float] | None = None
    quantised: str | None = None


@dataclass(frozen=True)
class Answer:
    """What the language model said to one question.

    Attributes:
        region: A region of ``m2f2 explain --region``; None for a question of the user's own.
        question: As it was asked, without placeholders and template.
        complete: Whether it ended by itself, not at ``max_new_tokens``.
    """

    region: str | None
    question: str
    text: str
    complete: bool


@dataclass(frozen=True)
class FaceExplanation:
    """What detector and language model say of one face.

    Attributes:
        crop: (x0, y0, x1, y1) of the face, as in ``FaceScore`` or ``FrameScore``.
        frame: Number of the video's frame; None for pictures.
        fake_probability: The detector's, in [0, 1].
        verdict: The detector's, one of ``VERDICTS``.
        told: What the questions said of the face, ``real`` or ``fake``; None when nothing.
        judgement: The language model's own, ``real`` or ``fake``, read from ``judgement_text``;
            None when it says neither.
        judgement_text: Its answer to the question whether the picture is real, which tells nothing.
        agreement: Whether ``judgement`` is ``verdict``; None when either is undecided.
        reasons: The answers to the other questions, in order.
    """

    crop: Box
    frame: int | None
    fake_probability: float
    verdict: str
    told: str | None
    judgement: str | None
    judgement_text: str
    agreement: bool | None
    reasons: tuple[Answer, ...] = ()


@dataclass(frozen=True)
class Explanation(Detection):
    """The record of one explained item: that of a detection, and the words.

    Attributes:
        judgement: Of the first explanation; None without one.
        agreement: Whether ``judgement`` is the item's verdict; None when either is undecided.
        explanations: One a judged face of a picture, the one that decides first; of a video one,
            of the frame with the highest fake probability.
    """

    judgement: str | None = None
    agreement: bool | None = None
    explanations: tuple[FaceExplanation, ...] = ()

    SETTINGS: ClassVar[type[Settings]] = ExplainSettings
    PARTS: ClassVar[Mapping[str, type[Any]]] = {
        **Detection.PARTS,
        "explanations": FaceExplanation,
    }


def agree(judgement: str | None, verdict: str | None) -> bool | None:
    """Whether the language model's judgement is the detector's verdict; None if undecided."""
    if judgement is None or verdict not in ("real", "fake"):
        return None
    return judgement == verdict


def plain(part: Any) -> dict[str, Any]:
    """The fields of one of the classes above as JSON values."""
    return {item.name: _json(getattr(part, item.name)) for item in fields(part)}


def _json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_json(item) for item in value]
    return plain(value) if is_dataclass(value) else value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _part(kind: type[Any], row: Mapping[str, Any]) -> Any:
    values = {k: _tuple(v) for k, v in row.items()}
    if kind is FaceExplanation:
        values["reasons"] = tuple(_part(Answer, answer) for answer in values.get("reasons", ()))
    return kind(**values)


def to_line(row: Mapping[str, Any]) -> bytes:
    """One JSON line; names that are no valid Unicode are escaped, so any path survives."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(row, allow_nan=False).encode() + b"\n"


def read_text(path: Path) -> str:
    """The whole of a UTF-8 file.

    Raises:
        InputError: It is missing, empty or no text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"There is no file '{path}'.", "missing", "Check the path.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is not a text file (UTF-8).") from error
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}.") from error
    if not text.strip():
        raise InputError(f"'{path}' is empty.", "empty")
    return text


CSV_COLUMNS = (
    "path", "kind", "status", "verdict", "fake_probability", "forgery", "reason", "message",
    "in_domain", "domain_distance", "faces_found", "crop", "crop_source", "width", "height",
    "sha256", "threshold", "model", "model_fingerprint", "schema_version",
)  # fmt: skip


def to_csv(records: Iterable[Detection]) -> str:
    """One row an item, columns ``CSV_COLUMNS``, RFC 4180.

    A path that a spreadsheet would read as a formula gets ``./`` in front, the same file.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore")
    writer.writeheader()
    for record in records:
        row = record.to_dict()
        if row["path"].startswith(("=", "+", "-", "@", "\t", "\r")):
            row["path"] = "./" + row["path"]
        if row["crop"] is not None:
            row["crop"] = " ".join(map(str, row["crop"]))
        writer.writerow(row)
    return text.getvalue()
