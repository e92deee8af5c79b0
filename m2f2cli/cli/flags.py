"""A command's flags, made from its options.

The option ``batch_size`` is the flag ``--batch-size``, the environment variable
``M2F2_BATCH_SIZE``, and the key ``batch-size`` of a ``--config`` file and of ``--set``. ``--set``
wins over flags, flags over the environment, that over the file, the file over what an option such
as ``--recipe`` brings, that over the default.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from m2f2cli.cli.output import Output
from m2f2cli.errors import ConfigError, UsageError
from m2f2cli.options.fields import MOVED, Options, key_of, parse_yaml, renamed

_DEEPEST = 8  # mappings inside mappings of a configuration file
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
    tuple[int, ...]: "N",
    tuple[str, ...] | None: "DIR",
    tuple[Path, ...]: "DIR",
}


@dataclass(frozen=True)
class Command:
    """A command: a function of options and a printer that returns the exit code.

    Attributes:
        kind: Its options; each is a flag.
        body: The function; its docstring is the help text.
        json: Whether there is ``--json``.
        quiet: Whether there is ``--quiet``.
        lines: Whether there is ``--jsonl``.
    """

    kind: type[Options]
    body: Callable[[Any, Output], int | None]
    json: bool = True
    quiet: bool = True
    lines: bool = False

    def callback(self) -> Callable[..., None]:
        """What Typer runs: a function with a parameter for each flag."""

        def run(context: typer.Context, **values: Any) -> None:
            printer = Output(*(values.pop(name, False) for name in ("json", "quiet", "jsonl")))
            if printer.as_json and printer.as_lines:
                raise UsageError("--json and --jsonl exclude each other.", "Leave out one.")
            show, settings = values.pop("print_config"), values.pop("set") or ()
            given = {
                name: value
                for name, value in values.items()
                if name != "config" and value not in (None, [], ()) and _was_given(context, name)
            }
            given |= _settings(self.kind, settings)
            if show:
                printer.text(_shown(self.kind, given).to_yaml())
            elif code := self.body(self.kind.from_flat(given), printer):
                raise typer.Exit(code)

        types = self.kind.types()
        own = [_parameter(group, item, types[item.name]) for group, item in self.kind.walk()]
        about = inspect.Parameter(
            "context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context
        )
        general = _general(self.kind, json=self.json, quiet=self.quiet, lines=self.lines)
        parameters = [about, *general, *own]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run


def command(
    kind: type[Options], *, json: bool = True, quiet: bool = True, lines: bool = False
) -> Callable[[Callable[[Any, Output], int | None]], Command]:
    """Decorator that makes a function a ``Command``; arguments as there."""
    return lambda body: Command(kind, body, json, quiet, lines)


def _was_given(context: typer.Context, name: str) -> bool:
    """Whether a flag, the environment or a file sets an option; its default is its class's own."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _general(
    kind: type[Options], *, json: bool, quiet: bool, lines: bool
) -> Iterator[inspect.Parameter]:
    """The flags that are no options: how options are read, and how results are printed."""

    def read(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None and not context.resilient_parsing:
            given = _defaults(context, kind, read_mapping(path), f"'{path}'")
            context.default_map = {**(context.default_map or {}), **given}
        return path

    yield _keyword(
        "config",
        Path | None,
        "YAML file with values for the flags of this command.",
        is_eager=True,
        callback=read,
        metavar="FILE.yaml",
    )
    yield _keyword(
        "set",
        list[str] | None,
        "Set any key that --print-config lists, such as {}. May be repeated; goes before all "
        "else.".format("augment.jpeg.p=0.2" if kind.name_of("augment.jpeg.p") else "KEY=VALUE"),
        metavar="KEY=VALUE",
        show_default=False,
    )
    yield _keyword("print-config", bool, "Print the settings as a --config file, and stop.")
    if json:
        yield _keyword("json", bool, "Print one JSON object and nothing else.")
    if lines:
        yield _keyword("jsonl", bool, "Print one JSON object an item, each as soon as it is there.")
    if quiet:
        yield _keyword("quiet", bool, "No progress and no notes.", short="-q")


def _keyword(name: str, kind: Any, help: str, *, short: str = "", **more: Any) -> inspect.Parameter:
    """The flag ``--name``; a bool is a switch without a value."""
    if kind is bool:
        more["metavar"] = ""
    variable = "M2F2_" + name.upper().replace("-", "_")
    spellings = [f"--{name}", short] if short else [f"--{name}"]
    shown = typer.Option(*spellings, help=help, envvar=variable, show_envvar=False, **more)
    return inspect.Parameter(
        name.replace("-", "_"),
        inspect.Parameter.KEYWORD_ONLY,
        default=False if kind is bool else None,
        annotation=Annotated[kind, shown],
    )


def _parameter(group: str, item: dataclasses.Field[Any], kind: Any) -> inspect.Parameter:
    """The flag of an option; the option itself checks values."""
    about, key = item.metadata, key_of(item)
    silent = item.default is dataclasses.MISSING or about.get("says_default", False)
    default: Any = None if silent else item.default
    metavar = about.get("metavar") or "|".join(about["limits"].choices)
    needed = " Required." if item.default is dataclasses.MISSING else ""
    extra: dict[str, Any] = {"help": about["help"] + needed, "show_default": not silent}
    if kind is bool:
        metavar = ""
    elif "parse" in about:
        kind = str | None
    else:
        metavar = metavar or _METAVARS[kind]
        inner = next((t for t in typing.get_args(kind) if typing.get_origin(t) is tuple), kind)
        if typing.get_args(inner)[1:] == (Ellipsis,):
            kind, default = list[typing.get_args(inner)[0]] | None, list(default or ()) or None  # type: ignore[misc]
        elif silent:
            kind = kind | None
    if about.get("argument"):
        shown = typer.Argument(metavar=metavar, **extra | {"show_default": False})
    else:
        spelled = f"--{key}/--no-{key}" if kind is bool else f"--{key}"
        shown = typer.Option(
            *filter(None, (spelled, about.get("short"))),
            envvar=about.get("variable") or "M2F2_" + key.upper().replace("-", "_"),
            show_envvar=False,
            metavar=metavar,
            hidden=about["key"],
            rich_help_panel=about["group"] or group.rpartition(".")[2].capitalize() or None,
            **extra,
        )
    return inspect.Parameter(
        key.replace("-", "_"),
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, shown],
    )


def _defaults(
    context: typer.Context, kind: type[Options] | None, values: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Values of keys, nested or not, by the names of the command's parameters.

    Raises:
        ConfigError: The command has no such key.
    """
    known = {p.name: p for p in context.command.params if p.name not in ("config", "set", "help")}
    defaults = {}
    for key, value in _dotted(values):
        name = (kind and kind.name_of(key)) or key
        parameter = known.get(name.replace("-", "_"))
        if parameter is None:
            raise unknown_key(key, sorted(str(n).replace("_", "-") for n in known), where)
        one_of_several = getattr(parameter, "multiple", False) or parameter.nargs == -1
        defaults[str(parameter.name)] = (
            [value] if one_of_several and isinstance(value, str) else value
        )
    return defaults


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    if prefix.count(".") > _DEEPEST:
        raise ConfigError(f"A configuration file nests '{prefix[:-1]}' too deeply.")
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _settings(kind: type[Options], settings: Sequence[str]) -> dict[str, Any]:
    """What ``--set`` says, by the names of the options.

    Raises:
        ConfigError: No such option, or no value.
    """
    options = {key_of(item): item for _, item in kind.walk()}
    found = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        name = kind.name_of(key)
        if name is None or "below" in options[name].metadata:
            raise unknown_key(key, sorted(options), "--set")
        if not equals:
            raise ConfigError(f"--set {key} has no value.", f"For example: --set {key}=1")
        try:
            found[name.replace("-", "_")] = parse_yaml(text)
        except ValueError as error:
            raise ConfigError(f"--set {key} cannot read '{text}' as a value.") from error
    return found


def _shown(kind: type[Options], given: Mapping[str, Any]) -> Options:
    """What ``--print-config`` prints: a word stands for each value that a run would miss."""
    types = kind.types()
    words: dict[bool, dict[str, str]] = {False: {}, True: {}}
    for _, item in kind.walk():
        if item.default is dataclasses.MISSING or "blank" in item.metadata:
            word = item.metadata.get("metavar") or _METAVARS[types[item.name]]
            name = key_of(item).replace("-", "_")
            words["blank" in item.metadata][name] = word.strip("[]")
    try:
        return kind.from_flat({**words[False], **given})
    except UsageError:
        return kind.from_flat({**words[False], **words[True], **given})


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping with string keys.

    Raises:
        ConfigError: The file is missing, is no YAML or holds something else.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ConfigError(f"There is no configuration file '{path}'.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration file '{path}' cannot be read: {error}") from error
    except ValueError as error:
        raise ConfigError(f"'{path}' is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"'{path}' must hold 'flag: value' lines.", "For example: batch-size: 16")
    return content


def unknown_key(key: str, known: Sequence[str], where: str) -> ConfigError:
    """The error for a name nobody reads, with the nearest one that somebody does."""
    if new := renamed(key.replace("_", "-"), known):
        return ConfigError(f"{where} sets '{key}', which is now '{new}'.", f"Write '{new}'.")
    if moved := MOVED.get(key.replace("_", "-")):
        return ConfigError(f"{where} sets '{key}', which is now '{moved}'.")
    near = get_close_matches(key.replace("_", "-").rpartition(".")[2], known, n=1)
    hint = f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(known)}."
    return ConfigError(f"{where} sets '{key}', which this command does not know.", hint)
