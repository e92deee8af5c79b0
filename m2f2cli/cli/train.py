"""Commands that train: ``train-detector``. Their flags are the fields of their options."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from m2f2cli.cli import options as flags
from m2f2cli.cli.output import Output
from m2f2cli.errors import ConfigError
from m2f2cli.options.fields import Options, flag_name
from m2f2cli.options.recipes import read_recipe
from m2f2cli.options.train_detector import TrainDetectorOptions
from m2f2cli.runtime import first_process

EXAMPLES = {
    "train-detector": (
        "m2f2 train-detector --data faces/ --output detector/",
        "m2f2 train-detector --config recipe.yaml --output detector/ --resume",
        "m2f2 train-detector --data ddvqa/ --model lite --train head --epochs 5 --output tuned/",
        "m2f2 train-detector --data ffpp:ffpp_h5/ --recipe published --output detector/",
        "m2f2 train-detector --data ffpp:ffpp_h5/ --data faces/ --balance --output detector/",
        "m2f2 train-detector --recipe published --set augment.jpeg.p=0.2 --print-config",
    )
}

PANELS = {
    "data": "Data",
    "model": "Model",
    "optimizer": "Optimizer",
    "objective": "Objective",
    "augment": "Augmentation (published: blur, JPEG, flip)",
    "pseudo": "Pseudo-fakes (shares of the forged pictures)",
    "run": "Run",
}
_METAVARS: dict[Any, str] = {
    int: "N",
    int | None: "N",
    float: "X",
    float | None: "X",
    str: "NAME",
    str | None: "NAME",
    Path: "DIR",
    Path | None: "PATH",
    tuple[float, float]: "LOW HIGH",
    tuple[int, int]: "LOW HIGH",
    tuple[str, ...]: "DIR",
    tuple[str, ...] | None: "DIR",
}


def _flags_from_recipe(context: typer.Context, name: str | None) -> str | None:
    """Make a recipe's values the defaults of the flags that no --config file sets."""
    if name is not None and not context.resilient_parsing:
        values = flags.as_defaults(context, read_recipe(name), f"The recipe '{name}'")
        context.default_map = {**values, **(context.default_map or {})}
    return name


PrintConfig = Annotated[
    bool,
    flags.flag("print-config", "Print the settings as a --config file, and stop.", switch=True),
]


Set = Annotated[
    list[str] | None,
    flags.flag(
        "set",
        "Set any key that --print-config lists, such as augment.jpeg.p=0.2. May be repeated; goes "
        "before all else.",
        metavar="KEY=VALUE",
        show_default=False,
    ),
]


def apply_settings(kind: type[Options], values: dict[str, Any], settings: Sequence[str]) -> None:
    """Put what ``--set`` says among the flags' values.

    Raises:
        ConfigError: No such option, or no value.
    """
    import yaml

    known = sorted(item.name.replace("_", "-") for _, item in kind.walk())
    for setting in settings:
        key, equals, text = setting.partition("=")
        name = kind.name_of(key)
        if name is None or name == "recipe":
            raise flags.unknown_key(key, known, "--set")
        if not equals:
            raise ConfigError(f"--set {key} has no value.", f"For example: --set {key}=1")
        try:
            values[name.replace("-", "_")] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {key} cannot read '{text}' as a value.") from error


def train_detector(**values: Any) -> None:
    """Train a detector on pictures in real/ and fake/ (stage 1).

    The epoch that does best on held-out identities becomes a checkpoint folder, for 'm2f2 detect
    --model DIR'. A killed run goes on with --resume and ends with the weights it would have had.
    The defaults are the published settings; --recipe names others, and --print-config shows the
    whole as a file for --config. Flags win over M2F2_* in the environment, that over the file, the
    file over the recipe.
    """
    train(TrainDetectorOptions, values, trainer="detector", blanks={"data": "DIR", "output": "DIR"})


def train(
    kind: type[Options], values: dict[str, Any], *, trainer: str, blanks: Mapping[str, str]
) -> None:
    """What every training command does: print its settings, or train and print the result's folder.

    Args:
        kind: Its options.
        values: Its flags.
        trainer: The module of ``m2f2cli.training`` whose ``prepare`` makes the run.
        blanks: What ``--print-config`` shows for flags that have no default.
    """
    quiet, show = values.pop("quiet"), values.pop("print_config")
    apply_settings(kind, values, values.pop("set") or ())
    if show:
        values |= {name: values[name] or blank for name, blank in blanks.items()}
    values.pop("config")
    leads = first_process()
    output = Output(quiet=quiet or not leads)
    options = kind.from_flat(values)
    if show:
        output.text(options.to_yaml())
        return
    with redirect_stdout(sys.stderr):  # DeepSpeed prints, and logs to what this is when it loads
        run = import_module(f"m2f2cli.training.{trainer}").prepare(options, notify=output.note)
        with output.progress("Training", run.steps) as advance:
            folder = run.run(advance=advance)
    if leads:
        output.text(str(folder))


def signature_of(options: type[Options], *others: inspect.Parameter) -> inspect.Signature:
    """The command-line parameters that a command's options stand for.

    Args:
        options: Each of its fields becomes a flag with its help, type, limits and default.
        *others: Further parameters, put first.
    """
    parameters, kinds = list(others), options.types()
    for group, item in options.walk():
        panel = PANELS.get(group, group.capitalize())
        parameters.append(_parameter(item, kinds[item.name], panel))
    return inspect.Signature(parameters)


def _parameter(item: dataclasses.Field[Any], hint: Any, panel: str) -> inspect.Parameter:
    """A flag with the field's name, type, default and help; the field itself checks values."""
    wanted = item.default is dataclasses.MISSING
    default: Any = None if wanted else item.default
    extra: dict[str, Any] = {
        "rich_help_panel": panel,
        "show_default": not wanted,
        "hidden": item.metadata["key"],
    }
    if hint is bool:
        extra |= {"negatable": True, "metavar": ""}
    else:
        extra["metavar"] = "|".join(item.metadata["limits"].choices) or _METAVARS[hint]
    if hint in (tuple[str, ...], tuple[str, ...] | None):
        hint, default = list[str] | None, default and list(default)
    if item.name == "recipe":
        extra |= {"is_eager": True, "callback": _flags_from_recipe}
    name = flag_name(item.name).removeprefix("--")
    return inspect.Parameter(
        item.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[
            hint | None if wanted else hint, flags.flag(name, item.metadata["help"], **extra)
        ],
    )


def _extra(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def as_command(body: Callable[..., None], options: type[Options]) -> None:
    """Give a command its flags: Typer reads them from the signature."""
    signature = signature_of(
        options,
        _extra("config", flags.Config, None),
        _extra("set", Set, None),
        _extra("print_config", PrintConfig, False),
        _extra("quiet", flags.Quiet, False),
    )
    body.__signature__ = signature  # type: ignore[attr-defined]
    body.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}


as_command(train_detector, TrainDetectorOptions)
