"""A run over items, and its file of records: killed, it leaves that whole, and a later one resumes.

JSON Lines. Items are told apart by one key alone, ``path`` mostly, as the record spells it: a
resumed run judges no path twice, so a file that changed in between keeps its first record.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from m2f2cli.errors import M2F2Error, UsageError
from m2f2cli.files import atomic_write, parse_json, refuse_special
from m2f2cli.inference.sources import Source, Sources
from m2f2cli.records import (
    SCHEMA_VERSION,
    STATUSES,
    VERDICTS,
    Detection,
    ExplainSettings,
    Settings,
    plain,
    to_csv,
    to_line,
)

if TYPE_CHECKING:
    from m2f2cli.inference.explain_dataset import AnswerRow

_LONGEST = 1 << 26  # bytes of a line; a video of a thousand frames has 300,000

Record = TypeVar("Record", bound=Detection)


class Layout(NamedTuple):
    """How the lines of a kind of record look.

    Attributes:
        settings: What each line repeats of its run.
        key: Tells items apart; the first key of a line but for ``schema_version``.
        inside: The key under which settings, status and version lie; None for the line itself.
    """

    settings: type[Settings] = Settings
    key: str = "path"
    inside: str | None = None

    @property
    def start(self) -> bytes:
        """What every line begins with."""
        return f'{{"{self.key if self.inside else "schema_version"}": '.encode()


DETECTIONS = Layout()
EXPLANATIONS = Layout(ExplainSettings)


class RecordFile:
    """A JSON Lines file that records are appended to, and that a later run can resume.

    Opening it reads what is there and changes nothing; ``bind`` compares the settings and makes it
    writable. A record is one ``write`` of one line, so a killed process leaves whole lines and at
    most one cut one, which ``bind`` removes. A write that fails half-way is taken back.

    Args:
        path: The file; it and its folder are made when missing.
        overwrite: Start anew instead of resuming; what is there is removed by ``bind``.
        layout: Of the records.

    Attributes:
        done: Item to (status, verdict, kind of forgery) of every record in the file.

    Raises:
        UsageError: The file holds something else than records.
        M2F2Error: It cannot be opened or another process is writing it.
    """

    def __init__(self, path: Path, *, overwrite: bool = False, layout: Layout = DETECTIONS) -> None:
        self.path = path
        self._layout = layout
        self.done: dict[str, tuple[str, str | None, str | None]] = {}
        self._made_with: dict[str, Any] = {}
        self._size = 0
        self._bound = False
        refuse_special(path)
        self._is_new = not path.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            raise _cannot_write(path, error) from error
        try:
            _lock(self._handle, path)
            if not overwrite:
                self._read_existing()
        except BaseException:
            os.close(self._handle)
            raise

    def _read_existing(self) -> None:
        with os.fdopen(os.dup(self._handle), "rb") as file:
            lines = iter(partial(file.readline, _LONGEST), b"")
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    if len(line) == _LONGEST or (number == 1 and not self._may_begin(line)):
                        raise self._foreign(number)
                    return
                if line.strip():
                    self._take(line, number)
                self._size += len(line)

    def _take(self, line: bytes, number: int) -> None:
        try:
            row = parse_json(line)
        except ValueError:
            raise self._foreign(number) from None
        key, inside, kind = self._layout.key, self._layout.inside, self._layout.settings
        about = row.get(inside) if inside and isinstance(row, dict) else row
        if not isinstance(about, dict) or not isinstance(row.get(key), str):
            raise self._foreign(number)
        if about.get("schema_version") != SCHEMA_VERSION:
            raise self._other("schema_version", about.get("schema_version"), SCHEMA_VERSION)
        status, verdict = about.get("status"), about.get("verdict")
        if status not in list(STATUSES) or verdict not in (None, *VERDICTS):
            raise self._foreign(number)
        made_with = {item.name: about.get(item.name) for item in fields(kind)}
        self._made_with = self._made_with or made_with
        self._compare(made_with, self._made_with)
        named = about.get("forgery")  # older records have none
        forgery = named if isinstance(named, str) else None
        self.done[row[key]] = (status, verdict, forgery)

    def _may_begin(self, line: bytes) -> bool:
        return line.startswith(self._layout.start) or self._layout.start.startswith(line)

    def _compare(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        for name, value in wanted.items():
            if name != "model" and found[name] != value:
                raise self._other(name, found[name], value)

    def bind(self, settings: Settings) -> None:
        """Make the file writable for a run with these settings.

        Raises:
            UsageError: The records in the file were made with other settings.
        """
        if self._bound:
            return
        if self._made_with:
            self._compare(self._made_with, plain(settings))
        os.ftruncate(self._handle, self._size)
        os.lseek(self._handle, self._size, os.SEEK_SET)
        self._bound = True

    def _foreign(self, number: int) -> UsageError:
        return UsageError(
            f"'{self.path}' is not a record file of m2f2 (line {number}).",
            "Choose another --output, or add --overwrite to replace it.",
        )

    def _other(self, name: str, found: Any, wanted: Any) -> UsageError:
        return UsageError(
            f"'{self.path}' was made with {name} {found}, this run has {wanted}.",
            "Choose another --output, repeat the old settings, or add --overwrite to start anew.",
        )

    def append(self, record: Detection | AnswerRow) -> None:
        """Write one record; the first one binds the file to its settings.

        Raises:
            M2F2Error: It cannot be written whole; the file then ends with the record before it.
        """
        self.bind(record.settings)
        self._check_present()
        line = to_line(record.to_dict())
        try:
            written = os.write(self._handle, line)
            while written < len(line):
                written += os.write(self._handle, line[written:])
        except OSError as error:
            os.ftruncate(self._handle, self._size)
            os.lseek(self._handle, self._size, os.SEEK_SET)
            raise _cannot_write(self.path, error) from error
        self._size += len(line)
        forgery = record.forgery if isinstance(record, Detection) else None
        self.done[record.path] = (record.status, record.verdict, forgery)

    def _check_present(self) -> None:
        """Refuse to write into a file that is elsewhere or gone, where nobody would look for it."""
        try:
            there = os.path.samestat(os.stat(self.path), os.fstat(self._handle))
        except OSError:
            there = False
        if not there:
            raise M2F2Error(
                f"'{self.path}' was removed, moved or replaced during the run.",
                "Run the same command again and leave the file where it is.",
            )

    def close(self) -> None:
        """Flush to the disk and close; a new file that was never bound is removed."""
        try:
            os.fsync(self._handle)
            if self._bound:
                self._check_present()
            if self._is_new and not self._bound:
                self.path.unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        finally:
            os.close(self._handle)

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Tally:
    """How many items of a run came out how; ``failed`` are those without a verdict.

    ``forgeries`` counts the fake ones by their kind, where it is named. All include those that an
    earlier, resumed run had recorded, which ``earlier`` counts.
    """

    real: int = 0
    fake: int = 0
    uncertain: int = 0
    failed: int = 0
    earlier: int = 0
    forgeries: dict[str, int] = field(default_factory=dict)

    def count(self, verdict: str | None, forgery: str | None = None) -> None:
        """Add one item, by its verdict and kind of forgery."""
        name = verdict if verdict in VERDICTS else "failed"
        setattr(self, name, getattr(self, name) + 1)
        if forgery is not None:
            self.forgeries[forgery] = self.forgeries.get(forgery, 0) + 1

    def sentence(self) -> str:
        """The counts in words."""
        judged = self.real + self.fake + self.uncertain
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(self.forgeries.items()))
        fake = f"{self.fake} fake ({kinds})" if kinds else f"{self.fake} fake"
        words = f"{judged} judged: {fake}, {self.real} real, {self.uncertain} uncertain"
        if self.failed:
            words += f"; {self.failed} without a verdict"
        if self.earlier:
            words += f" ({self.earlier} of them recorded earlier)"
        return words + "."


class Job(Generic[Record]):
    """One run over items, as an iterator of records; those recorded earlier are left out.

    Args:
        sources: Every item; told apart by ``path``.
        run: Gives the records of some of them, in order.
        settings: Of the run; asked for when there is nothing left to do, so that records of other
            settings are never taken for this run's.
        output: A ``.jsonl`` file, which is resumed, or, of detections, a ``.csv`` file, which is
            written at the end; or None.
        overwrite: Replace ``output`` instead.
        layout: Of the records.

    Attributes:
        sources: Every item.
        remark: What of the folders is no item; None for nothing.
        tally: What came out so far.

    Raises:
        M2F2Error: ``output`` cannot be used.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        run: Callable[..., Iterator[Record]],
        settings: Callable[[], Settings],
        output: Path | None = None,
        overwrite: bool = False,
        layout: Layout = DETECTIONS,
    ) -> None:
        self.sources = sources
        self.remark = sources.remark if isinstance(sources, Sources) else None
        self.tally = Tally()
        self._run, self._settings = run, settings
        self._table: Path | None = None
        self._log: RecordFile | None = None
        if output is None:
            return
        if _is_one_of(output, sources):
            raise UsageError(f"'{output}' is one of the inputs.", "Choose another --output.")
        if layout is DETECTIONS and output.suffix.lower() == ".csv":
            _check_table(output, overwrite)
            self._table = output
        else:
            self._log = open_records(output, overwrite=overwrite, layout=layout)

    def run(self, **how: Any) -> Iterator[Record]:
        """Judge, record and yield every item that had no record yet, in order.

        ``how`` is passed on to the ``run`` that the job was made with.
        """
        written: list[Record] = []
        run = partial(self._run, **how)
        with self._log or nullcontext():
            for record in record_new(self.sources, run, self._settings, self._log, self.tally):
                if self._table is not None:
                    written.append(record)
                yield record
        if self._table is not None:
            atomic_write(self._table, to_csv(written).encode("utf-8", "surrogateescape"))


def record_new(
    sources: Sequence[Source],
    run: Callable[[Sequence[Source]], Iterator[Record]],
    settings: Callable[[], Settings],
    log: RecordFile | None,
    tally: Tally,
) -> Iterator[Record]:
    """``Job.run`` into a file that is opened, and closed by the caller; None keeps no records."""
    done = log.done if log else {}
    left = [source for source in sources if source.path not in done]
    for source in sources:
        if source.path in done:
            tally.earlier += 1
            tally.count(*done[source.path][1:])
    if not left and log is not None:
        log.bind(settings())
    for record in run(left) if left else ():
        if log is not None:
            log.append(record)
        tally.count(record.verdict, record.forgery)
        yield record


def open_records(output: Path, *, overwrite: bool, layout: Layout) -> RecordFile:
    """The file that records go to.

    Raises:
        UsageError: It is no ``.jsonl`` file, or holds something else.
        M2F2Error: It cannot be opened.
    """
    if output.suffix.lower() != ".jsonl":
        ending = ".jsonl or .csv" if layout is DETECTIONS else ".jsonl"
        raise UsageError(
            f"--output must end in {ending}, not '{output.name}'.",
            "For example: --output records.jsonl",
        )
    return RecordFile(output, overwrite=overwrite, layout=layout)


def _is_one_of(output: Path, sources: Sequence[Source]) -> bool:
    try:
        found = os.stat(output)
    except OSError:
        return False
    for source in sources:
        with suppress(OSError, ValueError):
            if os.path.samestat(os.stat(source.path), found):
                return True
    return False


def _check_table(path: Path, overwrite: bool) -> None:
    """Refuse, before the work, a CSV file that cannot be written after it."""
    refuse_special(path)
    if path.exists() and not overwrite:
        raise UsageError(
            f"'{path}' exists; a table is written whole and cannot be resumed.",
            "Add --overwrite, or record into a .jsonl file, which can be resumed.",
        )
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"Cannot write into the folder '{folder}'.", "Choose another --output.")


def _lock(handle: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise M2F2Error(
            f"Another process is writing '{path}'.", "Wait for it, or choose another --output."
        ) from error
    except OSError:  # a file system without locks
        return


def _cannot_write(path: Path, error: OSError) -> M2F2Error:
    return M2F2Error(
        f"Cannot write '{path}': {error.strerror or error}.",
        "Check its folder and the free space; the same command resumes where it stopped.",
    )
