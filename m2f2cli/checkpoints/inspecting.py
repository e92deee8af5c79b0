"""What a checkpoint is and, for a model of ours, which tensors it lacks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from m2f2cli.checkpoints import describe, kinds
from m2f2cli.checkpoints.describe import Description
from m2f2cli.checkpoints.store import check_names_and_shapes
from m2f2cli.errors import M2F2Error


def inspect_checkpoint(name: str, *, verify: bool = False) -> Description:
    """Describe a checkpoint; compare a model of ours with what its config describes.

    Args:
        name: A folder, a weights file, or a bundled model (``lite``, ``lite-explainer``).
        verify: Also read every value: refuse NaN, and check the stored fingerprint.

    Raises:
        CheckpointError: Nothing is there, or it is damaged.
    """
    path = Path(name).expanduser()
    if not path.exists():
        from m2f2cli.checkpoints.loading import BUNDLED, resolve_checkpoint

        path = resolve_checkpoint(name) if name in BUNDLED else path
    found = describe.describe(path, verify=verify)
    ours = (kinds.DETECTOR, kinds.OUR_EXPLAINER)
    if found.kind not in ours or not found.config or not found.tensors:
        return found
    try:
        _compare(found)
    except M2F2Error as error:
        return replace(found, missing=(*found.missing, error.message.rstrip(".")))
    return found


def _compare(found: Description) -> None:
    if found.kind == kinds.OUR_EXPLAINER:
        from m2f2cli.checkpoints.initialising import check_explainer

        check_explainer(found.tensors, found.config, what="The folder")
        return
    from m2f2cli.checkpoints.loading import build_empty
    from m2f2cli.models.detector import DetectorConfig

    expected = build_empty(DetectorConfig.from_dict(found.config)).state_dict()
    check_names_and_shapes(found.tensors, expected, what="The folder")
