"""Detectors from the bundled assets, a folder or the Hub, loaded strictly."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch

from m2f2cli.checkpoints import store
from m2f2cli.errors import CheckpointError
from m2f2cli.models.detector import Detector, DetectorConfig
from m2f2cli.runtime import pick_device, pick_dtype

# What comes with the package: a detector, and an explainer around it.
BUNDLED = ("lite", "lite-explainer")


def resolve_checkpoint(name: str, *, patterns: Sequence[str] = ("*.json", "*.safetensors")) -> Path:
    """The folder behind a name of ``BUNDLED``, a path, or a Hub id ``owner/name``.

    Args:
        name: As the user wrote it.
        patterns: The files to fetch from the Hub.

    Raises:
        CheckpointError: Nothing is found under that name.
    """
    if name in BUNDLED:
        return Path(str(files("m2f2cli") / "assets" / name))
    path = Path(name).expanduser()
    if path.exists():
        return path
    owner, _, model = name.partition("/")
    if not owner or not model or "/" in model or name.startswith((".", "~")):
        raise CheckpointError(
            f"There is no checkpoint at '{name}'.",
            "Give a checkpoint folder, 'lite' for the bundled model, or a Hub id like owner/name.",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"'{name}' is neither a folder here nor a model the Hub gives: {type(error).__name__}.",
            "Check the spelling and the connection, or download the folder and give its path.",
        ) from error


def load_detector(name: str = "lite", *, device: str = "auto", dtype: str = "auto") -> Detector:
    """Load a detector for inference, with every tensor accounted for.

    Args:
        name: ``lite``, a checkpoint folder, or a Hub id.
        device: See ``runtime.pick_device``.
        dtype: See ``runtime.pick_dtype``.

    Returns:
        The detector in evaluation mode, frozen, with ``fingerprint`` set.

    Raises:
        CheckpointError: The folder is no detector, or a tensor is missing, unexpected, of the
            wrong shape or not finite.
    """
    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    folder = resolve_checkpoint(name)
    fields = store.read_config(folder)
    found = fields.get("model_type")
    if found != DetectorConfig.model_type:
        asks = f"Ask it with: m2f2 explain PATH --model {name}"
        raise CheckpointError(
            f"'{folder}' holds a model of type '{found}', not a detector.",
            asks if found == "m2f2_explainer" else f"See what it is with: m2f2 info {folder}",
        )
    config = DetectorConfig.from_dict(fields)
    tensors = store.read_tensors(folder, finite=True)
    model = build_empty(config)
    store.check_names_and_shapes(tensors, model.state_dict(), what=f"The detector '{folder}'")
    cast = {k: t.to(where, kind if t.is_floating_point() else t.dtype) for k, t in tensors.items()}
    model.load_state_dict(cast, assign=True)
    model.requires_grad_(False)
    # Convolutions are about half again as fast on this layout; the numbers stay.
    model.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.fingerprint = store.fingerprint(folder)
    return model.eval()


def build_empty(config: DetectorConfig) -> Detector:
    """A detector whose tensors have shapes but no storage, where its parts allow that."""
    with torch.device("meta"):
        model = Detector(config)
    kept = set(model.state_dict())
    unsaved = any(name not in kept for name, _ in model.named_buffers())
    return Detector(config) if unsaved else model
