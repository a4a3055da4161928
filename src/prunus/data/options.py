"""Checking options against the signature of the function that takes them, with a suggestion for misspellings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from prunus.errors import InvalidValue, unknown


def check_options(function: Callable[..., Any], options: Mapping[str, Any], kind: str) -> None:
    """Check that `function` has a keyword-only parameter for each of `options`, and gets those it cannot do without.

    Args:
        function: what will be called; one that takes `**anything` accepts every name.
        options: the names (and values) the user gave.
        kind: what an option is called in the error, such as "option of model 'mlp'".

    Raises:
        UnknownName: the first option that the function does not have.
        InvalidValue: an option without a default is not given.
    """
    parameters = inspect.signature(function).parameters.values()
    needed = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name not in options]
    if needed:
        raise InvalidValue(f"{kind}: {', '.join(needed)} must be given")
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise unknown(kind, name, known)
