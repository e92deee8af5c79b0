"""``m2f2 import``: published weights turned into checkpoints and deltas of ours.

What a file is, is read from its tensors' names and shapes (``keymaps.LAYOUTS``), never from its own
name. Every key is mapped, folded into another tensor or dropped for a stated reason. Tensors stay
on disk until they are written one by one, so memory does not grow with the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from m2f2cli import files
from m2f2cli.checkpoints import adapters, configs, io, keymaps
from m2f2cli.checkpoints.io import LazyTensor, Weights, from_tensor
from m2f2cli.checkpoints.keymaps import Entry
from m2f2cli.checkpoints.load import check_model
from m2f2cli.checkpoints.verify import Verification, verify_import
from m2f2cli.environment import library_versions
from m2f2cli.errors import CheckpointError, UsageError
from m2f2cli.models.clip import blocks_needed
from m2f2cli.models.tokenizer import load_tokenizer
from m2f2cli.runtime import Progress, no_progress

_ABOVE = "above the hidden state that the detector reads"
_SAME_TOWER = "the detector's file brings the same tower"
_TRAINING = "training state or other data, no weight of the model"
_NO_TOWER = "not part of the vision tower"
_TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_CLASS_TOKEN = "embeddings.class_embedding"
_WORDS = "clip_text_encoder.model.text_model.embeddings.token_embedding.weight"
_UNUSED = re.compile(r"(?:detector\.)?clip\.vision\.(?:post_layernorm\.|encoder\.layers\.(\d+)\.)")
_USE_AS_IT_IS = "It is a checkpoint already: use it as it is."
_NOTHING_TO_IMPORT = {
    keymaps.OUR_EXPLAINER: _USE_AS_IT_IS,
    keymaps.DETECTOR: _USE_AS_IT_IS,
    keymaps.DELTA: "It is a delta already: use it as it is.",
    keymaps.LANGUAGE: "Give the whole folder if this is a part of an explainer.",
}


@dataclass
class Imported:
    """Published weights in our terms, and what was written of them.

    Args:
        source: What was published.
        kind: In words.
        config: The content of ``config.json`` (of ``adapter_config.json`` for an adapter).
        tensors: By our names.
        entries: For each file, what becomes of each of its keys.
        sources: What ``stage.json`` says of each file.
        files: Further files of the checkpoint, by name.
        head: Of a detector: its published last layer, features (B, F) to logits (B, 2).
        folder: The new checkpoint.
        fingerprint: Of the new checkpoint.
        verified: What ``verify_import`` found, when it was asked for.
    """

    source: Weights
    kind: str
    config: dict[str, Any]
    tensors: dict[str, LazyTensor]
    entries: dict[str, list[Entry]]
    sources: list[dict[str, Any]]
    files: dict[str, bytes] = field(default_factory=dict)
    head: Callable[[torch.Tensor], torch.Tensor] | None = None
    folder: Path = Path()
    fingerprint: str = ""
    verified: Verification | None = None

    @property
    def parameters(self) -> int:
        """How many values its tensors hold."""
        return sum(tensor.size for tensor in self.tensors.values())

    def summary(self) -> list[tuple[str, int, str, str]]:
        """Rows (file, how many keys, what became of them, destination or reason)."""
        rows = []
        for path, entries in self.entries.items():
            groups: dict[tuple[str, str], list[Entry]] = {}
            for entry in entries:
                where = entry.why or _branch(entry.to or "")
                groups.setdefault((entry.action, where), []).append(entry)
            for (action, where), members in groups.items():
                alone = members[0].to if len(members) == 1 else None
                rows.append((Path(path).name, len(members), action, alone or where))
        return rows

    def listing(self) -> list[tuple[str, str, str, str]]:
        """Rows (file, key, what became of it, destination or reason), one a key."""
        return [
            (Path(path).name, entry.key, entry.action, entry.to or entry.why)
            for path, entries in self.entries.items()
            for entry in entries
        ]

    def as_dict(self) -> dict[str, Any]:
        """The whole account as plain data."""
        return {
            "output": str(self.folder),
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "parameters": self.parameters,
            "verified": asdict(self.verified) if self.verified else None,
            "keys": [
                {"file": path, "key": e.key, "action": e.action, "to": e.to, "why": e.why or None}
                for path, entries in self.entries.items()
                for e in entries
            ],
        }

    def stage(self, digests: Mapping[str, str]) -> dict[str, Any]:
        """``stage.json``, from the digests of the tensors that were written."""
        source, sources = self.source, self.sources
        said: dict[str, Any] = {"stage": "import", "kind": self.kind}
        if source.kind == keymaps.EXPLAINER:
            names = {e.key: e.to for e in self.entries[str(source.path)] if e.to is not None}
            mark = source_fingerprint(source, names, self.tensors, digests)
            main = {"file": source.path.resolve().name, "kind": source.kind}
            sources = [main | {"layout": source.layout, "fingerprint": mark}, *sources]
        said["sources"] = sources
        if source.kind in keymaps.DELTAS:
            base = ("base_model_name_or_path", "_name_or_path")
            named = [source.config[name] for name in base if source.config.get(name)]
            said |= {"parent": None, "trained_on": next(iter(named), None)}
        return said | {"versions": library_versions("m2f2cli", "torch", "transformers")}


def import_weights(
    paths: Sequence[Path],
    output: Path,
    *,
    clip_config: Path | None = None,
    verify: bool = False,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> Imported:
    """Turn published weights into a checkpoint or delta folder.

    Args:
        paths: A detector, an explainer's folder (or one of its files) or a delta's, and, where it
            lacks one, a file or folder that brings its CLIP vision tower.
        output: The folder to make.
        clip_config: A CLIP ``config.json``, for towers that are none of the known ones.
        verify: Read it back, load it and run it on a fixed input.
        overwrite: Replace an existing checkpoint folder.
        progress: Shows how far it is.

    Raises:
        CheckpointError: A file is unreadable, unknown or incomplete, a tensor has the wrong shape
            or holds NaN or infinity, the folder exists, the disk refuses, or what was written is
            not what was meant.
        UsageError: The files do not make one checkpoint.
    """
    files.refuse_existing(output, overwrite)
    homes = dict.fromkeys(io.home_of(path) for path in paths)
    source, tower = _source_and_tower([_open(home) for home in homes])
    made = _CONVERTERS[source.kind](source, tower, clip_config)
    with progress("Writing", len(made.tensors)) as advance:
        tensors = io.watched(made.tensors, advance)
        if source.kind in keymaps.DELTAS:
            made.fingerprint = adapters.write_delta(
                output,
                tensors=tensors,
                stage=made.stage,
                adapter=made.config or None,
                overwrite=overwrite,
            )
        else:
            made.fingerprint = io.write_checkpoint(
                output,
                config=made.config,
                tensors=tensors,
                stage=made.stage,
                extra_files=made.files,
                overwrite=overwrite,
            )
        made.folder = output
        if verify:
            made.verified = verify_import(output, made.tensors, made.config, made.head)
    return made


def _open(path: Path) -> Weights:
    """Open weights, by names without what parallel or compiled training put into them."""
    found = io.open_weights(path)
    tensors = keymaps.without_wrappers(found.tensors)
    kind = keymaps.kind_of(tensors) if tensors.keys() != found.tensors.keys() else found.kind
    return replace(found, tensors=tensors, kind=kind)


def _source_and_tower(opened: Sequence[Weights]) -> tuple[Weights, Weights | None]:
    for one in opened:
        hint = _NOTHING_TO_IMPORT.get(one.kind)
        if hint or (one.kind == keymaps.PEFT and adapters.is_ours(one)):
            raise CheckpointError(f"'{one.path}' is a {one.kind}, nothing to import.", hint)
    if len(opened) == 1 and opened[0].kind in (keymaps.LLAVA, keymaps.LLAVA_HF):
        raise UsageError(
            f"'{opened[0].path}' is a {opened[0].kind}; it has no detector to import.",
            f"m2f2 init-llava --llava {opened[0].path} --detector DIR --output DIR",
        )
    sources = [one for one in opened if one.kind in _CONVERTERS]
    towers = [one for one in opened if one.kind not in _CONVERTERS]
    for tower in towers:
        _tower_prefix(tower)
    alone = bool(sources) and sources[0].kind in keymaps.DELTAS
    if len(sources) != 1 or len(towers) > (0 if alone else 1):
        names = ", ".join(f"'{one.path}' is a {one.kind}" for one in opened)
        raise UsageError(
            f"These files do not make one checkpoint: {names}.",
            "Give a detector or an explainer and at most one CLIP tower, or a delta alone.",
        )
    return sources[0], towers[0] if towers else None


# --- detectors, explainers, deltas --------------------------------------------------------------


def _detector(source: Weights, tower: Weights | None, clip_config: Path | None) -> Imported:
    what = f"'{source.path}'"
    is_a = source.kind == keymaps.DETECTOR_A
    folded = keymaps.FOLDED if is_a else ()
    checked = {k: t.finite(what=f"The tensor '{k}' of {what}") for k, t in source.tensors.items()}
    mark = "clip_vision_alpha"
    prefix = next((key.removesuffix(mark) for key in checked if key.endswith(mark)), None)
    if prefix is None or not all(key.startswith(prefix) for key in checked):
        raise CheckpointError(
            f"{what} holds a detector inside a larger model.",
            "Give the detector's own file; m2f2 info PATH says what this one is.",
        )
    state = {key.removeprefix(prefix): tensor for key, tensor in checked.items()}
    needed = (*folded, "output.weight", "output.bias", "vision_proj.0.weight")
    if missing := [key for key in needed if key not in state]:
        raise CheckpointError(f"{what} lacks the tensors {', '.join(missing)}.")
    head, folded_head = _published_head({key: state[key].load() for key in needed}, folded=is_a)
    backbone = keymaps.backbone_of(state, what=what)
    rows = keymaps.detector_map(source.kind, backbone)
    plain = (key for key in checked if key.removeprefix(prefix) not in folded)
    entries = keymaps.look_up(plain, rows, what=what, prefix=prefix)
    tensors = {e.to: checked[e.key] for e in entries if e.to is not None}
    tensors |= {f"head.{part}": from_tensor(tensor) for part, tensor in folded_head.items()}
    entries += [Entry(prefix + key, None, keymaps.BRIDGE, folded=True) for key in folded]
    config, by_file = _with_tower(source, entries, tensors, tower, clip_config, backbone=backbone)
    by_file[str(source.path)] += [Entry(key, None, _TRAINING) for key in source.others]
    given = " with ".join(f"'{one.path}'" for one in (source, tower) if one is not None)
    check_model(tensors, config, what=given, rows=rows)
    kind = "detector A" if is_a else "detector B"
    return Imported(
        source=source,
        kind=kind,
        config=config,
        tensors={name: tensors[name] for name in sorted(tensors)},
        entries=by_file,
        sources=[io.describe_file(source) | {"kind": kind}, *_tower_source(tower)],
        files={"preprocessor_config.json": configs.preprocessor_file(config)},
        head=head,
    )


def _published_head(
    state: Mapping[str, torch.Tensor], *, folded: bool
) -> tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, torch.Tensor]]:
    """A detector's last layer as published, and detector A's with the bridge folded into it."""
    weight, bias = state["output.weight"].float(), state["output.bias"].float()

    def head(features: torch.Tensor) -> torch.Tensor:
        if folded:
            half = features.shape[1] // 2
            middle = keymaps.bridge_constant(state).float().expand(len(features), -1)
            features = torch.cat([features[:, :half], middle, features[:, half:]], dim=1)
        return torch.nn.functional.linear(features, weight, bias)

    made = keymaps.fold_bridge(state) if folded else {}
    return head, {key.removeprefix("output."): made[key] for key in made if "output." in key}


def _explainer(source: Weights, tower: Weights | None, clip_config: Path | None) -> Imported:
    what, rows = f"'{source.path}'", keymaps.PUBLISHED
    entries = keymaps.look_up(source.tensors, rows, what=what)
    tensors = {e.to: source.tensors[e.key] for e in entries if e.to is not None}
    text = configs.llama_config(source.config, tensors, what=what)
    part = keymaps.DETECTOR_PART
    detector, by_file = _with_tower(source, entries, tensors, tower, clip_config, part=part)
    config = configs.explainer_config(
        detector=detector,
        text=text,
        aspect=configs.llava_aspect(source.config, source.kind),
        dtype=tensors["language_model.model.embed_tokens.weight"].dtype,
    )
    check_model(tensors, config, what=what, rows=rows)
    preprocessor = {"preprocessor_config.json": configs.preprocessor_file(detector)}
    return Imported(
        source=source,
        kind="published explainer",
        config=config,
        tensors={name: tensors[name] for name in sorted(tensors)},
        entries=by_file,
        sources=_tower_source(tower),
        files=tokenizer_files(source.folder, text) | preprocessor,
    )


def _delta(source: Weights, tower: Weights | None, clip_config: Path | None) -> Imported:
    delta = adapters.read_delta(source)
    entries = {str(source.path): delta.entries}
    return Imported(source, source.kind, delta.config, delta.tensors(), entries, [delta.source])


_CONVERTERS: dict[str, Callable[[Weights, Weights | None, Path | None], Imported]] = {
    keymaps.DETECTOR_A: _detector,
    keymaps.DETECTOR_B: _detector,
    keymaps.EXPLAINER: _explainer,
    **dict.fromkeys(keymaps.DELTAS, _delta),
}
"""How each kind is imported; anything else may bring a CLIP vision tower to it."""


# --- the CLIP vision tower ----------------------------------------------------------------------


def _with_tower(
    source: Weights,
    entries: list[Entry],
    tensors: dict[str, LazyTensor],
    tower: Weights | None,
    clip_config: Path | None,
    *,
    part: str = "",
    backbone: str = "densenet121",
) -> tuple[dict[str, Any], dict[str, list[Entry]]]:
    """Complete a model with its CLIP vision tower, as far up as it is used.

    ``tensors`` (by our names) is changed here. ``part`` stands before the detector's names.

    Returns:
        The detector's configuration, and what becomes of the keys of each file.
    """
    by_file = {str(source.path): entries}
    own = {name: t for name, t in tensors.items() if name.startswith(f"{part}clip.vision.")}
    if tower is not None:
        by_file[str(tower.path)] = _bring_tower(source, own, tensors, tower, part)
    elif not own:
        named = source.config.get("mm_vision_tower")
        raise CheckpointError(
            f"'{source.path}' comes without its CLIP vision tower{f' ({named})' if named else ''}.",
            "Give its file or folder (of the published models: "
            f"openai/clip-vit-large-patch14-336) as well: m2f2 import {source.path} TOWER "
            "--output DIR.",
        )
    words = [t.shape[0] for key, t in source.tensors.items() if key.endswith(_WORDS)]
    config = configs.detector_config(
        {name.removeprefix(part): t for name, t in tensors.items() if name.startswith(part)},
        _given_clip(clip_config, tower),
        backbone=backbone,
        words=int(words[0]) if words else 49408,
        what=f"'{source.path}'",
    )
    used = blocks_needed(config["clip"]["vision"]["num_hidden_layers"], configs.VISION_LAYER)

    def is_above(name: str | None) -> bool:
        match = _UNUSED.match(name or "")
        return match is not None and (match[1] is None or int(match[1]) >= used)

    for name in [name for name in tensors if is_above(name)]:
        del tensors[name]
    return config, {
        path: [replace(e, to=None, why=_ABOVE) if is_above(e.to) else e for e in found]
        for path, found in by_file.items()
    }


def _bring_tower(
    source: Weights,
    own: Mapping[str, LazyTensor],
    tensors: dict[str, LazyTensor],
    tower: Weights,
    part: str,
) -> list[Entry]:
    """Take a tower from its file, or compare it with the model's own."""
    prefix = _tower_prefix(tower)
    inside = [key for key in tower.tensors if key.startswith(prefix)]
    found = keymaps.look_up(inside, keymaps.VISION_TOWER, what=f"'{tower.path}'", prefix=prefix)
    entries = [replace(e, to=part + e.to) if e.to is not None else e for e in found]
    brought = {e.to: tower.tensors[e.key] for e in entries if e.to is not None}
    for name, tensor in own.items():
        twin = brought.get(name)
        if twin is None or twin.shape != tensor.shape or io.largest_difference(twin, tensor):
            raise UsageError(
                f"'{source.path}' brings its own CLIP vision tower, and the one in '{tower.path}' "
                f"differs ({name.removeprefix(part)}).",
                "Give the model's file alone, or a model without a tower.",
            )
    tensors.update({name: tensor for name, tensor in brought.items() if name not in own})
    entries = [replace(e, to=None, why=_SAME_TOWER) if e.to in own else e for e in entries]
    outside = [key for key in tower.tensors if not key.startswith(prefix)]
    return entries + [Entry(key, None, _NO_TOWER) for key in (*outside, *tower.others)]


def _tower_prefix(file: Weights) -> str:
    """What stands before the names of a CLIP vision tower in its own file, a CLIP or a LLaVA."""
    marks = [key for key in file.tensors if key.endswith(_CLASS_TOKEN)]
    if len(marks) != 1:
        raise CheckpointError(
            f"'{file.path}' is neither a published detector nor a CLIP vision tower.",
            "m2f2 info PATH says what it is.",
        )
    return marks[0].removesuffix(_CLASS_TOKEN)


def _given_clip(path: Path | None, tower: Weights | None) -> dict[str, dict[str, Any]]:
    """The CLIP settings the user gave, or those in the folder the tower came from."""
    if path is not None or tower is None or not tower.config:
        return configs.read_clip_config(path)
    part = tower.config.get("vision_config", tower.config)
    return {"vision": part} if part.get("model_type") == "clip_vision_model" else {}


def _tower_source(tower: Weights | None) -> list[dict[str, Any]]:
    return [] if tower is None else [io.describe_file(tower) | {"kind": "vision tower"}]


# --- what stands beside the tensors -------------------------------------------------------------


def source_fingerprint(
    source: Weights,
    names: Mapping[str, str],
    written: Mapping[str, LazyTensor],
    digests: Mapping[str, str],
) -> str:
    """What ``io.fingerprint`` gives for a source, without reading again what was taken over.

    Args:
        source: A folder whose tensors were, for the most part, written as they were.
        names: Our names of its tensors that were, by their keys.
        written: The tensors of the new checkpoint.
        digests: Their digests.
    """
    found = {}
    for key, stored in source.tensors.items():
        name = names.get(key, "")
        same = name in digests and written[name].dtype == stored.dtype
        found[key] = digests[name] if same else io.digest_of(stored)
    return io.combine(source.config, found)


def tokenizer_files(folder: Path, text_config: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a folder's tokenizer, checked against the language model it belongs to.

    Raises:
        CheckpointError: It is missing or damaged, lacks a special token, or is of another model.
    """
    tokenizer = load_tokenizer(folder)
    elsewhere = "Take the tokenizer's files from the folder of the same model."
    for name in ("bos_token_id", "eos_token_id"):
        mine, theirs = text_config[name], getattr(tokenizer, name)
        if theirs not in (mine if isinstance(mine, list) else [mine]):
            raise CheckpointError(
                f"The tokenizer in '{folder}' says {name} {theirs}, config.json {mine}.", elsewhere
            )
    if len(tokenizer) > text_config["vocab_size"]:
        raise CheckpointError(
            f"The tokenizer in '{folder}' has {len(tokenizer)} tokens, the language model "
            f"{text_config['vocab_size']}.",
            elsewhere,
        )
    found = (folder / name for name in _TOKENIZER_FILES)
    return {path.name: path.read_bytes() for path in found if path.is_file()}


def _branch(name: str) -> str:
    """The part of the model a tensor belongs to, for example ``clip.vision.*``."""
    parts = name.removeprefix(keymaps.DELTA_PREFIX).split(".")
    depth = 1 + (parts[0] == "detector")
    if parts[depth - 1] == "clip":
        depth += 1
    return ".".join([*parts[:depth], "*"])
