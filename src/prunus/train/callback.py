"""Callbacks: the places of a training step where something may be added without another loop."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Callback:
    """Override what is needed; a method that is not overridden costs nothing. `step` counts from 0.

    A callback that draws randomness keys it by (seed, purpose, step), and one that remembers something hands it
    out in `state_dict`, so that a training cut anywhere goes on bit for bit.
    """

    def batch(self, step: int, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Change a batch: x (B, ...) float32, y (B,) int64, ids (B,) int64; return the new (x, y)."""
        return x, y

    def perturb(self, step: int, model: nn.Module) -> None:
        """Change weights before the forward pass."""

    def gradients(self, step: int, model: nn.Module) -> None:
        """Combine or penalise gradients, before they are masked."""

    def restore(self, step: int, model: nn.Module) -> None:
        """Take back what `perturb` did, after the optimizer step and the masking of weights."""

    def event(self, step: int, model: nn.Module) -> None:
        """Act after a finished step; `step` is now the number of steps done."""

    def state_dict(self) -> dict[str, Any]:
        """Return {"tensors": name -> tensor, "values": JSON values}."""
        return {"tensors": {}, "values": {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""

    def describe(self) -> dict[str, Any]:
        """Return what it is made of as JSON values: the type's name and its public attributes."""
        chosen = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {"type": type(self).__name__, **chosen}


def overriding(callbacks: tuple[Callback, ...], name: str) -> list[Any]:
    """Return the bound methods `name` of those callbacks that override it."""
    return [getattr(c, name) for c in callbacks if getattr(type(c), name) is not getattr(Callback, name)]
