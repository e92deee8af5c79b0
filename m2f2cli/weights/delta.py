"""A delta on disk: what a training stage changed, in a folder of its own.

Two forms: ``delta.safetensors``, whose tensors take the place of the base's tensors of the same
name; or a standard PEFT adapter (``adapter_config.json``, ``adapter_model.safetensors``). Both with
``stage.json``, written last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from m2f2cli.weights import store
from m2f2cli.weights.atomic import MARK, atomic_folder
from m2f2cli.weights.streams import Stream, finite
from m2f2cli.weights.tensorfile import write_tensor_file

TENSORS = "delta.safetensors"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


def write_delta(
    folder: Path,
    *,
    tensors: Mapping[str, Stream],
    stage: Mapping[str, Any] | Callable[[Mapping[str, str]], Mapping[str, Any]],
    adapter: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> str:
    """Write a delta folder in one step and return its fingerprint.

    Args:
        folder: Where; parents are made.
        tensors: By our names; for an adapter by PEFT's.
        stage: Becomes ``stage.json``, with the fingerprint added. A function is called when the
            tensors are written, with the digest of each.
        adapter: ``adapter_config.json``, for an adapter.
        overwrite: Replace an existing checkpoint folder.

    Returns:
        ``sha256:`` over the adapter's configuration and every tensor.

    Raises:
        CheckpointError: The folder exists, a tensor holds NaN or infinity, or the disk refuses;
            whatever was there before is still there.
    """
    checked = {key: finite(t, what=f"The tensor '{key}'") for key, t in tensors.items()}
    with atomic_folder(folder, overwrite) as partial:
        digests = write_tensor_file(partial / (TENSORS if adapter is None else ADAPTER), checked)
        if adapter is not None:
            (partial / ADAPTER_CONFIG).write_bytes(store.json_bytes(adapter))
        mark = store.combine(adapter or {}, digests)
        said = stage(digests) if callable(stage) else stage
        (partial / MARK).write_bytes(store.json_bytes({**said, "fingerprint": mark}))
    return mark
