"""One ``m2f2 detect``: list the items, judge those that no record exists of, keep the records."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from m2f2cli.errors import UsageError
from m2f2cli.inference.recordfile import RecordFile
from m2f2cli.inference.sources import Source, expand
from m2f2cli.records import VERDICTS, Detection, Settings, to_csv

if TYPE_CHECKING:
    from m2f2cli.inference.scoring import Judge
    from m2f2cli.options.detect import DetectOptions

Record = TypeVar("Record", bound=Detection)


@dataclass
class Tally:
    """How many items of a run came out how, those of an earlier, resumed run included.

    Attributes:
        real: Items with that verdict.
        fake: Items with that verdict.
        uncertain: Items with that verdict.
        failed: Items without a verdict, whatever the status.
        earlier: Of all these, how many an earlier run had recorded.
    """

    real: int = 0
    fake: int = 0
    uncertain: int = 0
    failed: int = 0
    earlier: int = 0

    def count(self, verdict: str | None) -> None:
        """Add one item."""
        name = verdict if verdict in VERDICTS else "failed"
        setattr(self, name, getattr(self, name) + 1)

    def sentence(self) -> str:
        """The counts in words."""
        judged = self.real + self.fake + self.uncertain
        words = f"{judged} judged: {self.fake} fake, {self.real} real, {self.uncertain} uncertain"
        if self.failed:
            words += f"; {self.failed} without a verdict"
        if self.earlier:
            words += f" ({self.earlier} of them recorded earlier)"
        return words + "."


class Job:
    """Everything one run of ``detect`` does, as an iterator of records.

    Args:
        paths: See ``sources.expand``.
        options: How to judge.
        model: A checkpoint's name, or a detector.
        recursive: Enter sub-folders.
        output: A ``.jsonl`` file, which is resumed, or a ``.csv`` file, which is written at the
            end; or None.
        overwrite: Replace ``output`` instead.

    Attributes:
        sources: Every item.
        tally: What came out so far.

    Raises:
        M2F2Error: Nothing to judge, or ``output`` cannot be used.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        options: DetectOptions,
        model: str | Judge = "lite",
        recursive: bool = False,
        output: Path | None = None,
        overwrite: bool = False,
    ) -> None:
        self.sources = expand(paths, recursive=recursive)
        self.options = options
        self.model = model
        self.tally = Tally()
        self._table: Path | None = None
        self._log: RecordFile | None = None
        if output is None:
            return
        refuse_input(output, self.sources)
        if output.suffix.lower() == ".jsonl":
            self._log = RecordFile(output, overwrite=overwrite)
        elif output.suffix.lower() == ".csv":
            self._table = _table(output, overwrite)
        else:
            raise UsageError(
                f"--output must end in .jsonl or .csv, not '{output.name}'.",
                "For example: --output verdicts.jsonl",
            )

    def run(self) -> Iterator[Detection]:
        """Judge, record and yield every item that had no record yet, in order."""
        written: list[Detection] = []
        with ExitStack() as stack:
            if self._log is not None:
                stack.enter_context(self._log)
            for record in judge_and_record(
                self.sources,
                model=self.model,
                options=self.options,
                log=self._log,
                tally=self.tally,
            ):
                if self._table is not None:
                    written.append(record)
                yield record
        if self._table is not None:
            from m2f2cli.files import atomic_write

            atomic_write(self._table, to_csv(written).encode("utf-8", "surrogateescape"))


def judge_and_record(
    sources: Sequence[Source],
    *,
    model: str | Judge,
    options: DetectOptions,
    log: RecordFile | None,
    tally: Tally,
) -> Iterator[Detection]:
    """Judge, record and yield every source that has no record yet, in order.

    Args:
        sources: Every item; told apart by ``path``.
        model: A checkpoint's name, or a detector.
        options: How to judge.
        log: Where records are and go; opened, and closed by the caller. None keeps no records.
        tally: Counts every item, those recorded earlier first.

    Raises:
        M2F2Error: The records were made with other settings, the model cannot be loaded, or the
            disk refuses.
    """
    from m2f2cli.inference.detect import judge_sources, load, settings_of

    yield from record_new(
        sources,
        run=lambda left: judge_sources(left, model=model, options=options),
        settings=lambda: settings_of(model, load(model, options), options),
        log=log,
        tally=tally,
    )


def record_new(
    sources: Sequence[Source],
    *,
    run: Callable[[Sequence[Source]], Iterator[Record]],
    settings: Callable[[], Settings],
    log: RecordFile | None,
    tally: Tally,
) -> Iterator[Record]:
    """Run, record and yield every source that has no record yet, in order.

    Args:
        sources: Every item; told apart by ``path``.
        run: Gives the records of some of them.
        settings: Of the run; asked for when there is nothing left to do, so that records of other
            settings are never taken for this run's.
        log: As for ``judge_and_record``.
        tally: As for ``judge_and_record``.
    """
    done = log.done if log else {}
    left = [source for source in sources if source.path not in done]
    for source in sources:
        if source.path in done:
            tally.earlier += 1
            tally.count(done[source.path][1])
    if not left and log is not None:
        log.bind(settings())
    for record in run(left) if left else ():
        if log is not None:
            log.append(record)
        tally.count(record.verdict)
        yield record


def refuse_input(output: Path, sources: Sequence[Source]) -> None:
    """Refuse to write over an input.

    Raises:
        UsageError: ``output`` is one.
    """
    if any(os.path.realpath(source.path) == os.path.realpath(output) for source in sources):
        raise UsageError(f"'{output}' is one of the inputs.", "Choose another --output.")


def _table(path: Path, overwrite: bool) -> Path:
    """Check, before the work, that a CSV file can be written after it."""
    if path.exists() and not overwrite:
        raise UsageError(
            f"'{path}' exists; a table is written whole and cannot be resumed.",
            "Add --overwrite, or record into a .jsonl file, which can be resumed.",
        )
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"Cannot write into the folder '{folder}'.", "Choose another --output.")
    return path
