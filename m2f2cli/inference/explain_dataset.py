"""Answers to a file of DD-VQA questions, in the rows that the published system writes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from m2f2cli.data.conversations import stated_label
from m2f2cli.data.images import IMAGE_SUFFIXES
from m2f2cli.errors import InputError, UsageError
from m2f2cli.files import sha256_of
from m2f2cli.inference.explain import Answers, ExplainPipeline, Loaded, Request
from m2f2cli.inference.pipeline import Decoder
from m2f2cli.inference.questions import JUDGEMENT, Question, untold
from m2f2cli.inference.recordfile import Layout, RecordFile, open_records
from m2f2cli.inference.sources import Source
from m2f2cli.options.explain import ExplainOptions
from m2f2cli.records import SCHEMA_VERSION, Detection, ExplainSettings, plain, read_text

if TYPE_CHECKING:
    from m2f2cli.inference.pipeline import Judged

_SUFFIXES = (".jpg", *sorted(IMAGE_SUFFIXES - {".jpg"}))


class Row(NamedTuple):
    """One question of a file.

    Attributes:
        key: Its name, ``<picture>_<number>``; in a file of judgements the picture's path.
        picture: File name without suffix.
        question: As the file has it; None asks for the judgement.
    """

    key: str
    picture: str
    question: str | None


@dataclass(frozen=True)
class AnswerRow:
    """One answer, or the status and message why there is none; only answers go to a file.

    Attributes:
        path: The question's key, or for a judgement the picture.
        image: The picture, as the published files spell it.
        text: The answer between the tokenizer's marks.
        told: What the question says of the face, ``real`` or ``fake``; None when nothing.
    """

    path: str
    image: str
    status: str
    settings: ExplainSettings
    message: str | None = None
    prompt: str | None = None
    text: str | None = None
    fake_probability: float | None = None
    verdict: str | None = None
    told: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The published row; what is ours is in ``metadata``."""
        key = {} if self.path == self.image else {"key": self.path}
        about = {
            "schema_version": SCHEMA_VERSION,
            "status": self.status,
            "message": self.message,
            "fake_probability": self.fake_probability,
            "verdict": self.verdict,
            "told": self.told,
            **plain(self.settings),
        }
        words = {"image": self.image, "prompt": self.prompt, "text": self.text}
        return {**key, **words, "metadata": about}


@dataclass
class Count:
    """How many questions of a file are answered, by an earlier run, or lack their picture."""

    questions: int = 0
    answered: int = 0
    earlier: int = 0
    missing: int = 0

    def sentence(self) -> str:
        """The counts in words."""
        words = f"{self.answered} of {self.questions} questions answered"
        if self.earlier:
            words += f" ({self.earlier} of them earlier)"
        if self.missing:
            words += f"; {self.missing} without their picture"
        return words + "."


class DatasetJob:
    """Everything one run over a file of questions does, as an iterator of rows.

    Args:
        file: The questions, as ``read_questions`` takes them.
        images: The folder of the pictures, as the user spelled it.
        model: A checkpoint's name, or an explainer with its processor.
        options: How to ask; pictures are crops. ``judge`` asks one judgement a picture instead.
        output: A ``.jsonl`` file, which is resumed; or None.
        overwrite: Replace ``output`` instead.

    Attributes:
        count: What came out so far.

    Raises:
        M2F2Error: The file or the folder cannot be read, a question has no neutral form, or
            ``output`` cannot be used.
    """

    def __init__(
        self,
        file: Path,
        images: str,
        *,
        model: str | Loaded,
        options: ExplainOptions,
        output: Path | None = None,
        overwrite: bool = False,
    ) -> None:
        if options.questions or options.regions:
            raise UsageError(
                "The questions of a data set are in its file.", "Leave out --question and --region."
            )
        if not Path(images).is_dir():
            raise InputError(f"There is no folder '{images}'.", "missing", "Check --images.")
        if output is not None and output.resolve() == file.resolve():
            raise UsageError(f"'{output}' is the file of questions.", "Choose another --output.")
        self.model = model
        self.options = replace(options, detect=replace(options.detect, faces="none"))
        self._images = images.rstrip("/")
        rows, self._digest = read_questions(file)
        self._rows = self._judgements(rows) if options.judge else rows
        self._questions = {row.key: self._question(row) for row in self._rows}
        self.count = Count(questions=len(self._rows))
        layout = Layout(ExplainSettings, "image" if options.judge else "key", "metadata")
        self._log: RecordFile | None = None
        if output is not None:
            self._log = open_records(output, overwrite=overwrite, layout=layout)

    def _judgements(self, rows: Iterable[Row]) -> list[Row]:
        pictures = dict.fromkeys(row.picture for row in rows)
        return [
            Row(f"{self._images}/{_file(self._images, name).name}", name, None) for name in pictures
        ]

    def _question(self, row: Row) -> Question:
        if row.question is None:
            return JUDGEMENT
        return Question(row.question) if self.options.condition == "truth" else untold(row.question)

    def run(self) -> Iterator[AnswerRow]:
        """Answer, write and yield every question that had no answer yet, by picture."""
        done = self._log.done if self._log else {}
        left: dict[str, list[Row]] = {}
        for row in self._rows:
            if row.key not in done:
                left.setdefault(row.picture, []).append(row)
        self.count.earlier = self.count.answered = sum(row.key in done for row in self._rows)
        try:
            for answer in self._answers(left):
                if answer.status != "ok":
                    self.count.missing += 1
                else:
                    self.count.answered += 1
                    if self._log is not None:
                        self._log.append(answer)
                yield answer
        finally:
            if self._log is not None:
                self._log.close()

    def _answers(self, left: dict[str, list[Row]]) -> Iterator[AnswerRow]:
        sources = [
            Source(str(_file(self._images, name)), "image", PurePosixPath(name)) for name in left
        ]
        with Decoder(sources, self.options.detect) as decoder:
            pipeline = ExplainPipeline(self.model, self.options)
            for row in self._rows:
                try:
                    pipeline.length(self._questions[row.key])
                except UsageError as error:
                    named = f"Question '{row.key}': {error.message}"
                    raise UsageError(named, error.hint) from error
            pipeline.reserve(set(self._questions.values()))
            digests = () if self.options.judge else (self._digest,)
            settings = replace(pipeline.explain_settings, questions=digests)
            if self._log is not None:
                self._log.bind(settings)
            requests = (
                None
                if item is None
                else Request(
                    item,
                    pipeline.faces(item),
                    tuple(self._questions[row.key] for row in left[_picture(item)]),
                )
                for item in pipeline.judge(decoder)
            )
            for request, answers in pipeline.answers(requests):
                for number, row in enumerate(left[_picture(request.judged)]):
                    yield self._answer(row, number, request.judged.record, answers, settings)

    def _answer(
        self,
        row: Row,
        number: int,
        record: Detection,
        answers: Sequence[Answers],
        settings: ExplainSettings,
    ) -> AnswerRow:
        image = row.key if row.question is None else Path(record.path).name
        if not answers:
            return AnswerRow(row.key, image, record.status, settings, record.message)
        found, answer, told = answers[0], answers[0].answers[number], answers[0].told
        if self.options.condition == "truth":
            label = stated_label(row.question or "")
            told = None if label is None else ("real", "fake")[label]
        return AnswerRow(
            row.key,
            image,
            record.status,
            settings,
            prompt=found.prompts[number].text,
            text=f"<s> {answer.text}" + ("</s>" if answer.complete else ""),
            fake_probability=record.fake_probability,
            verdict=record.verdict,
            told=told,
        )


def _picture(item: Judged) -> str:
    return str(item.prepared.source.name)


def _file(folder: str, picture: str) -> Path:
    """The picture of that name; the .jpg where there is none."""
    files = [Path(folder) / (picture + suffix) for suffix in _SUFFIXES]
    return next((file for file in files if file.exists()), files[0])


def read_questions(file: Path) -> tuple[list[Row], str]:
    """Read a file of questions: one ``{"<picture>_<number>": {"question": …}}`` a line.

    Returns:
        The questions in order, and the ``sha256:…`` of the file.

    Raises:
        InputError: It is missing, empty or no text, or a row is broken; the line is named.
    """
    rows: dict[str, Row] = {}
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        row = _row(line)
        if row is None or rows.setdefault(row.key, row) != row:
            fault = "is no question" if row is None else f"asks another '{row.key}' than before"
            raise InputError(
                f"Line {number} of '{file}' {fault}.",
                hint='A line is like {"5_012_0": {"question": "…", "answer": ["…"]}}.',
            )
    return list(rows.values()), f"sha256:{sha256_of(file)}"


def _row(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or len(row) != 1:
        return None
    key, entry = next(iter(row.items()))
    picture = re.fullmatch(r"([^/\\]+)_\d+", key)
    question = entry.get("question") if isinstance(entry, dict) else None
    if picture is None or not isinstance(question, str) or not question.strip():
        return None
    return Row(key, picture[1], question)
