"""Every flag, spelled and explained once.

A flag ``--batch-size`` also answers to the environment variable ``M2F2_BATCH_SIZE`` and to the key
``batch-size`` of a ``--config`` file. Flags win over the environment, the environment over the
file, the file over the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from m2f2cli.errors import ConfigError
from m2f2cli.options.fields import MOVED, renamed


def flag(name: str, help: str, **extra: Any) -> Any:
    """Describe the option ``--name`` for use inside ``Annotated``.

    Args:
        name: The long flag without its dashes.
        help: One sentence for the user.
        **extra: For ``typer.Option``; ``short="-m"`` adds a short spelling, ``switch=True``
            marks a flag without a value, ``negatable=True`` one that ``--no-NAME`` switches off;
            ``variable`` names another environment variable than the flag's own.
    """
    negatable = extra.pop("negatable", False)
    spellings = [f"--{name}/--no-{name}" if negatable else f"--{name}"]
    if short := extra.pop("short", None):
        spellings.append(short)
    if extra.pop("switch", False):
        extra["metavar"] = ""
    variable = extra.pop("variable", "M2F2_" + name.upper().replace("-", "_"))
    return typer.Option(*spellings, help=help, envvar=variable, show_envvar=False, **extra)


def _flags_from_file(context: typer.Context, path: Path | None) -> Path | None:
    """Make a YAML file's values the defaults of the running command's flags."""
    if path is None or context.resilient_parsing:
        return path
    values = as_defaults(context, read_mapping(path), f"'{path}'")
    context.default_map = {**(context.default_map or {}), **values}
    return path


def as_defaults(context: typer.Context, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Values of flags, named with dashes or underscores, by the names of the command's parameters.

    Raises:
        ConfigError: The command has no such flag.
    """
    by_flag: dict[str, Any] = {}
    for parameter in context.command.params:
        if parameter.name is None or parameter.name in ("config", "set", "help"):
            continue
        for spelling in parameter.opts:
            if spelling.startswith("--"):
                by_flag[spelling.removeprefix("--")] = parameter
    defaults = {}
    for key, value in values.items():
        name = key.replace("_", "-")
        if name not in by_flag:
            raise unknown_key(key, sorted(by_flag), where)
        parameter = by_flag[name]
        one_of_several = getattr(parameter, "multiple", False) and isinstance(value, str)
        defaults[parameter.name] = [value] if one_of_several else value
    return defaults


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping with string keys.

    Raises:
        ConfigError: The file is missing, is no YAML or holds something else.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"There is no configuration file '{path}'.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration file '{path}' cannot be read: {error}") from error
    except yaml.YAMLError as error:
        sentence = " ".join(str(error).split())
        raise ConfigError(f"'{path}' is not valid YAML: {sentence}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"'{path}' must hold 'flag: value' lines.", "For example: batch-size: 16")
    return content


def unknown_key(key: str, known: list[str], where: str) -> ConfigError:
    """The error for a name nobody reads, with the nearest one that somebody does."""
    if new := renamed(key.replace("_", "-"), known):
        return ConfigError(f"{where} sets '{key}', which is now '{new}'.", f"Write '{new}'.")
    if moved := MOVED.get(key.replace("_", "-")):
        return ConfigError(f"{where} sets '{key}', which is now '{moved}'.")
    near = get_close_matches(key.replace("_", "-"), known, n=1)
    hint = f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(known)}."
    return ConfigError(f"{where} sets '{key}', which this command does not know.", hint)


_INPUT, _MODEL, _VERDICT, _RESULT, _GATES = "Input", "Model", "Verdict", "Output", "Gates"

Config = Annotated[
    Path | None,
    flag(
        "config",
        "YAML file with values for the flags of this command.",
        is_eager=True,
        callback=_flags_from_file,
        metavar="FILE.yaml",
    ),
]
Model = Annotated[
    str,
    flag(
        "model",
        "The detector: 'lite' (bundled), a checkpoint folder, or a hub id.",
        short="-m",
        metavar="lite|DIR|HUB-ID",
        rich_help_panel=_MODEL,
    ),
]
Device = Annotated[
    str, flag("device", "auto, cpu, cuda, cuda:N or mps.", rich_help_panel=_MODEL, metavar="NAME")
]
Dtype = Annotated[
    str,
    flag("dtype", "auto, float32, bfloat16 or float16.", rich_help_panel=_MODEL, metavar="NAME"),
]
BatchSize = Annotated[
    int,
    flag("batch-size", "Crops judged at a time.", min=1, rich_help_panel=_MODEL, metavar="N"),
]
OutputFile = Annotated[
    Path | None,
    flag(
        "output",
        "Write one record an item; run again to resume a .jsonl file.",
        short="-o",
        metavar="FILE.jsonl|FILE.csv",
        rich_help_panel=_RESULT,
    ),
]
Paths = Annotated[
    list[str] | None,
    typer.Argument(
        help="Pictures, videos, folders, globs, @LIST.txt, or - for a list on standard input.",
        metavar="PATH...",
        show_default=False,
    ),
]
Recursive = Annotated[
    bool,
    flag(
        "recursive",
        "Enter the sub-folders of folders.",
        short="-r",
        switch=True,
        rich_help_panel=_INPUT,
    ),
]
Faces = Annotated[
    str,
    flag(
        "faces",
        "auto: every face found, a small square picture without one counts as a crop; all; "
        "largest; none: pictures are crops.",
        metavar="auto|all|largest|none",
        rich_help_panel=_INPUT,
    ),
]
Frames = Annotated[
    int,
    flag(
        "frames",
        "Frames looked at in a video, evenly spaced.",
        min=1,
        max=1000,
        metavar="N",
        rich_help_panel=_INPUT,
    ),
]
Threshold = Annotated[
    float | None,
    flag(
        "threshold",
        "Probability from which the verdict is fake. Default: the model's.",
        metavar="0..1",
        rich_help_panel=_VERDICT,
        show_default=False,
    ),
]
Uncertain = Annotated[
    str | None,
    flag(
        "uncertain",
        "Probabilities in this band give the verdict uncertain. Default: the model's.",
        metavar="LOW:HIGH|none",
        rich_help_panel=_VERDICT,
        show_default=False,
    ),
]
FailOn = Annotated[
    list[str] | None,
    flag(
        "fail-on",
        "Leave with exit code 4 if there is a fake item, a fake or uncertain one, or one without "
        "a verdict. May be repeated.",
        metavar="fake|uncertain|error",
        rich_help_panel=_VERDICT,
        show_default=False,
    ),
]
Heatmap = Annotated[
    Path | None,
    flag(
        "heatmap",
        "Draw the forgery map over each picture, into this folder.",
        metavar="DIR",
        rich_help_panel=_RESULT,
    ),
]
Annotate = Annotated[
    Path | None,
    flag(
        "annotate",
        "Draw boxes and scores into copies of the pictures, in this folder.",
        metavar="DIR",
        rich_help_panel=_RESULT,
    ),
]
Overwrite = Annotated[
    bool, flag("overwrite", "Replace what is there.", switch=True, rich_help_panel=_RESULT)
]
Json = Annotated[
    bool,
    flag("json", "Print one JSON object and nothing else.", switch=True, rich_help_panel=_RESULT),
]
Quiet = Annotated[
    bool,
    flag("quiet", "No progress and no notes.", short="-q", switch=True, rich_help_panel=_RESULT),
]
WeightFiles = Annotated[
    list[Path],
    typer.Argument(
        help="Published weights: a .pth, .pt, .bin or .safetensors file, or a folder.",
        metavar="PATH",
        show_default=False,
    ),
]
ImportFolder = Annotated[
    Path,
    flag(
        "output", "Checkpoint folder to make.", short="-o", metavar="DIR", rich_help_panel=_RESULT
    ),
]
ClipConfig = Annotated[
    Path | None,
    flag(
        "clip-config",
        "config.json of the CLIP model, for towers that are none of OpenAI's.",
        metavar="FILE.json",
        rich_help_panel=_INPUT,
    ),
]
Checkpoint = Annotated[
    str | None,
    typer.Argument(help="A checkpoint folder, a weights file or 'lite'.", metavar="[PATH]"),
]
Verbose = Annotated[
    bool, flag("verbose", "List every tensor.", short="-v", switch=True, rich_help_panel=_RESULT)
]
Verify = Annotated[
    bool,
    flag(
        "verify",
        "Read every value: refuse NaN and check the stored fingerprint.",
        switch=True,
        rich_help_panel=_INPUT,
    ),
]
Proof = Annotated[
    bool,
    flag(
        "verify",
        "Read everything back, load it strictly and run it once on a fixed input.",
        switch=True,
        rich_help_panel=_RESULT,
    ),
]
LlavaBase = Annotated[
    str,
    flag(
        "llava",
        "LLaVA-1.5: a folder in its own or in Hugging Face's layout, or a hub id.",
        metavar="DIR|HUB-ID",
        rich_help_panel=_INPUT,
    ),
]
DetectorFolder = Annotated[
    str,
    flag(
        "detector",
        "The detector: a checkpoint folder or a hub id.",
        metavar="DIR|HUB-ID",
        rich_help_panel=_INPUT,
    ),
]
StoredDtype = Annotated[
    str,
    flag(
        "dtype",
        "Type to store the language model and the projectors in; auto keeps the base's.",
        metavar="auto|float32|bfloat16|float16",
        rich_help_panel=_MODEL,
    ),
]
Tower = Annotated[
    str,
    flag(
        "tower",
        "Whose CLIP tower serves both where the base's and the detector's differ.",
        metavar="detector|llava",
        rich_help_panel=_MODEL,
    ),
]
ProjectorSeed = Annotated[
    int, flag("seed", "Seed of the new projector.", min=0, metavar="N", rich_help_panel=_MODEL)
]
Check = Annotated[
    Path | None,
    flag(
        "check",
        "Leave with exit code 4 if a figure is not what this file expects; it may be an earlier "
        "report.json.",
        metavar="FILE.json",
        rich_help_panel=_GATES,
    ),
]
MinAuc = Annotated[
    float | None,
    flag(
        "min-auc",
        "Leave with exit code 4 if the AUC is below this or undefined.",
        metavar="0..1",
        rich_help_panel=_GATES,
    ),
]
MinAccuracy = Annotated[
    float | None,
    flag(
        "min-accuracy",
        "Leave with exit code 4 if the accuracy is below this or undefined.",
        metavar="0..1",
        rich_help_panel=_GATES,
    ),
]
Report = Annotated[
    Path,
    typer.Argument(
        help="A folder that --report made, or the report.json in it.",
        metavar="REPORT",
        show_default=False,
    ),
]
CommonItems = Annotated[
    bool,
    flag("common-items", "Compare what both have although their data differ.", switch=True),
]
Resamples = Annotated[
    int, flag("resamples", "Bootstrap resamples behind the intervals.", min=1, metavar="N")
]
Seed = Annotated[int, flag("seed", "Seed of the bootstrap.", min=0, metavar="N")]
