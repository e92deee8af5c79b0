"""The only printer: results go to standard output, everything else to standard error."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_SOME_FAILED = 3
EXIT_GATE = 4
EXIT_INTERRUPTED = 130

_WIDE = 400  # columns for a reader that is no terminal: never wrap, never cut
_SECONDS_A_LINE = 60  # between lines of progress in a log


def printable(text: str) -> str:
    """Spell out control characters, so that a file's name cannot drive the terminal."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in text
    )


def _printable_lines(text: str) -> str:
    return "\n".join(printable(line) for line in text.split("\n"))


@dataclass(frozen=True)
class Output:
    """Prints for one command.

    Attributes:
        as_json: The command's result is one JSON object; tables and texts are left out.
        quiet: No progress and no notes; results, warnings and errors still appear.
    """

    as_json: bool = False
    quiet: bool = False

    def json(self, value: Mapping[str, Any]) -> None:
        """Print the result as one JSON object, whatever ``as_json`` says."""
        text = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False)
        sys.stdout.write(text + "\n")

    def text(self, line: str) -> None:
        """Print one line of the result."""
        sys.stdout.write(line.rstrip("\n") + "\n")

    def words(self, piece: str) -> None:
        """Print a piece of the result at once, without ending the line."""
        sys.stdout.write(_printable_lines(piece))
        sys.stdout.flush()

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[object]],
        *,
        title: str | None = None,
        styles: Callable[[Sequence[object]], str | None] | None = None,
    ) -> None:
        """Print a table of the result.

        Args:
            columns: Headings; one that ends in ``>`` is aligned to the right.
            rows: Cells; anything but a string is shown by ``str``.
            title: Heading over the table.
            styles: Gives the Rich style of a row, such as ``"red"``.
        """
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in columns:
            right = column.endswith(">")
            table.add_column(
                column.removesuffix(">"), justify="right" if right else "left", overflow="fold"
            )
        for row in rows:
            style = styles(row) if styles else None
            table.add_row(*(Text(printable(str(cell))) for cell in row), style=style)
        _console(sys.stdout).print(table)

    def fields(self, values: Mapping[str, object]) -> None:
        """Print name and value pairs of the result, one a line."""
        width = max((len(name) for name in values), default=0)
        for name, value in values.items():
            self.text(f"{name:<{width}}  {printable(str(value))}")

    def note(self, line: str) -> None:
        """Say something about the run on standard error, unless quiet."""
        if not self.quiet:
            sys.stderr.write(_printable_lines(line) + "\n")

    def warning(self, line: str) -> None:
        """Warn on standard error."""
        self._labelled("warning", "yellow", line)

    def error(self, message: str, hint: str | None = None) -> None:
        """Report a failure on standard error, with the way out."""
        self._labelled("error", "red", message)
        if hint:
            self._labelled("hint", "cyan", hint)

    def _labelled(self, label: str, colour: str, line: str) -> None:
        if sys.stderr.isatty():
            _console(sys.stderr).print(f"[bold {colour}]{label}:[/]", end=" ")
        else:
            sys.stderr.write(f"{label}: ")
        sys.stderr.write(_printable_lines(line) + "\n")

    @contextmanager
    def progress(
        self, description: str, total: int | None = None, *, in_bytes: bool = False
    ) -> Iterator[Callable[..., None]]:
        """Show on standard error how far a command is, unless quiet.

        A terminal gets a bar that vanishes; a log a line a minute, so that short commands add none.

        Args:
            description: What is done.
            total: How many steps there are, where that is known.
            in_bytes: The steps are bytes.

        Yields:
            ``advance(steps=1, note="")``: moves the bar and sets the words beside it.
        """
        if self.quiet:
            yield lambda steps=1, note="": None
            return
        if not sys.stderr.isatty():
            yield _Lines(description, total, in_bytes, self.note)
            return
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
        )
        from rich.progress import TimeRemainingColumn as Remaining

        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn() if in_bytes else MofNCompleteColumn(),
            Remaining(),
            TextColumn("{task.fields[note]}"),
            console=_console(sys.stderr),
            transient=True,
        )
        with bar:
            task = bar.add_task(description, total=total, note="")

            def advance(steps: int = 1, note: str = "") -> None:
                bar.update(task, advance=steps, note=note)

            yield advance


class _Lines:
    """Progress for a log: ``Training: 120/640, 0:12:05 left, loss 0.431``, once a minute.

    The first call starts the clock, so that steps which a resumed run has behind it are not taken
    for fast ones. Several threads may call.
    """

    def __init__(
        self, description: str, total: int | None, in_bytes: bool, say: Callable[[str], None]
    ) -> None:
        self.description = description
        self.total = total
        self.in_bytes = in_bytes
        self.say = say
        self.lock = threading.Lock()
        self.done = 0
        self.last: tuple[float, int] | None = None  # when a line was due, and the steps done then

    def __call__(self, steps: int = 1, note: str = "") -> None:
        with self.lock:
            self.done += steps
            self._speak_if_due(note)

    def _speak_if_due(self, note: str) -> None:
        now = time.monotonic()
        if self.last is None:
            self.last = now, self.done
        then, before = self.last
        if now - then < _SECONDS_A_LINE:
            return
        self.last = now, self.done
        words = [self._amount(self.done)]
        if self.total is not None:
            words[0] += f"/{self._amount(self.total)}"
            if self.done > before:
                seconds = (self.total - self.done) * (now - then) / (self.done - before)
                words.append(f"{timedelta(seconds=round(seconds))} left")
        self.say(f"{self.description}: {', '.join(filter(None, [*words, note]))}")

    def _amount(self, steps: int) -> str:
        return f"{steps / 1e9:.1f} GB" if self.in_bytes else str(steps)


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    width = None if stream.isatty() else _WIDE
    return Console(file=stream, width=width, highlight=False, soft_wrap=False)
