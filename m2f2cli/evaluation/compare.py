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
    (figures, kinds), (others, other_kinds) = (_measured(scored) for scored in (mine, theirs))
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "first": _described(one),
        "second": _described(other),
        "items": sizes,
        "definition": {"resamples": resamples, "seed": seed, "level": LEVEL},
        "figures": _rows(figures, others, changes),
        "per_kind": {
            kind: _rows(own, other_kinds[kind], changes, f"{kind}.")
            for kind, own in kinds.items()
            if kind in other_kinds
        },
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


Figures = Mapping[str, protocols.Figure]


def _measured(scored: Joined) -> tuple[Figures, Mapping[str, Figures]]:
    """The standard figures without intervals, and those of each manipulation."""
    measures = protocols.standard(scored, resamples=0, java=False)
    return measures.figures, measures.per_kind


def _rows(
    first: Figures, second: Figures, changes: Mapping[str, Any], prefix: str = ""
) -> dict[str, dict[str, float | None]]:
    """Each figure of both, with its difference and the interval of that."""
    rows = {}
    for name in first:
        if name not in second or name == "count":
            continue
        one, other = first[name].value, second[name].value
        _, low, high = changes.get(prefix + name) or (None, None, None)
        difference = None if one is None or other is None else other - one
        rows[name] = {
            "first": one,
            "second": other,
            "difference": difference,
            "low": low,
            "high": high,
        }
    return rows


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
