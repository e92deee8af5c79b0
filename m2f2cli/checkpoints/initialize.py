"""``m2f2 init-llava``: an explainer before its training, from LLaVA-1.5 and a detector.

The explainer runs one CLIP tower for the language model and for the detector. Where the two bring
different ones, one is kept for both, and the difference is reported. Tensors go from file to file
one by one, so memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from m2f2cli import files
from m2f2cli.checkpoints import configs, io, keymaps
from m2f2cli.checkpoints.convert import source_fingerprint, tokenizer_files
from m2f2cli.checkpoints.hub import resolve_checkpoint
from m2f2cli.checkpoints.io import LazyTensor, Weights
from m2f2cli.checkpoints.load import check_model
from m2f2cli.environment import library_versions
from m2f2cli.errors import CheckpointError
from m2f2cli.options.checkpoints import InitLlavaOptions
from m2f2cli.runtime import Progress, no_progress

_HUB_FILES = ("*.json", "tokenizer.model", "*.safetensors", "pytorch_model*.bin")
_WORDS = "language_model.model.embed_tokens.weight"
# The vision towers that LLaVA's configurations name: (width, side of the picture).
_TOWERS = {
    "openai/clip-vit-large-patch14-336": (1024, 336),
    "openai/clip-vit-large-patch14": (1024, 224),
}
_HINTS = {
    keymaps.EXPLAINER: "It is an explainer already: m2f2 import DIR --output DIR.",
    keymaps.OUR_EXPLAINER: "It is an explainer already; nothing is to be initialized.",
    keymaps.DETECTOR: "Give it as --detector, and the LLaVA model as --llava.",
    keymaps.LANGUAGE: "It lacks LLaVA's projector: take liuhaotian/llava-v1.5-7b, for example.",
}


@dataclass(frozen=True)
class TowerComparison:
    """How the base's CLIP tower and the detector's compare.

    Args:
        state: ``absent`` (the base brings none), ``same``, ``differs`` or ``another library``.
        difference: The largest difference of a value, after rounding both to the coarser type.
        fields: Settings that differ, such as ``hidden_act``.
        kept: Whose tower the explainer has.
    """

    state: str
    difference: float = 0.0
    fields: tuple[str, ...] = ()
    kept: str = "detector"

    def sentence(self) -> str:
        """The comparison in words."""
        if self.state == "absent":
            return "The LLaVA base brings no CLIP tower; the detector's serves both."
        if self.state == "same":
            return "The LLaVA base and the detector have the same CLIP tower."
        if self.state == "another library":
            return (
                "The detector's CLIP tower comes from open_clip and was not compared with that of "
                "the LLaVA base; the detector's serves both."
            )
        how = f"by up to {self.difference:.3g}"
        if self.fields:
            how += f", and in {', '.join(self.fields)}"
        if self.kept == "detector":
            return (
                f"The CLIP tower of the LLaVA base differs from the detector's {how}. The "
                "detector's serves both, so its verdicts stay; the language model was trained with "
                "the other (--tower llava keeps that one)."
            )
        return (
            f"The CLIP tower of the LLaVA base differs from the detector's {how}. The base's "
            "serves both, as --tower llava says, so the detector's verdicts change."
        )


@dataclass
class NewExplainer:
    """An explainer before its training.

    Args:
        base: The LLaVA.
        detector: The detector.
        options: How they are put together.
        config: The content of ``config.json``.
        tensors: By our names.
        names: Our names of the base's tensors that were taken, by their keys there.
        tower: How the base's CLIP tower and the detector's compare.
        tokenizer: The tokenizer's files.
        fingerprint: Of the checkpoint, once it is written.
    """

    base: Weights
    detector: Weights
    options: InitLlavaOptions
    config: dict[str, Any]
    tensors: dict[str, LazyTensor]
    names: dict[str, str]
    tower: TowerComparison
    tokenizer: dict[str, bytes]
    fingerprint: str = ""

    @property
    def parameters(self) -> int:
        """How many values the checkpoint holds."""
        return sum(tensor.size for tensor in self.tensors.values())

    def parts(self) -> list[tuple[str, int, int, str]]:
        """Rows (part, tensors, parameters, types)."""
        groups: dict[str, list[LazyTensor]] = {}
        for name, tensor in self.tensors.items():
            part = "detector.clip" if name.startswith(keymaps.TOWER_PART) else name.split(".")[0]
            groups.setdefault(part, []).append(tensor)
        return [
            (part, len(group), sum(t.size for t in group), _types(group))
            for part, group in sorted(groups.items())
        ]

    def as_dict(self) -> dict[str, Any]:
        """The account as plain data."""
        names = ("part", "tensors", "parameters", "dtypes")
        return {
            "fingerprint": self.fingerprint,
            "parameters": self.parameters,
            "parts": [dict(zip(names, row, strict=True)) for row in self.parts()],
            "clip_tower": asdict(self.tower),
        }

    def stage(self, digests: Mapping[str, str]) -> dict[str, Any]:
        """``stage.json``, from the digests of the tensors that were written."""
        marks = {
            "llava": source_fingerprint(self.base, self.names, self.tensors, digests),
            "detector": io.fingerprint(self.detector.path),
        }
        return {
            "stage": "init-llava",
            "parents": {
                name: {
                    "name": weights.path.resolve().name,
                    "kind": weights.kind,
                    "fingerprint": marks[name],
                }
                for name, weights in (("llava", self.base), ("detector", self.detector))
            },
            "options": asdict(self.options),
            "clip_tower": asdict(self.tower),
            "versions": library_versions("m2f2cli", "torch", "transformers"),
        }


def init_llava(
    llava: str,
    detector: str,
    output: Path,
    *,
    options: InitLlavaOptions | None = None,
    overwrite: bool = False,
    compared: Callable[[TowerComparison], None] = lambda tower: None,
    progress: Progress = no_progress,
) -> NewExplainer:
    """Build an explainer from LLaVA-1.5 and a detector, before its training.

    Args:
        llava: A LLaVA-1.5 folder in either layout, or a Hub id.
        detector: A detector folder, ``lite`` or a Hub id.
        output: The checkpoint folder to make.
        options: How.
        overwrite: Replace an existing checkpoint folder.
        compared: Called with how the two CLIP towers compare, before anything is written.
        progress: Shows how far it is.

    Raises:
        CheckpointError: A source is unreadable, incomplete or of another kind, the two do not fit
            together, the tokenizer is missing or of another model, a tensor holds NaN or infinity,
            the folder exists, or the disk refuses; nothing is left.
    """
    files.refuse_existing(output, overwrite)
    made = _plan(llava, detector, options or InitLlavaOptions())
    compared(made.tower)
    preprocessor = configs.preprocessor_file(made.config["detector_config"])
    with progress("Writing", len(made.tensors)) as advance:
        made.fingerprint = io.write_checkpoint(
            output,
            config=made.config,
            tensors=io.watched(made.tensors, advance),
            stage=made.stage,
            extra_files={**made.tokenizer, "preprocessor_config.json": preprocessor},
            overwrite=overwrite,
        )
    return made


def _plan(llava: str, detector: str, options: InitLlavaOptions) -> NewExplainer:
    """Check everything; nothing but CLIP towers is read yet."""
    judge = _open_detector(detector)
    base = io.open_weights(resolve_checkpoint(llava, patterns=_HUB_FILES))
    what = f"'{base.path}'"
    rows = {keymaps.LLAVA: keymaps.ORIGINAL, keymaps.LLAVA_HF: keymaps.HUGGING_FACE}
    if base.kind not in rows:
        raise CheckpointError(
            f"{what} is no LLaVA base but: {base.kind}.",
            _HINTS.get(base.kind, "Give a folder of LLaVA-1.5, in either of its layouts."),
        )
    entries = keymaps.look_up(base.tensors, rows[base.kind], what=what)
    theirs = {e.to: base.tensors[e.key] for e in entries if e.to is not None}
    text = configs.llama_config(base.config, theirs, what=what)
    tokenizer = tokenizer_files(base.folder, text)
    _check_fit(base, theirs, judge)
    tower = _compare_towers(base, theirs, judge, options.tower)
    tensors = {f"{keymaps.DETECTOR_PART}{key}": stored for key, stored in judge.tensors.items()}
    wanted = theirs[_WORDS].dtype if options.dtype == "auto" else options.dtype
    taken = set()
    for name, tensor in theirs.items():
        if not name.startswith(keymaps.TOWER_PART):
            keeps = options.dtype == "auto"
            tensors[name] = tensor if keeps else tensor.cast(wanted, what=f"The tensor '{name}'")
        elif tower.kept == "llava" and name in tensors:
            tensors[name] = tensor
        else:
            continue
        taken.add(name)
    tensors |= _new_projector(theirs[_WORDS].shape[1], wanted, options.seed)
    config = configs.explainer_config(
        detector=judge.config,
        text=text,
        aspect=configs.llava_aspect(base.config, base.kind),
        dtype=wanted,
    )
    check_model(tensors, config, what=f"'{llava}' with the detector '{detector}'")
    names = {e.key: e.to for e in entries if e.to is not None and e.to in taken}
    return NewExplainer(base, judge, options, config, tensors, names, tower, tokenizer)


def _open_detector(name: str) -> Weights:
    found = io.open_weights(resolve_checkpoint(name))
    hint = f"See what it is with: m2f2 info {name}"
    if found.kind in (keymaps.DETECTOR_A, keymaps.DETECTOR_B):
        hint = f"Import it first: m2f2 import {name} --output DIR"
    elif found.kind in (keymaps.LLAVA, keymaps.LLAVA_HF):
        hint = "Give it as --llava, and the detector folder as --detector."
    if found.kind != keymaps.DETECTOR or not found.config:
        raise CheckpointError(f"'{name}' is no detector folder but: {found.kind}.", hint)
    return found


def _new_projector(width: int, dtype: str, seed: int) -> dict[str, LazyTensor]:
    """The forgery projector before training: weights N(0, 0.1), biases 0, as published.

    Values for a language model of this width are drawn in float32 and rounded once; the same seed
    gives the same.
    """
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for layer, inputs in ((0, 2), (2, width)):
        weight = 0.1 * torch.randn((width, inputs), generator=generator)
        for part, tensor in (("weight", weight), ("bias", torch.zeros(width))):
            name = f"{keymaps.FORGERY_PROJECTOR}{layer}.{part}"
            made[name] = io.from_tensor(tensor.to(getattr(torch, dtype)))
    return made


def _types(group: list[LazyTensor]) -> str:
    sizes: dict[str, int] = {}
    for tensor in group:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
    return ", ".join(sorted(sizes, key=lambda name: -sizes[name]))


# --- the CLIP towers ----------------------------------------------------------------------------


def _check_fit(base: Weights, tensors: Mapping[str, LazyTensor], detector: Weights) -> None:
    """Refuse a detector whose tower is of another size than the base was trained with."""
    ours, theirs = detector.config["clip"]["vision"], base.config.get("vision_config", {})
    named = _TOWERS.get(str(base.config.get("mm_vision_tower")), (None, None))
    width = theirs.get("hidden_size", base.config.get("mm_hidden_size", named[0]))
    projector = tensors.get(f"{keymaps.VISION_PROJECTOR}0.weight")
    if projector is not None and len(projector.shape) == 2:
        width = projector.shape[1]
    side = ours.get("image_size", detector.config["image_size"])
    for name, mine, said in (
        ("width", ours.get("hidden_size", ours.get("width")), width),
        ("picture size", side, theirs.get("image_size", named[1])),
    ):
        if said is not None and mine != said:
            raise CheckpointError(
                f"The CLIP tower of the detector '{detector.path}' has the {name} {mine}, that of "
                f"the LLaVA base '{base.path}' {said}; they share one tower, so they must be "
                "equal.",
                "Give a detector with the base's tower (for LLaVA-1.5: CLIP ViT-L/14 at 336 "
                "pixels), such as the published detector B.",
            )
    if detector.config.get("vision_layer", -2) != configs.VISION_LAYER:
        raise CheckpointError(
            f"The detector '{detector.path}' reads the CLIP hidden state "
            f"{detector.config['vision_layer']}, LLaVA-1.5 the one before the last.",
            "Give a detector that was trained with vision layer -2.",
        )


def _compare_towers(
    base: Weights, tensors: Mapping[str, LazyTensor], detector: Weights, wanted: str
) -> TowerComparison:
    """Compare the CLIP towers of a base and a detector, as far as the detector's goes."""
    mine = configs.below("clip.vision.", detector.tensors)
    theirs = configs.below(keymaps.TOWER_PART, tensors)
    if not theirs or detector.config["clip"].get("library") == "open_clip":
        found = TowerComparison("another library" if theirs else "absent")
        if wanted == "llava":
            raise CheckpointError(
                f"The tower of '{base.path}' cannot be kept: {found.sentence()}",
                "Leave out --tower llava.",
            )
        return found
    common = {key: tensor for key, tensor in theirs.items() if key in mine}
    what = f"The CLIP tower of '{base.path}' beside the detector's"
    io.check_names_and_shapes(common, mine, what=what)
    vision, ours = base.config.get("vision_config", {}), detector.config["clip"]["vision"]
    names = ("num_attention_heads", "hidden_act", "layer_norm_eps")
    fields = tuple(name for name in names if name in vision and vision[name] != ours.get(name))
    worst = 0.0
    for key, tensor in mine.items():
        pair = (tensor, common[key])
        # Both are rounded to the coarser of their types.
        coarse = max(
            (t.dtype for t in pair), key=lambda name: torch.finfo(getattr(torch, name)).eps
        )
        one, other = (t.cast(coarse, what="A CLIP tower") for t in pair)
        worst = max(worst, io.largest_difference(one, other))
    if not worst and not fields:
        return TowerComparison("same")
    return TowerComparison("differs", worst, fields, wanted)
