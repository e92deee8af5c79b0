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
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from m2f2cli.errors import ConfigError

T = TypeVar("T")
Group = TypeVar("Group", bound="OptionGroups")


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


def option(default: T, help: str, *choices: str, key: bool = False, **limits: Any) -> T:
    """Declare a field of an options class.

    Args:
        default: Its value when nobody sets it.
        help: One or two sentences for the user: what it does, its unit, the published value.
        *choices: The words it accepts, if it accepts only some.
        key: Few people set it: help pages leave it out; it is a key of ``--config`` and ``--set``.
        **limits: ``low``, ``high`` and ``open_low`` of ``Limits``.
    """
    metadata = {"help": help, "limits": Limits(choices, **limits), "key": key}
    declared: T = field(default=default, metadata=metadata)
    return declared


def required(help: str) -> Any:
    """Declare a field that has no default."""
    return field(metadata={"help": help, "limits": Limits(), "key": False})


def flag_name(field_name: str) -> str:
    """The command-line spelling of a field: ``learning_rate`` is ``--learning-rate``."""
    return "--" + field_name.replace("_", "-")


class Checked:
    """Base of options classes: converts and checks every field when an instance is built."""

    def __post_init__(self) -> None:
        kinds = typing.get_type_hints(type(self))
        for item in fields(self):  # type: ignore[arg-type]
            flag = flag_name(item.name)
            value = _convert(flag, getattr(self, item.name), kinds[item.name])
            _check(flag, value, item.metadata["limits"])
            object.__setattr__(self, item.name, value)
        self.check()

    def check(self) -> None:
        """Check what fields say together; raise ``ConfigError`` in the words of the flags."""


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
    raise ConfigError(f"{flag} needs {names.get(kind, 'a path')}, not {value!r}.")


def _number(flag: str, value: int | str) -> float:
    try:  # YAML reads 1e-3 as a word
        return float(value)
    except ValueError as error:
        raise ConfigError(f"{flag} needs a number, not {value!r}.") from error


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
        if not math.isfinite(number):
            raise ConfigError(f"{flag} needs a finite number, not {number}.")
        if number < limits.low or (limits.open_low and number == limits.low):
            word = "above" if limits.open_low else "at least"
            raise ConfigError(f"{flag} must be {word} {limits.low:g}, not {number:g}.")
        if number > limits.high:
            raise ConfigError(f"{flag} must be at most {limits.high:g}, not {number:g}.")
    if len(numbers) == 2 and numbers[0] > numbers[1]:
        raise ConfigError(f"{flag} needs its lower value first, not {numbers[0]:g} {numbers[1]:g}.")


@dataclass(frozen=True)
class OptionGroups:
    """Base of a command's options: a dataclass whose fields are ``Checked`` groups.

    Across all groups field names are unique: they are the command's flags.
    """

    @classmethod
    def groups(cls) -> dict[str, type[Checked]]:
        """Group names to their classes, in order."""
        kinds = typing.get_type_hints(cls)
        return {item.name: kinds[item.name] for item in fields(cls)}

    @classmethod
    def walk(cls) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
        """Every option with the name of its group, in order."""
        for group, kind in cls.groups().items():
            for item in fields(kind):  # type: ignore[arg-type]
                yield group, item

    @classmethod
    def from_flat(cls: type[Group], values: Mapping[str, Any]) -> Group:
        """Build from one flat mapping, such as a configuration file or ``stage.json`` holds.

        Args:
            values: Option names, with dashes or underscores, to values; what is missing gets its
                default.

        Raises:
            ConfigError: A name is unknown, a value impossible, or a required option missing.
        """
        given = {name.replace("-", "_"): value for name, value in values.items()}
        home = {item.name: group for group, item in cls.walk()}
        for name in given:
            if name not in home:
                old, known = name.replace("_", "-"), [key.replace("_", "-") for key in home]
                if new := renamed(old, known):
                    raise ConfigError(f"'{old}' is now '{new}'.", f"Write '{new}' instead.")
                near = get_close_matches(old, known, n=1)
                hint = f"Did you mean '{near[0]}'?" if near else None
                raise ConfigError(f"There is no option '{old}'.", hint)
        for _, item in cls.walk():
            if item.default is dataclasses.MISSING and given.get(item.name) is None:
                flag = flag_name(item.name)
                raise ConfigError(f"{flag} is missing.", f"Add {flag} PATH.")
        built = {
            group: kind(**{name: given[name] for name in given if home[name] == group})
            for group, kind in cls.groups().items()
        }
        return cls(**built)

    @classmethod
    def name_of(cls, key: str) -> str | None:
        """The option that a key of ``--set`` names, with underscores; None if there is none.

        Args:
            key: ``learning-rate``, or with its group ``optimizer.learning-rate``. Dots may separate
                the parts: ``augment.jpeg.quality`` is ``jpeg-quality``, ``augment.jpeg.p``, the
                share that it is done to, ``jpeg``.
        """
        names = {item.name: group for group, item in cls.walk()}
        first, dot, rest = key.replace("-", "_").partition(".")
        group, path = (first, rest) if dot and first in cls.groups() else (None, first + dot + rest)
        parts = path.split(".")
        spelled = "_".join(parts[:-1] if len(parts) > 1 and parts[-1] == "p" else parts)
        for name in (spelled, parts[-1]):  # augment.affine.degrees is degrees
            if name in names and group in (None, names[name]):
                return name
        return None

    @classmethod
    def recorded(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """What an earlier version recorded, under the present names of the options.

        Args:
            values: As ``to_flat`` gave them then.
        """
        known = {item.name.replace("_", "-") for _, item in cls.walk()}
        return {renamed(name, known) or name: value for name, value in values.items()}

    def to_flat(self) -> dict[str, Any]:
        """Option names with dashes to plain values (JSON and YAML), in order."""
        flat = {}
        for group, item in self.walk():
            value = getattr(getattr(self, group), item.name)
            if isinstance(value, Path):
                value = str(value)
            if isinstance(value, tuple):
                value = list(value) if len(value) > 1 else value[0]  # one word stays a word
            flat[item.name.replace("_", "-")] = value
        return flat

    def to_yaml(self) -> str:
        """The configuration file that says the same, group by group."""
        import yaml

        flat = self.to_flat()
        blocks = []
        for group, kind in self.groups().items():
            lines = ["# " + (kind.__doc__ or group).split("\n")[0]]
            for item in fields(kind):  # type: ignore[arg-type]
                key = item.name.replace("_", "-")
                value = yaml.safe_dump(flat[key], default_flow_style=True, allow_unicode=True)
                lines.append(f"{key}: {value.splitlines()[0]}")
            blocks.append("\n".join(lines))
        return "\n\n".join(blocks) + "\n"
