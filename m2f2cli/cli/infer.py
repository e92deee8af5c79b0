"""Commands that judge pictures: ``detect``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from m2f2cli.cli import options as flags
from m2f2cli.cli.output import EXIT_GATE, EXIT_SOME_FAILED, Output
from m2f2cli.errors import UsageError

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
GATES = ("fake", "uncertain", "error")


def detect(
    paths: flags.Paths = None,
    config: flags.Config = None,
    recursive: flags.Recursive = False,
    faces: flags.Faces = "auto",
    frames: flags.Frames = 16,
    model: flags.Model = "lite",
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
    batch_size: flags.BatchSize = 16,
    threshold: flags.Threshold = None,
    uncertain: flags.Uncertain = None,
    fail_on: flags.FailOn = None,
    heatmap: flags.Heatmap = None,
    annotate: flags.Annotate = None,
    output: flags.OutputFile = None,
    overwrite: flags.Overwrite = False,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
) -> None:
    """Judge pictures and videos: real, fake or uncertain.

    Faces are found and cropped the way the model was trained. A bad file becomes a line with its
    reason and the run goes on. A score is the model's opinion about one face, not a proof.

    Exit codes: 0 done, 3 some items have no verdict, 4 a --fail-on gate tripped.
    """
    from m2f2cli.inference.pipeline import detect_job
    from m2f2cli.options.detect import DetectOptions

    tripping = gates(fail_on)
    job = detect_job(
        paths or [],
        options=DetectOptions(
            faces=faces,
            threshold=threshold,
            uncertain=band(uncertain),
            batch_size=batch_size,
            frames=frames,
            heatmap=heatmap,
            annotate=annotate,
            device=device,
            dtype=dtype,
        ),
        model=model,
        recursive=recursive,
        output=output,
        overwrite=overwrite,
    )
    printer = Output(as_json=as_json, quiet=quiet)
    records = []
    with printer.progress("Judging", len(job.sources)) as advance:
        for record in job.run():
            advance()
            if as_json or output is None:
                records.append(record)
    _show(printer, records, job.tally, output)
    raise typer.Exit(exit_code(job.tally, tripping))


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
    words = [words for words in (record.reason, record.note) if words]
    if record.kind == "video":
        judged = [f for f in record.frames if f.fake_probability is not None]
        words.append(f"mean of {len(judged)} of {len(record.frames)} frames")
    elif len(record.faces) > 1:
        words.append(f"{len(record.faces)} faces, the most suspicious one decides")
    elif record.crop_source == "picture":
        words.append("taken whole as a face crop")
    return (
        record.path,
        str(record.verdict),
        f"{record.fake_probability:.3f}",
        "; ".join(words),
    )


def band(text: str | None) -> tuple[float, float] | Literal["checkpoint"] | None:
    """The value of ``--uncertain``."""
    if text is None:
        return "checkpoint"
    if text.lower() == "none":
        return None
    low, colon, high = text.partition(":")
    try:
        if colon:
            return float(low), float(high)
    except ValueError:
        pass
    raise UsageError(
        f"--uncertain takes LOW:HIGH or none, not '{text}'.", "For example: --uncertain 0.4:0.6"
    )


def gates(words: Sequence[str] | None) -> set[str]:
    """The values of ``--fail-on``."""
    for word in words or ():
        if word not in GATES:
            raise UsageError(f"--fail-on takes {', '.join(GATES)}, not '{word}'.")
    return set(words or ())


def exit_code(tally: Tally, tripping: set[str]) -> int:
    """How a run over items leaves."""
    tripped: dict[str, Any] = {
        "fake": tally.fake,
        "uncertain": tally.fake + tally.uncertain,
        "error": tally.failed,
    }
    if any(tripped[gate] for gate in tripping):
        return EXIT_GATE
    return EXIT_SOME_FAILED if tally.failed else 0
