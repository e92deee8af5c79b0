"""Published checkpoints imported into folders of ours, checked against the models they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2f2cli import files as atomic
from m2f2cli.checkpoints import (
    delta,
    folders,
    import_delta,
    import_explainer,
    importer,
    kinds,
    llava_names,
    reference,
    store,
    streams,
)
from m2f2cli.checkpoints.assembling import source_fingerprint
from m2f2cli.checkpoints.folders import Weights
from m2f2cli.checkpoints.importer import Conversion
from m2f2cli.checkpoints.initialising import (
    Progress,
    check_explainer,
    preprocessor_file,
    tokenizer_files,
    versions,
)
from m2f2cli.checkpoints.loading import build_empty
from m2f2cli.checkpoints.probing import Probe, probe
from m2f2cli.checkpoints.reference import Fate
from m2f2cli.errors import CheckpointError, UsageError
from m2f2cli.models.detector import DetectorConfig

_DELTAS = (kinds.STAGE_2, kinds.STAGE_3, kinds.STAGE_3_PART, kinds.PEFT)


@dataclass(frozen=True)
class Imported:
    """What an import did.

    Args:
        folder: The new checkpoint.
        kind: What was imported, in words.
        fingerprint: Of the new checkpoint.
        parameters: How many values its tensors hold.
        fates: For each file, what became of each of its keys.
        probe: The proof, when it was asked for.
    """

    folder: Path
    kind: str
    fingerprint: str
    parameters: int
    fates: dict[str, list[Fate]]
    probe: Probe | None = None

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
            "verified": self.probe.as_dict() if self.probe else None,
            "keys": [
                {"file": path, "key": f.key, "action": f.action, "to": f.to, "why": f.why or None}
                for path, fates in self.fates.items()
                for f in fates
            ],
        }


class Import:
    """A recognised and converted import: everything is checked, nothing is written yet.

    Args:
        paths: What was published: a detector, an explainer's folder (or one of its files) or a
            delta's, and, where it lacks one, a file or folder that brings its CLIP vision tower.
        output: The checkpoint folder to make.
        clip_config: A CLIP ``config.json``, for towers that are none of the known ones.
        overwrite: Replace an existing checkpoint folder.

    Raises:
        CheckpointError: A file is unreadable, unknown or incomplete, a tensor has the wrong shape
            or holds NaN, or the output exists.
        UsageError: The files do not make one checkpoint.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        output: Path,
        *,
        clip_config: Path | None = None,
        overwrite: bool = False,
    ) -> None:
        atomic.refuse_existing(output, overwrite)
        self.output, self.overwrite = output, overwrite
        homes = dict.fromkeys(folders.home_of(path) for path in paths)
        opened = [folders.open_weights(home) for home in homes]
        self._main, others = _main_and_others(opened)
        if self._main.kind == kinds.EXPLAINER:
            tower = others[0] if others else None
            self.made = import_explainer.convert(self._main, tower, clip_config=clip_config)
            self._extra = _explainer_files(self._main, self.made)
        elif self._main.kind in _DELTAS:
            self.made = import_delta.convert(self._main)
        else:
            self.made = importer.convert(opened, clip_config=clip_config)
            self._extra = _detector_files(opened, self.made)

    def write(
        self, *, verify: bool = False, advance: Progress = lambda steps=1, note="": None
    ) -> Imported:
        """Write the checkpoint.

        Args:
            verify: Read it back, load it and run it on a fixed input.
            advance: Called with (1, name) after each tensor.

        Raises:
            CheckpointError: A tensor holds NaN or infinity, the disk refuses, or the proof fails.
        """
        made = self.made
        tensors = {key: streams.as_stream(tensor) for key, tensor in made.tensors.items()}
        watched = streams.watched(tensors, advance)
        if self._main.kind in _DELTAS:
            mark = delta.write_delta(
                self.output,
                tensors=watched,
                stage=self._stage,
                adapter=made.config or None,
                overwrite=self.overwrite,
            )
        else:
            mark = store.write_checkpoint(
                self.output,
                config=made.config,
                tensors=watched,
                stage=self._stage,
                extra_files=self._extra,
                overwrite=self.overwrite,
            )
        total = sum(stream.size for stream in tensors.values())
        proof = probe(self.output, made) if verify else None
        return Imported(self.output, made.kind, mark, total, made.fates, proof)

    def _stage(self, digests: Mapping[str, str]) -> dict[str, Any]:
        sources = self.made.sources
        if self._main.kind == kinds.EXPLAINER:
            fates = self.made.fates[str(self._main.path)]
            names = {fate.key: fate.to for fate in fates if fate.to is not None}
            tensors = {key: streams.as_stream(t) for key, t in self.made.tensors.items()}
            mark = source_fingerprint(self._main, names, tensors, digests)
            main = {"file": self._main.path.resolve().name, "kind": self._main.kind}
            sources = [main | {"layout": self._main.layout, "fingerprint": mark}, *sources]
        said: dict[str, Any] = {"stage": "import", "kind": self.made.kind, "sources": sources}
        if self._main.kind in _DELTAS:
            base = ("base_model_name_or_path", "_name_or_path")
            named = [self._main.config[name] for name in base if self._main.config.get(name)]
            said |= {"parent": None, "trained_on": next(iter(named), None)}
        return said | {"versions": versions()}


def import_published(paths: Sequence[Path], output: Path, **options: Any) -> Imported:
    """Import what was published, in one call; see ``Import`` for the options."""
    return Import(paths, output, **options).write()


def _main_and_others(opened: Sequence[Weights]) -> tuple[Weights, list[Weights]]:
    """What is imported, and what was given with it.

    Raises:
        CheckpointError: One of them is nothing that can be imported.
        UsageError: They do not make one checkpoint.
    """
    for one in opened:
        hint = {
            kinds.OUR_EXPLAINER: "It is a checkpoint already: use it as it is.",
            kinds.DETECTOR: "It is a checkpoint already: use it as it is.",
            kinds.DELTA: "It is a delta already: use it as it is.",
            kinds.LANGUAGE: "Give the whole folder if this is a part of an explainer.",
        }.get(one.kind)
        if hint or (one.kind == kinds.PEFT and import_delta.is_ours(one)):
            raise CheckpointError(f"'{one.path}' is a {one.kind}, nothing to import.", hint)
    alone = [one for one in opened if one.kind in (kinds.EXPLAINER, *_DELTAS)]
    main = alone[0] if alone else opened[0]
    others = [one for one in opened if one is not main]
    if len(alone) > 1 or (main.kind in _DELTAS and others) or (alone and len(others) > 1):
        names = ", ".join(f"'{one.path}' is a {one.kind}" for one in opened)
        raise UsageError(
            f"These files do not make one checkpoint: {names}.",
            "Give an explainer and at most one CLIP tower, or a delta alone.",
        )
    if not others and main.kind in (kinds.LLAVA, kinds.LLAVA_HF):
        raise UsageError(
            f"'{main.path}' is a {main.kind}; it has no detector to import.",
            f"m2f2 init-llava --llava {main.path} --detector DIR --output DIR",
        )
    return main, others


def _explainer_files(source: Weights, made: Conversion) -> dict[str, bytes]:
    check_explainer(made.tensors, made.config, what=f"'{source.path}'", rows=made.rows)
    return {
        **tokenizer_files(source.folder, made.config["text_config"]),
        "preprocessor_config.json": preprocessor_file(made.config["detector_config"]),
    }


def _detector_files(opened: Sequence[Weights], made: Conversion) -> dict[str, bytes]:
    expected = build_empty(DetectorConfig.from_dict(made.config)).state_dict()
    store.check_names_and_shapes(
        reference.to_published(made.tensors, made.rows),
        reference.to_published(expected, made.rows),
        what=" with ".join(f"'{one.path}'" for one in opened),
    )
    return {"preprocessor_config.json": preprocessor_file(made.config)}


def _branch(name: str) -> str:
    """The part of the model a tensor belongs to, for example ``clip.vision.*``."""
    parts = name.removeprefix(llava_names.DELTA_PREFIX).split(".")
    depth = 1 + (parts[0] == "detector")
    if parts[depth - 1] == "clip":
        depth += 1
    return ".".join([*parts[:depth], "*"])
