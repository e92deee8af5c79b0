"""How close texts are to reference texts: BLEU-1..4, ROUGE-L and CIDEr by pycocoevalcap.

As published: the raw strings are compared, split at blanks, without the PTB tokeniser and with
upper and lower case apart. METEOR and SPICE are programs in Java, run by pycocoevalcap in a process
of its own that can be stopped, when Java and their data are there. Nothing is ever downloaded.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from m2f2cli.errors import MissingExtraError

ORDER = 4  # longest n-gram
FIGURES = (*(f"bleu_{n + 1}" for n in range(ORDER)), "bleu", "rouge_l", "cider")
# pycocoevalcap's guards against a division by zero; part of the published numbers.
_SMALL, _TINY = 1e-9, 1e-15
TIMEOUT = 600.0  # seconds for each Java program
# What each needs inside pycocoevalcap: file, and what is said where it is missing.
JAVA_PROGRAMS = {
    "meteor": {
        "meteor/meteor-1.5.jar": "pycocoevalcap has no file 'meteor-1.5.jar'",
        "meteor/data/paraphrase-en.gz": "its paraphrase table is not there",
    },
    "spice": {
        "spice/spice-1.0.jar": "pycocoevalcap has no file 'spice-1.0.jar'",
        # Without this file pycocoevalcap would fetch half a gigabyte.
        "spice/lib/stanford-corenlp-3.6.0.jar": "Stanford CoreNLP 3.6.0 and its models are not in "
        "pycocoevalcap/spice/lib",
    },
}


@dataclass(frozen=True)
class TextScores:
    """What each answer adds to the figures."""

    # Float (N, 2 + 2 * ORDER): words in the answer; words in the reference of the closest length;
    # n-grams in the answer for n = 1..ORDER; those of them that a reference has
    bleu: np.ndarray
    rouge_l: np.ndarray  # float (N,) in [0, 1]
    # Float (N,) in [0, 10]; how rare an n-gram is, is counted over all N references
    cider: np.ndarray

    def measure(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """``FIGURES``, (R,) each, of answers that count ``weights`` (R, N) times; NaN for none."""
        total = weights.sum(axis=-1)
        bleus = corpus_bleu(weights @ self.bleu)
        found = {f"bleu_{n + 1}": np.where(total > 0, bleus[..., n], np.nan) for n in range(ORDER)}
        with np.errstate(invalid="ignore"):
            return {
                **found,
                "bleu": np.where(total > 0, bleus.mean(axis=-1), np.nan),
                "rouge_l": weights @ self.rouge_l / total,
                "cider": weights @ self.cider / total,
            }


def corpus_bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU-1 to BLEU-4 of a corpus, (..., ORDER), from added-up rows of ``TextScores.bleu``."""
    words, reference = sums[..., :1], sums[..., 1:2]
    guessed, right = sums[..., 2 : 2 + ORDER], sums[..., 2 + ORDER :]
    precision = np.cumprod((right + _TINY) / (guessed + _SMALL), axis=-1)
    mean = precision ** (1 / np.arange(1, ORDER + 1))
    ratio = (words + _TINY) / (reference + _SMALL)
    return mean * np.exp(np.minimum(0.0, 1 - 1 / ratio))


def score_texts(references: Mapping[str, Sequence[str]], answers: Mapping[str, str]) -> TextScores:
    """Compare answers with references.

    Args:
        references: Key to one or more texts; rows come in their order.
        answers: The same keys; marks of the tokenizer already removed.

    Raises:
        MissingExtraError: pycocoevalcap is not installed.
    """
    try:
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise MissingExtraError("pycocoevalcap", "eval", "Scoring explanations") from error
    if not any(text.split() for texts in references.values() for text in texts):
        nothing = np.zeros(len(references))
        return TextScores(np.zeros((len(references), 2 + 2 * ORDER)), nothing, nothing)
    truth = {key: list(texts) for key, texts in references.items()}
    found = {key: [answers[key]] for key in references}
    scorer = BleuScorer(n=ORDER)
    for key, texts in truth.items():
        scorer += (found[key][0], texts)
    _, rouge_l = Rouge().compute_score(truth, found)
    _, cider = Cider(n=ORDER).compute_score(truth, found)
    return TextScores(np.array([_bleu_row(test) for test in scorer.ctest]), rouge_l, cider)


def _bleu_row(test: Mapping[str, Any]) -> list[float]:
    words = test["testlen"]
    closest = min((abs(length - words), length) for length in test["reflen"])[1]
    return [words, closest, *test["guess"], *test["correct"]]


def java_score(
    program: str,
    references: Mapping[str, Sequence[str]],
    answers: Mapping[str, str],
    timeout: float = TIMEOUT,
) -> tuple[float | None, str | None]:
    """METEOR 1.5 or SPICE of a whole set of answers, or why there is none.

    Args:
        program: A key of ``JAVA_PROGRAMS``.
        references: Key to one or more texts, at least one key.
        answers: The same keys.
        timeout: Seconds that it may take.

    Returns:
        The value, None when it did not run; and why it did not.
    """
    if shutil.which("java") is None:
        return None, "skipped: there is no program 'java'"
    package = find_spec("pycocoevalcap")
    root = Path(next(iter(package.submodule_search_locations or ()))) if package else Path()
    for file, missing in JAVA_PROGRAMS[program].items():
        if not (root / file).is_file():
            return None, f"skipped: {missing}"
    texts = (
        {key: [_one_field(text) for text in found] for key, found in references.items()},
        {key: [_one_field(answers[key])] for key in references},
    )
    with tempfile.TemporaryDirectory(prefix="m2f2-java-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, program, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            told, complaints = process.communicate(json.dumps(texts).encode(), timeout)
        except subprocess.TimeoutExpired:
            return None, f"skipped: not done within {timeout:g} seconds"
        finally:
            _stop(process)
    last = (complaints.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
    try:
        value, reason = json.loads(told.splitlines()[-1])
    except (ValueError, IndexError):
        return None, f"skipped: java ended early ({last})"
    if reason is None and not math.isfinite(value):
        reason = "it gave no number"
    return (value, None) if reason is None else (None, f"skipped: {reason}")


def _one_field(text: str) -> str:
    """A text as one field of METEOR's protocol: one line, no separator inside."""
    return " ".join(text.replace("|||", " ").split())


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and the Java program that it started."""
    with suppress(ProcessLookupError, PermissionError):
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()


def _run_java(program: str, folder: str) -> None:
    """In a process of its own: texts from stdin, [value, why there is none] to stdout."""
    references, answers = json.load(sys.stdin)
    value, reason = None, None
    if program == "spice":
        from pycocoevalcap.spice import spice

        spice.TEMP_DIR = spice.CACHE_DIR = folder  # nothing is written into the package
        value = float(spice.Spice().compute_score(references, answers)[0])
    else:
        from pycocoevalcap.meteor.meteor import Meteor

        meteor = Meteor()
        java = meteor.meteor_p
        try:
            value = float(meteor.compute_score(references, answers)[0])
        except (OSError, ValueError) as error:
            meteor.lock.release()
            java.kill()
            with suppress(OSError):
                java.stdin.close()
            said = (java.stderr.read().decode(errors="replace").strip().splitlines() or [""])[-1]
            reason = f"java ended early ({said or 'no message'})"
            if isinstance(error, ValueError) and not str(error).endswith("b''"):
                reason = f"its output was not understood ({error!r})"
    sys.stdout.write("\n" + json.dumps([value, reason]) + "\n")


if __name__ == "__main__":
    _run_java(*sys.argv[1:])
