"""How close texts are to reference texts: BLEU-1..4, ROUGE-L and CIDEr by pycocoevalcap.

As published: the raw strings are compared, split at blanks, without the PTB tokeniser and with
upper and lower case apart. METEOR and SPICE are programs in Java; see ``evaluation.java``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from m2f2cli.errors import MissingExtraError

ORDER = 4  # longest n-gram
TOKENISER = "none: raw strings split at blanks, case kept"
# pycocoevalcap's guards against a division by zero; part of the published numbers.
_SMALL, _TINY = 1e-9, 1e-15


@dataclass(frozen=True)
class TextScores:
    """What each answer adds to the figures.

    Attributes:
        bleu: float (N, 2 + 2 * ORDER): words in the answer; words in the reference of the closest
            length; n-grams in the answer for n = 1..ORDER; those of them that a reference has.
        rouge_l: float (N,) in [0, 1].
        cider: float (N,) in [0, 10]; how rare an n-gram is, is counted over all N references.
    """

    bleu: np.ndarray
    rouge_l: np.ndarray
    cider: np.ndarray

    def measure(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """The figures of weighted answers.

        Args:
            weights: (R, N), how often each answer counts.

        Returns:
            ``bleu_1`` to ``bleu_4``, their mean ``bleu``, ``rouge_l`` and ``cider``, (R,) each;
            NaN where nothing is counted.
        """
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
    """BLEU of a corpus from its answers' added-up counts.

    Args:
        sums: (..., 2 + 2 * ORDER), columns as in ``TextScores.bleu``.

    Returns:
        (..., ORDER), BLEU-1 first, with the brevity penalty.
    """
    words, reference = sums[..., :1], sums[..., 1:2]
    guessed, right = sums[..., 2 : 2 + ORDER], sums[..., 2 + ORDER :]
    precision = np.cumprod((right + _TINY) / (guessed + _SMALL), axis=-1)
    mean = precision ** (1 / np.arange(1, ORDER + 1))
    ratio = (words + _TINY) / (reference + _SMALL)
    return mean * np.exp(np.minimum(0.0, 1 - 1 / ratio))


def score_texts(references: Mapping[str, Sequence[str]], answers: Mapping[str, str]) -> TextScores:
    """Compare answers with references.

    Args:
        references: Key to one or more texts.
        answers: The same keys, in any order; marks of the tokeniser already removed.

    Returns:
        Rows in the order of ``references``.

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
