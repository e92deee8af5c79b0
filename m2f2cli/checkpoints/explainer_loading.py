"""Explainers from a folder or the Hub, loaded strictly; the language model in 4 or 8 bits if asked.

Only the language model's layers are quantised: detector and projectors are small, and what they
say is what everything else hangs on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import logging

from m2f2cli.checkpoints import store
from m2f2cli.checkpoints.loading import resolve_checkpoint
from m2f2cli.errors import CheckpointError, MissingExtraError, UsageError
from m2f2cli.models.detector import Detector, DetectorConfig
from m2f2cli.models.explainer import Explainer, ExplainerConfig
from m2f2cli.runtime import pick_device, pick_dtype

QUANTISED = ("4bit", "8bit")
# Modules that stay in floating point; a name also covers what is below it.
KEPT_FLOAT = ("detector", "mm_projector", "forgery_projector", "lm_head")
# By the name of the detector that they are built around.
EXPLAINERS = {"lite": "lite-explainer"}
_PATTERNS = ("*.json", "*.safetensors", "tokenizer.model")


def load_explainer(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantise: str | None = None,
    attention: str = "auto",
    device_map: str | dict[str, Any] | None = None,
) -> tuple[Explainer, Path]:
    """Load an explainer for inference, with every tensor accounted for.

    Args:
        name: A checkpoint folder, a Hub id, or ``lite`` for the bundled explainer.
        device: See ``runtime.pick_device``.
        dtype: See ``runtime.pick_dtype``; with ``quantise`` what stays in floating point.
        quantise: ``4bit`` or ``8bit`` for the language model's layers, or None.
        attention: transformers' name of an attention implementation; ``auto`` is flash-attn where
            it is installed and the device is CUDA, else torch's own.
        device_map: transformers' ``device_map``, to spread the model; replaces ``device``.

    Returns:
        The explainer in evaluation mode, frozen, with ``fingerprint`` set, and its folder, which
        ``ExplainerProcessor.from_folder`` reads.

    Raises:
        CheckpointError: The folder is no explainer, or a tensor is missing, unexpected, of the
            wrong shape or not finite.
        UsageError: An option has an impossible value.
        MissingExtraError: ``quantise`` without bitsandbytes.
    """
    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    quantisation = quantisation_config(quantise, kind)
    folder = find_explainer(name)
    config = read_explainer_config(folder)
    check_tensors(folder, config)
    shares = (folder / store.SHARED).is_file()  # transformers reads one folder only
    with _no_progress_bars():
        model: Explainer = Explainer.from_pretrained(
            None if shares else folder,
            state_dict=store.read_tensors(folder) if shares else None,
            config=config,
            dtype=kind,
            device_map=device_map or {"": where},
            quantization_config=quantisation,
            attn_implementation=pick_attention(attention, where, kind),
            local_files_only=True,
        )
    _restore_unsaved(model.detector)
    store.check_finite(model.state_dict(), what=f"'{folder}'")
    model.requires_grad_(False)
    model.fingerprint = store.fingerprint(folder)
    return model.eval(), folder


def find_explainer(name: str) -> Path:
    """The folder behind an explainer's name, as ``load_explainer`` takes it."""
    return resolve_checkpoint(EXPLAINERS.get(name, name), patterns=_PATTERNS)


def is_explainer(name: str) -> bool:
    """Whether an explainer goes by a name, not a detector or something else alone.

    Raises:
        CheckpointError: Nothing goes by it.
    """
    kind = store.read_config(find_explainer(name)).get("model_type")
    return bool(kind == ExplainerConfig.model_type)


def read_explainer_config(folder: Path) -> ExplainerConfig:
    """The configuration of an explainer's folder.

    Raises:
        CheckpointError: It is none, or holds something else.
    """
    fields = store.read_config(folder)
    found = fields.get("model_type")
    if found == ExplainerConfig.model_type:
        return ExplainerConfig.from_dict(fields)
    hint = f"See what it is with: m2f2 info {folder}"
    if found == DetectorConfig.model_type:
        raise CheckpointError(
            f"'{folder}' holds a detector, which judges without words.",
            "Ask it with m2f2 detect, or build an explainer around it with: "
            f"m2f2 init-llava --llava DIR --detector {folder} --output DIR",
        )
    if str(found).startswith("llava"):
        hint = (
            f"A published explainer is imported with: m2f2 import {folder} --output DIR; "
            "a plain LLaVA becomes one with m2f2 init-llava."
        )
    raise CheckpointError(f"'{folder}' holds a model of type '{found}', not an explainer.", hint)


def check_tensors(folder: Path, config: ExplainerConfig) -> None:
    """Compare a folder's tensors with the model its configuration describes, without reading them.

    Raises:
        CheckpointError: Names what is missing, unexpected or of the wrong shape.
    """
    found = store.open_tensors(folder)
    expected = build_empty(config).state_dict()
    first = "mm_projector.0.weight"
    if first in found and found[first].shape[-1:] != expected[first].shape[-1:]:
        raise CheckpointError(
            f"The detector's CLIP tower in '{folder}' is {expected[first].shape[-1]} wide, but "
            f"the language model's projector was made for one of {found[first].shape[-1]}.",
            "Build the explainer again from a detector with the CLIP tower LLaVA was trained with.",
        )
    tied = {"language_model.lm_head.weight"} if config.text_config.tie_word_embeddings else set()
    store.check_names_and_shapes(found, expected, what=f"The explainer '{folder}'", optional=tied)


def build_empty(config: ExplainerConfig) -> Explainer:
    """An explainer whose tensors have shapes but no storage."""
    with torch.device("meta"):
        return Explainer(config)


def quantisation_config(quantise: str | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """What transformers needs to quantise the language model's layers and nothing else.

    Args:
        quantise: ``4bit``, ``8bit`` or None.
        dtype: What 4-bit layers compute in.

    Raises:
        UsageError: There is no such kind.
        MissingExtraError: bitsandbytes is not installed.
    """
    if quantise is None:
        return None
    if quantise not in QUANTISED:
        raise UsageError(f"Unknown quantisation '{quantise}'.", f"Use {' or '.join(QUANTISED)}.")
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "quant", "Loading in 4 or 8 bits")
    if quantise == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(KEPT_FLOAT))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=list(KEPT_FLOAT),
    )


def pick_attention(name: str, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The attention implementation of each part, as ``attn_implementation`` takes it.

    flash-attn serves the language model, in half precision on CUDA; CLIP's short sequences stay
    with torch.
    """
    if name == "auto":
        flash = (
            device.type == "cuda"
            and dtype in (torch.float16, torch.bfloat16)
            and find_spec("flash_attn") is not None
        )
        name = "flash_attention_2" if flash else "sdpa"
    return {"": name, "text_config": name, "detector_config": "sdpa"}


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep its bars, which transformers draws into files and pipes too, out of the way."""
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


def _restore_unsaved(detector: Detector) -> None:
    """Compute again what a backbone keeps outside its checkpoint."""
    kept = set(detector.state_dict())
    unsaved = {n: b for n, b in detector.named_buffers() if n not in kept}
    if unsaved:
        fresh = dict(Detector(detector.config).named_buffers())
        for name, buffer in unsaved.items():
            buffer.copy_(fresh[name])
