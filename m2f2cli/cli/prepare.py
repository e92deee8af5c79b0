"""``m2f2 prepare faces`` and ``m2f2 prepare ddvqa``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from m2f2cli.cli.flags import command
from m2f2cli.cli.output import EXIT_SOME_FAILED, Output
from m2f2cli.options.prepare import PrepareDdvqaCommand, PrepareFacesCommand

if TYPE_CHECKING:
    from m2f2cli.data.prepare.faces import Prepared

EXAMPLES = {
    "prepare faces": (
        "m2f2 prepare faces FaceForensics/original_sequences/youtube/c40 --output ffpp/",
        "m2f2 prepare faces FaceForensics/manipulated_sequences --output ffpp/ --boxes-from ffpp/",
        "m2f2 prepare faces clips/ --output crops/ --frames 32 --workers 4",
    ),
    "prepare ddvqa": ("m2f2 prepare ddvqa ddvqa/ --output conversations/",),
}


@command(PrepareFacesCommand)
def faces(options: PrepareFacesCommand, printer: Output) -> int:
    """Cut the faces out of videos and pictures into HDF5 files.

    FaceForensics++ folders become the published files (FF++_Deepfakes_c40.h5, …), others one file.
    Run the same command again to go on with a run that was stopped, or to add videos.

    Exit codes: 0 done, 3 some videos have no crops.
    """
    from m2f2cli.data.prepare.faces import FacesJob

    job = FacesJob(options.sources, options.output, options.faces)
    prepared = []
    with printer.progress("Preparing", len(job.videos)) as advance:
        for one in job.run():
            advance()
            prepared.append(one)
    prepared.sort(key=lambda one: (one.file, one.key))
    if job.passed_over:
        printer.note(f"{job.passed_over} files beside FaceForensics++'s videos were passed over.")
    _show_faces(printer, prepared)
    return EXIT_SOME_FAILED if any(one.status != "ok" for one in prepared) else 0


@command(PrepareDdvqaCommand)
def ddvqa(options: PrepareDdvqaCommand, printer: Output) -> None:
    """Make conversations for training and questions for testing from DD-VQA.

    Four files: judge-only conversations (stage 2), explanations in one and in two turns (stage 3),
    the test questions with reference answers, and the truth about the test pictures.
    """
    from m2f2cli.data.prepare.ddvqa import prepare_ddvqa

    output = options.output
    report = prepare_ddvqa(options.root, output, seed=options.seed, overwrite=options.overwrite)
    if printer.as_json:
        counts = [vars(one) for one in report.counts]
        printer.json({**vars(report), "rows": dict(report.rows), "counts": counts})
        return
    names = list(vars(report.counts[0]))
    printer.table(
        [
            f"{n.replace('_', ' ').capitalize()}{'>' if n not in ('part', 'kind') else ''}"
            for n in names
        ],
        [tuple(vars(one).values()) for one in report.counts],
    )
    printer.fields({str(output / name): f"{rows} rows" for name, rows in report.rows.items()})
    for message in report.unreadable.values():
        printer.warning(message)
    if report.unannotated:
        printer.note(f"{len(report.unannotated)} crops without annotations were left out.")


def _show_faces(printer: Output, prepared: Sequence[Prepared]) -> None:
    totals = {
        file: _totals([one for one in prepared if one.file == file])
        for file in dict.fromkeys(one.file for one in prepared)
    }
    if printer.as_json:
        printer.json({"items": [vars(one) for one in prepared], "files": totals})
        return
    lacking = [one for one in prepared if one.without_face or one.status != "ok" or one.message]
    if lacking:
        printer.table(
            ("File", "Video", "Crops>", "Frames without a face>", "Interpolated>", "Remark"),
            [
                (one.file, one.key, one.frames, one.without_face, one.interpolated, _remark(one))
                for one in lacking
            ],
            styles=lambda row: "red" if row[2] == 0 else None,
        )
    names = list(next(iter(totals.values())))
    printer.table(
        ("File", *(f"{name.replace('_', ' ')}>" for name in names)),
        [(file, *values.values()) for file, values in totals.items()],
    )


def _remark(one: Prepared) -> str:
    return one.message or "" if one.status == "ok" else f"{one.status}: {one.message}"


def _totals(prepared: Sequence[Prepared]) -> dict[str, int]:
    return {
        "videos": len(prepared),
        "earlier": sum(one.earlier for one in prepared),
        "failed": sum(one.status != "ok" for one in prepared),
        "crops": sum(one.frames for one in prepared),
        "frames_looked_at": sum(one.looked_at for one in prepared),
        "frames_without_face": sum(one.without_face for one in prepared),
        "interpolated": sum(one.interpolated for one in prepared),
    }
