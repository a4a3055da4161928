"""Optimizers by name, with checked options and, on request, no weight decay on vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from prunus.data.options import check_options
from prunus.errors import InvalidValue, unknown

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def _sgd(*, momentum: float = 0.9, nesterov: bool = False, dampening: float = 0.0) -> None:
    """The options of SGD (Sutskever et al., ICML 2013, in torch's formulation)."""


def _adam(*, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, amsgrad: bool = False) -> None:
    """The options of Adam (Kingma and Ba, ICLR 2015) and AdamW (Loshchilov and Hutter, ICLR 2019)."""


_OPTIONS: dict[str, Callable[..., None]] = {"sgd": _sgd, "adam": _adam, "adamw": _adam}


def build(
    model: nn.Module | Iterable[nn.Parameter],
    name: str = "sgd",
    *,
    lr: float,
    weight_decay: float = 0.0,
    decay_vectors: bool = True,
    **options: Any,
) -> torch.optim.Optimizer:
    """Build an optimizer over the parameters that require gradients.

    Args:
        model: a module, or parameters.
        name: "sgd" (momentum 0.9 unless given), "adam" or "adamw".
        lr: learning rate, >= 0.
        weight_decay: L2 penalty ("sgd", "adam") or decoupled decay ("adamw"), >= 0.
        decay_vectors: False leaves parameters with one axis or none (biases, norm layers) out of the decay; they
            form a second parameter group.
        **options: momentum, nesterov, dampening for "sgd"; betas, eps, amsgrad for "adam" and "adamw".

    Raises:
        UnknownName: no such optimizer, or an option that it does not have.
        InvalidValue: a value out of range, or no parameter requires gradients.
    """
    kind = name.lower() if isinstance(name, str) else name
    if kind not in OPTIMIZERS:
        raise unknown("optimizer", name, OPTIMIZERS)
    check_options(_OPTIONS[kind], options, f"option of optimizer {kind!r}")
    parameters = model.parameters() if isinstance(model, nn.Module) else model
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise InvalidValue("no parameter requires gradients, so there is nothing to train; unfreeze some.")
    if kind == "sgd":
        options.setdefault("momentum", 0.9)
    groups: list[dict[str, Any]] = [{"params": trained}]
    if not decay_vectors and weight_decay:
        flat = [p for p in trained if p.ndim <= 1]
        groups = [{"params": [p for p in trained if p.ndim > 1]}, {"params": flat, "weight_decay": 0.0}]
        groups = [g for g in groups if g["params"]]
    try:
        return OPTIMIZERS[kind](groups, lr=lr, weight_decay=weight_decay, fused=_fusible(trained), **options)  # type: ignore[call-arg]
    except ValueError as error:
        raise InvalidValue(f"optimizer {kind!r} refuses its options: {error}.") from error


def _fusible(parameters: list[nn.Parameter]) -> bool | None:
    """Tell whether one fused kernel per step can be used (it saves most of the time of small networks' steps)."""
    fits = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    return True if fits else None
