"""Named parts that are imported on first use; other packages add theirs by entry points."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from m2f2cli.errors import ConfigError


class Registry:
    """A table from names to ``"module:attribute"``.

    Args:
        noun: What the entries are, for messages.
        table: The built-in entries.
        group: The entry-point group through which installed packages add entries.
    """

    def __init__(self, noun: str, table: Mapping[str, str], *, group: str) -> None:
        self.noun = noun
        self._table = dict(table)
        self._group = group

    def names(self) -> list[str]:
        """All names, built-in ones first."""
        added = {point.name for point in entry_points(group=self._group)}
        return [*self._table, *sorted(added - self._table.keys())]

    def get(self, name: str) -> Any:
        """Import and return the entry called ``name``.

        Raises:
            ConfigError: There is none; the nearest name is offered.
        """
        if name in self._table:
            module, _, attribute = self._table[name].partition(":")
            return getattr(import_module(module), attribute)
        for point in entry_points(group=self._group, name=name):
            return point.load()
        near = get_close_matches(name, self.names(), n=1)
        hint = f"Did you mean '{near[0]}'?" if near else f"Use one of: {', '.join(self.names())}."
        raise ConfigError(f"There is no {self.noun} '{name}'.", hint)
