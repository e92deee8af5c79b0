"""Deltas merged into a checkpoint, tensor by tensor; the result appears whole or not at all.

Every tensor of the base is copied, rounded to another type, replaced, or gets the products of an
adapter added. Arithmetic is float32, rounded once. Memory does not grow with the model: each thread
reads, changes, hashes and writes a block of values before the next. Nothing is kept of a run that
was killed; the next one begins anew and clears its traces.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2f2cli import files as atomic
from m2f2cli.checkpoints import io, keymaps
from m2f2cli.checkpoints.adapters import Delta, Pair, open_delta
from m2f2cli.checkpoints.io import LazyTensor, Weights
from m2f2cli.environment import library_versions
from m2f2cli.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import torch

AUTO = "auto"
DTYPES = (AUTO, "float32", "bfloat16", "float16")
COPIED, CAST, REPLACED, FOLDED = "copied", "rounded to another type", "replaced", "folded"
# Files of the base that go along as they are: tokenizer, preprocessor, generation settings.
_COMPANIONS = (".json", ".model", ".txt", ".jinja")
_OWN = ("config.json", atomic.MARK, "adapter_config.json", *io.INDICES)
_AS_DELTA = "Give it as --delta, and the checkpoint it was trained on as --base."
_HINTS = {
    keymaps.EXPLAINER: "Import it first: m2f2 import DIR --output DIR",
    keymaps.LLAVA: "Build an explainer from it first: m2f2 init-llava",
    keymaps.LLAVA_HF: "Build an explainer from it first: m2f2 init-llava",
    keymaps.DELTA: _AS_DELTA,
    keymaps.PEFT: _AS_DELTA,
}
# Resident memory of a process that has loaded torch, and a worker's blocks in flight.
_PROCESS = 250_000_000
_BLOCKS = 6


@dataclass(frozen=True)
class Row:
    """What becomes of one tensor of the base.

    Args:
        name: The tensor.
        before: As it is in the base.
        changes: What the deltas say of it, in order: a tensor in its place, or a pair to add.
        dtype: The name of the torch dtype it will have.
    """

    name: str
    before: LazyTensor
    changes: tuple[LazyTensor | Pair, ...]
    dtype: str

    @property
    def start(self) -> LazyTensor:
        """What pairs are added to: the last tensor that takes the base's place, or the base's."""
        return next((c for c in reversed(self.changes) if isinstance(c, LazyTensor)), self.before)

    @property
    def pairs(self) -> list[Pair]:
        """The pairs that are added: those after the last tensor that takes the base's place."""
        found: list[Pair] = []
        for change in self.changes:
            found = [*found, change] if isinstance(change, Pair) else []
        return found

    @property
    def action(self) -> str:
        """In words."""
        if self.changes:
            return FOLDED if self.pairs else REPLACED
        return COPIED if self.before.dtype == self.dtype else CAST

    @property
    def result(self) -> LazyTensor:
        """The tensor as it will be; a value out of the range of its type is an error on reading."""
        start = self.start
        if self.pairs:
            start = LazyTensor(start.shape, "float32", self._fold)
        return start.cast(self.dtype, what=f"The tensor '{self.name}'")

    def _fold(self) -> Iterator[torch.Tensor]:
        """The matrix plus the products of its pairs, in float32, block by block.

        A block that is rounded at once takes the memory of the one before, which is faster.
        """
        import torch

        start, columns = self.start, self.start.shape[1]
        factors = [(pair.scale * pair.up.floats(), pair.down.floats()) for pair in self.pairs]
        room = torch.empty(0)
        begin = 0
        for block in start.blocks():
            end = begin + block.numel()
            # The rows that the block touches; of the first and the last only a part is used.
            first, last = begin // columns, -(-end // columns)
            count = (last - first) * columns
            if self.dtype == "float32" or room.numel() < count:
                room = torch.empty(count + columns)
            rows = room[:count].view(-1, columns)
            used = room[begin - first * columns : end - first * columns]
            used.copy_(block)
            for up, down in factors:
                rows.addmm_(up[first:last], down)
            yield used
            begin = end


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Args:
        folder: The new checkpoint.
        fingerprint: Of the new checkpoint.
        stage: Its ``stage.json``.
        actions: How many tensors, values and bytes were copied, rounded, replaced and folded.
        existed: An earlier run had made it already; nothing was written.
    """

    folder: Path
    fingerprint: str
    stage: dict[str, Any]
    actions: list[dict[str, Any]]
    existed: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The account as plain data."""
        return {
            "output": str(self.folder),
            "fingerprint": self.fingerprint,
            "existed": self.existed,
            "actions": self.actions,
            **{key: self.stage[key] for key in ("base", "deltas", "dtype", "forced")},
        }


class Merge:
    """A planned merge: everything is checked, nothing is written yet.

    Args:
        base: A checkpoint folder of ours.
        deltas: Folders (or files of published ones), in the order they are applied.
        output: The checkpoint folder to make.
        dtype: One of ``DTYPES``: what all but the detector is stored in; ``auto`` keeps the type
            that each tensor has in the base.
        force: Merge deltas that were trained on another base, and updates of frozen modules.
        overwrite: Replace an existing checkpoint folder.

    Raises:
        CheckpointError: A folder is unreadable, incomplete or of another kind, a delta does not
            fit or belongs to another base, or the output exists and is something else.
        UsageError: There is no delta, or no such ``dtype``.
    """

    def __init__(
        self,
        base: Path,
        deltas: Sequence[Path],
        output: Path,
        *,
        dtype: str = AUTO,
        force: bool = False,
        overwrite: bool = False,
    ) -> None:
        if not deltas:
            raise UsageError("Nothing is to be merged.", "Name a delta: --delta DIR")
        if dtype not in DTYPES:
            raise UsageError(f"Unknown type '{dtype}'.", f"Use one of: {', '.join(DTYPES)}.")
        self.output, self.dtype, self.force, self.overwrite = output, dtype, force, overwrite
        self.base = io.open_weights(base)
        kind = self.base.kind
        if kind not in (keymaps.OUR_EXPLAINER, keymaps.DETECTOR) or not self.base.config:
            hint = _HINTS.get(kind, "Give a checkpoint folder of an explainer.")
            raise CheckpointError(f"'{base}' is no checkpoint to merge into but: {kind}.", hint)
        self.parent = io.fingerprint(base)
        self.deltas = [open_delta(path) for path in deltas]
        self._forced: list[str] = []
        self._check_parent(self.deltas[0], self.parent)
        for delta in self.deltas:
            self._check_frozen(delta)
            _check_fit(self.base, delta)
        self.rows = self._plan(self.deltas, dtype)
        if not any(row.changes for row in self.rows.values()) and dtype == AUTO:
            raise CheckpointError(
                f"'{self.deltas[0].path}' changes nothing: every one of its updates is zero.",
                "It was saved before training, or is damaged; take another delta.",
            )
        self._done = None if overwrite else self._earlier()
        if self._done is None:
            atomic.refuse_existing(output, overwrite)

    def _plan(self, deltas: Sequence[Delta], dtype: str) -> dict[str, Row]:
        rows = {}
        for name, before in self.base.tensors.items():
            found = [part.get(name) for delta in deltas for part in (delta.whole, delta.pairs)]
            keeps = dtype == AUTO or name.startswith(keymaps.DETECTOR_PART) or not before.floating
            changes = tuple(change for change in found if change is not None)
            rows[name] = Row(name, before, changes, before.dtype if keeps else dtype)
        return rows

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the result."""
        return sum(row.result.nbytes for row in self.rows.values())

    def actions(self) -> list[dict[str, Any]]:
        """How many tensors, values and bytes are copied, rounded, replaced and folded."""
        found = []
        for action in (COPIED, CAST, REPLACED, FOLDED):
            group = [row.result for row in self.rows.values() if row.action == action]
            count, size = len(group), sum(tensor.size for tensor in group)
            total = sum(tensor.nbytes for tensor in group)
            said = {"action": action, "tensors": count, "parameters": size, "bytes": total}
            found += [said] if group else []
        return found

    def plan(self) -> dict[str, Any]:
        """What would be done, as plain data."""
        return {
            "output": str(self.output),
            "base": {"path": str(self.base.path), "fingerprint": self.parent},
            "deltas": [{"path": str(d.path), **d.as_dict()} for d in self.deltas],
            "dtype": self.dtype,
            "actions": self.actions(),
            "left_out": {k: why for d in self.deltas for k, why in d.dropped.items()},
            "forced": list(self._forced),
            "bytes": self.nbytes,
            "free_bytes": self._free(),
            "peak_memory_bytes": self._peak_memory(),
            "tensors": [
                {
                    "name": row.name,
                    "action": row.action,
                    "shape": list(row.result.shape),
                    "dtype": row.dtype,
                }
                for row in self.rows.values()
                if row.action != COPIED
            ],
        }

    def _free(self) -> int:
        place = next(folder for folder in self.output.resolve().parents if folder.is_dir())
        return shutil.disk_usage(place).free

    def _peak_memory(self) -> int:
        """Bytes needed at most, by estimate: the process; each worker's pairs and blocks."""
        pairs = [sum(p.up.size + p.down.size for p in row.pairs) for row in self.rows.values()]
        # Factors are held in float32 beside what they are read from; a block also in float32.
        return _PROCESS + io.workers() * (12 * max(pairs, default=0) + 8 * _BLOCKS * io.BLOCK)

    def write(self, advance: Callable[..., None] = lambda steps=1, note="": None) -> Merged:
        """Write the checkpoint, or find that an earlier run has.

        Args:
            advance: Called with (bytes, tensor's name) after each block, by several threads.

        Raises:
            CheckpointError: A value is not finite or out of range, a later delta was trained on
                something else than the deltas before it make, or the disk refuses; nothing is
                left.
        """
        atomic.remove_stale(self.output)
        if self._done is not None:
            mark = self._done["fingerprint"]
            return Merged(self.output, mark, self._done, self.actions(), existed=True)
        if (free := self._free()) < self.nbytes:
            raise CheckpointError(
                f"The result needs {self.nbytes / 1e9:.2f} GB, and '{self.output.parent}' has "
                f"{free / 1e9:.2f} GB left.",
                "Free some disk space or choose another folder; nothing was written.",
            )
        said: dict[str, Any] = {}

        def stage(digests: Mapping[str, str]) -> dict[str, Any]:
            self._check_later_parents(digests)
            said.update(self._stage())
            return said

        def watched(row: Row) -> LazyTensor:
            def blocks() -> Iterator[torch.Tensor]:
                for block in result.blocks():
                    yield block
                    advance(block.nbytes, note=row.name)

            result = row.result
            return replace(result, blocks=blocks)

        mark = io.write_checkpoint(
            self.output,
            config=self.base.config | ({} if self.dtype == AUTO else {"dtype": self.dtype}),
            tensors={name: watched(row) for name, row in self.rows.items()},
            stage=stage,
            extra_files={
                path.name: path.read_bytes()
                for path in sorted(self.base.path.iterdir())
                if path.is_file() and path.suffix in _COMPANIONS and path.name not in _OWN
            },
            overwrite=self.overwrite,
        )
        return Merged(self.output, mark, said, self.actions())

    def _stage(self) -> dict[str, Any]:
        return {
            "stage": "merge",
            "parent": self.parent,
            "base": {"name": self.base.path.resolve().name, "fingerprint": self.parent},
            "deltas": [delta.as_dict() for delta in self.deltas],
            "dtype": self.dtype,
            "forced": list(self._forced),
            "versions": library_versions("m2f2cli", "torch"),
        }

    def _earlier(self) -> dict[str, Any] | None:
        """The ``stage.json`` that an earlier run of this very merge left in the output."""
        if not (self.output / atomic.MARK).is_file():
            return None
        found, mine = io.read_stage(self.output), self._stage()
        same = all(found.get(key) == mine[key] for key in ("stage", "parent", "deltas", "dtype"))
        return found if same and isinstance(found.get("fingerprint"), str) else None

    def _check_parent(self, delta: Delta, mark: str) -> None:
        if delta.parent not in (None, mark):
            self._refuse(
                f"The delta '{delta.path}' was trained on {delta.parent}, and this base is {mark}",
                "Give the base it was trained on; --force merges it all the same.",
            )

    def _check_frozen(self, delta: Delta) -> None:
        if delta.frozen:
            self._refuse(
                f"The delta '{delta.path}' updates {len(delta.frozen)} modules that every stage "
                f"keeps frozen: {io.name_some(delta.frozen)}",
                "It is damaged or was trained otherwise; --force merges them all the same.",
            )

    def _refuse(self, said: str, hint: str) -> None:
        if not self.force:
            raise CheckpointError(f"{said}.", hint)
        self._forced.append(said)

    def _check_later_parents(self, digests: Mapping[str, str]) -> None:
        """Every delta but the first must have been trained on what those before it make."""
        for count, delta in enumerate(self.deltas[1:], start=1):
            if delta.parent is None:
                continue
            marks = {}
            for name, row in self._plan(self.deltas[:count], AUTO).items():
                final = self.rows[name]
                same = len(row.changes) == len(final.changes) and row.dtype == final.dtype
                marks[name] = digests[name] if same else io.digest_of(row.result)
            self._check_parent(delta, io.combine(self.base.config, marks))


def merge(
    base: Path | str,
    deltas: Sequence[Path | str],
    output: Path | str,
    *,
    dtype: str = AUTO,
    force: bool = False,
    overwrite: bool = False,
) -> Merged:
    """Merge what stages trained into the checkpoint it was trained on; all as of ``Merge``."""
    found = [Path(delta) for delta in deltas]
    job = Merge(Path(base), found, Path(output), dtype=dtype, force=force, overwrite=overwrite)
    return job.write()


def _check_fit(base: Weights, delta: Delta) -> None:
    """Refuse a delta that has no place for one of its tensors, or lacks a part of a module."""
    shapes = {name: tensor.shape for name, tensor in delta.whole.items()}
    shapes |= {name: (p.up.shape[0], p.down.shape[1]) for name, p in delta.pairs.items()}
    extra = [name for name in shapes if name not in base.tensors]
    wrong = [
        f"{name} is {list(shape)}, not {list(base.tensors[name].shape)}"
        for name, shape in shapes.items()
        if name in base.tensors and shape != base.tensors[name].shape
    ]
    retyped = []
    for name, tensor in delta.whole.items():
        before = base.tensors.get(name, tensor)
        if tensor.dtype != before.dtype and not (tensor.floating and before.floating):
            retyped.append(name)
    absent = [
        name
        for module in delta.modules
        for name in base.tensors
        if name.startswith(f"{module}.") and name not in delta.whole
    ]
    said = io.say_faults(
        {
            "have no place in it": extra,
            "of the wrong shape": wrong,
            "of another kind of number": retyped,
            "missing": absent,
        }
    )
    if said:
        raise CheckpointError(
            f"The delta '{delta.path}' does not fit '{base.path}': of its tensors {said}.",
            "It belongs to another model, or is incomplete; m2f2 info PATH says what each is.",
        )
