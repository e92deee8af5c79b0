"""What a merge does to every tensor of its base: copy, cast, replace or fold.

All arithmetic is float32, rounded once. Values are read block by block when they are written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2f2cli.checkpoints import io, keymaps
from m2f2cli.checkpoints.delta_reading import Delta, Pair
from m2f2cli.checkpoints.io import LazyTensor, Weights, open_weights, workers
from m2f2cli.errors import CheckpointError

if TYPE_CHECKING:
    import torch

AUTO = "auto"
COPIED, _CAST, _REPLACED, _FOLDED = "copied", "rounded to another type", "replaced", "folded"
_HINTS = {
    keymaps.EXPLAINER: "Import it first: m2f2 import DIR --output DIR",
    keymaps.LLAVA: "Build an explainer from it first: m2f2 init-llava",
    keymaps.LLAVA_HF: "Build an explainer from it first: m2f2 init-llava",
    keymaps.DELTA: "Give it as --delta, and the checkpoint it was trained on as --base.",
    keymaps.PEFT: "Give it as --delta, and the checkpoint it was trained on as --base.",
}
# Resident memory of a process that has loaded torch, and a worker's blocks in flight.
_PROCESS = 250_000_000
_BLOCKS = 6


@dataclass(frozen=True)
class Row:
    """What becomes of one tensor of the base.

    Args:
        name: The tensor.
        action: In words.
        before: As it is in the base.
        result: As it will be.
        changes: What the deltas say of it, in order: a new tensor, or a pair to add.
    """

    name: str
    action: str
    before: LazyTensor
    result: LazyTensor
    changes: tuple[LazyTensor | Pair, ...] = ()


def open_base(path: Path) -> Weights:
    """Open the checkpoint to merge into.

    Raises:
        CheckpointError: It is missing, incomplete or no checkpoint of ours.
    """
    found = open_weights(path)
    if found.kind not in (keymaps.OUR_EXPLAINER, keymaps.DETECTOR) or not found.config:
        hint = _HINTS.get(found.kind, "Give a checkpoint folder of an explainer.")
        raise CheckpointError(f"'{path}' is no checkpoint to merge into but: {found.kind}.", hint)
    return found


def plan_rows(base: Weights, deltas: Sequence[Delta], dtype: str = AUTO) -> dict[str, Row]:
    """What becomes of every tensor of the base.

    Args:
        base: The checkpoint.
        deltas: In the order they are applied.
        dtype: A torch dtype's name for all but the detector; ``auto`` keeps each tensor's.

    Raises:
        CheckpointError: A tensor of a delta has no counterpart, or one of another shape.
    """
    for delta in deltas:
        _check_fit(base, delta)
    rows = {}
    for name, stored in base.tensors.items():
        before = stored
        changes: list[LazyTensor | Pair] = []
        for delta in deltas:
            changes += [source[name] for source in (delta.whole, delta.pairs) if name in source]
        wanted = _wanted(name, before, dtype)
        result = merged(before, changes, wanted, what=f"The tensor '{name}'")
        rows[name] = Row(name, _action(before, changes, wanted), before, result, tuple(changes))
    return rows


def _wanted(name: str, before: LazyTensor, dtype: str) -> str:
    import torch

    keeps = dtype == AUTO or name.startswith(keymaps.DETECTOR_PART)
    floating = getattr(torch, before.dtype).is_floating_point
    return before.dtype if keeps or not floating else dtype


def _action(before: LazyTensor, changes: Sequence[LazyTensor | Pair], wanted: str) -> str:
    if pairs_of(changes):
        return _FOLDED
    if changes:
        return _REPLACED
    return COPIED if before.dtype == wanted else _CAST


def merged(
    before: LazyTensor, changes: Sequence[LazyTensor | Pair], dtype: str, *, what: str
) -> LazyTensor:
    """A tensor after its changes, rounded once.

    Args:
        before: The base's.
        changes: New tensors that take its place, and pairs that are added, in order.
        dtype: A torch dtype's name.
        what: The tensor, for messages.

    Raises:
        CheckpointError: On reading, when a value is out of the range of ``dtype``.
    """
    start, pairs = start_of(before, changes), pairs_of(changes)
    if pairs:
        start = _folded(start, pairs, keep=dtype == "float32")
    return start.cast(dtype, what=what)


def start_of(before: LazyTensor, changes: Sequence[LazyTensor | Pair]) -> LazyTensor:
    """What pairs are added to: the last tensor that takes the base's place, or the base's."""
    return next((c for c in reversed(changes) if not isinstance(c, Pair)), before)


def pairs_of(changes: Sequence[LazyTensor | Pair]) -> list[Pair]:
    """The pairs that are added: those after the last tensor that takes the base's place."""
    last = max((n for n, c in enumerate(changes, start=1) if not isinstance(c, Pair)), default=0)
    return [change for change in changes[last:] if isinstance(change, Pair)]


def _folded(start: LazyTensor, pairs: Sequence[Pair], *, keep: bool) -> LazyTensor:
    """A matrix plus the products of its pairs, in float32.

    Args:
        start: The matrix.
        pairs: What is added.
        keep: Blocks stay as they are. Otherwise each takes the memory of the one before, which is
            faster where they are rounded at once.
    """
    columns = start.shape[1]

    def blocks() -> Iterator[torch.Tensor]:
        import torch

        factors = [(pair.scale * values(pair.up), values(pair.down)) for pair in pairs]
        room = torch.empty(0)
        begin = 0
        for block in start.blocks():
            end = begin + block.numel()
            # The rows that the block touches; of the first and the last only a part is used.
            first, last = begin // columns, -(-end // columns)
            count = (last - first) * columns
            if keep or room.numel() < count:
                room = torch.empty(count + columns)
            rows = room[:count].view(-1, columns)
            used = room[begin - first * columns : end - first * columns]
            used.copy_(block)
            for up, down in factors:
                rows.addmm_(up[first:last], down)
            yield used
            begin = end

    return replace(start, dtype="float32", blocks=blocks)


def values(stream: LazyTensor) -> torch.Tensor:
    """A whole tensor in float32."""
    import torch

    return torch.cat([block.float() for block in stream.blocks()]).reshape(stream.shape)


def _check_fit(base: Weights, delta: Delta) -> None:
    """Refuse a delta that has no place for one of its tensors, or lacks a part of a module."""
    faults = []
    changed = {**{name: t.shape for name, t in delta.whole.items()}, **_shapes(delta.pairs)}
    if extra := [name for name in changed if name not in base.tensors]:
        faults.append(f"{len(extra)} have no place in it: {io.name_some(extra)}")
    wrong = [
        f"{name} is {list(shape)}, not {list(base.tensors[name].shape)}"
        for name, shape in changed.items()
        if name in base.tensors and tuple(shape) != tuple(base.tensors[name].shape)
    ]
    if wrong:
        faults.append(f"{len(wrong)} of the wrong shape: {io.name_some(wrong)}")
    retyped = [
        name
        for name, tensor in delta.whole.items()
        if name in base.tensors and not _alike(tensor.dtype, base.tensors[name].dtype)
    ]
    if retyped:
        faults.append(f"{len(retyped)} of another kind of number: {io.name_some(retyped)}")
    absent = [
        name
        for module in delta.modules
        for name in base.tensors
        if name.startswith(f"{module}.") and name not in delta.whole
    ]
    if absent:
        faults.append(f"{len(absent)} missing: {io.name_some(absent)}")
    if faults:
        raise CheckpointError(
            f"The delta '{delta.path}' does not fit '{base.path}': of its tensors "
            f"{'; '.join(faults)}.",
            "It belongs to another model, or is incomplete; m2f2 info PATH says what each is.",
        )


def _shapes(pairs: Mapping[str, Pair]) -> dict[str, tuple[int, ...]]:
    return {name: (pair.up.shape[0], pair.down.shape[1]) for name, pair in pairs.items()}


def _alike(first: str, second: str) -> bool:
    import torch

    one, other = getattr(torch, first), getattr(torch, second)
    return first == second or (one.is_floating_point and other.is_floating_point)


def summary(rows: Mapping[str, Row]) -> list[dict[str, Any]]:
    """How many tensors, values and bytes are copied, cast, replaced and folded."""
    found = []
    for action in (COPIED, _CAST, _REPLACED, _FOLDED):
        group = [row.result for row in rows.values() if row.action == action]
        if group:
            found.append(
                {
                    "action": action,
                    "tensors": len(group),
                    "parameters": sum(stream.size for stream in group),
                    "bytes": sum(stream.nbytes for stream in group),
                }
            )
    return found


def peak_memory(rows: Mapping[str, Row]) -> int:
    """Bytes a merge needs at most, by estimate: the process; each worker's pairs and blocks."""
    largest = max(
        (
            sum(c.up.size + c.down.size for c in row.changes if isinstance(c, Pair))
            for row in rows.values()
        ),
        default=0,
    )
    # Factors are held in float32 beside what they are read from; a block also in float32.
    return _PROCESS + workers() * (12 * largest + 8 * _BLOCKS * io.BLOCK)
