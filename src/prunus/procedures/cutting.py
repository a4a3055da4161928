"""Cutting a network inside a run: the state of a smaller one, with its masks and its optimizer's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunus.errors import InvalidValue
from prunus.graph.couple import Coupling, Family, couple
from prunus.graph.plan import Plan
from prunus.graph.record import record
from prunus.masks import Masks
from prunus.run.stages import OptimizerState, Run, State
from prunus.structured.removal import kept_units
from prunus.train.optim import build
from prunus.train.training import Training


@dataclass(frozen=True)
class Cut:
    """The architecture that a plan leaves, for `prunus.run.stages.State`.

    Attributes:
        plan: from the run's own network to this one.
    """

    plan: Plan

    def apply(self, model: nn.Module) -> nn.Module:
        """Return a really smaller copy of `model`."""
        return self.plan.apply(model) if self.plan else model

    def describe(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {"plan": self.plan.to_dict()}


def inputs(run: Run, count: int = 2) -> Tensor:
    """Return the first training inputs, normalised, on the run's device: an example for tracing."""
    examples = run.splits.train
    return examples.normalise(examples.x[:count]).to(run.device)


def coupling_of(run: Run, state: State) -> Coupling:
    """Return which channels of the network of `state` can only go together."""
    return couple(record(state.model(run).eval(), inputs(run)))


def sliced(tensor: Tensor, name: str, plan: Plan) -> Tensor:
    """Return what the plan leaves of a tensor of the shape of parameter or buffer `name`."""
    for axis in range(tensor.ndim):
        kept = plan.keep.get(f"{name}:{axis}")
        if kept is not None:
            tensor = tensor.index_select(axis, torch.tensor(kept, dtype=torch.int64, device=tensor.device))
    return tensor


def sliced_masks(masks: Masks, plan: Plan) -> Masks:
    """Return what the plan leaves of masks."""
    return Masks({n: sliced(m, n, plan) for n, m in masks.items()})


def sliced_optimizer(state: OptimizerState, names: Mapping[int, str], plan: Plan) -> OptimizerState:
    """Return what the plan leaves of an optimizer's state; moments of kept entries stay as they are.

    Args:
        state: as `prunus.train.checkpoint.optimizer_state` takes it apart: tensors by "INDEX.NAME".
        names: index -> name of the parameter.
        plan: the cut.
    """
    tensors = {}
    for key, tensor in state[0].items():
        owner = key.partition(".")[0]
        name = names.get(int(owner)) if owner.isdigit() else None
        whole = name is not None and name in plan.shapes and list(tensor.shape) == plan.shapes[name]
        tensors[key] = sliced(tensor, name, plan) if whole and name is not None else tensor
    return tensors, state[1]


def parameter_names(model: nn.Module, training: Training) -> dict[int, str]:
    """Return the index that an optimizer with these choices gives to each parameter -> its name."""
    optimizer = build(
        model,
        training.optimizer,
        lr=training.lr,
        weight_decay=training.weight_decay,
        decay_vectors=training.decay_vectors,
        **training.optimizer_options(),
    )
    names = {id(p): n for n, p in model.named_parameters()}
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    return {i: names[id(p)] for i, p in enumerate(ordered)}


def cut_state(
    run: Run, state: State, plan: Plan, *, model: nn.Module | None = None, training: Training | None = None
) -> State:
    """Return the smaller network that `plan`, made for the network of `state`, leaves: weights, masks, optimizer state.

    Args:
        run: whose network `state` belongs to.
        state: the network; its own shape, if any, must be a `Cut`.
        plan: the cut.
        model: of full size with other weights than those of `state` (compensated ones, say).
        training: the choices that the optimizer's state was made with; default the run's.

    Raises:
        InvalidValue: the state has another kind of shape.
        MaskMismatch: the plan belongs to another network.
    """
    if state.shape is not None and not isinstance(state.shape, Cut):
        raise InvalidValue(f"a network of shape {type(state.shape).__name__} cannot be cut further by a plan.")
    big = state.model(run) if model is None else model
    small = plan.apply(big)
    optimizer = state.optimizer
    if optimizer is not None:
        names = parameter_names(state.model(run), run.training if training is None else training)
        optimizer = sliced_optimizer(optimizer, names, plan)
    masks = None if state.masks is None else sliced_masks(state.masks, plan)
    whole = plan if state.shape is None else state.shape.plan.then(plan)
    made = State.of(small.state_dict(), masks, state.step, state.metrics, optimizer, shape=Cut(whole))
    return replace(made, metrics=dict(state.metrics))


def kept_masks(plan: Plan, families: Sequence[Family]) -> dict[str, Tensor]:
    """Return family name -> bool (units,), what a plan for these families keeps."""
    return {f.name: torch.from_numpy(kept_units(plan, f)) for f in families}


def widths(plan: Plan) -> dict[str, int]:
    """Return family name -> channels that stay, for reports; families that are whole are left out."""
    return {name: len(kept) for name, kept in plan.families.items()}
