"""Gates on a report: figures that must not fall below a floor, or drift from what is expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from m2f2cli.errors import InputError, UsageError
from m2f2cli.evaluation.report import is_report, read_json

TOLERANCE = 1e-6
# The first of these that a report has is what a floor is held against.
AUC = ("frame_auc", "video_auc")
ACCURACY = ("accuracy",)


@dataclass(frozen=True)
class Gates:
    """What a report is held against.

    Attributes:
        expectation: What figures should be; None for anything.
        min_auc: Smallest accepted AUC (the first of ``AUC``); None for any.
        min_accuracy: Smallest accepted accuracy; None for any.
    """

    expectation: Expectation | None = None
    min_auc: float | None = None
    min_accuracy: float | None = None

    @classmethod
    def of(cls, check: Path | None, *, min_auc: float | None, min_accuracy: float | None) -> Gates:
        """Make sure, before the work, that the gates can be held against something.

        Raises:
            UsageError: A floor is no share.
            InputError: ``check`` cannot be read (see ``read_expectation``).
        """
        for flag, floor in (("--min-auc", min_auc), ("--min-accuracy", min_accuracy)):
            if floor is not None and not 0 <= floor <= 1:
                raise UsageError(f"{flag} must lie between 0 and 1, not {floor:g}.")
        return cls(read_expectation(check) if check else None, min_auc, min_accuracy)

    def trips(self, report: Mapping[str, Any]) -> list[str]:
        """Why the report does not pass, a sentence each; empty when it does."""
        found = drifts(report, self.expectation) if self.expectation else []
        for names, floor in ((AUC, self.min_auc), (ACCURACY, self.min_accuracy)):
            sentence = None if floor is None else below(report, names, floor)
            found += [sentence] if sentence else []
        return found


class Expected(NamedTuple):
    """What one figure should be.

    Attributes:
        key: A figure, ``KIND.figure`` of one manipulation, or ``counts.NAME``.
        value: None where the figure should be undefined.
        tolerance: Largest accepted difference.
    """

    key: str
    value: float | None
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class Expectation:
    """What ``--check`` holds a report against.

    Attributes:
        figures: The expected figures.
        identity: Dotted paths into the report to what must stand there, such as
            ``protocol.sha256``; only an earlier report asks for any.
    """

    figures: tuple[Expected, ...]
    identity: Mapping[str, str]


def read_expectation(path: Path) -> Expectation:
    """Read what figures should be.

    The file holds ``{"accuracy": 0.9444, "frame_auc": {"value": 0.98, "tolerance": 0.005}}``, the
    same under a key ``figures`` beside ``per_kind`` and ``counts``, or is an earlier
    ``report.json``. A ``tolerance`` beside them is for all that state none.

    Raises:
        InputError: The file cannot be read, expects nothing, or a value is no number.
    """
    found = read_json(path)
    identity: dict[str, str] = {}
    if is_report(found):
        identity = {
            "dataset": str(found.get("dataset")),
            "protocol.sha256": _at(found, "protocol.sha256"),
            "data.fingerprint": _at(found, "data.fingerprint"),
        }
    tolerance = found.pop("tolerance", TOLERANCE)
    default = _number(path, "tolerance", tolerance, low=0.0)
    rows: dict[str, Any] = found
    if isinstance(found.get("figures"), dict):
        rows = {
            **found["figures"],
            **_dotted(found.get("per_kind")),
            **_dotted({"counts": found.get("counts")}),
        }
    figures = tuple(_expected(path, key, value, default) for key, value in rows.items())
    if not figures:
        raise InputError(f"'{path}' expects nothing.", "empty", 'For example: {"accuracy": 0.9444}')
    return Expectation(figures, identity)


def _dotted(groups: Any) -> dict[str, Any]:
    if not isinstance(groups, dict):
        return {}
    return {
        f"{group}.{name}": value
        for group, values in groups.items()
        if isinstance(values, dict)
        for name, value in values.items()
    }


def _expected(path: Path, key: str, row: Any, default: float) -> Expected:
    value, tolerance = row, default
    if isinstance(row, dict):
        if "value" not in row:
            raise InputError(f"'{path}' gives '{key}' no value.", hint='{"value": 0.9444}')
        value = row["value"]
        if "tolerance" in row:
            tolerance = _number(path, f"{key}.tolerance", row["tolerance"], low=0.0)
    if value is None:
        return Expected(key, None, tolerance)
    return Expected(key, _number(path, key, value), tolerance)


def _number(path: Path, key: str, value: Any, low: float | None = None) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(
            f"'{path}' expects {value!r} of '{key}', which is not a number.",
            hint='For example: {"accuracy": {"value": 0.9444, "tolerance": 0.001}}',
        )
    if low is not None and value < low:
        raise InputError(f"'{path}' gives '{key}' as {value}, below {low:g}.")
    return float(value)


def drifts(report: Mapping[str, Any], expected: Expectation) -> list[str]:
    """What differs from the expectation, a sentence each; empty when all is as expected."""
    found = []
    for path, wanted in expected.identity.items():
        if (have := _at(report, path)) != wanted:
            found.append(f"{path} is {have}, expected {wanted}.")
    for one in expected.figures:
        found += _drift(report, one)
    return found


def _drift(report: Mapping[str, Any], one: Expected) -> list[str]:
    figures = _figures(report)
    if one.key not in figures:
        return [f"{one.key} is not in this report, expected {one.value}."]
    have, note = figures[one.key]
    if have is None and one.value is None:
        return []
    if have is None:
        return [f"{one.key} is undefined ({note}), expected {one.value!r}."]
    if one.value is None:
        return [f"{one.key} is {have!r}, expected it to be undefined."]
    if abs(have - one.value) <= one.tolerance:
        return []
    return [
        f"{one.key} is {have!r}, expected {one.value!r} (off by {have - one.value:+.6g}, "
        f"tolerance {one.tolerance:g})."
    ]


def below(report: Mapping[str, Any], names: Sequence[str], floor: float) -> str | None:
    """Why a floor is not reached, as a sentence; None when it is.

    Args:
        report: Of ``report.build_report``.
        names: The first one that the report has is meant.
        floor: The smallest accepted value.
    """
    figures = _figures(report)
    name = next((name for name in names if name in figures), None)
    if name is None:
        return f"{names[0]} is not among this report's figures, at least {floor:g} was asked for."
    value, note = figures[name]
    if value is None:
        return f"{name} is undefined ({note}), at least {floor:g} was asked for."
    if value < floor:
        return f"{name} is {value:.6f}, at least {floor:g} was asked for."
    return None


def _figures(report: Mapping[str, Any]) -> dict[str, tuple[float | None, str | None]]:
    """Every number of a report under its key, with the reason where it is undefined."""
    groups = {**_dotted(report["per_kind"]), **report["figures"]}
    found = {key: (figure["value"], figure["note"]) for key, figure in groups.items()}
    counts = {f"counts.{name}": (value, None) for name, value in report["counts"].items()}
    return {**found, **counts}


def _at(report: Mapping[str, Any], dotted: str) -> str:
    value: Any = report
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return str(value)
