"""An explainer put together from a LLaVA and a detector, tensor by tensor.

The explainer runs one CLIP tower for the language model and for the detector. Where the two bring
different ones, one is kept for both, and the difference is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from m2f2cli.checkpoints import llava_names, store, streams
from m2f2cli.checkpoints.folders import Weights
from m2f2cli.checkpoints.llava import Base, tower_size
from m2f2cli.checkpoints.streams import Stream
from m2f2cli.checkpoints.tensorfile import StoredTensor, digest_of
from m2f2cli.errors import CheckpointError

TOWERS = ("detector", "llava")
_CLIP = "clip.vision."
_FIELDS = ("num_attention_heads", "hidden_act", "layer_norm_eps")


@dataclass(frozen=True)
class TowerReport:
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
        """The report in words."""
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


@dataclass(frozen=True)
class Assembly:
    """A new explainer's tensors and where they come from.

    Args:
        tensors: By our names.
        names: Our names of the base's tensors that were taken, by their keys there.
        tower: How the base's CLIP tower and the detector's compare.
    """

    tensors: dict[str, Stream]
    names: dict[str, str]
    tower: TowerReport


def source_fingerprint(
    source: Weights,
    names: Mapping[str, str],
    written: Mapping[str, Stream],
    digests: Mapping[str, str],
) -> str:
    """A source's fingerprint, without reading again what was written as it was.

    Args:
        source: A folder whose tensors were, for the most part, taken over.
        names: Our names of its tensors that were, by their keys.
        written: The tensors of the new checkpoint.
        digests: Their digests.

    Returns:
        What ``store.fingerprint`` gives for it.
    """
    found = {}
    for key, stored in source.tensors.items():
        name = names.get(key, "")
        same = name in digests and written[name].dtype == stored.dtype
        found[key] = digests[name] if same else digest_of(stored)
    return store.combine(source.config, found)


def assemble(
    base: Base, detector: Weights, *, dtype: str | None, tower: str, seed: int
) -> Assembly:
    """Plan an explainer; nothing but a CLIP tower is read yet.

    Args:
        base: The LLaVA.
        detector: A detector folder of ours.
        dtype: The type of language model and projectors; None keeps the base's. The detector and
            the tower keep theirs.
        tower: Whose tower to keep where they differ, one of ``TOWERS``.
        seed: Of the forgery projector.

    Raises:
        CheckpointError: The detector does not fit the base.
    """
    check_fit(base, detector)
    report = compare_towers(base, detector, tower)
    tensors = {
        f"{llava_names.DETECTOR}{key}": streams.from_stored(stored)
        for key, stored in detector.tensors.items()
    }
    names = {}
    keys = {fate.to: fate.key for fate in base.fates}
    for name, stored in base.tensors.items():
        stream = streams.from_stored(stored)
        if not name.startswith(llava_names.TOWER):
            checked = streams.finite(stream, what=f"'{base.weights.path}': the tensor '{name}'")
            stream = streams.cast(checked, dtype or stored.dtype, what=f"The tensor '{name}'")
        elif report.kept != "llava" or name not in tensors:
            continue
        tensors[name] = stream
        if name in keys:
            names[keys[name]] = name
    words = base.tensors["language_model.model.embed_tokens.weight"]
    tensors |= new_projector(int(words.shape[1]), dtype or words.dtype, seed)
    return Assembly(tensors, names, report)


def new_projector(width: int, dtype: str, seed: int) -> dict[str, Stream]:
    """The forgery projector before training: weights N(0, 0.1), biases 0, as published.

    Args:
        width: Of the language model.
        dtype: A torch dtype's name; values are drawn in float32 and rounded once.
        seed: The same seed gives the same values.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    made = {}
    for layer, inputs in ((0, 2), (2, width)):
        weight = 0.1 * torch.randn((width, inputs), generator=generator)
        for part, tensor in (("weight", weight), ("bias", torch.zeros(width))):
            name = f"{llava_names.FORGERY_PROJECTOR}{layer}.{part}"
            made[name] = streams.from_tensor(tensor.to(getattr(torch, dtype)))
    return made


def check_fit(base: Base, detector: Weights) -> None:
    """Refuse a detector whose tower is of another size than the base was trained with.

    Raises:
        CheckpointError: Names both sizes.
    """
    spec = detector.config["clip"]["vision"]
    width = spec.get("hidden_size", spec.get("width"))
    side = spec.get("image_size", detector.config["image_size"])
    said_width, said_side = tower_size(base.weights.config)
    projector = base.tensors.get(f"{llava_names.VISION_PROJECTOR}0.weight")
    if projector is not None and len(projector.shape) == 2:
        said_width = projector.shape[1]
    for name, mine, theirs in (
        ("width", width, said_width),
        ("picture size", side, said_side),
    ):
        if theirs is not None and mine != theirs:
            raise CheckpointError(
                f"The CLIP tower of the detector '{detector.path}' has the {name} {mine}, that of "
                f"the LLaVA base '{base.weights.path}' {theirs}; they share one tower, so they "
                "must be equal.",
                "Give a detector with the base's tower (for LLaVA-1.5: CLIP ViT-L/14 at 336 "
                "pixels), such as the published detector B.",
            )
    if detector.config.get("vision_layer", -2) != -2:
        raise CheckpointError(
            f"The detector '{detector.path}' reads the CLIP hidden state "
            f"{detector.config['vision_layer']}, LLaVA-1.5 the one before the last.",
            "Give a detector that was trained with vision layer -2.",
        )


def compare_towers(base: Base, detector: Weights, wanted: str) -> TowerReport:
    """Compare the CLIP towers of a base and a detector, as far as the detector's goes.

    Args:
        base: The LLaVA.
        detector: A detector folder.
        wanted: Whose to keep where they differ.

    Raises:
        CheckpointError: They differ in shape, or the wanted one is not there.
    """
    mine = {
        key.removeprefix(_CLIP): stored
        for key, stored in detector.tensors.items()
        if key.startswith(_CLIP)
    }
    theirs = base.tower
    if not theirs or detector.config["clip"].get("library") == "open_clip":
        state = "absent" if not theirs else "another library"
        if wanted == "llava":
            raise CheckpointError(
                f"The tower of '{base.weights.path}' cannot be kept: "
                f"{TowerReport(state).sentence()}",
                "Leave out --tower llava.",
            )
        return TowerReport(state)
    common = {key: stored for key, stored in theirs.items() if key in mine}
    store.check_names_and_shapes(
        common, mine, what=f"The CLIP tower of '{base.weights.path}' beside the detector's"
    )
    vision = base.weights.config.get("vision_config", {})
    ours = detector.config["clip"]["vision"]
    fields = tuple(name for name in _FIELDS if name in vision and vision[name] != ours.get(name))
    worst = max(_rounded_difference(mine[key], common[key]) for key in mine)
    if not worst and not fields:
        return TowerReport("same")
    return TowerReport("differs", worst, fields, wanted)


def _rounded_difference(first: StoredTensor, second: StoredTensor) -> float:
    """The largest difference of two tensors, both rounded to the coarser of their types."""
    import torch

    pair = [streams.from_stored(first), streams.from_stored(second)]
    coarse = max((s.dtype for s in pair), key=lambda name: torch.finfo(getattr(torch, name)).eps)
    rounded = [streams.cast(stream, coarse, what="A CLIP tower") for stream in pair]
    return streams.largest_difference(*rounded)


def parts_of(tensors: Mapping[str, Stream]) -> list[tuple[str, int, int, str]]:
    """Rows (part, tensors, parameters, types) of an explainer."""
    groups: dict[str, list[Stream]] = {}
    for name, stream in tensors.items():
        part = "detector.clip" if name.startswith(llava_names.TOWER) else name.split(".")[0]
        groups.setdefault(part, []).append(stream)
    return [
        (part, len(group), sum(s.size for s in group), _types(group))
        for part, group in sorted(groups.items())
    ]


def _types(group: list[Stream]) -> str:
    kinds: dict[str, int] = {}
    for stream in group:
        kinds[stream.dtype] = kinds.get(stream.dtype, 0) + stream.size
    return ", ".join(sorted(kinds, key=lambda name: -kinds[name]))


def explainer_config(
    *, detector: Mapping[str, Any], text: Mapping[str, Any], aspect: str, dtype: str
) -> dict[str, Any]:
    """The content of an explainer's ``config.json``.

    Args:
        detector: The content of a detector's.
        text: The language model's fields.
        aspect: ``pad`` or ``square``.
        dtype: The type most values have.
    """
    left_out = ("architectures", "dtype", "transformers_version")
    return {
        "architectures": ["Explainer"],
        "model_type": "m2f2_explainer",
        "detector_config": {k: v for k, v in detector.items() if k not in left_out},
        "text_config": dict(text),
        "template": "vicuna_v1",
        "image_aspect": aspect,
        "image_token_id": -200,
        "deepfake_token_id": -300,
        "dtype": dtype,
    }
