"""The reference of every command, written from the application: see the head of the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import typer.main

from m2f2cli.cli.app import COMMANDS, GROUPS, build
from m2f2cli.cli.output import Output

_HEAD = """\
# Command line

Every command and every flag, as `m2f2 COMMAND --help` shows them; written from the application by
`python -m m2f2cli.cli.reference > docs/cli.md`.

A flag can also be given in the environment, by the name under it, or as a line of a
`--config FILE.yaml` (`batch-size: 8`). Flags win over the environment, the environment over the
file, the file over the default. A flag without a value is switched on by naming it; in the
environment and in a file its value is `true` or `false`. What few people set is no part of the
help page but listed here as a key, which goes into a `--config` file or after `--set`.
"""


def reference() -> str:
    """The page: Markdown, equal wherever it is made."""
    root: Any = typer.main.get_command(build())
    parts = [_HEAD]
    described: set[str] = set()
    for entry in COMMANDS:
        command = root
        for name in entry.name.split():
            command = command.commands[name]
        group = entry.name.split()[0]
        if group in GROUPS and group not in described:
            described.add(group)
            parts.append(f"## m2f2 {group}\n\n{GROUPS[group]}\n")
        level = "###" if group in GROUPS else "##"
        parts.append(f"{level} m2f2 {entry.name}\n\n" + "\n".join(_command(command)))
    return "\n".join(parts)


def _command(command: Any) -> Iterator[str]:
    """What a command is for, its examples, its arguments and its flags."""
    yield _prose(command.help) + "\n"
    examples = (command.epilog or "").split("\n\n")[1:]
    if examples:
        yield "\n".join("    " + line.strip().replace("\\[", "[") for line in examples) + "\n"
    flags = [p for p in command.params if p.opts[0].startswith("-")]
    arguments = [p for p in command.params if p not in flags]
    keys = [p for p in flags if p.hidden]
    flags = [p for p in flags if not p.hidden]
    if arguments:
        rows = [(f"`{p.metavar}`", *_needed(p)) for p in arguments]
        yield _table(("Argument", "", "Meaning"), rows)
    panels: dict[str, list[Any]] = {}
    for parameter in flags:
        panels.setdefault(parameter.rich_help_panel or "Flags", []).append(parameter)
    for panel, members in panels.items():
        yield _table((panel, "Value", "Default", "Meaning"), [_flag(p) for p in members])
    if keys:
        listed = [(f"`{p.opts[0].removeprefix('--')}`", *_flag(p)[1:]) for p in keys]
        yield "Further keys of `--config` and `--set`:\n"
        yield _table(("Key", "Value", "Default", "Meaning"), listed)


def _flag(parameter: Any) -> tuple[str, str, str, str]:
    spellings = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    variable = f"<br>`{parameter.envvar}`" if parameter.envvar else ""
    value = "" if parameter.is_flag else _value(parameter.metavar or "VALUE")
    if getattr(parameter, "multiple", False) and "epeat" not in parameter.help:
        value += ", may be repeated"
    needed, meaning = _needed(parameter)
    return spellings + variable, value, needed or _default(parameter), meaning


def _needed(parameter: Any) -> tuple[str, str]:
    """Whether it must be given, and what it means."""
    help = parameter.help.removesuffix(" Required.")
    return "required" if help != parameter.help else "", _prose(help)


def _value(metavar: str) -> str:
    return ", ".join(f"`{choice}`" for choice in metavar.split("|"))


def _default(parameter: Any) -> str:
    default = parameter.default
    if parameter.is_flag:
        return "on" if default else "off"
    if default is None or default == () or default == []:
        return ""
    values = default if isinstance(default, list | tuple) else [default]
    return ", ".join(f"`{value}`" for value in values)


def _prose(text: str | None) -> str:
    """Help text as Markdown: brackets and angle brackets stay what they are."""
    plain = (text or "").replace("\\[", "[")
    for sign, written in (("<", "&lt;"), ("*", "\\*"), ("|", "\\|")):
        plain = plain.replace(sign, written)
    return plain


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    Output().text(reference())
