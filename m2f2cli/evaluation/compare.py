"""Two reports side by side: what differs, and whether chance alone could make it differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from m2f2cli.errors import InputError
from m2f2cli.evaluation import protocols
from m2f2cli.evaluation.report import SavedReport, call_of, find_mistakes, read_report
from m2f2cli.evaluation.truth import Joined, fingerprint
from m2f2cli.metrics import LEVEL, RESAMPLES, SEED

SCHEMA_VERSION = 1
KIND = "comparison"


def compare_reports(
    first: Path,
    second: Path,
    *,
    common_items: bool = False,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> dict[str, Any]:
    """Compare two saved evaluations on the items that both have.

    The figures are the standard protocol's, taken anew from the saved items, each evaluation at
    its own threshold. A detector and texts are compared by their verdicts alone. The intervals are
    of second minus first, from a paired bootstrap: each resample is drawn once for both.

    Args:
        first: A report's folder, or its ``report.json``.
        second: The other one.
        common_items: Compare what both have although their data differ.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        JSON values, documented in ``docs/evaluate.md``.

    Raises:
        InputError: A report cannot be read, the data differ, no item is common, or a common item
            has two labels.
    """
    one, other = read_report(first), read_report(second)
    notes = [
        f"'{saved.path}' was made with the paper protocol; compared are the standard figures."
        for saved in (one, other)
        if saved.report["protocol"]["name"] != "standard"
    ]
    if one.scored.data_fingerprint != other.scored.data_fingerprint and not common_items:
        raise InputError(
            f"'{one.path}' and '{other.path}' are about different data.",
            hint="Add --common-items to compare them on the items that both have.",
        )
    mine, theirs = _common(one, other)
    sizes = {
        "both": len(mine.items),
        "only_first": len(one.scored.items) - len(mine.items),
        "only_second": len(other.scored.items) - len(mine.items),
    }
    if sizes["only_first"] or sizes["only_second"]:
        notes.append(f"Compared on the {sizes['both']:,} items that both have.")
    if mine.task != theirs.task:
        mine, theirs = _by_verdict(mine, one), _by_verdict(theirs, other)
        notes.append("Probabilities against texts: compared by their verdicts alone.")
    changes = protocols.difference(mine, theirs, resamples=resamples, seed=seed)
    values = _values(mine), _values(theirs)
    rows = {
        name: _row(values[0].get(name), values[1].get(name), changes.get(name))
        for name in values[0]
        if name in values[1]
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "first": _described(one),
        "second": _described(other),
        "items": sizes,
        "definition": {"resamples": resamples, "seed": seed, "level": LEVEL},
        "figures": {name: row for name, row in rows.items() if "." not in name},
        "per_kind": _nested({name: row for name, row in rows.items() if "." in name}),
        "answers": _flips(mine, theirs),
        "notes": notes,
    }


def _common(one: SavedReport, other: SavedReport) -> tuple[Joined, Joined]:
    """Both sets cut to what is in both, in the first one's order, with its kinds and groups."""
    theirs = {item.name: item for item in other.scored.items}
    mine = [item for item in one.scored.items if item.name in theirs]
    if not mine:
        raise InputError(f"'{one.path}' and '{other.path}' have no item in common.", "empty")
    matched = []
    for item in mine:
        found = theirs[item.name]
        if found.label != item.label:
            raise InputError(
                f"'{item.name}' is labelled {item.label} in '{one.path}' and {found.label} in "
                f"'{other.path}'.",
                hint="One of the two was measured against a wrong truth.",
            )
        matched.append(replace(found, kind=item.kind, group=item.group))
    whole = fingerprint(mine)
    return (
        replace(one.scored, items=tuple(mine), data_fingerprint=whole, missing=()),
        replace(other.scored, items=tuple(matched), data_fingerprint=whole, missing=()),
    )


def _by_verdict(scored: Joined, saved: SavedReport) -> Joined:
    """A set as if its model had only said real or fake."""
    if scored.task == "explanation":
        raise InputError(
            f"'{saved.path}' holds explanations, which are compared only with explanations."
        )
    items = tuple(
        replace(item, verdict=call_of(item, scored), fake_probability=None) for item in scored.items
    )
    return replace(scored, task="judgement", items=items)


def _values(scored: Joined) -> dict[str, float | None]:
    """The standard figures without intervals, ``KIND.figure`` for those of one manipulation."""
    measures = protocols.standard(scored, resamples=0, java=False)
    found = {name: figure.value for name, figure in measures.figures.items()}
    for kind, figures in measures.per_kind.items():
        found |= {f"{kind}.{n}": f.value for n, f in figures.items() if n != "count"}
    return found


def _row(
    first: float | None, second: float | None, change: tuple[float, float, float] | None
) -> dict[str, Any]:
    difference = None if first is None or second is None else second - first
    low, high = change[1:] if change else (None, None)
    return {
        "first": first,
        "second": second,
        "difference": difference,
        "low": low,
        "high": high,
    }


def _nested(rows: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        kind, _, figure = name.rpartition(".")
        found.setdefault(kind, {})[figure] = row
    return found


def _described(saved: SavedReport) -> dict[str, Any]:
    report = saved.report
    return {
        "report": str(saved.path),
        "created": report["created"],
        "dataset": report["dataset"],
        "split": report["split"],
        "protocol": {key: report["protocol"][key] for key in ("name", "sha256")},
        "model": report["model"],
        "data_fingerprint": saved.scored.data_fingerprint,
    }


def _flips(first: Joined, second: Joined) -> dict[str, int] | None:
    """How many items only one of the two called rightly; None for explanations."""
    if first.task == "explanation":
        return None
    wrong, wrong_now = ({m.item.name for m in find_mistakes(s)} for s in (first, second))
    return {
        "both_right": len(first.items) - len(wrong | wrong_now),
        "only_first_right": len(wrong_now - wrong),
        "only_second_right": len(wrong - wrong_now),
        "both_wrong": len(wrong & wrong_now),
    }
