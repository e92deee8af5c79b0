"""Commands that measure: ``evaluate ddvqa``, ``images``, ``ffpp`` and ``compare``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2f2cli.cli import options as flags
from m2f2cli.cli.flags import signature_of
from m2f2cli.cli.output import EXIT_GATE, EXIT_SOME_FAILED, Output
from m2f2cli.options.evaluate import (
    EvaluateDdvqaOptions,
    EvaluateFfppOptions,
    EvaluateImagesOptions,
    EvaluateOptions,
)

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
}


def ddvqa(**values: Any) -> None:
    """Measure answers about DD-VQA: judgements, explanations or probabilities.

    With --predictions the file's content decides what is measured, and no model is loaded;
    otherwise --model judges the crops of --data first. The truth comes from --truth or from the
    annotations in --data, from file names only with --truth-from-names.

    Exit codes: 0 done, 3 some items have no answer, 4 a gate tripped.
    """
    run(EvaluateDdvqaOptions, values)


def images(**values: Any) -> None:
    """Measure a detector, or its records, on a folder of real and forged pictures.

    The folder is one that train-detector takes: real/ and fake/, or DD-VQA crops. Pictures count
    as face crops unless --faces says otherwise.

    Exit codes: 0 done, 3 some items have no answer, 4 a gate tripped.
    """
    run(EvaluateImagesOptions, values)


def ffpp(**values: Any) -> None:
    """Measure a detector, or its records, on FaceForensics++ videos in HDF5 files.

    A video's score is the mean over its frames. A published CSV of frames is measured without the
    folder.

    Exit codes: 0 done, 3 some items have no answer, 4 a gate tripped.
    """
    run(EvaluateFfppOptions, values)


def compare(
    first: flags.Report,
    second: flags.Report,
    config: flags.Config = None,
    common_items: flags.CommonItems = False,
    resamples: flags.Resamples = 2000,
    seed: flags.Seed = 0,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
) -> None:
    """Set two reports side by side, with intervals of what differs.

    The standard figures are taken anew from the items that both reports keep; a paired bootstrap
    draws the same items for both, so an interval without 0 is more than chance.
    """
    from m2f2cli.evaluation.compare import compare_reports

    found = compare_reports(
        first, second, common_items=common_items, resamples=resamples, seed=seed
    )
    printer = Output(as_json=as_json, quiet=quiet)
    if as_json:
        printer.json(found)
        return
    rows = dict(found["figures"])
    for kind, figures in found["per_kind"].items():
        rows |= {f"{kind}: {name}": row for name, row in figures.items()}
    printer.table(
        ("Figure", f"{first}>", f"{second}>", "Difference>", "95 % interval>"),
        [
            (name, _value(row["first"]), _value(row["second"]), *_change(row))
            for name, row in rows.items()
        ],
        styles=lambda row: "bold" if _sure(rows[str(row[0])]) else None,
    )
    if found["answers"]:
        words = (f"{count} {name.replace('_', ' ')}" for name, count in found["answers"].items())
        printer.note(f"Of {found['items']['both']} items: {', '.join(words)}.")
    for note in found["notes"]:
        printer.note(note)


def run(kind: type[EvaluateOptions], values: dict[str, Any]) -> None:
    """Measure, print, and leave with the exit code of the gates."""
    from m2f2cli.evaluation.evaluate import Evaluator
    from m2f2cli.evaluation.gates import Gates

    check, min_auc, min_accuracy, as_json, quiet, _ = (
        values.pop(name)
        for name in ("check", "min_auc", "min_accuracy", "as_json", "quiet", "config")
    )
    gates = Gates.of(check, min_auc=min_auc, min_accuracy=min_accuracy)
    evaluator = Evaluator(kind.from_flat(values))
    printer = Output(as_json=as_json, quiet=quiet)
    with printer.progress("Judging", evaluator.steps) as advance:
        found = evaluator.run(advance)
    _show(printer, found)
    if folder := evaluator.options.results.report:
        printer.note(f"Report: {folder / 'index.html'}")
    trips = gates.trips(found.report)
    for sentence in trips:
        printer.error(sentence)
    raise typer.Exit(EXIT_GATE if trips else EXIT_SOME_FAILED if found.unanswered else 0)


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
        if found.sweep is not None:
            printer.text("")
            printer.table(*found.sweep.table())
    counts = ", ".join(f"{count:,} {name}" for name, count in report["counts"].items() if count)
    printer.note(f"Counts: {counts}.")
    for line in (*report["notes"], *found.calibration, *(found.sweep.notes if found.sweep else ())):
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


# Options that a verb does not have.
_CALIBRATION = ("target_fpr", "calibrated")
_ABSENT = {
    "evaluate": {*_CALIBRATION, "robustness_dir"},
    "calibrate": {"robustness_dir"},
    "robustness": {*_CALIBRATION, "predictions"},
}


def as_command(
    body: Callable[..., None], options: type[EvaluateOptions], verb: str = "evaluate"
) -> None:
    """Give a command its flags: those of its options, the gates, and how to print."""
    absent = _ABSENT[verb] | {"calibrate", "robustness"}
    own = signature_of(options).parameters
    words = {
        EvaluateImagesOptions: "Folder with real/ and fake/, or of DD-VQA crops.",
        EvaluateFfppOptions: "Folder of the HDF5 files.",
    }
    folder = typer.Argument(help=words.get(options, ""), metavar="[DIR]", show_default=False)
    extras = {
        "config": (flags.Config, None),
        "check": (flags.Check, None),
        "min_auc": (flags.MinAuc, None),
        "min_accuracy": (flags.MinAccuracy, None),
        "as_json": (flags.Json, False),
        "quiet": (flags.Quiet, False),
    }
    parameters = [
        p.replace(annotation=Annotated[Path | None, folder]) if name == "folder" else p
        for name, p in own.items()
        if name not in absent
    ]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=flag)
        for name, (flag, default) in extras.items()
    ]
    body.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    body.__annotations__ = {p.name: p.annotation for p in parameters}


as_command(ddvqa, EvaluateDdvqaOptions)
as_command(images, EvaluateImagesOptions)
as_command(ffpp, EvaluateFfppOptions)
