"""``m2f2 explain``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from m2f2cli.cli.detect import exit_code
from m2f2cli.cli.flags import command
from m2f2cli.cli.output import EXIT_SOME_FAILED, Output
from m2f2cli.errors import UsageError
from m2f2cli.options.explain import ExplainCommand
from m2f2cli.records import to_line

if TYPE_CHECKING:
    from m2f2cli.inference.explain import TextChunk
    from m2f2cli.inference.explain_dataset import DatasetJob
    from m2f2cli.inference.recordfile import Job
    from m2f2cli.records import Explanation, FaceExplanation

EXAMPLES = {
    "explain": (
        "m2f2 explain photo.jpg",
        "m2f2 explain evidence/ --model explainer/ --recursive --output why.jsonl",
        'm2f2 explain photo.jpg -m explainer/ --region eyes --question "Is the hair natural?"',
        "m2f2 explain --dataset questions.jsonl --images crops/ -m explainer/ -o answers.jsonl",
    )
}


_SMALL = (
    "This is the small bundled model; the published 7B one: m2f2 import "
    "llava-v1.5-7b-M2F2-Det/ --output explainer, then --model explainer."
)


@command(ExplainCommand, lines=True)
def explain(options: ExplainCommand, printer: Output) -> int:
    """Say why: the detector's verdict, the language model's own judgement, and its reasons.

    Every judged face of a picture is explained; of a video, its most suspicious frame. The verdict
    is the detector's; whether the language model agrees stands beside it. Reasons are what a
    language model finds to say about a verdict, not evidence.

    Exit codes: 0 done, 3 some items have no verdict, 4 a --fail-on gate tripped.
    """
    items = options.items
    prints = printer.as_json or printer.as_lines
    if options.dataset is not None and items.output is None and not prints:
        raise UsageError(
            "The answers to a data set need a place to go.",
            "Add --output FILE.jsonl, --jsonl or --json.",
        )
    from m2f2cli.inference.explain import explain_job
    from m2f2cli.inference.explain_dataset import DatasetJob

    kept: dict[str, Any] = {name: getattr(items, name) for name in ("model", "output", "overwrite")}
    if options.dataset is not None and options.images is not None:
        answers = DatasetJob(options.dataset, options.images, options=options.explain, **kept)
        code = _answer(answers, printer)
    else:
        job = explain_job(items.paths, options=options.explain, recursive=items.recursive, **kept)
        _explain(job, printer, shown=items.output is None)
        code = exit_code(job.tally, items.fail_on)
    if items.model == "lite":
        printer.note(_SMALL)
    return code


def _explain(job: Job[Explanation], printer: Output, *, shown: bool) -> None:
    """Print each record as it comes, or its words as they come, or nothing but the progress."""
    reads = shown and not printer.as_json and not printer.as_lines
    streams = reads and sys.stdout.isatty() and len(job.sources) == 1
    records = []
    # Texts and lines on the terminal show the progress themselves.
    bar = Output(quiet=printer.quiet or reads or (printer.as_lines and sys.stdout.isatty()))
    with bar.progress("Explaining", len(job.sources)) as advance:
        for number, record in enumerate(job.run(on_text=_streamed(printer) if streams else None)):
            advance(1 if number else 1 + job.tally.earlier)
            if printer.as_json:
                records.append(record)
            elif printer.as_lines:
                printer.line(to_line(record.to_dict()))
            elif reads:
                _print(printer, record, streamed=streams)
    if printer.as_json:
        items = [record.to_dict() for record in records]
        printer.json({"items": items, "summary": vars(job.tally)})
        return
    if job.remark:
        printer.note(job.remark)
    printer.note(job.tally.sentence())
    if job.tally.real or job.tally.fake:
        printer.note("The verdict is the detector's; reasons are a language model's, not evidence.")


def _streamed(printer: Output) -> Callable[[TextChunk], None]:
    """Prints words as they are written, each question and each face under its own heading."""
    begun = False

    def show(chunk: TextChunk) -> None:
        nonlocal begun
        if chunk.text:
            printer.words(chunk.text)
            return
        printer.words("\n\n" if begun else "")
        begun = True
        if chunk.question.text is None:
            score = chunk.fake_probability
            printer.text(f"Face at {chunk.crop}: {chunk.verdict} ({score:.3f}).")
        printer.text(f"> {chunk.asked}")

    return show


def _print(printer: Output, record: Explanation, *, streamed: bool) -> None:
    if streamed and record.explanations:
        printer.words("\n\n")
    if record.status != "ok":
        _line(printer, f"{record.path}: {record.status}: {record.message}")
        return
    why = f" ({record.reason})" if record.reason else ""
    _line(printer, f"{record.path}: {record.verdict}, {record.fake_probability:.3f}{why}")
    for face in record.explanations:
        place = f"frame {face.frame}, " if face.frame is not None else ""
        if place or len(record.explanations) > 1:
            score = f"{face.verdict}, {face.fake_probability:.3f}"
            _line(printer, f"  {place}face at {face.crop}: {score}")
        _line(printer, f"  language model: {_judgement(face)}")
        for reason in () if streamed else face.reasons:
            cut = "" if reason.complete else " [cut off]"
            _line(printer, f"  {reason.region or reason.question}: {reason.text}{cut}")


def _line(printer: Output, words: str) -> None:
    printer.words(" ".join(words.split("\n")) + "\n")


def _judgement(face: FaceExplanation) -> str:
    agreement = {True: ", agrees", False: ", disagrees", None: ""}[face.agreement]
    return f"{face.judgement or 'neither real nor fake'}{agreement} ({face.judgement_text})"


def _answer(job: DatasetJob, printer: Output) -> int:
    """Answer a data set: to the file or the JSON object; pictures without an answer are named."""
    rows = []
    silent: set[str | None] = set()
    with printer.progress("Answering", job.count.questions) as advance:
        for row in job.run():
            advance()
            if printer.as_json:
                rows.append(row.to_dict())
            elif printer.as_lines:
                printer.line(to_line(row.to_dict()))
            elif row.message not in silent and row.status != "ok":
                silent.add(row.message)
                printer.note(f"{row.image}: {row.message}")
    if printer.as_json:
        printer.json({"items": rows, "summary": vars(job.count)})
    printer.note(job.count.sentence())
    return EXIT_SOME_FAILED if job.count.missing else 0
