"""The proof of an import: what was written is read back, and the model is run once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from m2f2cli.checkpoints import delta, store, streams
from m2f2cli.checkpoints.explainer_loading import load_explainer
from m2f2cli.checkpoints.importer import Conversion
from m2f2cli.checkpoints.loading import load_detector
from m2f2cli.checkpoints.tensorfile import open_tensor_file
from m2f2cli.errors import CheckpointError
from m2f2cli.models.tokenizer import load_tokenizer

_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Probe:
    """What the proof found.

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

    def as_dict(self) -> dict[str, Any]:
        """The findings as plain data."""
        return asdict(self)


def probe(folder: Path, made: Conversion) -> Probe:
    """Read an imported checkpoint back, load it strictly and run it on a fixed input.

    Args:
        folder: The checkpoint.
        made: What it was written from.

    Raises:
        CheckpointError: A value differs from its source, or an output is not finite.
    """
    found = _read_back(folder)
    store.check_names_and_shapes(found, made.tensors, what=f"'{folder}'")
    worst = max(
        streams.largest_difference(streams.from_stored(found[key]), streams.as_stream(source))
        for key, source in made.tensors.items()
    )
    if worst:
        raise CheckpointError(
            f"'{folder}' does not hold what was written: a value differs by {worst}.",
            "The disk is at fault: check it and import again.",
        )
    kind = made.config.get("model_type")
    if kind == "m2f2_explainer":
        whole = made.config["dtype"] == "float32"
        return Probe(len(found), worst, _run_explainer(folder, "float32" if whole else "bfloat16"))
    if kind == "m2f2_detector":
        return Probe(len(found), worst, *_run_detector(folder, made))
    return Probe(len(found), worst)


def _read_back(folder: Path) -> Mapping[str, Any]:
    for name in (delta.TENSORS, delta.ADAPTER):
        if (folder / name).is_file():
            return open_tensor_file(folder / name)
    return store.open_tensors(folder)


def _picture(size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((1, 3, size, size), generator=generator)


def _run_explainer(folder: Path, dtype: str) -> int:
    model, _ = load_explainer(str(folder), device="cpu", dtype=dtype)
    config = model.config
    start = load_tokenizer(folder).bos_token_id
    ids = [start, *[config.image_token_id] * config.patches, config.deepfake_token_id, start]
    pixels = _picture(config.detector_config.image_size).to(model.dtype)
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([ids]), pixel_values=pixels)
    _refuse_infinite(out.logits, folder)
    return out.logits.numel()


def _run_detector(folder: Path, made: Conversion) -> tuple[int, float | None]:
    """Run a detector, and its published head (unfolded) on the same features."""
    model = load_detector(str(folder), device="cpu", dtype="float32")
    with torch.inference_mode():
        out = model(_picture(model.config.image_size))
    _refuse_infinite(out.logits, folder)
    if made.head is None:
        return out.logits.numel(), None
    features = out.features
    if made.head.constant is not None:
        half = features.shape[1] // 2
        constant = made.head.constant.float().expand(len(features), -1)
        features = torch.cat([features[:, :half], constant, features[:, half:]], dim=1)
    with torch.inference_mode():
        expected = torch.nn.functional.linear(
            features, made.head.weight.float(), made.head.bias.float()
        )
    worst = float((expected - out.logits).abs().max())
    if worst > _TOLERANCE:
        raise CheckpointError(
            f"The detector in '{folder}' differs from the published arithmetic by {worst:.2e}.",
            "Please report this file's layout; its numbers cannot be trusted.",
        )
    return out.logits.numel(), worst


def _refuse_infinite(logits: torch.Tensor, folder: Path) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise CheckpointError(
            f"The model in '{folder}' gives NaN or infinite logits for a fixed input.",
            "The weights are damaged or of another model; take the original files.",
        )
