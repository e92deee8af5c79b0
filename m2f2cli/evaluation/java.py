"""METEOR and SPICE: Java programs inside pycocoevalcap, run when Java and their data are there.

Nothing is ever downloaded, and pycocoevalcap's own wrappers are not used: they would fetch half a
gigabyte, print, and wait without end.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

TIMEOUT = 600.0  # seconds for each program
_METEOR = ("meteor", "meteor-1.5.jar")
_SPICE = ("spice", "spice-1.0.jar")
_CORENLP = "stanford-corenlp-3.6.0*.jar"

References = Mapping[str, Sequence[str]]


class JavaScore(NamedTuple):
    """What a Java program gave.

    Attributes:
        value: Of the whole set; None when it did not run.
        reason: Why it did not; None otherwise.
    """

    value: float | None
    reason: str | None = None


class _Skipped(Exception):
    pass


def meteor(
    references: References, answers: Mapping[str, str], timeout: float = TIMEOUT
) -> JavaScore:
    """METEOR 1.5 of a set of answers (its own normaliser on, English).

    Args:
        references: Key to one or more texts, at least one key.
        answers: The same keys.
        timeout: Seconds that it may take.
    """
    return _score(_run_meteor, references, answers, timeout)


def spice(
    references: References, answers: Mapping[str, str], timeout: float = TIMEOUT
) -> JavaScore:
    """SPICE of a set of answers: the mean F-score of their scene graphs.

    Args:
        references: Key to one or more texts, at least one key.
        answers: The same keys.
        timeout: Seconds that it may take.
    """
    return _score(_run_spice, references, answers, timeout)


def _score(
    run: Callable[[References, Mapping[str, str], float], float],
    references: References,
    answers: Mapping[str, str],
    timeout: float,
) -> JavaScore:
    try:
        value = run(references, answers, timeout)
    except subprocess.TimeoutExpired:
        return JavaScore(None, f"skipped: not done within {timeout:g} seconds")
    except (_Skipped, OSError) as error:
        return JavaScore(None, f"skipped: {error}")
    except (ValueError, KeyError, TypeError) as error:
        return JavaScore(None, f"skipped: its output was not understood ({error!r})")
    if not math.isfinite(value):
        return JavaScore(None, "skipped: it gave no number")
    return JavaScore(value)


def _program(name: tuple[str, str]) -> tuple[str, Path]:
    java = shutil.which("java")
    if java is None:
        raise _Skipped("there is no program 'java'")
    package = find_spec("pycocoevalcap")
    folder = Path(next(iter(package.submodule_search_locations or ()))) if package else Path()
    jar = folder.joinpath(*name)
    if not jar.is_file():
        raise _Skipped(f"pycocoevalcap has no file '{name[1]}'")
    return java, jar


def _last_line(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"


def _run_meteor(references: References, answers: Mapping[str, str], timeout: float) -> float:
    java, jar = _program(_METEOR)
    if not (jar.parent / "data" / "paraphrase-en.gz").is_file():
        raise _Skipped("its paraphrase table is not there")
    command = [java, "-Xmx2G", "-jar", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"]
    # One line asked, one line answered, so that neither side waits for a full pipe.
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            command,
            cwd=jar.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            encoding="utf-8",
        )
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(timeout, stop)
        timer.start()
        try:
            # Closing the pipes may fail as well: what could not be written is still in the buffer.
            with process:
                try:
                    return _ask_meteor(process, references, answers)
                finally:
                    process.kill()
        except (OSError, EOFError):
            if late.is_set():
                raise subprocess.TimeoutExpired(command, timeout) from None
            complaints.seek(0)
            raise _Skipped(f"java ended early ({_last_line(complaints.read())})") from None
        finally:
            timer.cancel()


def _ask_meteor(
    process: subprocess.Popen[str], references: References, answers: Mapping[str, str]
) -> float:
    asked, answered = process.stdin, process.stdout
    if asked is None or answered is None:
        raise OSError("METEOR has no pipes")

    def ask(*fields: str) -> None:
        asked.write(" ||| ".join(fields) + "\n")
        asked.flush()

    def answer() -> str:
        if not (line := answered.readline()):
            raise EOFError
        return line.strip()

    counted = []
    for key, texts in references.items():
        ask("SCORE", *map(_field, texts), _field(answers[key]))
        counted.append(answer())
    ask("EVAL", *counted)
    return [float(answer()) for _ in range(len(counted) + 1)][-1]  # the last is of the whole set


def _field(text: str) -> str:
    """A text as one field of METEOR's protocol: one line, no separator inside."""
    return " ".join(text.replace("|||", " ").split())


def _run_spice(references: References, answers: Mapping[str, str], timeout: float) -> float:
    java, jar = _program(_SPICE)
    if not list(jar.parent.joinpath("lib").glob(_CORENLP)):
        raise _Skipped("Stanford CoreNLP 3.6.0 and its models are not in pycocoevalcap/spice/lib")
    rows = [
        {"image_id": key, "test": answers[key], "refs": list(texts)}
        for key, texts in references.items()
    ]
    with tempfile.TemporaryDirectory(prefix="m2f2-spice-") as folder:
        asked, found = Path(folder, "asked.json"), Path(folder, "found.json")
        asked.write_text(json.dumps(rows), encoding="utf-8")
        command = [java, "-Xmx8G", "-jar", jar.name, str(asked), "-out", str(found), "-silent"]
        done = subprocess.run(command, cwd=jar.parent, capture_output=True, timeout=timeout)
        if done.returncode:
            raise _Skipped(f"java ended early ({_last_line(done.stderr)})")
        scores = [float(row["scores"]["All"]["f"]) for row in json.loads(found.read_text())]
    return math.fsum(scores) / len(scores)
