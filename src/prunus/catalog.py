"""Catalogues: named tables of things that are imported only when used, so listing them costs no torch import."""

from __future__ import annotations

import fnmatch
import importlib
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from prunus.errors import unknown


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of a catalogue.

    Attributes:
        name: the name users type, lower case, words joined by "-".
        target: where the object lives, as "package.module:attribute".
        summary: one line for `prunus ls`.
        aliases: other names it answers to.
    """

    name: str
    target: str
    summary: str
    aliases: tuple[str, ...] = ()

    def load(self) -> Any:
        """Import and return the object this row stands for."""
        module, _, attribute = self.target.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def describe(self) -> dict[str, Any]:
        """Return the row as plain JSON-ready values (tuples become lists)."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


E = TypeVar("E", bound=Entry)


def fold(name: str) -> str:
    """Return the spelling under which names are compared: "RigL", "rigl" and "rig_l" are one name."""
    return name.replace("-", "").replace("_", "").replace(" ", "").lower()


class Catalog(Generic[E]):
    """An ordered table of entries of one kind, looked up by forgiving name."""

    def __init__(self, kind: str, entries: Iterable[E]):
        self.kind = kind
        self._entries: dict[str, E] = {}
        self._aliases: dict[str, str] = {}
        for entry in entries:
            self._entries[fold(entry.name)] = entry
            self._aliases |= {fold(a): fold(entry.name) for a in entry.aliases}

    def __iter__(self) -> Iterator[E]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (fold(name) in self._entries or fold(name) in self._aliases)

    def names(self, pattern: str = "*") -> list[str]:
        """Return the names that match a shell pattern, in catalogue order."""
        return [e.name for e in self if fnmatch.fnmatchcase(e.name, pattern.lower())]

    def entry(self, name: str) -> E:
        """Return the row called `name`.

        Raises:
            UnknownName: no such row; the message suggests near ones.
        """
        folded = fold(name) if isinstance(name, str) else ""
        found = self._entries.get(self._aliases.get(folded, folded))
        if found is None:
            raise unknown(self.kind, name, [n for e in self for n in (e.name, *e.aliases)])
        return found

    def load(self, name: str) -> Any:
        """Import and return the object called `name` (raises `UnknownName` as `entry` does)."""
        return self.entry(name).load()

    def build(self, name: str, **options: Any) -> Any:
        """Call the class or function called `name` with `options`.

        Raises:
            UnknownName: no such row, or an option it does not take; the message suggests near ones.
        """
        maker = self.load(name)
        known = [p.name for p in inspect.signature(maker).parameters.values() if p.kind is not p.VAR_KEYWORD]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(maker).parameters.values())
        for option in options:
            if option not in known and not takes_any:
                raise unknown(f"option of {self.kind} {self.entry(name).name!r}:", option, known)
        return maker(**options)
