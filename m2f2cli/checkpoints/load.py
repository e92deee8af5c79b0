"""Detectors and explainers loaded from checkpoints, strictly: every tensor is accounted for.

A language model may be loaded in 4 or 8 bits. Only its layers are quantized: detector and
projectors are small, and everything else depends on what they say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, GenerationConfig
from transformers.utils import logging

from m2f2cli.checkpoints import io, keymaps
from m2f2cli.checkpoints.hub import find_explainer, resolve_checkpoint
from m2f2cli.errors import CheckpointError, ConfigError, MissingExtraError, UsageError
from m2f2cli.models.detector import Detector, DetectorConfig
from m2f2cli.models.explainer import Explainer, ExplainerConfig
from m2f2cli.runtime import pick_device, pick_dtype

QUANTIZED = ("4bit", "8bit")
# Modules that stay in floating point; a name also covers what is below it.
KEPT_FLOAT = ("detector", "mm_projector", "forgery_projector", "lm_head")
# What timm, open_clip and transformers raise where settings do not fit together.
_UNFIT = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError),
    *(RuntimeError, TypeError, ValueError),
)


def load_detector(name: str = "lite", *, device: str = "auto", dtype: str = "auto") -> Detector:
    """Load a detector for inference: in evaluation mode, frozen, with ``fingerprint`` set.

    ``name`` is ``lite``, a checkpoint folder, or a Hub id; see ``runtime.pick_device`` and
    ``runtime.pick_dtype`` for the rest.

    Raises:
        CheckpointError: The folder is no detector, or a tensor is missing, unexpected, of the
            wrong shape or not finite.
    """
    where = pick_device(device)
    folder = resolve_checkpoint(name)
    fields = io.read_config(folder)
    kind = pick_dtype(dtype, where, fields.get("dtype"))
    found = fields.get("model_type")
    if found != DetectorConfig.model_type:
        asks = f"Ask it with: m2f2 explain PATH --model {name}"
        raise CheckpointError(
            f"'{folder}' holds a model of type '{found}', not a detector.",
            asks if found == "m2f2_explainer" else f"See what it is with: m2f2 info {folder}",
        )
    stored = io.open_tensors(folder)
    model = build_checked(fields, stored, what=f"The detector '{folder}'")
    tensors = {key: tensor.load() for key, tensor in stored.items()}
    io.check_finite(tensors, what=f"'{folder}'")
    cast = {k: t.to(where, kind if t.is_floating_point() else t.dtype) for k, t in tensors.items()}
    model.load_state_dict(cast, assign=True)
    model.requires_grad_(False)
    # Convolutions are about half again as fast on this layout; the numbers stay.
    if model.backbone is not None:
        model.backbone.to(memory_format=torch.channels_last)
    model.fingerprint = io.combine(fields, io.digests_of(stored))
    return model.eval()


def load_explainer(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    attention: str = "auto",
    device_map: str | dict[str, Any] | None = None,
) -> tuple[Explainer, Path]:
    """Load an explainer for inference.

    Args:
        name: A checkpoint folder, a Hub id, or ``lite`` for the bundled explainer.
        device: See ``runtime.pick_device``.
        dtype: See ``runtime.pick_dtype``; with ``quantize`` what stays in floating point.
        quantize: ``4bit`` or ``8bit`` for the language model's layers, or None.
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
        MissingExtraError: ``quantize`` without bitsandbytes.
    """
    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    quantization = quantization_config(quantize, kind)
    folder = find_explainer(name)
    config = read_explainer_config(folder)
    stored = _check_explainer(folder, config)
    shares = (folder / io.SHARED).is_file()  # transformers reads one folder only
    with _no_progress_bars():
        model: Explainer = Explainer.from_pretrained(
            None if shares else folder,
            state_dict={k: t.load() for k, t in stored.items()} if shares else None,
            config=config,
            # Not the folder's own file, which no fingerprint covers.
            generation_config=GenerationConfig.from_model_config(config),
            dtype=kind,
            device_map=device_map or {"": where},
            quantization_config=quantization,
            attn_implementation=pick_attention(attention, where, kind),
            local_files_only=True,
        )
    _restore_unsaved(model.detector)
    io.check_finite(model.state_dict(), what=f"'{folder}'")
    model.requires_grad_(False)
    model.fingerprint = io.combine(io.read_config(folder), io.digests_of(stored))
    return model.eval(), folder


def is_explainer(name: str) -> bool:
    """Whether an explainer goes by a name, not a detector or something else alone.

    Raises:
        CheckpointError: Nothing goes by it.
    """
    fields = io.read_config(find_explainer(name))
    return bool(fields.get("model_type") == ExplainerConfig.model_type)


def read_explainer_config(folder: Path) -> ExplainerConfig:
    """The configuration of an explainer's folder.

    Raises:
        CheckpointError: It is none, or holds something else.
    """
    fields = io.read_config(folder)
    found = fields.get("model_type")
    if found == ExplainerConfig.model_type:
        with _said_of(f"The explainer '{folder}'"):
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


def build_empty(config: DetectorConfig | ExplainerConfig) -> Any:
    """A model whose tensors have shapes but no storage.

    Raises:
        ConfigError: The parts cannot be built, or not together.
    """
    try:
        with torch.device("meta"):
            return Explainer(config) if isinstance(config, ExplainerConfig) else Detector(config)
    except _UNFIT as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"No model can be built as config.json describes it ({said}).") from error


def build_checked(fields: Mapping[str, Any], tensors: Mapping[str, Any], *, what: str) -> Any:
    """A detector to be given its tensors, which are compared with it before it has storage.

    Raises:
        CheckpointError: It cannot be built, or names ``what`` and the tensors that do not fit.
    """
    with _said_of(what):
        config = DetectorConfig.from_dict(dict(fields))
        model = build_empty(config)
    kept = model.state_dict()
    io.check_names_and_shapes(tensors, kept, what=what)
    # What a part does not save it has to compute, which takes storage.
    return Detector(config) if any(n not in kept for n, _ in model.named_buffers()) else model


def check_model(
    tensors: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    what: str,
    rows: Sequence[keymaps.Row] | None = None,
) -> None:
    """Compare tensors, by our names, with the model that the content of ``config.json`` describes.

    With a key map, ``rows``, tensors are named as they stand in published files.

    Raises:
        CheckpointError: Names ``what`` and the missing, unexpected and wrongly shaped tensors.
    """
    explainer = config["model_type"] == ExplainerConfig.model_type
    kind = ExplainerConfig if explainer else DetectorConfig
    with _said_of(what):
        expected = build_empty(kind.from_dict(dict(config))).state_dict()
    if rows is not None:
        expected = keymaps.to_published(expected, rows)
        tensors = keymaps.to_published(tensors, rows)
    io.check_names_and_shapes(tensors, expected, what=what)


def _check_explainer(folder: Path, config: ExplainerConfig) -> dict[str, io.LazyTensor]:
    """Compare a folder's tensors with the model its configuration describes, without reading."""
    found = io.open_tensors(folder)
    with _said_of(f"The explainer '{folder}'"):
        expected = build_empty(config).state_dict()
    first = "mm_projector.0.weight"
    if first in found and found[first].shape[-1:] != expected[first].shape[-1:]:
        raise CheckpointError(
            f"The detector's CLIP tower in '{folder}' is {expected[first].shape[-1]} wide, but "
            f"the language model's projector was made for one of {found[first].shape[-1]}.",
            "Build the explainer again from a detector with the CLIP tower LLaVA was trained with.",
        )
    tied = {"language_model.lm_head.weight"} if config.text_config.tie_word_embeddings else set()
    io.check_names_and_shapes(found, expected, what=f"The explainer '{folder}'", optional=tied)
    return found


def quantization_config(quantize: str | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """What transformers needs to quantize the language model's layers and nothing else.

    ``quantize`` is ``4bit``, ``8bit`` or None; ``dtype`` what 4-bit layers compute in.

    Raises:
        UsageError: There is no such kind.
        MissingExtraError: bitsandbytes is not installed.
    """
    if quantize is None:
        return None
    if quantize not in QUANTIZED:
        raise UsageError(f"Unknown quantization '{quantize}'.", f"Use {' or '.join(QUANTIZED)}.")
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "quant", "Loading in 4 or 8 bits")
    return BitsAndBytesConfig(
        load_in_4bit=quantize == "4bit",
        load_in_8bit=quantize == "8bit",
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
def _said_of(what: str) -> Iterator[None]:
    """Settings that do not fit are here a fault of a checkpoint, not of a command's options."""
    try:
        yield
    except ConfigError as error:
        raise CheckpointError(f"{what} cannot be built: {error.message}", error.hint) from error


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Transformers draws its bars into files and pipes too."""
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
