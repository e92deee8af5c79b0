"""``m2f2 detect``."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2f2cli.cli.flags import command
from m2f2cli.cli.output import EXIT_GATE, EXIT_SOME_FAILED, Output
from m2f2cli.options.detect import DetectCommand
from m2f2cli.records import to_line

if TYPE_CHECKING:
    from m2f2cli.inference.recordfile import Job, Tally
    from m2f2cli.records import Detection

EXAMPLES = {
    "detect": (
        "m2f2 detect photo.jpg",
        "m2f2 detect evidence/ --recursive --output verdicts.jsonl",
        "m2f2 detect clip.mp4 --frames 32 --annotate marked/",
        "m2f2 detect crops/ --faces none --json",
        "m2f2 detect evidence/ --jsonl | grep '\"fake\"'",
    )
}


LONGEST = 60  # columns that the names of files take at most before the next ones shift
STYLES = {"fake": "red", "uncertain": "yellow", "-": "dim"}


@command(DetectCommand, lines=True)
def detect(options: DetectCommand, printer: Output) -> int:
    """Judge pictures and videos: real, fake or uncertain.

    Faces are found and cropped the way the model was trained. A bad file becomes a line with its
    reason and the run goes on. A score is the model's opinion about one face, not a proof.

    Exit codes: 0 done, 3 some items have no verdict, 4 a --fail-on gate tripped.
    """
    from m2f2cli.inference.pipeline import detect_job

    items = options.items
    job = detect_job(
        items.paths,
        options=options.detect,
        model=items.model,
        recursive=items.recursive,
        output=items.output,
        overwrite=items.overwrite,
    )
    if job.remark:
        printer.note(job.remark)
    _run(job, printer, items.output)
    if job.tally.earlier and (options.detect.heatmap or options.detect.annotate):
        printer.note("What was recorded earlier was not drawn: --overwrite judges and draws it.")
    if job.tally.real or job.tally.fake:
        printer.note("A verdict is this model's opinion, not proof; 'real' means no forgery found.")
    return exit_code(job.tally, items.fail_on)


def _run(job: Job[Detection], printer: Output, output: Path | None) -> None:
    """Judge every item; print each as it comes, or one JSON object, or nothing but the counts."""
    as_table = output is None and not printer.as_json and not printer.as_lines
    longest = max((len(source.path) for source in job.sources), default=0)
    widths = (min(longest, LONGEST), 9, -16)
    records = []
    # A bar and rows on one terminal get into each other's way.
    bar = Output(quiet=printer.quiet or ((as_table or printer.as_lines) and sys.stdout.isatty()))
    with bar.progress("Judging", len(job.sources)) as advance:
        for number, record in enumerate(job.run()):
            advance(1 if number else 1 + job.tally.earlier)
            if printer.as_json:
                records.append(record.to_dict())
            elif printer.as_lines:
                printer.line(to_line(record.to_dict()))
            elif as_table:
                if not number:
                    printer.row(("File", "Verdict", "Fake probability", "Why"), widths, "bold")
                row = _row(record)
                printer.row(row, widths, STYLES.get(row[1]))
    if printer.as_json:
        printer.json({"items": records, "summary": vars(job.tally)})
    printer.note(job.tally.sentence() + (f" Records: {output}" if output else ""))


def _row(record: Detection) -> tuple[str, str, str, str]:
    if record.fake_probability is None:
        return record.path, "-", "-", f"{record.status}: {record.message}"
    words = [words for words in (record.forgery, record.reason, record.note) if words]
    if record.kind == "video":
        judged = [f for f in record.frames if f.fake_probability is not None]
        words.append(f"mean of {len(judged)} of {len(record.frames)} frames")
    elif len(record.faces) > 1:
        words.append(f"{len(record.faces)} faces, the most suspicious one decides")
    elif record.crop_source == "picture":
        words.append("taken whole as a face crop")
    return (record.path, str(record.verdict), f"{record.fake_probability:.3f}", "; ".join(words))


def exit_code(tally: Tally, tripping: Collection[str]) -> int:
    """How a run over items leaves."""
    tripped: dict[str, Any] = {
        "fake": tally.fake,
        "uncertain": tally.fake + tally.uncertain,
        "error": tally.failed,
    }
    if any(tripped[gate] for gate in tripping):
        return EXIT_GATE
    return EXIT_SOME_FAILED if tally.failed else 0
