"""Commands that measure: ``evaluate``, ``calibrate`` and ``robustness``, on each kind of data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from m2f2cli.cli.flags import Command, command
from m2f2cli.cli.output import EXIT_GATE, EXIT_SOME_FAILED, Output
from m2f2cli.options.evaluate import (
    CalibrateOptions,
    CompareOptions,
    DdvqaData,
    EvaluateOptions,
    FfppData,
    ImagesData,
    MeasureOptions,
    RobustnessOptions,
    about,
)
from m2f2cli.runtime import Progress

if TYPE_CHECKING:
    from m2f2cli.evaluation.evaluate import Evaluation

EXAMPLES = {
    "evaluate ddvqa": (
        "m2f2 evaluate ddvqa --predictions answers.jsonl --truth labels.jsonl",
        "m2f2 evaluate ddvqa --predictions answers.jsonl --truth labels.jsonl --min-accuracy 0.9",
        "m2f2 evaluate ddvqa --predictions why.jsonl --truth questions.jsonl --protocol paper",
        "m2f2 evaluate ddvqa --data ddvqa/ --model detector/ --report report/",
    ),
    "evaluate images": (
        "m2f2 evaluate images faces/ --report report/",
        "m2f2 evaluate images faces/ --predictions verdicts.jsonl --check expected.json --json",
        "m2f2 evaluate images faces/ --model detector/ --split validation",
    ),
    "evaluate ffpp": (
        "m2f2 evaluate ffpp ffpp_h5/ --compression c40 --model detector/ --report report/",
        "m2f2 evaluate ffpp --predictions frames.csv --protocol paper",
    ),
    "evaluate compare": (
        "m2f2 evaluate compare old/ new/",
        "m2f2 evaluate compare old/report.json new/report.json --json",
    ),
    "calibrate ddvqa": ("m2f2 calibrate ddvqa --data ddvqa/ --split train --model detector/",),
    "calibrate images": ("m2f2 calibrate images faces/ --model detector/ --split validation",),
    "calibrate ffpp": ("m2f2 calibrate ffpp ffpp_h5/ --split validation --model detector/",),
    "robustness ddvqa": ("m2f2 robustness ddvqa --data ddvqa/ --robustness-dir sweep/",),
    "robustness images": (
        "m2f2 robustness images faces/ --model detector/ --report report/",
        "m2f2 robustness images faces/ --corruptions chains --robustness-dir sweep/",
    ),
    "robustness ffpp": ("m2f2 robustness ffpp ffpp_h5/ --model detector/ --report report/",),
}
_SETS = {
    DdvqaData: "the crops of DD-VQA",
    ImagesData: "a folder of real and forged pictures",
    FfppData: "FaceForensics++ videos in HDF5 files",
}
_EVALUATE = {
    DdvqaData: """Measure answers about DD-VQA: judgements, explanations or probabilities.

    With --predictions the file's content decides what is measured, and no model is loaded;
    otherwise --model judges the crops of --data first. The truth comes from --truth or from the
    annotations in --data, from file names only with --truth-from-names.
    """,
    ImagesData: """Measure a detector, or its records, on a folder of real and forged pictures.

    The folder is one that train-detector takes: real/ and fake/, or DD-VQA crops. Pictures count
    as face crops unless --faces says otherwise.
    """,
    FfppData: """Measure a detector, or its records, on FaceForensics++ videos in HDF5 files.

    A video's score is the mean over its frames. A published CSV of frames is measured without the
    folder.
    """,
}
_CALIBRATE = """Calibrate a detector on {}.

    Temperature, threshold and uncertain band are fitted to the set and stored in the checkpoint, or
    in a copy of it with --calibrated. Refused on a test set. The set is measured and reported as by
    'm2f2 evaluate'.
    """
_ROBUSTNESS = """Judge {}, corrupted.

    JPEG, blur, noise, scaling and brightness, each from mild to severe, and chains of what happens
    to pictures that are passed on: JPEG, half size, a screenshot, a messenger, a video. The table
    tells how many verdicts flip. The untouched set is measured and reported as by 'm2f2 evaluate';
    the sweep's records, plot and table are resumable.
    """
_EXIT_CODES = """
    Exit codes: 0 done, 3 some items have no answer, 4 a gate tripped.
    """


def _evaluate(options: Any, progress: Progress) -> Evaluation:
    from m2f2cli.evaluation.evaluate import evaluate

    return evaluate(options, progress)


def _calibrate(options: Any, progress: Progress) -> Evaluation:
    from m2f2cli.evaluation.calibrate import calibrate

    return calibrate(options, progress)


def _robustness(options: Any, progress: Progress) -> Evaluation:
    from m2f2cli.evaluation.robustness import robustness

    return robustness(options, progress)


def _command(
    verb: Callable[[Any, Progress], Evaluation], kind: type[MeasureOptions], help: str
) -> Command:
    """A command: measure, print, and leave with the exit code of the gates."""

    def body(options: MeasureOptions, out: Output) -> int:
        found = verb(options, out.progress)
        _show(out, found)
        if options.report:
            out.note(f"Report: {options.report / 'index.html'}")
        for sentence in found.tripped:
            out.error(sentence)
        return EXIT_GATE if found.tripped else EXIT_SOME_FAILED if found.unanswered else 0

    body.__doc__ = help + _EXIT_CODES
    return command(kind)(body)


evaluate_ddvqa, evaluate_images, evaluate_ffpp = (
    _command(_evaluate, about(EvaluateOptions, data), help) for data, help in _EVALUATE.items()
)
calibrate_ddvqa, calibrate_images, calibrate_ffpp = (
    _command(_calibrate, about(CalibrateOptions, data), _CALIBRATE.format(words))
    for data, words in _SETS.items()
)
robustness_ddvqa, robustness_images, robustness_ffpp = (
    _command(_robustness, about(RobustnessOptions, data), _ROBUSTNESS.format(words))
    for data, words in _SETS.items()
)


@command(CompareOptions)
def compare(options: CompareOptions, out: Output) -> None:
    """Set two reports side by side, with intervals of what differs.

    The standard figures are taken anew from the items that both reports keep; a paired bootstrap
    draws the same items for both, so an interval without 0 is more than chance.
    """
    from m2f2cli.evaluation.compare import compare_reports

    found = compare_reports(
        options.first,
        options.second,
        common_items=options.common_items,
        resamples=options.resamples,
        seed=options.seed,
    )
    if out.as_json:
        out.json(found)
        return
    rows = dict(found["figures"])
    for kind, figures in found["per_kind"].items():
        rows |= {f"{kind}: {name}": row for name, row in figures.items()}
    out.table(
        ("Figure", f"{options.first}>", f"{options.second}>", "Difference>", "95 % interval>"),
        [
            (name, _value(row["first"]), _value(row["second"]), *_change(row))
            for name, row in rows.items()
        ],
        styles=lambda row: "bold" if _sure(rows[str(row[0])]) else None,
    )
    if found["answers"]:
        words = (f"{count} {name.replace('_', ' ')}" for name, count in found["answers"].items())
        out.note(f"Of {found['items']['both']} items: {', '.join(words)}.")
    for note in found["notes"]:
        out.note(note)


def _show(printer: Output, found: Evaluation) -> None:
    report = found.report
    if printer.as_json:
        printer.json(report)
    else:
        printer.fields(_facts(report))
        printer.text("")
        printer.table(*_figures(report))
        if kinds := report["per_kind"]:
            printer.text("")
            names = list(dict.fromkeys(name for figures in kinds.values() for name in figures))
            printer.table(
                ("Manipulation", *(f"{name}>" for name in names)),
                [(kind, *_cells(kinds[kind], names)) for kind in kinds],
            )
        if named := report["forgeries"]:
            printer.text("")
            names = sorted({name for row in named.values() for name in row})
            printer.table(
                ("Called fake, and named", *(f"{name}>" for name in names)),
                [(kind, *(row.get(name, 0) for name in names)) for kind, row in named.items()],
            )
        if found.sweep is not None:
            printer.text("")
            printer.table(*found.sweep.table())
    counts = ", ".join(f"{count:,} {name}" for name, count in report["counts"].items() if count)
    printer.note(f"Counts: {counts}.")
    lines = list(report["notes"])
    if found.calibration is not None:
        lines += found.calibration.sentences()
    if found.sweep is not None:
        lines += found.sweep.notes
    for line in lines:
        printer.note(line)


def _facts(report: Mapping[str, Any]) -> dict[str, str]:
    model = report["model"]["name"]
    facts = {
        "data": f"{report['dataset']}, split {report['split']}",
        "protocol": report["protocol"]["name"],
    }
    return facts | ({"model": model} if model else {})


def _figures(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows; a column that would stay empty is left out."""
    level = report["protocol"]["definition"].get("level")
    heads = ["Figure", "Value>", f"{100 * level:g} % interval>" if level else "Interval>", "Note"]
    rows = [
        [name, _value(f["value"]), _ends(f), f["note"] or ""]
        for name, f in report["figures"].items()
    ]
    kept = [place for place in range(len(heads)) if any(row[place] for row in rows)]
    return [heads[place] for place in kept], [[row[place] for place in kept] for row in rows]


def _cells(figures: Mapping[str, Any], names: list[str]) -> list[str]:
    cells = []
    for name in names:
        figure = figures.get(name) or {"value": None, "low": None}
        if name == "count":
            cells.append(f"{figure['value']:,.0f}")
        else:
            cells.append(f"{_value(figure['value'])} {_ends(figure)}".strip())
    return cells


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _ends(figure: Mapping[str, Any]) -> str:
    return "" if figure["low"] is None else f"{figure['low']:.4f} to {figure['high']:.4f}"


def _change(row: Mapping[str, Any]) -> tuple[str, str]:
    if row["difference"] is None:
        return "-", ""
    ends = "" if row["low"] is None else f"{row['low']:+.4f} to {row['high']:+.4f}"
    return f"{row['difference']:+.4f}", ends


def _sure(row: Mapping[str, Any]) -> bool:
    """Whether the interval of a difference leaves out 0."""
    return row["low"] is not None and not row["low"] <= 0 <= row["high"]
