"""SR-STE: train N:M sparse nets from scratch with a sparse-refined straight-through estimator.

Source: Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch (Zhou et al., ICLR 2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.budget.allocate import check_fraction
from prunus.errors import InvalidValue
from prunus.masks import Masks
from prunus.methods.base import Method, check_no_holes, check_pattern
from prunus.schedule import Duration
from prunus.sparsifier import Sparsifier
from prunus.units import NM, unit


def refined_gradient(gradient: Tensor, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
    """Return dL/dw = dL/dw~ + decay * (1 - mask) * w: straight through for all, plus decay on removed weights."""
    return gradient + decay * torch.where(mask, torch.zeros_like(weight), weight)


@dataclass(frozen=True)
class SRSTE(Method):
    """Forward with the N largest of every M weights, update all weights, decay the removed ones.

    The model's parameters hold the sparse weights between steps, so evaluation and saving see the pruned net; the
    dense weights behind them live in the sparsifier and come back only inside `optimizer.step()`.

    Attributes:
        unit: the pattern, kept:group ("2:4").
        sparsity: ignored but checked: it must be 1 - N/M or left at its default.
        decay: lambda, the extra decay of removed weights (paper: 2e-4; 0 is plain STE).
        freeze: from here on the mask stays as it is.
    """

    sparsity: float | None = None  # type: ignore[assignment]
    unit: str = "2:4"
    decay: float = 2e-4
    freeze: Duration = "1dur"

    def _pattern(self) -> NM:
        pattern = unit(self.unit)
        if not isinstance(pattern, NM):
            raise InvalidValue(f"SR-STE trains N:M patterns such as '2:4', not units of {self.unit!r}.")
        return pattern

    def check(self, steps: int, steps_per_epoch: int | None) -> None:
        """Check pattern, sparsity and decay."""
        self._pattern()
        if self.sparsity is not None:
            check_pattern(self.unit, check_fraction("sparsity", self.sparsity))
        if not 0 <= self.decay < math.inf:
            raise InvalidValue(f"decay {self.decay} must be a number from 0 up; the paper uses 2e-4.")

    def _masks(self, s: Sparsifier, weights: dict[str, Tensor]) -> Masks:
        pattern = self._pattern()
        return Masks({n: pattern.choose(w.abs(), s.addresses[n]) for n, w in weights.items()})

    def start(self, s: Sparsifier) -> Masks:
        """Store the dense weights and return the pattern of their magnitudes."""
        check_no_holes(s)
        s.memory |= {f"dense/{n}": p.detach().clone() for n, p in s.parameters.items()}
        return self._masks(s, s.weights())

    def wants_dense_gradients(self, s: Sparsifier) -> bool:
        """The estimator passes the gradient to all weights, until frozen."""
        return not self._frozen(s)

    def _frozen(self, s: Sparsifier) -> bool:
        return s.step >= s.in_steps(self.freeze)

    def trains_dense(self, s: Sparsifier) -> bool:
        """Optimizer state belongs to the dense weights, so it is not masked, until frozen."""
        return not self._frozen(s)

    @torch.no_grad()
    def before(self, s: Sparsifier) -> None:
        """Give the optimizer the dense weights and the refined gradient."""
        if self._frozen(s):
            return
        for name, parameter in s.parameters.items():
            dense = s.memory[f"dense/{name}"]
            if parameter.grad is not None:
                mask = s.masks[name].to(parameter.device)
                parameter.grad.copy_(refined_gradient(parameter.grad, dense, mask, self.decay))
            parameter.copy_(dense)

    @torch.no_grad()
    def after(self, s: Sparsifier) -> None:
        """Take the updated dense weights back, choose the pattern anew, and leave the sparse weights in the model."""
        if s.step > s.in_steps(self.freeze):
            return
        s.memory |= {f"dense/{n}": p.detach().clone() for n, p in s.parameters.items()}
        s.update(self._masks(s, s.weights()))
