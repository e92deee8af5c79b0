"""The only printer: results go to standard output, everything else to standard error."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO

from m2f2cli.errors import M2F2Error

if TYPE_CHECKING:
    from rich.console import Console

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_SOME_FAILED = 3
EXIT_GATE = 4
EXIT_INTERRUPTED = 130

_WIDE = 400  # columns for a reader that is no terminal: never wrap, never cut
_SECONDS_A_LINE = 60  # between lines of progress in a log
_SECONDS_OF_PACE = 300  # that tell how long the rest will take
_SECONDS_UNTIL_PACE = 10  # before which nothing is said of it


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


class _Closed(io.TextIOBase):
    """Stands for a standard output that was closed before the program began."""

    def write(self, text: str) -> int:
        """Refuse."""
        raise M2F2Error(
            "Standard output is closed, so the result cannot be printed.", "Leave it open."
        )


def stand_in_for_closed_streams() -> None:
    """Let no file that is opened later become a standard stream that was closed."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout = sys.stdout or _Closed()
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def silence(stream: TextIO) -> None:
    """Nobody reads a standard stream any more: what it still holds goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@dataclass(frozen=True)
class Output:
    """Prints for one command.

    Attributes:
        as_json: The command's result is one JSON object; tables and texts are left out.
        quiet: No progress and no notes; results, warnings and errors still appear.
        as_lines: The command's result is one JSON object a line, each as soon as it is there.
    """

    as_json: bool = False
    quiet: bool = False
    as_lines: bool = False

    def json(self, value: Mapping[str, Any]) -> None:
        """Print the result as one JSON object, whatever ``as_json`` says."""
        text = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False)
        sys.stdout.write(text + "\n")

    def line(self, row: bytes) -> None:
        """Print one of the result's JSON lines at once."""
        self.words(row.decode())

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

    def row(self, cells: Sequence[str], widths: Sequence[int], style: str | None = None) -> None:
        """Print one row of a growing table at once.

        Args:
            cells: One more than there are widths: the last one is as long as it is.
            widths: Of the others, in columns; a negative one is aligned to the right.
            style: As for ``table``.
        """
        from rich.cells import cell_len

        shown = [printable(cell) for cell in cells]
        for place, width in enumerate(widths):
            room = " " * (abs(width) - cell_len(shown[place]))
            shown[place] = room + shown[place] if width < 0 else shown[place] + room
        line = "  ".join(shown).rstrip()
        if sys.stdout.isatty():
            from rich.text import Text

            _console(sys.stdout).print(Text(line, style or ""), soft_wrap=True)
        else:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def fields(self, values: Mapping[str, object]) -> None:
        """Print name and value pairs of the result, one a line."""
        width = max((len(name) for name in values), default=0)
        for name, value in values.items():
            self.text(f"{name:<{width}}  {printable(str(value))}")

    def note(self, line: str) -> None:
        """Say something about the run on standard error, unless quiet."""
        if not self.quiet:
            self._say(_printable_lines(line) + "\n")

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
            self._say(f"{label}: ")
        self._say(_printable_lines(line) + "\n")

    def _say(self, words: str) -> None:
        """Write to standard error; the command goes on where nobody can read it."""
        try:
            sys.stderr.write(words)
        except OSError:
            silence(sys.stderr)

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

        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn() if in_bytes else MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[note]}"),
            console=_console(sys.stderr),
            transient=True,
        )
        with bar:
            task = bar.add_task(description, total=total, note="", left="")
            pace = _Pace(total)

            def advance(steps: int = 1, note: str = "") -> None:
                pace.add(steps)
                bar.update(task, advance=steps, note=note, left=pace.left())

            yield advance


class _Pace:
    """How fast steps go, by the last minutes.

    The first second starts the clock, so that steps which a resumed run has behind it, or the first
    batch that leaves at once, are not taken for fast ones.
    """

    def __init__(self, total: int | None) -> None:
        self.total, self.done = total, 0
        self._marks: deque[tuple[float, int]] = deque()  # times, a second apart, and steps then

    def add(self, steps: int) -> None:
        """Count steps that are done now."""
        self.done += steps
        now = time.monotonic()
        if not self._marks:
            self._marks.append((now, self.done))
        elif len(self._marks) == 1 and now - self._marks[0][0] < 1:
            self._marks[0] = self._marks[0][0], self.done
        elif now - self._marks[-1][0] >= 1:
            self._marks.append((now, self.done))
            while now - self._marks[0][0] > _SECONDS_OF_PACE and len(self._marks) > 2:
                self._marks.popleft()

    def left(self) -> str:
        """The time that the rest will take, in words; empty while that cannot be told."""
        then, before = self._marks[0]
        seconds = time.monotonic() - then
        if self.total is None or self.done <= before or seconds < _SECONDS_UNTIL_PACE:
            return ""
        rest = (self.total - self.done) * seconds / (self.done - before)
        return f"{timedelta(seconds=round(rest))} left"


class _Lines:
    """Progress for a log: ``Training: 120/640, 0:12:05 left, loss 0.431``, once a minute.

    Several threads may call.
    """

    def __init__(
        self, description: str, total: int | None, in_bytes: bool, say: Callable[[str], None]
    ) -> None:
        self.description = description
        self.in_bytes = in_bytes
        self.say = say
        self.pace = _Pace(total)
        self.lock = threading.Lock()
        self.last: float | None = None  # when a line was due

    def __call__(self, steps: int = 1, note: str = "") -> None:
        with self.lock:
            self.pace.add(steps)
            now = time.monotonic()
            self.last = now if self.last is None else self.last
            if now - self.last >= _SECONDS_A_LINE:
                self.last = now
                done = self._amount(self.pace.done)
                if self.pace.total is not None:
                    done += f"/{self._amount(self.pace.total)}"
                words = filter(None, [done, self.pace.left(), note])
                self.say(f"{self.description}: {', '.join(words)}")

    def _amount(self, steps: int) -> str:
        return f"{steps / 1e9:.1f} GB" if self.in_bytes else str(steps)


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    width = None if stream.isatty() else _WIDE
    return Console(file=stream, width=width, highlight=False, soft_wrap=False)
