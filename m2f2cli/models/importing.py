"""Published detectors imported into a checkpoint folder, checked against the model they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from m2f2cli.models.detector import DetectorConfig
from m2f2cli.models.loading import build_empty
from m2f2cli.weights import atomic, importer, reference, store
from m2f2cli.weights.reference import Fate


@dataclass(frozen=True)
class Imported:
    """What an import did.

    Args:
        folder: The new checkpoint.
        kind: ``detector A`` or ``detector B``.
        fingerprint: Of the new checkpoint.
        parameters: How many values its tensors hold.
        fates: For each file, what became of each of its keys.
    """

    folder: Path
    kind: str
    fingerprint: str
    parameters: int
    fates: dict[str, list[Fate]]

    def summary(self) -> list[tuple[str, int, str, str]]:
        """Rows (file, how many keys, what became of them, reason or destination)."""
        rows = []
        for path, fates in self.fates.items():
            groups: dict[tuple[str, str], list[Fate]] = {}
            for fate in fates:
                groups.setdefault((fate.action, fate.why or _branch(fate.to or "")), []).append(
                    fate
                )
            for (action, where), members in groups.items():
                alone = members[0].to if len(members) == 1 else None
                rows.append((Path(path).name, len(members), action, alone or where))
        return rows

    def listing(self) -> list[tuple[str, str, str, str]]:
        """Rows (file, key, what became of it, destination or reason), one a key."""
        return [
            (Path(path).name, fate.key, fate.action, fate.to or fate.why)
            for path, fates in self.fates.items()
            for fate in fates
        ]

    def as_dict(self) -> dict[str, Any]:
        """The whole account as plain data."""
        return {
            "output": str(self.folder),
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "parameters": self.parameters,
            "keys": [
                {"file": path, "key": f.key, "action": f.action, "to": f.to, "why": f.why or None}
                for path, fates in self.fates.items()
                for f in fates
            ],
        }


def import_detector(
    paths: Sequence[Path],
    output: Path,
    *,
    clip_config: Path | None = None,
    overwrite: bool = False,
) -> Imported:
    """Import a published detector.

    Args:
        paths: A detector A or B and, where it lacks one, the file of its CLIP vision tower.
        output: The checkpoint folder to make.
        clip_config: A CLIP ``config.json``, for towers that are none of the known ones.
        overwrite: Replace an existing checkpoint folder.

    Returns:
        The account of every key.

    Raises:
        CheckpointError: A file is unreadable, unknown or incomplete, a tensor has the wrong shape
            or holds NaN, or the folder cannot be written.
        UsageError: The files do not make one detector.
    """
    atomic.refuse_existing(output, overwrite)
    made = importer.convert(paths, clip_config=clip_config)
    expected = build_empty(DetectorConfig.from_dict(made.config)).state_dict()
    store.check_names_and_shapes(
        reference.to_published(made.tensors, made.rows),
        reference.to_published(expected, made.rows),
        what=" with ".join(f"'{path}'" for path in paths),
    )
    config = made.config
    size, mean, std = config["image_size"], config["image_mean"], config["image_std"]
    mark = store.write_checkpoint(
        output,
        config=config,
        tensors=made.tensors,
        stage={
            "stage": "import",
            "kind": made.kind,
            "sources": made.sources,
            "versions": {name: version(name) for name in ("m2f2cli", "torch")},
        },
        extra_files={
            "preprocessor_config.json": store.json_bytes(store.preprocessor_config(size, mean, std))
        },
        overwrite=overwrite,
    )
    total = sum(tensor.numel() for tensor in made.tensors.values())
    return Imported(output, made.kind, mark, total, made.fates)


def _branch(name: str) -> str:
    """The part of the model a tensor belongs to, for example ``clip.vision.*``."""
    first, second, *_ = f"{name}.".split(".")
    return f"{first}.{second}.*" if first == "clip" else f"{first}.*"
