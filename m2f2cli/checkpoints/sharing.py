"""Checkpoints that share a part: stored once, in the one, and read from there by the other.

So are an explainer and its detector bundled. The fingerprint covers all tensors wherever they lie,
so it is that of the whole checkpoint. ``store.shared_tensors`` reads what is written here.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from m2f2cli.checkpoints import store
from m2f2cli.checkpoints.streams import as_stream
from m2f2cli.checkpoints.tensorfile import digests_of, write_tensor_file
from m2f2cli.errors import CheckpointError
from m2f2cli.files import MARK, atomic_folder


def share(folder: Path, output: Path, *, begin: str, source: Path) -> None:
    """Copy a checkpoint without the tensors that another one has.

    Args:
        folder: The whole checkpoint.
        output: The copy; it is found together with ``source``, so it names it by a relative path.
        begin: What the shared tensors' names begin with, for example ``detector.``.
        source: The checkpoint that has them, under the rest of their names.

    Raises:
        CheckpointError: One of them is missing in either or differs in a bit, or the disk refuses.
    """
    tensors = store.open_tensors(folder)
    theirs = {begin + key: tensor for key, tensor in store.open_tensors(source).items()}
    shared = {key: tensor for key, tensor in tensors.items() if key.startswith(begin)}
    mine, others = digests_of(shared), digests_of(theirs)
    unlike = [key for key in mine | others if mine.get(key) != others.get(key)]
    if unlike:
        raise CheckpointError(
            f"'{folder}' and '{source}' differ in {len(unlike)} tensors: {store.name_some(unlike)}."
        )
    own = {key: as_stream(tensor) for key, tensor in tensors.items() if key not in shared}
    place = Path(os.path.relpath(source.resolve(), output.resolve())).as_posix()
    said = {begin: {"folder": place, "fingerprint": store.fingerprint(source)}}
    with atomic_folder(output) as partial:
        for path in sorted(folder.iterdir()):
            if path.suffix != ".safetensors" and path.name not in (MARK, store.INDEX):
                shutil.copyfile(path, partial / path.name)
        write_tensor_file(partial / store.WEIGHTS, own)
        (partial / store.SHARED).write_bytes(store.json_bytes(said))
        shutil.copyfile(folder / MARK, partial / MARK)
