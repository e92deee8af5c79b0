"""From the name of a checkpoint to its folder: bundled, here, or on the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from m2f2cli.errors import CheckpointError

# What comes with the package: a detector, and an explainer around it.
BUNDLED = ("lite", "lite-explainer")
# Explainers by the name of the detector that they are built around.
EXPLAINERS = {"lite": "lite-explainer"}


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


def find_explainer(name: str) -> Path:
    """The folder behind an explainer's name; ``lite`` is the explainer around that detector.

    Raises:
        CheckpointError: See ``resolve_checkpoint``.
    """
    patterns = ("*.json", "*.safetensors", "tokenizer.model")
    return resolve_checkpoint(EXPLAINERS.get(name, name), patterns=patterns)
