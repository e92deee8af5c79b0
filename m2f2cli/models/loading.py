"""Detectors from the bundled assets, a folder or the Hub, loaded strictly."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch

from m2f2cli.errors import CheckpointError
from m2f2cli.models.detector import Detector, DetectorConfig
from m2f2cli.runtime import pick_device, pick_dtype
from m2f2cli.weights import store


def resolve_checkpoint(name: str) -> Path:
    """The folder behind ``lite`` (bundled), a path, or a Hub id ``owner/name``.

    Raises:
        CheckpointError: Nothing is found under that name.
    """
    if name == "lite":
        return Path(str(files("m2f2cli") / "assets" / "lite"))
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"There is no checkpoint at '{name}'.",
            "Give a detector folder, 'lite' for the bundled model, or a Hub id like owner/name.",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
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
    if fields.get("model_type") != DetectorConfig.model_type:
        raise CheckpointError(
            f"'{folder}' holds a model of type '{fields.get('model_type')}', not a detector.",
            f"See what it is with: m2f2 info {folder}",
        )
    config = DetectorConfig.from_dict(fields)
    tensors = store.read_tensors(folder)
    model = build_empty(config)
    check_tensors(model.state_dict(), tensors, folder)
    cast = {k: t.to(where, kind if t.is_floating_point() else t.dtype) for k, t in tensors.items()}
    model.load_state_dict(cast, assign=True)
    model.requires_grad_(False)
    model.fingerprint = store.fingerprint(folder)
    return model.eval()


def build_empty(config: DetectorConfig) -> Detector:
    """A detector whose tensors have shapes but no storage, where its parts allow that."""
    with torch.device("meta"):
        model = Detector(config)
    kept = set(model.state_dict())
    loose = [n for n, b in model.named_buffers() if n not in kept]
    return Detector(config) if loose else model


def check_tensors(
    wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor], folder: Path
) -> None:
    """Compare a checkpoint's tensors with the model's.

    Raises:
        CheckpointError: Naming the missing, unexpected, misshapen or non-finite ones.
    """
    problems = []
    for word, keys in (("missing", wanted.keys() - found), ("unexpected", found.keys() - wanted)):
        if keys:
            problems.append(f"{word}: {_few(sorted(keys))}")
    misshapen = [
        f"{k} is {list(found[k].shape)}, should be {list(wanted[k].shape)}"
        for k in sorted(wanted.keys() & found.keys())
        if found[k].shape != wanted[k].shape
    ]
    if misshapen:
        problems.append(f"wrong shape: {_few(misshapen)}")
    broken = [k for k, t in found.items() if t.is_floating_point() and not t.isfinite().all()]
    if broken:
        problems.append(f"not finite: {_few(sorted(broken))}")
    if problems:
        raise CheckpointError(
            f"The checkpoint '{folder}' does not hold a whole detector ({'; '.join(problems)}).",
            "Download or export it again; partial checkpoints are not loaded.",
        )


def _few(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
