"""The options of the commands on checkpoints: ``import``, ``init-llava``, ``merge``, ``info``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from m2f2cli.options.fields import Options, group, option, required

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ResultOptions(Options):
    """The checkpoint folder that is made."""

    output: Path = required("Checkpoint folder to make.", short="-o", group="Output")
    overwrite: bool = option(False, "Replace what is there.", group="Output")


@dataclass(frozen=True)
class ImportOptions(Options):
    """Every option of ``m2f2 import``."""

    files: tuple[Path, ...] = required(
        "Published weights: a .pth, .pt, .bin or .safetensors file, or a folder.",
        argument=True,
        metavar="PATH",
    )
    clip_config: Path | None = option(
        None,
        "config.json of the CLIP model, for towers that are none of OpenAI's.",
        group="Input",
        metavar="FILE.json",
    )
    result: ResultOptions = group(ResultOptions)
    verify: bool = option(
        False,
        "Read everything back, load it strictly and run it once on a fixed input.",
        group="Output",
    )
    verbose: bool = option(False, "List every tensor.", short="-v", group="Output")


@dataclass(frozen=True)
class InitLlavaOptions(Options):
    """How an explainer is put together."""

    dtype: str = option(
        "auto",
        "Type to store the language model and the projectors in; auto keeps the base's.",
        *DTYPES,
        group="Model",
    )
    tower: str = option(
        "detector",
        "Whose CLIP tower serves both where the base's and the detector's differ.",
        "detector",
        "llava",
        group="Model",
    )
    seed: int = option(0, "Seed of the new projector.", low=0, group="Model")


@dataclass(frozen=True)
class InitLlavaCommand(Options):
    """Every option of ``m2f2 init-llava``."""

    llava: str = required(
        "LLaVA-1.5: a folder in its own or in Hugging Face's layout, or a hub id.",
        group="Input",
        metavar="DIR|HUB-ID",
    )
    detector: str = required(
        "The detector: a checkpoint folder or a hub id.", group="Input", metavar="DIR|HUB-ID"
    )
    built: InitLlavaOptions = group(InitLlavaOptions)
    result: ResultOptions = group(ResultOptions)


@dataclass(frozen=True)
class MergeOptions(Options):
    """Every option of ``m2f2 merge``."""

    base: Path = required("Checkpoint to merge into.", group="Input")
    delta: tuple[Path, ...] = required(
        "What a stage trained: a delta of align or lora, a PEFT adapter or a published delta "
        "folder. Several are applied in order.",
        group="Input",
    )
    force: bool = option(
        False,
        "Merge a delta that was trained on another base, or that updates frozen modules; "
        "stage.json records it.",
        group="Input",
    )
    result: ResultOptions = group(ResultOptions)
    dtype: str = option(
        "auto",
        "Type to store all but the detector in; auto keeps each tensor's.",
        *DTYPES,
        group="Output",
    )
    verify: bool = option(
        False,
        "Compare what was written with base and delta kept apart, on probe inputs.",
        group="Output",
    )
    dry_run: bool = option(
        False, "Check everything and print the plan; write nothing.", group="Output"
    )


@dataclass(frozen=True)
class InfoOptions(Options):
    """Every option of ``m2f2 info``."""

    checkpoint: str | None = option(
        None, "A checkpoint folder, a weights file or 'lite'.", argument=True, metavar="[PATH]"
    )
    verify: bool = option(
        False, "Read every value: refuse NaN and check the stored fingerprint.", group="Input"
    )
    verbose: bool = option(False, "List every tensor.", short="-v", group="Output")
