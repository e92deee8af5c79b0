"""What the documents tell a reader to type: code blocks, command lines, and what they stand for."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from glob import glob
from pathlib import Path
from typing import Any

from m2f2cli.checkpoints.hub import BUNDLED

ROOT = Path(__file__).parent.parent
OUTSIDE = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
PAGES = sorted([*OUTSIDE, *ROOT.glob("docs/**/*.md")])
PAGES += sorted(ROOT.glob("examples/**/*.md"))
SCRIPTS = sorted([*ROOT.glob("examples/**/*.sh"), *ROOT.glob("examples/**/*.yml")])
REFERENCE = ROOT / "docs" / "cli.md"

_FENCE = re.compile(r"^( *)```(\w*)(.*)\n((?:.*\n)*?)\1```", re.MULTILINE)
_TITLE = re.compile(r'title="([^"]+)"')
# A command of ours in a line: alone, after a prompt, "&&" or "||", or behind a launcher's "-m".
_OURS = re.compile(r"(?:^|(?<=&& )|(?<=\|\| )|(?<=\$ ))(?:m2f2|\w+ .*?-m(?:odule)? m2f2cli) (?=\S)")
_EXIT = re.compile(r"#.*exit code (\d)")


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: The file it stands in.
        line: Where it begins, from 1.
        language: As the fence names it; empty of an indented block.
        title: As the fence names it; empty without.
        lines: Without the indentation.
    """

    page: Path
    line: int
    language: str
    title: str
    lines: list[str]


@dataclass(frozen=True)
class Command:
    """A command line of ours.

    Attributes:
        place: ``page:line``.
        arguments: What stands after ``m2f2``.
        launched: By torchrun or another launcher.
        shown: The output shown below it; None where none is promised (no ``$`` before it).
        code: The exit code that its comment promises, or None.
    """

    place: str
    arguments: list[str]
    launched: bool
    shown: list[str] | None
    code: int | None


def name_of(page: Path) -> str:
    """A page's path inside the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[Block]:
    """The code blocks of a Markdown page; of any other file, the whole as one."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".md":
        yield Block(page, 1, page.suffix[1:], "", [line.strip() for line in text.splitlines()])
        return
    for fence in _FENCE.finditer(text):
        line = text.count("\n", 0, fence.start()) + 2
        title = _TITLE.search(fence[3])
        lines = [part.removeprefix(fence[1]) for part in fence[4].splitlines()]
        yield Block(page, line, fence[2], title[1] if title else "", lines)
    rest = _FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text).splitlines()
    begin = None
    for number, written in enumerate([*rest, ""]):
        inside = written.startswith("    ")
        if inside and begin is None:
            begin = number
        elif not inside and begin is not None and (written.strip() or number == len(rest)):
            lines = [part[4:] for part in rest[begin:number]]
            yield Block(page, begin + 1, "", "", lines)
            begin = None


def commands(page: Path) -> Iterator[Command]:
    """The command lines of ours in a page's code blocks, in order."""
    for block in sorted(blocks(page), key=lambda block: block.line):
        for number, line in _joined(block.lines):
            for found in _OURS.finditer(line):
                rest = line[found.end() :].split(" && ")[0]
                code = _EXIT.search(rest)
                prompted = line.startswith("$ ")
                yield Command(
                    f"{name_of(page)}:{block.line + number}",
                    shlex.split(rest, comments=True),
                    not found[0].startswith("m2f2"),
                    _output(block.lines[number + 1 :]) if prompted else None,
                    int(code[1]) if code else None,
                )


def _joined(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Lines with their numbers; one that goes on (a backslash, or flags next) is one."""
    number = 0
    while number < len(lines):
        begin, line = number, lines[number].strip()
        number += 1
        while number < len(lines) and (
            line.endswith("\\") or (_OURS.search(line) and lines[number].strip().startswith("--"))
        ):
            line = f"{line.removesuffix(chr(92)).rstrip()} {lines[number].strip()}"
            number += 1
        yield begin, line


def _output(lines: list[str]) -> list[str]:
    shown = []
    for line in lines:
        if line.startswith("$ "):
            break
        shown.append(line.rstrip())
    while shown and not shown[-1]:
        shown.pop()
    return shown


def mentions(page: Path) -> Iterator[str]:
    """What stands after ``m2f2`` in the code spans of a page's text."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    yield from re.findall(r"(?<!`)`m2f2 ([^`\n]+)`", text)


@cache
def application() -> Any:
    """The application's root command."""
    import typer.main

    from m2f2cli.cli.app import build

    return typer.main.get_command(build())


def resolve(arguments: list[str]) -> tuple[Any, list[str]]:
    """The command that a command line names, and what is left of the line.

    Raises:
        LookupError: There is no such command.
    """
    command, rest = application(), list(arguments)
    while rest and hasattr(command, "commands") and rest[0][0].isalpha():
        if rest[0] not in command.commands:
            raise LookupError(f"There is no command '{rest[0]}' in '{command.name}'.")
        command = command.commands[rest.pop(0)]
    return command, rest


def parse(arguments: list[str]) -> dict[Any, Any]:
    """A command line's values by parameter: every flag must exist, every value must fit.

    Raises:
        Exception: The parser's own, where a flag is unknown, a value impossible or one is missing.
    """
    command, rest = resolve(arguments)
    context = command.context_class(command, info_name=command.name)
    given, left, _ = command.make_parser(context).parse_args(args=rest)
    if left:
        raise LookupError(f"Nothing takes {left}.")
    values = {}
    settled = given.get("config") or given.get("print_config") or given.get("set")
    for parameter in command.params:
        value = given.get(parameter.name)
        # The callback of --config would read the file; a script's variable may hold anything.
        if parameter.name == "config" or "$" in str(value):
            values[parameter] = value
            continue
        values[parameter] = parameter.process_value(context, value)
        choices = (parameter.metavar or "").split("|")
        if len(choices) > 1 and all(re.fullmatch(r"[a-z0-9_]+", choice) for choice in choices):
            for word in _several(values[parameter]):
                if word not in choices:
                    raise LookupError(f"{parameter.opts[0]} takes {choices}, not '{word}'.")
        if value is None and (parameter.help or "").endswith(" Required.") and not settled:
            raise LookupError(f"Missing {parameter.opts[0]}.")
    return values


def _several(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


# Flags that name something to be written.
_WRITES = {"output", "heatmap", "annotate", "report", "calibrated", "robustness_dir"}


def needs(arguments: list[str]) -> list[str]:
    """What a command line wants to find: its arguments and the files, folders and models it names.

    Raises:
        Exception: As ``parse``.
    """
    wanted = []
    for parameter, value in parse(arguments).items():
        named = not parameter.opts[0].startswith("-") or any(
            word in (parameter.metavar or "") for word in ("DIR", "FILE", "HUB-ID")
        )
        if parameter.name not in _WRITES:
            wanted += [str(v) for v in _several(value) if named or isinstance(v, Path)]
    return [name for name in wanted if name not in BUNDLED]


def runs_here(command: Command, *, patiently: bool = False) -> bool:
    """Whether a command can be run where the reader stands (the current folder) and offline.

    Everything it needs must be there; a training's networks are, where it starts from the bundled
    model. Trainings and judging 36 spoilt copies of every picture take minutes, and the page in the
    browser ends only when it is told to.

    Args:
        command: The command.
        patiently: Whether minutes do not matter.
    """
    words = command.arguments
    trains = words[0] in ("train-detector", "align", "lora") and "--print-config" not in words
    if command.launched or words[0] == "demo" or (trains and "--model lite" not in " ".join(words)):
        return False
    if (trains or words[0] == "robustness") and not patiently:
        return False
    return all(Path(name).exists() or glob(name) for name in needs(words))
