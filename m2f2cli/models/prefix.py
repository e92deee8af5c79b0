"""Many questions about a picture: what they have in common is computed once.

The prompts about one picture begin alike: the system's words, the picture's patches and mostly
the detector's answer. Their keys and values are computed once a picture, pictures side by side
with padding on the left, and each question goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from transformers import DynamicCache

from m2f2cli.errors import UsageError
from m2f2cli.models.explainer import CACHE, Explainer, PictureFeatures


def common_start(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, leaving each at least one of its own."""
    shortest = min(map(len, prompts))
    same = takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    return min(sum(1 for _ in same), shortest - 1)


class SharedPrompts:
    """Prompts in groups, one group a picture (or a few), each group's beginning computed once.

    Args:
        model: An explainer.
        groups: For each group its prompts as token ids, as ``ExplainerProcessor.tokens`` gives
            them; all prompts of a group are about the same pictures.
        features: For each group its pictures, as ``Explainer.encode_pictures`` gives them; None
            where there is none.

    Raises:
        UsageError: A group is empty, or a prompt's places and its pictures do not match.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Explainer,
        groups: Sequence[Sequence[Sequence[int]]],
        features: Sequence[PictureFeatures | None],
    ) -> None:
        if not groups or not all(groups) or len(groups) != len(features):
            raise UsageError("Each picture needs at least one question.")
        self._model = model
        self._prompts = [
            [model.embed(torch.tensor([ids], device=model.device), seen)[0] for ids in prompts]
            for prompts, seen in zip(groups, features, strict=True)
        ]
        self.starts = [common_start(prompts) for prompts in groups]
        beginnings = [
            prompts[0][:start] for prompts, start in zip(self._prompts, self.starts, strict=True)
        ]
        states, self._mask = _pad_left(beginnings)
        self._cache = DynamicCache()
        if states.shape[1]:
            model(
                inputs_embeds=states,
                attention_mask=self._mask,
                position_ids=(self._mask.cumsum(dim=1) - 1).clamp(min=0),
                use_cache=True,
                logits_to_keep=1,
                **{CACHE: self._cache},
            )
        self._states = states

    def __len__(self) -> int:
        """How many prompts there are."""
        return sum(map(len, self._prompts))

    @torch.no_grad()
    def ask(
        self, which: Sequence[tuple[int, int]] | None = None, **options: Any
    ) -> list[list[int]]:
        """Answer prompts, all at once.

        Args:
            which: (group, number within the group) of each prompt to answer; None means all, in
                order.
            options: Those of ``GenerationMixin.generate``: ``max_new_tokens``, ``do_sample``, ….

        Returns:
            The new token ids of each, without end-of-sequence token and padding; with
            ``num_return_sequences`` that many for each.
        """
        if which is None:
            which = [(g, q) for g, prompts in enumerate(self._prompts) for q in range(len(prompts))]
        rest, mask = _pad_left([self._prompts[g][q][self.starts[g] :] for g, q in which])
        rows = torch.tensor([g for g, _ in which], device=mask.device)
        # generate repeats its inputs for beams and alternatives, but no cache.
        copies = max(options.get(n) or 1 for n in ("num_beams", "num_return_sequences"))
        cache, kept = DynamicCache(), rows.repeat_interleave(copies)
        layers: Any = self._cache.layers
        for number, layer in enumerate(layers):
            cache.update(layer.keys[kept], layer.values[kept], number)
        out = self._model.generate(
            inputs_embeds=torch.cat([self._states[rows], rest], dim=1),
            attention_mask=torch.cat([self._mask[rows], mask], dim=1),
            **{CACHE: cache, **options},
        )
        ends = self._model.end_tokens()
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        return [list(takewhile(lambda token: token not in ends, s)) for s in sequences.tolist()]


def _pad_left(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (t_i, W) to (B, T, W) with zeros in front, and the mask (B, T) of what is no padding."""
    longest = max(map(len, rows))
    states = rows[0].new_zeros(len(rows), longest, rows[0].shape[-1])
    mask = torch.zeros(len(rows), longest, dtype=torch.long, device=states.device)
    for number, row in enumerate(rows):
        states[number, longest - len(row) :] = row
        mask[number, longest - len(row) :] = 1
    return states, mask
