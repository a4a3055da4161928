"""Every error Prunus raises on purpose: one type per kind of trouble, each naming the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PrunusError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns for it."""

    exit_code = 3


class InvalidValue(PrunusError, ValueError):
    """An argument has a value that cannot be honoured."""

    exit_code = 2


class UnknownName(PrunusError, LookupError):
    """A method, score, model, data set or option name is not known; the message suggests the nearest ones."""

    exit_code = 2


class NothingPrunable(PrunusError, ValueError):
    """The model has no tensor that the request could prune."""

    exit_code = 2


class NonFinite(PrunusError, ArithmeticError):
    """Weights, gradients or scores contain NaN or infinity, so no ranking of them means anything."""


class MaskMismatch(PrunusError, ValueError):
    """Masks and model (or two sets of masks) do not have the same names and shapes."""


class Infeasible(PrunusError, ValueError):
    """A budget cannot be met: the message says how far it could go and which constraint stopped it."""

    exit_code = 2


class Unsupported(PrunusError, TypeError):
    """The combination asked for does not exist (yet); the message names what does."""

    exit_code = 2


class ScheduleTooShort(PrunusError, ValueError):
    """The training is shorter than the schedule of the method needs."""

    exit_code = 2


class MissingExtra(PrunusError, ImportError):
    """An optional library is not installed; the message holds the command that installs it."""

    exit_code = 2


class DataMissing(PrunusError, FileNotFoundError):
    """A data set's files are not where they were looked for."""

    exit_code = 2


class DataDamaged(PrunusError, ValueError):
    """A data file is truncated, has labels out of range, holds a single class, or is empty."""

    exit_code = 5


class DamagedFile(PrunusError, ValueError):
    """A file written by Prunus does not match its hash, is truncated, or a part of it is missing."""

    exit_code = 5


class StorageFailed(PrunusError, OSError):
    """A file could not be written (disk full, read-only, too large); what was there before is unchanged."""


class RecipeError(PrunusError, ValueError):
    """A recipe file or flag is not valid."""

    exit_code = 2


class RecipeChanged(PrunusError, ValueError):
    """A run folder was made by another recipe; the message shows the difference."""

    exit_code = 2


class RunLocked(PrunusError, RuntimeError):
    """Another process is working in this run folder."""


class Stopped(PrunusError):
    """The run was asked to stop, has saved its state, and can be resumed."""

    exit_code = 75


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest known names, or "" when nothing is near."""
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.55)
    if not near:
        folded = {n.lower(): n for n in names}
        near = [folded[f] for f in difflib.get_close_matches(name.lower(), list(folded), n=3, cutoff=0.55)]
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def unknown(kind: str, name: object, known: Iterable[str]) -> UnknownName:
    """Build the `UnknownName` error for a missing `kind` called `name`, with suggestions and the full list."""
    names = sorted(set(known))
    return UnknownName(f"unknown {kind} {name!r}.{did_you_mean(str(name), names)} Known: {', '.join(names)}.")
