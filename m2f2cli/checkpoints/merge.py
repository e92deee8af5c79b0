"""Deltas merged into a checkpoint, tensor by tensor; the result appears whole or not at all.

Memory does not grow with the model: each thread reads, changes, hashes and writes a block of values
before the next. Nothing is kept of a run that was killed; the next one begins anew and clears its
traces.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2f2cli import files as atomic
from m2f2cli.checkpoints import io, merge_plan
from m2f2cli.checkpoints.delta_reading import Delta, open_delta
from m2f2cli.checkpoints.io import INDICES, LazyTensor, digest_of
from m2f2cli.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import torch

DTYPES = (merge_plan.AUTO, "float32", "bfloat16", "float16")
Progress = Callable[..., None]
# Files of the base that go along as they are: tokeniser, preprocessor, generation settings.
_COMPANIONS = (".json", ".model", ".txt", ".jinja")
_OWN = ("config.json", atomic.MARK, "adapter_config.json", *INDICES)


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Args:
        folder: The new checkpoint.
        fingerprint: Of the new checkpoint.
        stage: Its ``stage.json``.
        actions: See ``merge_plan.summary``.
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
        dtype: str = merge_plan.AUTO,
        force: bool = False,
        overwrite: bool = False,
    ) -> None:
        if not deltas:
            raise UsageError("Nothing is to be merged.", "Name a delta: --delta DIR")
        if dtype not in DTYPES:
            raise UsageError(f"Unknown type '{dtype}'.", f"Use one of: {', '.join(DTYPES)}.")
        self.output, self.dtype, self.force, self.overwrite = output, dtype, force, overwrite
        self.base = merge_plan.open_base(base)
        self.parent = io.fingerprint(base)
        self.deltas = [open_delta(path) for path in deltas]
        self._forced: list[str] = []
        self._check_parent(self.deltas[0], self.parent)
        for delta in self.deltas:
            self._check_frozen(delta)
        self.rows = merge_plan.plan_rows(self.base, self.deltas, dtype)
        if not any(row.changes for row in self.rows.values()) and dtype == merge_plan.AUTO:
            raise CheckpointError(
                f"'{self.deltas[0].path}' changes nothing: every one of its updates is zero.",
                "It was saved before training, or is damaged; take another delta.",
            )
        self._done = None if overwrite else self._earlier()
        if self._done is None:
            atomic.refuse_existing(output, overwrite)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the result."""
        return sum(row.result.nbytes for row in self.rows.values())

    def plan(self) -> dict[str, Any]:
        """What would be done, as plain data."""
        return {
            "output": str(self.output),
            "base": {"path": str(self.base.path), "fingerprint": self.parent},
            "deltas": [{"path": str(d.path), **d.as_dict()} for d in self.deltas],
            "dtype": self.dtype,
            "actions": merge_plan.summary(self.rows),
            "left_out": {k: why for d in self.deltas for k, why in d.dropped.items()},
            "forced": list(self._forced),
            "bytes": self.nbytes,
            "free_bytes": _free(self.output),
            "peak_memory_bytes": merge_plan.peak_memory(self.rows),
            "tensors": [
                {
                    "name": row.name,
                    "action": row.action,
                    "shape": list(row.result.shape),
                    "dtype": row.result.dtype,
                }
                for row in self.rows.values()
                if row.changes or row.result.dtype != row.before.dtype
            ],
        }

    def write(self, advance: Progress = lambda steps=1, note="": None) -> Merged:
        """Write the checkpoint, or find that an earlier run has.

        Args:
            advance: Called with (bytes, tensor's name) after each block, by several threads.

        Raises:
            CheckpointError: A value is not finite or out of range, a later delta was trained on
                something else than the deltas before it make, or the disk refuses; nothing is
                left.
        """
        actions = merge_plan.summary(self.rows)
        atomic.remove_stale(self.output)
        if self._done is not None:
            return Merged(self.output, self._done["fingerprint"], self._done, actions, existed=True)
        if (free := _free(self.output)) < self.nbytes:
            raise CheckpointError(
                f"The result needs {self.nbytes / 1e9:.2f} GB, and '{self.output.parent}' has "
                f"{free / 1e9:.2f} GB left.",
                "Free some disk space or choose another folder; nothing was written.",
            )
        config = dict(self.base.config)
        if self.dtype != merge_plan.AUTO:
            config["dtype"] = self.dtype
        said: dict[str, Any] = {}

        def stage(digests: Mapping[str, str]) -> dict[str, Any]:
            self._check_later_parents(digests)
            said.update(self._stage())
            return said

        mark = io.write_checkpoint(
            self.output,
            config=config,
            tensors={name: _watched(row, advance) for name, row in self.rows.items()},
            stage=stage,
            extra_files=_companions(self.base.path),
            overwrite=self.overwrite,
        )
        return Merged(self.output, mark, said, actions)

    def _stage(self) -> dict[str, Any]:
        return {
            "stage": "merge",
            "parent": self.parent,
            "base": {"name": self.base.path.resolve().name, "fingerprint": self.parent},
            "deltas": [delta.as_dict() for delta in self.deltas],
            "dtype": self.dtype,
            "forced": list(self._forced),
            "versions": {name: version(name) for name in ("m2f2cli", "torch")},
        }

    def _earlier(self) -> dict[str, Any] | None:
        """The ``stage.json`` that an earlier run of this very merge left in the output."""
        if not (self.output / atomic.MARK).is_file():
            return None
        found = io.read_stage(self.output)
        mine = self._stage()
        same = all(found.get(key) == mine[key] for key in ("stage", "parent", "deltas", "dtype"))
        return found if same and isinstance(found.get("fingerprint"), str) else None

    def _check_parent(self, delta: Delta, mark: str) -> None:
        if delta.parent in (None, mark):
            return
        said = f"The delta '{delta.path}' was trained on {delta.parent}, and this base is {mark}"
        self._refuse(said, "Give the base it was trained on; --force merges it all the same.")

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
            before = merge_plan.plan_rows(self.base, self.deltas[:count])
            marks = {
                name: digests[name]
                if len(row.changes) == len(self.rows[name].changes)
                and row.result.dtype == self.rows[name].result.dtype
                else digest_of(row.result)
                for name, row in before.items()
            }
            self._check_parent(delta, io.combine(self.base.config, marks))


def _watched(row: merge_plan.Row, advance: Progress) -> LazyTensor:
    def blocks() -> Iterator[torch.Tensor]:
        for block in row.result.blocks():
            yield block
            advance(block.nbytes, note=row.name)

    return replace(row.result, blocks=blocks)


def _companions(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in _COMPANIONS and path.name not in _OWN
    }


def _free(output: Path) -> int:
    place = next(folder for folder in output.resolve().parents if folder.is_dir())
    return shutil.disk_usage(place).free
