"""A checkpoint folder: config.json, model.safetensors (sharded when large), stage.json.

Written into a temporary sibling and renamed, ``stage.json`` last; read strictly. No pickles.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2f2cli.checkpoints.streams import Stream, all_finite, as_stream, finite
from m2f2cli.checkpoints.tensorfile import (
    StoredTensor,
    digests_of,
    open_tensor_file,
    write_tensor_file,
)
from m2f2cli.errors import CheckpointError
from m2f2cli.files import MARK, atomic_folder, atomic_write, json_bytes, read_json

if TYPE_CHECKING:
    import torch

__all__ = [
    "atomic_folder",
    "atomic_write",
    "check_finite",
    "check_names_and_shapes",
    "combine",
    "fingerprint",
    "json_bytes",
    "name_some",
    "open_tensors",
    "preprocessor_config",
    "read_config",
    "read_json",
    "read_stage",
    "read_tensors",
    "shared_tensors",
    "write_checkpoint",
]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARED = "shared.json"
# Fields of config.json that change without the model changing.
_BOOKKEEPING = frozenset(
    {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
)
_NAMED_IN_ERRORS = 4


def write_checkpoint(
    folder: Path,
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor] | Mapping[str, Stream],
    stage: Mapping[str, Any] | Callable[[Mapping[str, str]], Mapping[str, Any]],
    extra_files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> str:
    """Write a checkpoint folder in one step and return its fingerprint.

    Args:
        folder: Where; parents are made.
        config: Becomes ``config.json``.
        tensors: Becomes ``model.safetensors``, or shards with an index. Streams are read once,
            a few at a time in threads, so memory does not grow with them.
        stage: Becomes ``stage.json``, with the fingerprint added. A function is called when the
            tensors are written, with the digest of each.
        extra_files: Further files by name, for example ``preprocessor_config.json``.
        max_shard_bytes: No file holds more, unless a single tensor does.
        overwrite: Replace an existing checkpoint folder.

    Returns:
        ``sha256:`` and 64 hex digits (see ``fingerprint``).

    Raises:
        CheckpointError: The folder exists, a tensor holds NaN or infinity, or the disk refuses;
            whatever was there before is still there.
    """
    what = f"The model for '{folder}'"
    check_finite({k: t for k, t in tensors.items() if not isinstance(t, Stream)}, what=what)
    streams = {
        key: finite(t, what=f"The tensor '{key}'") if isinstance(t, Stream) else as_stream(t)
        for key, t in tensors.items()
    }
    with atomic_folder(folder, overwrite) as partial:
        (partial / "config.json").write_bytes(json_bytes(config))
        for name, data in (extra_files or {}).items():
            if Path(name).name != name:
                raise CheckpointError(f"'{name}' is no plain file name.")
            (partial / name).write_bytes(data)
        shards = _split(streams, max_shard_bytes)
        digests: dict[str, str] = {}
        for name, keys in shards.items():
            digests |= write_tensor_file(partial / name, {key: streams[key] for key in keys})
        if len(shards) > 1:
            (partial / INDEX).write_bytes(json_bytes(_index(streams, shards)))
        mark = combine(config, digests)
        said = stage(digests) if callable(stage) else stage
        (partial / MARK).write_bytes(json_bytes({**said, "fingerprint": mark}))
    return mark


def preprocessor_config(size: int, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """The content of ``preprocessor_config.json``, as transformers' CLIP image processor reads it.

    Args:
        size: Side of the model's input in pixels.
        mean: Per channel, in [0, 1].
        std: Per channel, in [0, 1].
    """
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``.

    Raises:
        CheckpointError: The folder or the file is missing, or it is no JSON object.
    """
    if not folder.is_dir():
        raise CheckpointError(f"There is no checkpoint folder '{folder}'.", "Check the path.")
    return read_json(folder / "config.json")


def read_stage(folder: Path) -> dict[str, Any]:
    """Read ``stage.json``; empty where the folder has none.

    Raises:
        CheckpointError: The file is no JSON object.
    """
    path = folder / MARK
    return read_json(path) if path.exists() else {}


def open_tensors(folder: Path) -> dict[str, StoredTensor]:
    """List the tensors of a folder's weights, single file or shards, without reading them.

    Raises:
        CheckpointError: No weights, a missing or truncated shard, an index that does not agree
            with its shards, or see ``shared_tensors``.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    if single.is_file():
        return open_tensor_file(single) | shared_tensors(folder)
    if not index.is_file():
        raise CheckpointError(f"'{folder}' has no {WEIGHTS}.", f"m2f2 info '{folder}'")
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(v, str) for v in mapping.values()):
        raise CheckpointError(f"'{index}' has no weight_map.")
    found: dict[str, StoredTensor] = {}
    for shard in sorted(set(mapping.values())):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise CheckpointError(f"The shard '{shard}' of '{folder}' is missing.")
        tensors = open_tensor_file(folder / shard)
        wanted = {key for key, file in mapping.items() if file == shard}
        if wanted != set(tensors):
            raise CheckpointError(
                f"'{folder / shard}' does not hold what {INDEX} says: "
                f"{name_some(wanted ^ set(tensors))}."
            )
        found |= tensors
    return found | shared_tensors(folder)


def shared_tensors(folder: Path) -> dict[str, StoredTensor]:
    """List the tensors that a folder takes from another checkpoint, as its ``shared.json`` says.

    The file maps the beginning of their names to ``{"folder": relative path, "fingerprint": …}``;
    ``weights.sharing`` writes it. Most folders have none and share nothing.

    Raises:
        CheckpointError: The file is malformed, or the other checkpoint is missing or not the one
            that was shared.
    """
    path = folder / SHARED
    if not path.is_file():
        return {}
    found: dict[str, StoredTensor] = {}
    for begin, source in read_json(path).items():
        try:
            other, mark = folder / source["folder"], source["fingerprint"]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"'{path}' does not say what is shared with whom.") from error
        if read_stage(other).get("fingerprint") != mark:
            raise CheckpointError(
                f"'{folder}' takes the tensors '{begin}' from '{other}', which is not there or not "
                "the checkpoint they were left to.",
                "Keep the two folders together, as they were made.",
            )
        found |= {begin + key: tensor for key, tensor in open_tensors(other).items()}
    return found


def read_tensors(folder: Path, *, finite: bool = False) -> dict[str, torch.Tensor]:
    """Read a folder's tensors, mapped from the files.

    Args:
        folder: A checkpoint folder.
        finite: Also refuse NaN and infinity, at the price of reading every value.

    Raises:
        CheckpointError: See ``open_tensors``; or a tensor holds NaN or infinity.
    """
    tensors = {key: stored.load() for key, stored in open_tensors(folder).items()}
    if finite:
        check_finite(tensors, what=f"'{folder}'")
    return tensors


def fingerprint(folder: Path, *, verify: bool = False) -> str:
    """Name a model by its content: ``sha256:`` over the config's model fields and every tensor.

    Args:
        folder: A checkpoint folder.
        verify: Compute it from the files and compare it with ``stage.json``, instead of trusting
            what ``stage.json`` says.

    Raises:
        CheckpointError: The folder is unreadable, or ``verify`` finds another content.
    """
    stored = read_stage(folder).get("fingerprint")
    if isinstance(stored, str) and not verify:
        return stored
    computed = combine(read_config(folder), digests_of(open_tensors(folder)))
    if isinstance(stored, str) and stored != computed:
        raise CheckpointError(
            f"'{folder}' was changed after it was written: its fingerprint is {computed}, "
            f"{MARK} says {stored}.",
            "Restore it from where it came.",
        )
    return computed


def check_names_and_shapes(
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    *,
    what: str,
    optional: Collection[str] = (),
) -> None:
    """Compare two sets of tensors (or anything with ``shape``) by name and shape.

    Args:
        found: What a file holds.
        expected: What the model needs.
        what: The file, for the message.
        optional: Names that may be missing.

    Raises:
        CheckpointError: Names the missing, the unexpected and the wrongly shaped tensors.
    """
    faults = []
    if missing := [key for key in expected if key not in found and key not in optional]:
        faults.append(f"{len(missing)} missing: {name_some(missing)}")
    if extra := [key for key in found if key not in expected]:
        faults.append(f"{len(extra)} unexpected: {name_some(extra)}")
    wrong = [
        f"{key} is {list(found[key].shape)}, not {list(expected[key].shape)}"
        for key in expected
        if key in found and tuple(found[key].shape) != tuple(expected[key].shape)
    ]
    if wrong:
        faults.append(f"{len(wrong)} of the wrong shape: {name_some(wrong)}")
    if faults:
        raise CheckpointError(
            f"{what} does not fit its model: {'; '.join(faults)}.",
            "The file is incomplete or of another kind; m2f2 info PATH says what it is.",
        )


def check_finite(
    tensors: Mapping[str, torch.Tensor] | Mapping[str, StoredTensor], *, what: str
) -> None:
    """Refuse NaN and infinite values.

    Args:
        tensors: Floating-point tensors are checked, others ignored.
        what: The file or model, for the message.

    Raises:
        CheckpointError: Names the tensors at fault.
    """
    bad = [
        key
        for key, tensor in tensors.items()
        if not all(all_finite(block) for block in as_stream(tensor).blocks())
    ]
    if bad:
        raise CheckpointError(
            f"{what} holds NaN or infinite values in {len(bad)} tensors: {name_some(bad)}.",
            "The training diverged or the file is damaged; take another checkpoint.",
        )


def name_some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    ordered = sorted(names)
    rest = len(ordered) - _NAMED_IN_ERRORS
    shown = ", ".join(ordered[:_NAMED_IN_ERRORS])
    return f"{shown} and {rest} more" if rest > 0 else shown


def _split(streams: Mapping[str, Stream], limit: int) -> dict[str, list[str]]:
    groups: list[list[str]] = [[]]
    room = limit
    for key in sorted(streams):
        size = streams[key].nbytes
        if size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(key)
        room -= size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    total = len(groups)
    return {f"model-{n:05d}-of-{total:05d}.safetensors": g for n, g in enumerate(groups, start=1)}


def _index(streams: Mapping[str, Stream], shards: Mapping[str, list[str]]) -> dict[str, Any]:
    total = sum(stream.nbytes for stream in streams.values())
    mapping = {key: name for name, keys in shards.items() for key in keys}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(mapping.items()))}


def combine(config: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """The fingerprint of a model with this configuration and these digests of its tensors."""
    kept = {key: value for key, value in config.items() if key not in _BOOKKEEPING}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for key in sorted(digests):
        digest.update(f"\n{key} {digests[key]}".encode())
    return f"sha256:{digest.hexdigest()}"
