"""What was written, read back: merges and imports compared with what they were made of.

Of a merge, every changed tensor is tried on probe inputs, one at a time, and a model that fits into
memory is also run whole, once with the updates beside its layers and once merged. Of an import,
every value is compared with its source, and the model is run on a fixed input.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from m2f2cli.checkpoints import adapters, io, keymaps
from m2f2cli.checkpoints.io import LazyTensor
from m2f2cli.checkpoints.load import load_detector, load_explainer
from m2f2cli.checkpoints.merge import COPIED, Merge, Row
from m2f2cli.errors import CheckpointError
from m2f2cli.models.explainer import Explainer

_PROBES = 4
_WORDS = 16
_ROWS = 2048
# Bytes a value that is loaded in float32 needs, with room for the pass.
_BYTES = 6
# What the rounding of every merged weight may move a logit by, as a share of the largest one.
_SHARES = {"float32": 2**-12, "float16": 2**-8, "bfloat16": 2**-6}
# Sums of float32 in another order: this many roundings.
_SLACK = 2**-20
# How far a detector's logits may be from those of the published arithmetic.
_TOLERANCE = 1e-4


# --- merges -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proof:
    """What the comparison of a merge found.

    Args:
        tensors: How many changed tensors were read back.
        roundings: Of the merged matrices on probe inputs, the largest difference from base plus
            update, as a share of what one rounding of every weight can make.
        logits: The largest difference of a logit of the whole model; None where it was not run.
        scale: The largest logit, in absolute value.
        loaded: What was loaded, in words.
    """

    tensors: int
    roundings: float
    logits: float | None
    scale: float | None
    loaded: str

    def sentence(self) -> str:
        """The findings in words."""
        said = (
            f"Verified: {self.tensors:,} changed tensors read back; on probe inputs at most "
            f"{self.roundings:.2f} of one rounding from base plus update"
        )
        if self.logits is not None:
            said += f"; logits at most {self.logits:.1e} apart (largest {self.scale:.1f})"
        return f"{said}. Loaded: {self.loaded}."

    def as_dict(self) -> dict[str, Any]:
        """The findings as plain data."""
        return asdict(self)


def prove(job: Merge, advance: Callable[..., None] = lambda steps=1, note="": None) -> Proof:
    """Compare a written merge with its base and deltas.

    Args:
        job: A merge whose ``write`` is done.
        advance: Called with (1, name) after each changed tensor.

    Raises:
        CheckpointError: A tensor is not what it must be, or the outputs differ by more than the
            rounding of the weights.
    """
    found = io.open_tensors(job.output)
    results = {name: row.result for name, row in job.rows.items()}
    io.check_names_and_shapes(found, results, what=f"'{job.output}'")
    changed = [row for row in job.rows.values() if row.changes]
    worst = 0.0
    for row in changed:
        worst = max(worst, _compare(row, found[row.name]))
        advance(1, note=row.name)
    need = _BYTES * sum(row.result.size for row in job.rows.values())
    have = free_memory()
    if job.base.kind != keymaps.OUR_EXPLAINER:
        return Proof(len(changed), worst, None, None, "one tensor at a time")
    if need > have:
        said = (
            f"one tensor at a time; running the whole model takes {need / 1e9:.1f} GB of memory, "
            f"and {have / 1e9:.1f} GB are free"
        )
        return Proof(len(changed), worst, None, None, said)
    # What was only rounded to another type is rounded on both sides.
    beside = [row for row in job.rows.values() if row.action != COPIED]
    apart = _logits(job.base.path, beside, keep=_WORDS)
    merged = _logits(job.output, keep=_WORDS)
    difference, scale = float((apart - merged).abs().max()), float(apart.abs().max())
    coarse = max((row.dtype for row in changed), key=lambda name: _SHARES[name])
    if not difference <= _SHARES[coarse] * scale:
        raise CheckpointError(
            f"The merged model in '{job.output}' answers a fixed input otherwise than base and "
            f"delta do: its logits differ by {difference:.2e}, the largest is {scale:.2e}.",
            "Merge with --dtype float32; if it remains, please report it.",
        )
    return Proof(len(changed), worst, difference, scale, "the whole model in float32, twice")


def free_memory() -> int:
    """Bytes of memory that are free; none where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
        known = all(name in getattr(os, "sysconf_names", {}) for name in names)
        return os.sysconf(names[0]) * os.sysconf(names[1]) // 2 if known else 0


def _compare(row: Row, written: LazyTensor) -> float:
    """Read a changed tensor back; gives the share of one rounding that its outputs are off."""
    if row.pairs:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn((_PROBES, written.shape[1]), generator=generator)
        expected = _apply(row.start, inputs)[0]
        for pair in row.pairs:
            expected += pair.scale * (inputs @ pair.down.floats().T) @ pair.up.floats().T
        got, size = _apply(written, inputs)
        unit = torch.finfo(getattr(torch, row.dtype)).eps / 2
        share = float(((got - expected).abs() / ((unit + _SLACK) * size + 1e-30)).max())
    else:
        share = 2.0 if io.largest_difference(written, row.result) else 0.0
    if not share <= 1:
        raise CheckpointError(
            f"The merged tensor '{row.name}' is not base plus update.",
            "The disk may be at fault: check it and merge again.",
        )
    return share


def _apply(matrix: LazyTensor, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs times a matrix, and absolute inputs times the absolute matrix."""
    parts = matrix.floats().split(_ROWS)
    pieces = [(inputs @ part.T, inputs.abs() @ part.abs().T) for part in parts]
    return torch.cat([p[0] for p in pieces], dim=1), torch.cat([p[1] for p in pieces], dim=1)


def _keep_apart(model: Explainer, row: Row) -> None:
    """Put a tensor that was replaced in its place, and updates beside their layer."""
    with torch.no_grad():
        start = row.start if row.changes else row.result
        model.get_parameter(row.name).copy_(start.floats())
    for pair in row.pairs:
        down, up = pair.down.floats(), pair.scale * pair.up.floats()

        def beside(
            module: torch.nn.Module,
            inputs: tuple[torch.Tensor, ...],
            output: torch.Tensor,
            down: torch.Tensor = down,
            up: torch.Tensor = up,
        ) -> torch.Tensor:
            return output + (inputs[0] @ down.T) @ up.T

        model.get_submodule(row.name.removesuffix(".weight")).register_forward_hook(beside)


# --- imports ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verification:
    """What reading an import back and running it once found.

    Args:
        tensors: How many were read back.
        difference: The largest difference of a value from its source; 0 when all are equal.
        logits: How many logits one forward pass over a fixed input gave; None for a delta, which
            does not run alone.
        published: For a detector, the largest difference of a logit from the published head's.
    """

    tensors: int
    difference: float
    logits: int | None = None
    published: float | None = None

    def sentence(self) -> str:
        """The findings in words."""
        said = f"Verified: {self.tensors:,} tensors read back, largest difference {self.difference}"
        if self.logits is None:
            return f"{said}; a delta does not run alone"
        said += f"; {self.logits:,} logits of a fixed input, all finite"
        if self.published is not None:
            said += f", at most {self.published:.1e} from the published arithmetic"
        return said


def verify_import(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    config: Mapping[str, Any],
    head: Callable[[torch.Tensor], torch.Tensor] | None,
) -> Verification:
    """Read an imported checkpoint back, load it strictly and run it on a fixed input.

    Args:
        folder: The checkpoint or delta.
        tensors: What it must hold, by our names.
        config: The content of its configuration.
        head: Of a detector: its published last layer, features (B, F) to logits (B, 2).

    Raises:
        CheckpointError: A value differs from its source, or an output is not finite.
    """
    parts = [folder / name for name in (adapters.TENSORS, adapters.ADAPTER)]
    part = next((path for path in parts if path.is_file()), None)
    found = io.open_weight_file(part).tensors if part else io.open_tensors(folder)
    io.check_names_and_shapes(found, tensors, what=f"'{folder}'")
    worst = max(io.largest_difference(found[key], tensor) for key, tensor in tensors.items())
    if worst:
        raise CheckpointError(
            f"'{folder}' does not hold what was written: a value differs by {worst}.",
            "The disk is at fault: check it and import again.",
        )
    if part:
        return Verification(len(found), worst)
    difference = None
    if head is None:
        kept = "float32" if config["dtype"] == "float32" else "bfloat16"
        logits = _logits(folder, dtype=kept)
    else:
        model = load_detector(str(folder), device="cpu", dtype="float32")
        generator = torch.Generator().manual_seed(0)
        side = model.config.image_size
        with torch.inference_mode():
            out = model(torch.randn((1, 3, side, side), generator=generator))
            logits, difference = out.logits, float((head(out.features) - out.logits).abs().max())
    if not bool(torch.isfinite(logits).all()):
        raise CheckpointError(
            f"The model in '{folder}' gives NaN or infinite logits for a fixed input.",
            "The weights are damaged or of another model; take the original files.",
        )
    if difference is not None and difference > _TOLERANCE:
        raise CheckpointError(
            f"The detector in '{folder}' differs from the published arithmetic by "
            f"{difference:.2e}.",
            "Please report this file's layout; its numbers cannot be trusted.",
        )
    return Verification(len(found), worst, logits.numel(), difference)


def _logits(
    folder: Path, changes: Sequence[Row] = (), *, dtype: str = "float32", keep: int = 0
) -> torch.Tensor:
    """Logits (T, vocabulary) of a fixed input, with changes kept beside the layers.

    ``keep`` is how many of the last positions are wanted; 0 is all.
    """
    model, _ = load_explainer(str(folder), device="cpu", dtype=dtype)
    for row in changes:
        _keep_apart(model, row)
    config = model.config
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, config.text_config.vocab_size, (_WORDS,), generator=generator)
    ids = [config.image_token_id] * config.patches + [config.deepfake_token_id, *words.tolist()]
    side = config.detector_config.image_size
    pixels = torch.randn((1, 3, side, side), generator=generator).to(model.dtype)
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([ids]), pixel_values=pixels, logits_to_keep=keep)
    logits: torch.Tensor = out.logits[0]
    return logits
