"""Commands that make the files that training and evaluation read: ``prepare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m2f2cli.cli import options as flags
from m2f2cli.cli.output import EXIT_SOME_FAILED, Output

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


_OUTPUT = "Output"
Sources = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Videos, pictures, or folders of them with all their sub-folders.",
        metavar="SOURCE...",
        show_default=False,
    ),
]
PreparedFolder = Annotated[
    Path,
    flags.flag(
        "output", "Folder to write into.", short="-o", metavar="DIR", rich_help_panel=_OUTPUT
    ),
]
CropSize = Annotated[
    int, flags.flag("size", "Side of a crop in pixels.", metavar="N", rich_help_panel=_OUTPUT)
]
Margin = Annotated[
    float,
    flags.flag(
        "margin",
        "Share by which a crop is larger than the face box.",
        metavar="X",
        rich_help_panel=_OUTPUT,
    ),
]
BoxesFrom = Annotated[
    Path | None,
    flags.flag(
        "boxes-from",
        "Cut where these crops were cut, same frames: a forged video like its original. An HDF5 "
        "file of 'prepare faces', or a folder with those of the originals.",
        metavar="FILE.h5|DIR",
        show_default=False,
    ),
]
Workers = Annotated[
    int | None,
    flags.flag(
        "workers",
        "Videos worked on at a time. Default: one for each processor.",
        metavar="N",
        show_default=False,
    ),
]


DdvqaFolder = Annotated[
    Path,
    typer.Argument(
        help="Holds annotations/{train,test} and images/c40/{train,test}.",
        metavar="DDVQA_DIR",
        show_default=False,
    ),
]
Seed = Annotated[
    int,
    flags.flag("seed", "Decides the order of the training conversations.", metavar="N"),
]


def faces(
    output: PreparedFolder,
    sources: Sources = None,
    config: flags.Config = None,
    frames: flags.Frames = 100,
    size: CropSize = 224,
    margin: Margin = 0.3,
    boxes_from: BoxesFrom = None,
    workers: Workers = None,
    overwrite: flags.Overwrite = False,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
) -> None:
    """Cut the faces out of videos and pictures into HDF5 files.

    FaceForensics++ folders become the published files (FF++_Deepfakes_c40.h5, …), others one file.
    Run the same command again to go on with a run that was stopped, or to add videos.

    Exit codes: 0 done, 3 some videos have no crops.
    """
    from m2f2cli.data.prepare.faces import FacesJob, FacesOptions

    job = FacesJob(
        sources or [],
        output,
        FacesOptions(
            frames=frames,
            size=size,
            margin=margin,
            boxes_from=boxes_from,
            workers=workers,
            overwrite=overwrite,
        ),
    )
    printer = Output(as_json=as_json, quiet=quiet)
    prepared = []
    with printer.progress("Preparing", len(job.videos)) as advance:
        for one in job.run():
            advance()
            prepared.append(one)
    prepared.sort(key=lambda one: (one.file, one.key))
    if job.passed_over:
        printer.note(f"{job.passed_over} files beside FaceForensics++'s videos were passed over.")
    _show_faces(printer, prepared)
    raise typer.Exit(EXIT_SOME_FAILED if any(one.status != "ok" for one in prepared) else 0)


def ddvqa(
    root: DdvqaFolder,
    output: PreparedFolder,
    config: flags.Config = None,
    seed: Seed = 0,
    overwrite: flags.Overwrite = False,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
) -> None:
    """Make conversations for training and questions for testing from DD-VQA.

    Four files: judge-only conversations (stage 2), explanations in one and in two turns (stage 3),
    the test questions with reference answers, and the truth about the test pictures.
    """
    from m2f2cli.data.prepare.ddvqa import prepare_ddvqa

    report = prepare_ddvqa(root, output, seed=seed, overwrite=overwrite)
    printer = Output(as_json=as_json, quiet=quiet)
    if as_json:
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
