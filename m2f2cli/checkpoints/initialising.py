"""An explainer before its training: a LLaVA, a detector and a new forgery projector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from m2f2cli import files as atomic
from m2f2cli.checkpoints import assembling, kinds, llava, reference, store
from m2f2cli.checkpoints.assembling import TowerReport
from m2f2cli.checkpoints.explainer_loading import build_empty
from m2f2cli.checkpoints.folders import Weights, open_weights
from m2f2cli.checkpoints.loading import resolve_checkpoint
from m2f2cli.checkpoints.reference import Row
from m2f2cli.checkpoints.streams import watched
from m2f2cli.errors import CheckpointError
from m2f2cli.models.explainer import ExplainerConfig
from m2f2cli.models.tokenizer import load_tokenizer
from m2f2cli.options.fields import Checked, option

Progress = Callable[..., None]

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_HUB_FILES = ("*.json", "tokenizer.model", "*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class InitLlavaOptions(Checked):
    """How an explainer is put together."""

    dtype: str = option(
        "auto",
        "Type of the language model and the projectors; auto keeps the base's.",
        "auto",
        "float32",
        "bfloat16",
        "float16",
    )
    tower: str = option(
        "detector",
        "Whose CLIP tower serves both where they differ.",
        *assembling.TOWERS,
    )
    seed: int = option(0, "Seed of the new projector.", low=0)


@dataclass(frozen=True)
class Initialised:
    """What ``init_llava`` did.

    Args:
        folder: The new checkpoint.
        fingerprint: Of the new checkpoint.
        parts: Rows (part, tensors, parameters, types).
        tower: How the two CLIP towers compare.
    """

    folder: Path
    fingerprint: str
    parts: list[tuple[str, int, int, str]]
    tower: TowerReport

    @property
    def parameters(self) -> int:
        """How many values the checkpoint holds."""
        return sum(row[2] for row in self.parts)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The parts for people."""
        return [(part, f"{n:,}", f"{total:,}", types) for part, n, total, types in self.parts]

    def as_dict(self) -> dict[str, Any]:
        """The account as plain data."""
        names = ("part", "tensors", "parameters", "dtypes")
        return {
            "output": str(self.folder),
            "fingerprint": self.fingerprint,
            "parameters": self.parameters,
            "parts": [dict(zip(names, row, strict=True)) for row in self.parts],
            "clip_tower": asdict(self.tower),
        }


class InitLlava:
    """A planned explainer: everything is checked, nothing is written yet.

    Args:
        source: A LLaVA-1.5 folder in either layout, or a Hub id.
        detector: A detector folder, ``lite`` or a Hub id.
        output: The checkpoint folder to make.
        options: How.
        overwrite: Replace an existing checkpoint folder.

    Raises:
        CheckpointError: A source is unreadable, incomplete or of another kind, the two do not fit
            together, the tokeniser is missing or of another model, or the output exists.
    """

    def __init__(
        self,
        source: str,
        detector: str,
        output: Path,
        *,
        options: InitLlavaOptions | None = None,
        overwrite: bool = False,
    ) -> None:
        self.options = options or InitLlavaOptions()
        self.output, self.overwrite = output, overwrite
        atomic.refuse_existing(output, overwrite)
        self._detector = _open_detector(detector)
        self._base = llava.read_base(open_weights(resolve_checkpoint(source, patterns=_HUB_FILES)))
        self._tokenizer = tokenizer_files(self._base.weights.folder, self._base.text_config)
        dtype = None if self.options.dtype == "auto" else self.options.dtype
        self.plan = assembling.assemble(
            self._base,
            self._detector,
            dtype=dtype,
            tower=self.options.tower,
            seed=self.options.seed,
        )
        words = self.plan.tensors["language_model.model.embed_tokens.weight"]
        self.config = assembling.explainer_config(
            detector=self._detector.config,
            text=self._base.text_config,
            aspect=self._base.image_aspect,
            dtype=words.dtype,
        )
        what = f"'{source}' with the detector '{detector}'"
        check_explainer(self.plan.tensors, self.config, what=what)

    def write(self, advance: Progress = lambda steps=1, note="": None) -> Initialised:
        """Write the checkpoint, tensor by tensor.

        Args:
            advance: Called with (1, name) after each tensor.

        Raises:
            CheckpointError: A tensor holds NaN or infinity, or the disk refuses; nothing is left.
        """
        mark = store.write_checkpoint(
            self.output,
            config=self.config,
            tensors=watched(self.plan.tensors, advance),
            stage=self._stage,
            extra_files={
                **self._tokenizer,
                "preprocessor_config.json": preprocessor_file(self.config["detector_config"]),
            },
            overwrite=self.overwrite,
        )
        return Initialised(
            self.output, mark, assembling.parts_of(self.plan.tensors), self.plan.tower
        )

    def _stage(self, digests: Mapping[str, str]) -> dict[str, Any]:
        base = self._base.weights
        mark = assembling.source_fingerprint(base, self.plan.names, self.plan.tensors, digests)
        return {
            "stage": "init-llava",
            "parents": {
                "llava": _parent(base, mark),
                "detector": _parent(self._detector, store.fingerprint(self._detector.path)),
            },
            "options": asdict(self.options),
            "clip_tower": asdict(self.plan.tower),
            "versions": versions(),
        }


def _open_detector(name: str) -> Weights:
    found = open_weights(resolve_checkpoint(name))
    hint = f"See what it is with: m2f2 info {name}"
    if found.kind in (kinds.DETECTOR_A, kinds.DETECTOR_B):
        hint = f"Import it first: m2f2 import {name} --output DIR"
    elif found.kind in (kinds.LLAVA, kinds.LLAVA_HF):
        hint = "Give it as --llava, and the detector folder as --detector."
    if found.kind != kinds.DETECTOR or not found.config:
        raise CheckpointError(f"'{name}' is no detector folder but: {found.kind}.", hint)
    return found


def _parent(weights: Weights, mark: str) -> dict[str, Any]:
    return {"name": weights.path.resolve().name, "kind": weights.kind, "fingerprint": mark}


def tokenizer_files(folder: Path, text_config: Mapping[str, Any]) -> dict[str, bytes]:
    """A folder's tokeniser, checked against the language model it belongs to.

    Returns:
        The files' contents by name.

    Raises:
        CheckpointError: It is missing or damaged, lacks a special token, or is of another model.
    """
    tokenizer = load_tokenizer(folder)
    elsewhere = "Take the tokeniser's files from the folder of the same model."
    for name in ("bos_token_id", "eos_token_id"):
        mine, theirs = text_config[name], getattr(tokenizer, name)
        if theirs not in (mine if isinstance(mine, list) else [mine]):
            raise CheckpointError(
                f"The tokeniser in '{folder}' says {name} {theirs}, config.json {mine}.", elsewhere
            )
    if len(tokenizer) > text_config["vocab_size"]:
        raise CheckpointError(
            f"The tokeniser in '{folder}' has {len(tokenizer)} tokens, the language model "
            f"{text_config['vocab_size']}.",
            elsewhere,
        )
    found = (folder / name for name in TOKENIZER_FILES)
    return {path.name: path.read_bytes() for path in found if path.is_file()}


def check_explainer(
    tensors: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    what: str,
    rows: Sequence[Row] | None = None,
) -> None:
    """Compare tensors with the explainer that a configuration describes.

    Args:
        tensors: By our names, with shapes.
        config: The content of ``config.json``.
        what: Where they come from, for the message.
        rows: A table, to name tensors as they stand in the files.

    Raises:
        CheckpointError: Names the missing, the unexpected and the wrongly shaped tensors.
    """
    expected = build_empty(ExplainerConfig.from_dict(dict(config))).state_dict()
    if rows is not None:
        expected = reference.to_published(expected, rows)
        tensors = reference.to_published(tensors, rows)
    store.check_names_and_shapes(tensors, expected, what=what)


def preprocessor_file(detector: Mapping[str, Any]) -> bytes:
    """The content of ``preprocessor_config.json`` for a detector's configuration."""
    size, mean, std = (detector[name] for name in ("image_size", "image_mean", "image_std"))
    return store.json_bytes(store.preprocessor_config(size, mean, std))


def versions() -> dict[str, str]:
    """The versions of what made a checkpoint."""
    return {name: version(name) for name in ("m2f2cli", "torch", "transformers")}
