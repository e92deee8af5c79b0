"""Options: small frozen dataclasses, checked when built, saved with the result.

Each field carries its own explanation and limits (``option``), so the command line, the error
messages and the documentation all speak from one place. A field ``learning_rate`` is the flag
``--learning-rate``, the environment variable ``M2F2_LEARNING_RATE`` and the key ``learning-rate``
of a configuration file.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cache, reduce
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from m2f2cli.errors import ConfigError

T = TypeVar("T")
Kind = TypeVar("Kind", bound="Options")


_LARGEST = 2**63  # whole numbers stay below

# What options were called before, as flags without dashes: an old name on the command line, in a
# file or in the environment is an error that names the new one, where the command has that.
RENAMED = {
    "accumulate": "gradient-accumulation-steps",
    "alpha": "lora-alpha",
    "attention": "attn-implementation",
    "clip-gradient": "max-grad-norm",
    "dropout": "lora-dropout",
    "early-stop": "early-stopping-patience",
    "ema": "ema-decay",
    "init": "model",
    "load-in": "quantize",
    "normalisation": "normalization",
    "optimiser": "optimizer",
    "quantise": "quantize",
    "rank": "lora-r",
    "warmup": "warmup-ratio",
}

# Options that became verbs or options of these.
MOVED = {
    "calibrate": "m2f2 calibrate",
    "calibrated": "m2f2 calibrate --calibrated",
    "target-fpr": "m2f2 calibrate --target-fpr",
    "robustness": "m2f2 robustness",
    "robustness-dir": "m2f2 robustness --robustness-dir",
}


def renamed(old: str, known: Container[str]) -> str | None:
    """The present name of an option that was called ``old``, if ``known`` has it and not ``old``.

    Names are spelled with dashes.
    """
    new = RENAMED.get(old)
    return new if new in known and old not in known else None


class Limits(NamedTuple):
    """What a field accepts beyond its type.

    Attributes:
        choices: The only values, empty for any.
        low: The smallest value; each of a pair is held to it.
        high: The largest value.
        open_low: Whether ``low`` itself is excluded.
    """

    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False


def option(default: T, help: str, *choices: str, key: bool = False, **more: Any) -> T:
    """Declare an option: a field of an options class.

    Args:
        default: Its value when nobody sets it.
        help: One or two sentences for the user: what it does, its unit, the published value.
        *choices: The words it accepts, if it accepts only some.
        key: Few people set it: help pages leave it out; it is a key of ``--config`` and ``--set``.
        **more: ``low``, ``high`` and ``open_low`` of ``Limits``, and what is seldom needed:
            ``group``, the heading it stands under; ``metavar``, the word for its value; ``short``,
            a short spelling; ``name``, where it is called otherwise than its field; ``variable``,
            another environment variable than its own; ``secret``, whether it is never shown;
            ``blank``, whether a call may lack nothing but it; ``argument``, whether it is given by
            place; ``says_default``, whether ``help`` says the default; ``parse`` and ``spell``,
            functions from a word to its value and back; ``below``, a function from the option's
            value to values of other options that stand below all other sources.
    """
    declared: T = field(default=default, metadata=_about(help, choices, key, more))
    return declared


def required(help: str, *choices: str, **more: Any) -> Any:
    """Declare an option that has no default; arguments as for ``option``."""
    return field(metadata=_about(help, choices, False, more))


def _about(help: str, choices: tuple[str, ...], key: bool, more: dict[str, Any]) -> dict[str, Any]:
    limits = {name: more.pop(name) for name in ("low", "high", "open_low") if name in more}
    return {"help": help, "limits": Limits(choices, **limits), "key": key, "group": "", **more}


def group(kind: type[Kind], *only: str) -> Kind:
    """Declare a field that is a group of options.

    Args:
        kind: Their class.
        *only: The fields that are options of the command; all of them without.
    """
    declared: Kind = field(default_factory=kind, metadata={"only": only})
    return declared


def flag_name(field_name: str) -> str:
    """The command-line spelling of a field: ``learning_rate`` is ``--learning-rate``."""
    return "--" + field_name.replace("_", "-")


def key_of(item: dataclasses.Field[Any]) -> str:
    """What an option is called in files, and after the dashes of its flag."""
    return str(item.metadata.get("name") or item.name).replace("_", "-")


def _flag(item: dataclasses.Field[Any]) -> str:
    argument: str | None = item.metadata.get("metavar") if "argument" in item.metadata else None
    return argument or flag_name(key_of(item))


@dataclass(frozen=True)
class Options:
    """Base of options classes: frozen dataclasses whose fields are options, or groups of them.

    Values are converted and checked when an instance is built. Across all groups the options'
    names are unique: they are a command's flags.
    """

    def __post_init__(self) -> None:
        kinds = _kinds(type(self))
        for item in fields(self):
            if "help" not in item.metadata:
                continue
            value, parse = getattr(self, item.name), item.metadata.get("parse")
            value = parse(value) if parse else _convert(_flag(item), value, kinds[item.name])
            if value != item.default:
                _check(_flag(item), value, item.metadata["limits"])
            object.__setattr__(self, item.name, value)
        self.check()

    def check(self) -> None:
        """Check what fields say together; raise ``UsageError`` in the words of the flags."""

    @classmethod
    def walk(cls) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
        """Every option with the name of its group, dotted where nested, in order."""
        for item in fields(cls):
            if "help" in item.metadata:
                yield "", item
                continue
            only = item.metadata.get("only")
            for inner, option in _kinds(cls)[item.name].walk():
                if not only or option.name in only:
                    yield f"{item.name}.{inner}".rstrip("."), option

    @classmethod
    def types(cls) -> dict[str, Any]:
        """The type of every option, by the field's name."""
        found: dict[str, Any] = {}
        for item in fields(cls):
            kind = _kinds(cls)[item.name]
            found |= {item.name: kind} if "help" in item.metadata else kind.types()
        return found

    @classmethod
    def from_flat(cls: type[Kind], values: Mapping[str, Any]) -> Kind:
        """Build from one flat mapping, such as a configuration file or ``stage.json`` holds.

        Args:
            values: Option names, with dashes or underscores, to values; what is missing gets its
                default.

        Raises:
            ConfigError: A name is unknown, a value impossible, or a required option missing.
        """
        given = {name.replace("_", "-"): value for name, value in values.items()}
        for _, item in cls.walk():
            if "below" in item.metadata and given.get(key_of(item)) is not None:
                brought = item.metadata["below"](given[key_of(item)])
                given = {n.replace("_", "-"): v for n, v in brought.items()} | given
        known = [key_of(item) for _, item in cls.walk()]
        for key in given:
            if key in known:
                continue
            if new := renamed(key, known):
                raise ConfigError(f"'{key}' is now '{new}'.", f"Write '{new}' instead.")
            near = get_close_matches(key, known, n=1)
            raise ConfigError(
                f"There is no option '{key}'.", f"Did you mean '{near[0]}'?" if near else None
            )
        for _, item in cls.walk():
            if item.default is dataclasses.MISSING and given.get(key_of(item)) in (None, (), []):
                flag = _flag(item)
                value = "" if "argument" in item.metadata else " PATH"
                raise ConfigError(f"{flag} is missing.", f"Add {flag}{value}.")
        return cls._build(given)

    @classmethod
    def _build(cls: type[Kind], given: Mapping[str, Any]) -> Kind:
        built = {}
        for item in fields(cls):
            if "help" not in item.metadata:
                built[item.name] = _kinds(cls)[item.name]._build(given)
            elif key_of(item) in given:
                built[item.name] = given[key_of(item)]
        return cls(**built)

    @classmethod
    def name_of(cls, key: str) -> str | None:
        """The option that a key of ``--set`` or of a file names; None if there is none.

        Args:
            key: ``learning-rate``, or with its group ``optimizer.learning-rate``. Dots may separate
                the parts: ``augment.jpeg.quality`` is ``jpeg-quality``, ``augment.jpeg.p``, the
                share that it is done to, ``jpeg``.
        """
        names = {key_of(item): group for group, item in cls.walk()}
        groups = {part for group in names.values() for part in group.split(".")}
        parts, group = key.replace("_", "-").split("."), ""
        while len(parts) > 1 and parts[0] in groups:
            group = parts.pop(0)
        spelled = "-".join(parts[:-1] if len(parts) > 1 and parts[-1] == "p" else parts)
        for name in (spelled, parts[-1]):  # augment.affine.degrees is degrees
            if name in names and (not group or group in names[name].split(".")):
                return name
        return None

    @classmethod
    def recorded(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """What an earlier version recorded, under the present names of the options.

        Args:
            values: As ``to_flat`` gave them then.
        """
        known = {key_of(item) for _, item in cls.walk()}
        return {renamed(name, known) or name: value for name, value in values.items()}

    def to_flat(self) -> dict[str, Any]:
        """Option names with dashes to plain values (JSON and YAML), in order."""
        flat = {}
        for group, item in self.walk():
            value = getattr(reduce(getattr, filter(None, group.split(".")), self), item.name)
            if spell := item.metadata.get("spell"):
                value = spell(value)
            elif isinstance(value, tuple):
                several = [str(v) if isinstance(v, Path) else v for v in value]
                value = several[0] if len(several) == 1 else several  # one word stays a word
            flat[key_of(item)] = str(value) if isinstance(value, Path) else value
        return flat

    def to_yaml(self) -> str:
        """The configuration file that says the same, group by group."""
        import yaml

        blocks: dict[str, list[str]] = {}
        flat = self.to_flat()
        for group, item in self.walk():
            holder = reduce(getattr, filter(None, group.split(".")), self)
            title = item.metadata["group"] or (holder.__doc__ or group).split("\n")[0]
            value = yaml.safe_dump(flat[key_of(item)], default_flow_style=True, allow_unicode=True)
            if "secret" in item.metadata and flat[key_of(item)] is not None:
                value = "null  # set, and not shown"
            blocks.setdefault(f"# {title}", []).append(f"{key_of(item)}: {value.splitlines()[0]}")
        return "\n\n".join("\n".join((title, *lines)) for title, lines in blocks.items()) + "\n"


def parse_yaml(text: str) -> Any:
    """What a YAML text says.

    Raises:
        ValueError: It is no YAML, or a value is not what its form promises, as ``2001-99-99``; the
            message is one line.
    """
    import yaml

    try:
        return yaml.safe_load(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, OverflowError) as error:
        # PyYAML hands on whatever reading a number, date or flag raises.
        raise ValueError(" ".join(str(error).split())) from error


_hints = cache(typing.get_type_hints)


def _kinds(cls: Any) -> dict[str, Any]:
    """The types of a class's fields, read once."""
    found: dict[str, Any] = _hints(cls)
    return found


def _convert(flag: str, value: Any, kind: Any) -> Any:
    """Bring a value from a file or a caller to its field's type; never guess."""
    members = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and types.NoneType in members:
        return None
    kind = next(member for member in members if member is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        if inner[-1] is Ellipsis:  # one or several words
            several = value if isinstance(value, (list, tuple)) else (value,)
            return tuple(_convert(flag, one, inner[0]) for one in several)
        if not isinstance(value, (list, tuple)) or len(value) != len(inner):
            raise ConfigError(f"{flag} needs {len(inner)} values, not {value!r}.")
        return tuple(_convert(flag, one, want) for one, want in zip(value, inner, strict=True))
    if isinstance(value, (str, Path)) and "\0" in str(value):
        raise ConfigError(f"{flag} has a NUL in it.")
    if kind is Path and isinstance(value, (str, Path)) and str(value):
        return Path(value)
    if isinstance(value, bool) == (kind is bool):
        if isinstance(value, kind):
            return value
        if kind is float and isinstance(value, (int, str)):
            return _number(flag, value)
        if kind is int and isinstance(value, float) and value.is_integer():
            return int(value)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    if isinstance(value, int) and abs(value) >= _LARGEST:  # too long to be written out
        value = "a huge one"
    raise ConfigError(f"{flag} needs {names.get(kind, 'a path')}, not {value!r}.")


def _number(flag: str, value: int | str) -> float:
    try:  # YAML reads 1e-3 as a word
        return float(value)
    except ValueError as error:
        raise ConfigError(f"{flag} needs a number, not {value!r}.") from error
    except OverflowError as error:
        raise ConfigError(f"{flag} is too large a number.") from error


def _check(flag: str, value: Any, limits: Limits) -> None:
    values = value if isinstance(value, tuple) else (value,)
    for word in values if limits.choices else ():
        if word not in limits.choices:
            near = get_close_matches(str(word), limits.choices, n=1)
            known = f"Use one of: {', '.join(limits.choices)}."
            hint = f"Did you mean '{near[0]}'?" if near else known
            raise ConfigError(f"{flag} does not know '{word}'.", hint)
    if not values or "" in values:
        raise ConfigError(f"{flag} is empty.", f"Leave out {flag} to get its default.")
    numbers = [n for n in values if isinstance(n, (int, float)) and not isinstance(n, bool)]
    for number in numbers:
        if isinstance(number, int) and abs(number) >= _LARGEST:
            raise ConfigError(f"{flag} is too large a number.")
        if not math.isfinite(number):
            raise ConfigError(f"{flag} needs a finite number, not {number}.")
        if number < limits.low or (limits.open_low and number == limits.low):
            word = "above" if limits.open_low else "at least"
            raise ConfigError(f"{flag} must be {word} {limits.low:g}, not {number:g}.")
        if number > limits.high:
            raise ConfigError(f"{flag} must be at most {limits.high:g}, not {number:g}.")
    if len(numbers) == 2 and numbers[0] > numbers[1]:
        raise ConfigError(f"{flag} needs its lower value first, not {numbers[0]:g} {numbers[1]:g}.")
