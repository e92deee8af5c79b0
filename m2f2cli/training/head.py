"""The head of a detector fitted to new pictures before anything else moves.

A trained detector's features often suffice for pictures of another origin; its head does not. A
linear head on fixed features is a convex problem, solved in seconds; tuning the rest from there
needs few and small steps (linear probing, then fine-tuning: Kumar et al., ICLR 2022, arXiv
2202.10054).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch.nn import functional

from m2f2cli.models.detector import Detector

_RIDGE = 1e-3  # weight of the squared change of the head, for features of unit variance
_ITERATIONS = 100


def fit_head(detector: Detector, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
    """Fit ``detector.head`` in place, real and fake weighted alike, close to what it was.

    Args:
        detector: Its other parts stay as they are; their features are computed once.
        batches: ``pixel_values`` (B, 3, S, S), ``target`` (B,) float32 in [0, 1] and, where there
            are logits for kinds, ``kind`` (B, 1 + K) as for ``Objective``; at least one of either
            class in all.
    """
    was_training = detector.training
    detector.eval()
    seen: list[torch.Tensor] = []
    wanted: list[torch.Tensor] = []
    kinds: list[torch.Tensor] = []
    with torch.no_grad():
        for batch in batches:
            seen.append(detector(batch["pixel_values"]).features.float())
            wanted.append(batch["target"])
            if detector.config.kinds and "kind" in batch:
                kinds.append(batch["kind"])
    features, target = torch.cat(seen), torch.cat(wanted)
    _solve(detector, features, target, torch.cat(kinds) if kinds else None)
    detector.train(was_training)


def _solve(
    detector: Detector,
    features: torch.Tensor,
    target: torch.Tensor,
    kinds: torch.Tensor | None,
) -> None:
    head = detector.head
    start = head.weight.detach().clone()
    spread = features.var(0)
    share = target.mean().clamp(1e-3, 1 - 1e-3)
    weight = target / share + (1 - target) / (1 - share)
    weight = weight / weight.sum()
    moving = {p: p.requires_grad for p in head.parameters()}
    head.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        head.parameters(), max_iter=_ITERATIONS, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits, kind_logits = detector.classify(features)
        both = torch.stack([1 - target, target], dim=1)
        value = -(weight[:, None] * both * logits.log_softmax(1)).sum()
        if kind_logits is not None and kinds is not None:
            each = functional.binary_cross_entropy_with_logits(
                kind_logits, kinds[:, 1:], reduction="none"
            )
            value = value + (weight * kinds.sum(1) * each.mean(1)).sum()
        value = value + _RIDGE * (spread * (head.weight - start).square()).sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    optimizer.zero_grad()
    for parameter, moved in moving.items():
        parameter.requires_grad_(moved)
