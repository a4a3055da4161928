"""Holding masks through training: optimizer step hooks that keep pruned weights and their optimizer state at zero.

The hooks sit on the optimizer, so any loop is a loop for them: gradient accumulation, autocast with a gradient
scaler, torch.compile, Lightning, Accelerate and DistributedDataParallel all end in `optimizer.step()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from prunus.errors import InvalidValue
from prunus.masks import Masks


class OptimizerHooks:
    """Calls `before` when gradients are ready and `after` when weights have moved, once per optimizer step.

    When the step is given a closure (Lightning, L-BFGS), gradients exist only once the closure has run, so the
    closure is wrapped and `before` runs at its end. Both run without recording gradients.

    A gradient scaler leaves out `optimizer.step()` when gradients overflowed, except for fused optimizers: those
    are called all the same, skip inside their kernel, and get gradients that are still scaled. Here such a step is
    no step either, and `before` sees true gradients.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, before: Callable[[], None], after: Callable[[], None]):
        self._before = before
        self._after = after
        self._skipped = False
        inner = bare_optimizer(optimizer)
        self._handles = [inner.register_step_pre_hook(self._pre), inner.register_step_post_hook(self._post)]

    def _pre(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure")
        position = None
        if closure is None and len(args) > 1 and callable(args[1]):
            closure, position = args[1], 1
        self._skipped = overflowed(optimizer)
        if closure is None:
            if not self._skipped:
                unscale(optimizer)
                with torch.no_grad():
                    self._before()
            return None

        def then_before() -> Any:
            result = closure()
            with torch.no_grad():
                self._before()
            return result

        if position is None:
            return args, {**kwargs, "closure": then_before}
        return (*args[:1], then_before, *args[2:]), kwargs

    def _post(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._skipped:
            with torch.no_grad():
                self._after()

    def remove(self) -> None:
        """Take both hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def overflowed(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether a gradient scaler runs this step of a fused optimizer only to have it skipped."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found)


@torch.no_grad()
def unscale(optimizer: torch.optim.Optimizer) -> None:
    """Divide gradients by the scale that a fused optimizer was given to do it with, and take the scale away."""
    scale = getattr(optimizer, "grad_scale", None)
    if not isinstance(scale, Tensor):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.div_(scale.to(parameter.grad.device))
    optimizer.grad_scale = None  # type: ignore[attr-defined]


# By name, because neither library needs to be installed. They imitate the class of the optimizer they wrap.
_WRAPPERS = {"AcceleratedOptimizer", "LightningOptimizer", "_FabricOptimizer"}


def _is_wrapper(optimizer: Any) -> bool:
    return any(kind.__name__ in _WRAPPERS for kind in type(optimizer).__mro__)


def bare_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside wrappers that carry it as `.optimizer` (Accelerate, Lightning, Fabric).

    Raises:
        InvalidValue: there is no torch optimizer inside.
    """
    seen: set[int] = set()
    while not hasattr(optimizer, "register_step_post_hook") or _is_wrapper(optimizer):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None or id(inner) in seen:
            raise InvalidValue(
                f"{type(optimizer).__name__} is not a torch optimizer; pass the torch.optim.Optimizer itself."
            )
        seen.add(id(inner))
        optimizer = inner
    return optimizer


def state_tensors(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Iterable[Tensor]:
    """Yield the optimizer's per-entry state of one parameter (momentum, moments...): tensors of its shape."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim > 0:
            yield value


class Hold:
    """Masks held on a model through its optimizer. Made by `Masks.hold`; base of `prunus.sparsify`'s handle.

    Order inside `optimizer.step()`: mask gradients, update, mask weights and optimizer state.

    Args:
        model: the model whose parameters the masks name (wrappers are looked through).
        optimizer: the optimizer that trains them; parameters it does not own are masked once, now.
        masks: what to keep.

    Raises:
        MaskMismatch: the masks do not fit the model.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, masks: Masks):
        self.model = model
        self.optimizer = bare_optimizer(optimizer)
        self._parameters: dict[str, nn.Parameter] = {}
        self._holes: dict[str, Tensor] = {}
        self._install(masks)
        self._hooks = OptimizerHooks(self.optimizer, self._before_step, self._after_step)

    @property
    def masks(self) -> Masks:
        """The masks in force; assigning new ones applies them at once."""
        return self._masks

    @masks.setter
    def masks(self, masks: Masks) -> None:
        self._install(masks)

    def _install(self, masks: Masks) -> None:
        self._parameters = masks.parameters(self.model)
        self._masks = masks
        # Holes (what is pruned) are stored inverted because that is what masked_fill_ takes at every step; a fill,
        # unlike a product, also clears NaN and infinity at pruned places.
        self._holes = {n: ~masks[n].to(p.device) for n, p in self._parameters.items() if masks.count(n) < p.numel()}
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Zero pruned entries of weights and of optimizer state."""
        for name, hole in self._holes.items():
            parameter = self._parameters[name]
            if hole.device != parameter.device:
                hole = self._holes[name] = hole.to(parameter.device)
            parameter.masked_fill_(hole, 0.0)
            if self.masks_state():
                for state in state_tensors(self.optimizer, parameter):
                    state.masked_fill_(hole, 0.0)

    def masks_state(self) -> bool:
        """Whether optimizer state follows the masks (not so while dense weights train behind the masked ones)."""
        return True

    @torch.no_grad()
    def _mask_gradients(self) -> None:
        for name, hole in self._holes.items():
            gradient = self._parameters[name].grad
            if gradient is not None and not gradient.is_sparse:
                gradient.masked_fill_(hole.to(gradient.device), 0.0)

    def _before_step(self) -> None:
        self._mask_gradients()

    def _after_step(self) -> None:
        self.apply()

    def detach(self) -> None:
        """Stop holding: remove the hooks. Weights stay as they are."""
        self._hooks.remove()
