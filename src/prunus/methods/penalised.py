"""Penalised training: nothing is cut while it goes on, but what is to go is pushed towards zero."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunus.errors import InvalidValue
from prunus.masks import Masks
from prunus.methods.base import Method

if TYPE_CHECKING:
    from prunus.sparsifier import Sparsifier


@dataclass(frozen=True)
class Penalised(Method):
    """Base of methods that add the gradient of a penalty after backward and before the optimizer step.

    Masks stay as they were given (everything, when none were): channels go in a physical cut after the training. With
    a gradient scaler the term joins unscaled gradients; with `Training.clip_norm` it is clipped with them.

    Attributes:
        sparsity: must be None; how much goes is decided by the cut.
        strength: factor of the penalty.
    """

    sparsity: float | None = None  # type: ignore[assignment]
    strength: float = 1e-4

    def check(self, steps: int, steps_per_epoch: int | None) -> None:
        """Check the strength, and that no sparsity is asked for."""
        if self.sparsity is not None:
            raise InvalidValue(
                f"sparsity {self.sparsity!r}: {type(self).__name__} only pushes channels towards zero; leave sparsity "
                "out here and say how much goes when the channels are cut."
            )
        check_positive("strength", self.strength)

    def start(self, s: Sparsifier) -> Masks:
        """Return the given masks, or everything."""
        if s.given is not None:
            return s.given
        return Masks({n: torch.ones_like(p, dtype=torch.bool) for n, p in s.parameters.items()})

    def penalties(self, s: Sparsifier) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield parameters with the gradient of their penalty."""
        raise NotImplementedError

    def before(self, s: Sparsifier) -> None:
        """Add the penalty to the gradients."""
        for parameter, term in self.penalties(s):
            if parameter.grad is None:
                parameter.grad = term.to(parameter.dtype, copy=True)
            else:
                parameter.grad.add_(term)


def check_positive(name: str, value: float) -> None:
    """Raise `InvalidValue` unless `value` is a finite number from 0 up."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise InvalidValue(f"{name} {value!r} must be a finite number from 0 up.")
