"""Drawing words by chance, so that an answer depends on nothing but seed, face and question."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, TopPLogitsWarper


class SeededDraws(LogitsProcessor):
    """Draws the next token of each row with a generator of its own.

    The largest of scores with Gumbel noise added is a draw from their softmax, so the generation
    around it takes the likeliest token and needs no generator that rows would share.

    Args:
        seeds: One a row.
        temperature: Divides the scores; above 0.
        top_p: Share of the probability that the likeliest tokens drawn from have, in (0, 1].
    """

    def __init__(self, seeds: Sequence[int], *, temperature: float, top_p: float) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature = temperature
        self._keep_likely = TopPLogitsWarper(top_p)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores (B, V) with noise added, -inf where a token is not to be drawn."""
        likely = self._keep_likely(input_ids, scores / self._temperature)
        width = scores.shape[-1]
        noise = [torch.empty(width).exponential_(generator=g).log() for g in self._generators]
        result: Any = likely - torch.stack(noise).to(likely)
        return result


def seed_of(seed: int, digest: bytes, question: str) -> int:
    """The seed of one answer.

    Args:
        seed: Of the run.
        digest: Of the crop's pixels.
        question: The whole prompt.
    """
    text = f"{seed}\0".encode() + digest + question.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
