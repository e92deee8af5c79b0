"""``docs/detect.md`` says what the code does: every key, status, flag and column, and no other."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import typer

from m2f2cli.cli import app
from m2f2cli.records import (
    CSV_COLUMNS,
    SCHEMA_VERSION,
    STATUSES,
    Detection,
    FaceScore,
    FrameScore,
    Settings,
)

PAGE = (Path(__file__).parents[2] / "docs" / "detect.md").read_text(encoding="utf-8")


def rows(title: str) -> list[list[str]]:
    """The cells of the first table after a title."""
    table = re.search(r"\n\|(.+?)\n(?!\|)", PAGE[PAGE.index(title) :], re.DOTALL)
    assert table
    return [[c.strip() for c in row.strip("|").split("|")] for row in table[1].splitlines()[2:]]


def keys(title: str) -> list[str]:
    return [key for row in rows(title) for key in re.findall(r"`(\w+)`", row[0])]


def test_every_key_of_a_record_is_documented() -> None:
    own = {item.name for item in fields(Detection)} - {"settings"}
    assert set(keys("## The record")) == own | {"schema_version"}
    assert f"schema version {SCHEMA_VERSION}" in PAGE
    assert set(keys("What the run's verdicts depend on")) == {f.name for f in fields(Settings)}
    assert keys("Entries of `faces`") == [item.name for item in fields(FaceScore)]
    assert keys("Entries of `frames`") == [item.name for item in fields(FrameScore)]


def test_every_status_and_column_is_documented() -> None:
    documented = {row[0].strip("`"): row[1] for row in rows("Statuses:")}
    assert documented == dict(STATUSES)
    paragraph = PAGE[PAGE.index("The CSV has these columns") : PAGE.index("## From Python")]
    assert tuple(re.findall(r"`(\w+)`", paragraph)) == CSV_COLUMNS


def test_every_flag_is_documented_with_its_default() -> None:
    command = typer.main.get_command(app.build()).commands["detect"]  # type: ignore[attr-defined]
    flags = {p.opts[0]: p for p in command.params if p.opts[0].startswith("--")}
    flags.pop("--help", None)
    documented = {row[0].split("`")[1].split(" ")[0]: row for row in rows("## Flags")}
    assert set(documented) == set(flags)
    for name, row in documented.items():
        default = flags[name].default
        if isinstance(default, (str, int)) and not isinstance(default, bool):
            assert row[1].strip("`") == str(default)
