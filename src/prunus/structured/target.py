"""What a structured cut is asked for: a share of units, or what may remain of arithmetic, parameters, bytes or time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunus.errors import InvalidValue
from prunus.graph.couple import Coupling
from prunus.measure.cost import dense_bytes

COUNTED = ("macs", "params", "bytes")
TIMED = ("latency", "latency_ms")


@dataclass(frozen=True)
class Target:
    """One request.

    Attributes:
        what: "sparsity", "macs", "params", "bytes", "latency" or "latency_ms".
        asked: as given.
    """

    what: str
    asked: float | int

    @property
    def timed(self) -> bool:
        """Whether it is measured with a clock."""
        return self.what in TIMED

    def amount(self, whole: float) -> float:
        """Return how much may remain, of `whole`."""
        return as_amount(self.what, self.asked, whole)


def read_target(**given: float | int | None) -> Target:
    """Return the one target that is given.

    Raises:
        InvalidValue: none, or several.
    """
    named = {k: v for k, v in given.items() if v is not None}
    if len(named) != 1:
        raise InvalidValue(f"give exactly one of {', '.join(given)}; got {list(named)}.")
    what, asked = next(iter(named.items()))
    return Target(what, asked)


def as_amount(name: str, value: float | int, whole: float) -> float:
    """Return a target: a share of `whole` when below 1, else the amount itself.

    Raises:
        InvalidValue: zero, negative, NaN, text, or more than there is.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= max(whole, 1):
        raise InvalidValue(
            f"{name} {value!r} must be a share in (0, 1], or an amount up to {whole:,.6g}, which the model has now."
        )
    return value * whole if value <= 1 and not (isinstance(value, int) and whole > 1) else float(value)


def costs_of(model: nn.Module, coupling: Coupling) -> dict[str, Callable[[Mapping[str, Any]], float]]:
    """Return what a choice of kept units costs: "macs" of the example, "params", "bytes" of the state."""
    whole = dense_bytes(model)
    state = model.state_dict(keep_vars=True)
    stored = [(v, state[v.name].element_size()) for v in coupling.graph.values if v.stored and v.name in state]

    def size(keep: Mapping[str, Any]) -> float:
        shapes = coupling.shapes(keep)
        gone = sum((_numel(v.shape) - _numel(shapes[v.index])) * width for v, width in stored)
        return whole - gone

    return {"macs": coupling.macs, "params": coupling.parameters, "bytes": size}


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total
