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

RIDGES = (1e-3, 1e-2, 1e-1)  # weights of the squared change of the head, for unit variance
_ITERATIONS = 100


@torch.no_grad()
def collect(
    detector: Detector, batches: Iterable[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The features (N, F) of batches of pictures, float32 on the CPU, and whatever goes with them.

    The detector is put in evaluation mode.
    """
    detector.eval()
    found: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        rest = {name: tensor for name, tensor in batch.items() if name != "pixel_values"}
        features = detector(batch["pixel_values"]).features.float()
        for name, tensor in {**rest, "features": features}.items():
            if tensor.ndim:
                found.setdefault(name, []).append(tensor.cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def fit_head(
    detector: Detector,
    batches: Iterable[Mapping[str, torch.Tensor]],
    held: Iterable[Mapping[str, torch.Tensor]],
) -> float:
    """Fit ``detector.head`` in place, real and fake weighted alike, close to what it was.

    How close is chosen by the loss on held-out pictures.

    Args:
        detector: Its other parts stay as they are; their features are computed once.
        batches: ``pixel_values`` (B, 3, S, S), ``target`` (B,) float32 in [0, 1] and, where there
            are logits for kinds, ``kind`` (B, 1 + K) as for ``Objective``; at least one of either
            class in all.
        held: ``pixel_values`` and ``labels`` (B,) int64, 0 real and 1 fake.

    Returns:
        The weight of ``RIDGES`` that was chosen.
    """
    was_training = detector.training
    seen, other = collect(detector, batches), collect(detector, held)
    head, device = detector.head, detector.device
    with torch.no_grad():
        inputs, held_inputs = (
            detector.hidden(found["features"].to(device)).cpu() for found in (seen, other)
        )
    head.cpu()
    start = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    tried: list[tuple[float, float, dict[str, torch.Tensor]]] = []
    for ridge in RIDGES:
        head.load_state_dict(start)
        _solve(detector, inputs, seen["target"], seen.get("kind"), ridge)
        with torch.no_grad():
            logits, _ = detector.to_logits(head(held_inputs))
        weights = 1 / torch.bincount(other["labels"], minlength=2).clamp_min(1).float()
        loss = float(functional.cross_entropy(logits, other["labels"], weights))
        tried.append((loss, ridge, {n: t.clone() for n, t in head.state_dict().items()}))
    _, chosen, fitted = min(tried, key=lambda entry: entry[:2])
    head.load_state_dict(fitted)
    head.to(device)
    detector.train(was_training)
    return chosen


def _solve(
    detector: Detector,
    inputs: torch.Tensor,
    target: torch.Tensor,
    kinds: torch.Tensor | None,
    ridge: float,
) -> None:
    head = detector.head
    start = head.weight.detach().clone()
    spread = inputs.var(0)
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
        logits, kind_logits = detector.to_logits(head(inputs))
        both = torch.stack([1 - target, target], dim=1)
        value = -(weight[:, None] * both * logits.log_softmax(1)).sum()
        if kind_logits is not None and kinds is not None:
            each = functional.binary_cross_entropy_with_logits(
                kind_logits, kinds[:, 1:], reduction="none"
            )
            value = value + (weight * kinds.sum(1) * each.mean(1)).sum()
        value = value + ridge * (spread * (head.weight - start).square()).sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    optimizer.zero_grad()
    for parameter, moved in moving.items():
        parameter.requires_grad_(moved)
