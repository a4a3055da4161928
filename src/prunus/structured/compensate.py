"""One door to the closed forms that let kept weights make up for the units that go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunus.data.options import check_options
from prunus.errors import unknown
from prunus.graph.couple import Coupling
from prunus.structured import obspa, reconstruct
from prunus.structured.removal import Compensated, Keep

COMPENSATIONS = {"obspa": obspa.compensate, "udfc": reconstruct.compensate}


def compensate(
    method: str,
    model: nn.Module,
    coupling: Coupling,
    keep: Keep,
    *,
    data: Iterable[Any] | None = None,
    example: Any = None,
    seed: int = 0,
    **options: Any,
) -> Compensated:
    """Return the model with compensated weights, full size, ready for `plan.apply`.

    Args:
        method: "obspa" (`prunus.structured.obspa.compensate`) or "udfc" (`prunus.structured.reconstruct.compensate`).
        model: untouched.
        coupling: of this model.
        keep: a plan, or {family name: which units stay}.
        data, example, seed: what inputs OBSPA sees; UDFC works on weights alone and does not look at them.
        **options: what the method takes besides.

    Raises:
        UnknownName: no such method or option.
    """
    if method not in COMPENSATIONS:
        raise unknown("compensation", method, COMPENSATIONS)
    function: Any = COMPENSATIONS[method]
    check_options(function, options, f"option of compensation {method!r}")
    if method == "obspa":
        options |= {"data": data, "example": example, "seed": seed}
    return function(model, coupling, keep, **options)


def made_up(
    method: str | None,
    model: nn.Module,
    coupling: Coupling,
    plan: Keep,
    *,
    data: Sequence[Any] | None = None,
    calibration: Sequence[Any] | None = None,
    example: Any = None,
    seed: int = 0,
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model to cut, compensated if asked for, and what the report says about it ({} without a method).

    Args:
        method, model, coupling, seed: see `compensate`; None leaves the model as it is.
        plan: the cut.
        data: batches from the training distribution.
        calibration: batches from elsewhere, which come first where both are given.
        example: without batches, OBSPA sees noise of its shape.
    """
    if method is None:
        return model, {}
    seen = calibration if calibration is not None else data
    found = compensate(method, model, coupling, plan, data=seen, example=example, seed=seed)
    inputs = "calibration data" if calibration is not None else "data" if data is not None else "noise"
    anew = method == "obspa" and seen is not None and any(isinstance(m, _BatchNorm) for m in model.modules())
    return found.model, {
        "method": method,
        "inputs": inputs if method == "obspa" else "weights alone",
        "batch_norms": "measured anew" if anew else "kept",
        "errors": dict(found.errors),
        "skipped": dict(found.skipped),
    }
