"""Answers to a file of DD-VQA questions, in the rows that the published system writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from m2f2cli.data.conversations import stated_label
from m2f2cli.data.images import IMAGE_SUFFIXES
from m2f2cli.errors import InputError, UsageError
from m2f2cli.inference.decoding import Decoder
from m2f2cli.inference.detect import rule_of
from m2f2cli.inference.explain import explain_settings
from m2f2cli.inference.explain_asker import Asker, Loaded
from m2f2cli.inference.explain_interviews import Interview, Interviewer, Plan
from m2f2cli.inference.explain_job import open_records
from m2f2cli.inference.explain_questions import JUDGEMENT, Question, untold
from m2f2cli.inference.explain_rows import AnswerRow, Row, read_questions
from m2f2cli.inference.prepare import Prepared
from m2f2cli.inference.recordfile import Layout
from m2f2cli.inference.sources import Source
from m2f2cli.options.explain import ExplainOptions
from m2f2cli.records import ExplainSettings

_SUFFIXES = (".jpg", *sorted(IMAGE_SUFFIXES - {".jpg"}))


@dataclass
class Count:
    """How a run over questions went.

    Attributes:
        questions: In the file.
        answered: Those of an earlier, resumed run included.
        earlier: Answered by an earlier run.
        missing: Questions whose picture is missing or unreadable.
    """

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
        images: The folder of the pictures, as the user spelt it.
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
        self._told = self.options.condition == "truth"
        self._questions = {row.key: self._question(row) for row in self._rows}
        self.count = Count(questions=len(self._rows))
        layout = Layout(ExplainSettings, "image" if options.judge else "key", "metadata")
        self._log = None
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
        return Question(row.question) if self._told else untold(row.question)

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
        sources = [self._source(name) for name in left]
        with Decoder(sources, faces="none", frames=1) as decoder:
            asker = Asker(self.model, self.options)
            asker.leave_room([self._length(asker, row) for row in self._rows])
            settings = replace(
                explain_settings(self.model, asker),
                questions=() if self.options.judge else (self._digest,),
            )
            if self._log is not None:
                self._log.bind(settings)
            rule = rule_of(asker.model.detector, self.options.detect)
            prepared = decoder.prepared(asker.recipe(), ahead=self.options.detect.batch_size)
            plans = (self._plan(item, left[_name(item)]) for item in prepared)
            for plan, interviews in Interviewer(asker, rule).conduct(plans):
                yield from self._rows_of(plan, left[_name(plan.prepared)], interviews, settings)

    def _length(self, asker: Asker, row: Row) -> int:
        told = ("real", "fake") if self.options.condition == "detector" else (None,)
        question = self._questions[row.key]
        try:
            return max(asker.length(question.prompt(asker.template, label)) for label in told)
        except UsageError as error:
            raise UsageError(f"Question '{row.key}': {error.message}", error.hint) from error

    def _source(self, picture: str) -> Source:
        return Source(str(_file(self._images, picture)), "image", PurePosixPath(picture))

    def _plan(self, prepared: Prepared, rows: Sequence[Row]) -> Plan:
        if prepared.status != "ok":
            return Plan(prepared)
        questions = tuple(self._questions[row.key] for row in rows)
        return Plan(prepared, prepared.views[0].crops, questions)

    def _rows_of(
        self,
        plan: Plan,
        rows: Sequence[Row],
        interviews: Sequence[Interview],
        settings: ExplainSettings,
    ) -> Iterator[AnswerRow]:
        found = plan.prepared
        name = Path(found.source.path).name
        for number, row in enumerate(rows):
            answer = AnswerRow(
                row.key, row.key if row.question is None else name, found.status, settings
            )
            if not interviews:
                yield replace(answer, message=found.message)
                continue
            interview = interviews[0]
            said = interview.said[number]
            yield replace(
                answer,
                prompt=interview.prompts[number],
                text=f"<s> {said.text}" + ("</s>" if said.complete else ""),
                fake_probability=interview.score.fake_probability,
                verdict=interview.verdict.verdict,
                told=self._label(row) if self._told else interview.told,
            )

    def _label(self, row: Row) -> str | None:
        label = stated_label(row.question or "")
        return None if label is None else ("real", "fake")[label]


def _file(folder: str, picture: str) -> Path:
    """The picture of that name; the .jpg where there is none."""
    files = [Path(folder) / (picture + suffix) for suffix in _SUFFIXES]
    return next((file for file in files if file.exists()), files[0])


def _name(prepared: Prepared) -> str:
    return str(prepared.source.name)
