"""``m2f2 detect``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2f2cli.cli.flags import command
from m2f2cli.cli.output import EXIT_GATE, EXIT_SOME_FAILED, Output
from m2f2cli.options.detect import DetectCommand

if TYPE_CHECKING:
    from m2f2cli.inference.recordfile import Tally
    from m2f2cli.records import Detection

EXAMPLES = {
    "detect": (
        "m2f2 detect photo.jpg",
        "m2f2 detect evidence/ --recursive --output verdicts.jsonl",
        "m2f2 detect clip.mp4 --frames 32 --annotate marked/",
        "m2f2 detect crops/ --faces none --json",
    )
}


@command(DetectCommand)
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
    records = []
    with printer.progress("Judging", len(job.sources)) as advance:
        for record in job.run():
            advance()
            if printer.as_json or items.output is None:
                records.append(record)
    _show(printer, records, job.tally, items.output)
    return exit_code(job.tally, items.fail_on)


def _show(printer: Output, records: Sequence[Detection], tally: Tally, output: Path | None) -> None:
    if printer.as_json:
        items = [record.to_dict() for record in records]
        printer.json({"items": items, "summary": vars(tally)})
        return
    if output is None and records:
        printer.table(
            ("File", "Verdict", "Fake probability>", "Why"),
            [_row(record) for record in records],
            styles=lambda row: {"fake": "red", "uncertain": "yellow", "-": "dim"}.get(str(row[1])),
        )
    where = f" Records: {output}" if output is not None else ""
    printer.note(tally.sentence() + where)
    if tally.real or tally.fake:
        printer.note("A verdict is this model's opinion, not proof; 'real' means no forgery found.")


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
