"""Exact cuts of channels whose scale is zero but whose shift is not: the constant they leave goes into the next layer.

A norm layer with scale 0 gives its shift everywhere, and the nonlinearity behind it turns that into another constant.
Dropping the channel drops the constant; folding adds what the reader would have made of it to the reader's bias, or
takes it from the running mean of the norm layer behind the reader. The authors of MaskSparsity (Jiang et al., 2022)
drop it, which is exact only where the activation maps the shift to zero (a ReLU with a shift of at most zero).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunus.graph.couple import Coupling, Slot
from prunus.graph.plan import Plan
from prunus.graph.record import arguments
from prunus.measure.forwarding import evaluating
from prunus.parameters import copied, unwrap
from prunus.structured.removal import Keep, as_plan, kept_units

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Folded:
    """A model that is ready for an exact cut.

    Attributes:
        model: a copy of full size whose removed channels have scale 0 and whose readers hold the constants already;
            `plan.apply(model)` computes what the model before folding did with those scales at 0.
        plan: the cut.
        constants: weight -> largest constant that was folded into its layer.
        skipped: weight -> why constants of its inputs were dropped instead.
    """

    model: nn.Module
    plan: Plan
    constants: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def silenced(model: nn.Module, coupling: Coupling, plan: Plan) -> nn.Module:
    """Return a copy of `model` in which the norm scales of all removed channels are zero; shifts stay."""
    quiet = copied(unwrap(model))
    named = dict(quiet.named_parameters())
    for family in coupling.families:
        gone = ~kept_units(plan, family)
        for slot in family.slots:
            if slot.role == "affine" and slot.tensor.endswith("weight") and slot.tensor in named:
                with torch.no_grad():
                    named[slot.tensor][torch.as_tensor(slot.index[gone].reshape(-1))] = 0.0
    return quiet


def fold_constants(model: nn.Module, coupling: Coupling, keep: Keep, example: Any) -> Folded:
    """Fold what removed channels still say into the layers that read them.

    The constants are measured: the model runs once on `example` with the scales of removed channels at zero. A reader
    with zero padding sees the constant inside its border only, so there the fold is exact away from the border.

    Args:
        model: untouched.
        coupling: of this model.
        keep: a plan, or {family name: which units stay}.
        example: inputs as `prunus.graph.record.record` takes them.

    Returns:
        The model to cut. Constants are dropped, and listed in `skipped`, where inputs are not constant (channels of a
        residual stream that is not cut as a whole, layers without a norm), or where the reader has neither a bias nor a
        batch norm right behind it, is grouped, or is not a linear or convolution module.
    """
    plan = as_plan(coupling, keep)
    work = silenced(model, coupling, plan)
    readers: dict[str, list[tuple[Slot, np.ndarray]]] = {}
    for family in coupling.families:
        gone = ~kept_units(plan, family)
        for slot in family.slots:
            if gone.any() and slot.role == "input":
                readers.setdefault(slot.tensor, []).append((slot, slot.index[gone].reshape(-1)))
    result = Folded(work, plan)
    seen = _watch(work, readers, example)
    for name, parts in readers.items():
        problem = _fold(work, name, np.concatenate([i for _, i in parts]), seen.get(name), result.constants)
        if problem:
            result.skipped[name] = problem
    return result


@dataclass
class _Seen:
    inputs: Tensor
    output: Tensor | None = None
    norm: _BatchNorm | None = None


def _watch(model: nn.Module, names: Any, example: Any) -> dict[str, _Seen]:
    """Run the model once; return per weight what its module read and which norm layer read the module's output."""
    seen: dict[str, _Seen] = {}
    modules = dict(model.named_modules())
    hooks = []

    def before(name: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name] = _Seen(args[0])

        return look

    def behind(name: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen[name].output = output

        return look

    def norm(module: nn.Module, args: tuple[Any, ...]) -> None:
        for one in seen.values():
            if one.output is args[0]:
                one.norm = module  # type: ignore[assignment]

    for name in names:
        module = modules.get(name.removesuffix(".weight"))
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            hooks += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(behind(name))]
    hooks += [m.register_forward_pre_hook(norm) for m in modules.values() if isinstance(m, _BatchNorm)]
    args, kwargs = arguments(example)
    try:
        with evaluating(model), torch.no_grad():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _fold(
    model: nn.Module, name: str, index: np.ndarray, seen: _Seen | None, constants: dict[str, float]
) -> str | None:
    """Fold into one layer; return why not, or None."""
    if seen is None:
        return "it is no linear or convolution module that the example reaches"
    module = model.get_submodule(name.removesuffix(".weight"))
    if getattr(module, "groups", 1) != 1 or getattr(module, "transposed", False):
        return "it is a grouped or transposed convolution"
    weight = module.weight
    assert isinstance(weight, Tensor)
    where = torch.as_tensor(index, device=weight.device)
    spatial = isinstance(module, nn.modules.conv._ConvNd)
    values = seen.inputs.movedim(-weight.ndim + 1 if spatial else -1, 0).flatten(1)[where].double()
    value = values.mean(1)
    if float((values - value.unsqueeze(1)).abs().max()) > TOLERANCE * max(1.0, float(values.abs().max())):
        return "its removed inputs are not constant, even with their norm scales at zero"
    table = weight.detach().double()[:, where]
    amount = torch.einsum("oj,j->o", table.flatten(2).sum(2) if spatial else table, value)
    bias = module.bias
    with torch.no_grad():
        if isinstance(bias, Tensor):
            bias += amount.to(bias)
        elif seen.norm is not None and isinstance(seen.norm.running_mean, Tensor):
            seen.norm.running_mean -= amount.to(seen.norm.running_mean)
        elif bool(amount.any()):
            return "there is neither a bias nor a batch norm right behind it that could take a constant"
    constants[name] = float(value.abs().max())
    return None
