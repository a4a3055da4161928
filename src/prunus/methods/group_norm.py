"""Group-norm regularised training: coupled channels decay together, the weakest groups the most.

Source: the sparse-training variant of DepGraph (Fang et al., CVPR 2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunus.budget.allocate import check_fraction
from prunus.errors import InvalidValue
from prunus.masks import Masks
from prunus.methods.channels import (
    ChannelFamily,
    along,
    check_families,
    describe_families,
    group_norms,
    parameter_slots,
    spread,
)
from prunus.methods.penalised import Penalised, check_positive
from prunus.methods.penalties import growing_strengths
from prunus.parameters import unwrap

if TYPE_CHECKING:
    from prunus.graph.couple import Coupling
    from prunus.graph.plan import Plan
    from prunus.sparsifier import Sparsifier


@dataclass(frozen=True)
class GroupNorm(Penalised):
    """Add strength * gamma_i * w to the gradient of everything that unit i of a family occupies.

    gamma_i = 2^(alpha (I_max - I_i) / (I_max - I_min)), and I_i is the L2 norm of the unit over all its slots, taken
    anew at every step; when all units of a family are equal, gamma is 1. A weight with two coupled axes gets two terms.
    Biases and norm shifts are neither counted nor pushed (the authors' default). The authors' code divides by
    I_max - I_min without looking, which is NaN when all are equal.

    Attributes:
        families: coupled channels, from `prunus.graph` (`couple(record(model, example)).primary()`).
        strength: reg (authors: 1e-4).
        alpha: exponent of the weakest group (paper: 4).
    """

    families: tuple[ChannelFamily, ...] = ()
    alpha: float = 4.0

    def check(self, steps: int, steps_per_epoch: int | None) -> None:
        """Check the numbers, and that there are families."""
        super().check(steps, steps_per_epoch)
        check_positive("alpha", self.alpha)
        if not self.families:
            raise InvalidValue(
                "GroupNorm regularises coupled channels; give families=couple(record(model, example)).primary() from "
                "prunus.graph."
            )

    def start(self, s: Sparsifier) -> Masks:
        """Check that the families belong to the model; return the given masks, or everything."""
        check_families(self.families, regularised(s.model))
        return super().start(s)

    def penalties(self, s: Sparsifier) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every regularised parameter once per family it belongs to."""
        tensors = regularised(s.model)
        for family in self.families:
            strengths = growing_strengths(group_norms(family, tensors), self.alpha)
            for slot, parameter in parameter_slots(family, tensors):
                values = strengths.to(parameter)
                line = spread(values, slot, parameter.shape[slot.axis], 0.0)
                yield parameter, self.strength * along(line, parameter, slot.axis) * parameter.detach()

    def plan(
        self, model: torch.nn.Module, coupling: Coupling, sparsity: float, *, scope: str = "local", minimum: int = 1
    ) -> Plan:
        """Return the physical cut after training: the units of least norm go until enough arithmetic is gone.

        Args:
            model: the trained model.
            coupling: of this model; its families of the names of `families` are cut.
            sparsity: share of the multiply-accumulates that goes.
            scope: who competes: "local" (every family loses the same share), "global" or "isomorphic" (see
                `prunus.structured.select.by_share`; norms are divided by the mean of their family).
            minimum: units that stay in every family.

        Raises:
            Infeasible: with `minimum` units in every family too much arithmetic stays.
        """
        from prunus.graph.plan import Plan
        from prunus.structured.select import Limits, to_target

        parameters, goal = regularised(model), coupling.macs() * (1 - check_fraction("sparsity", sparsity))
        families = [coupling[f.name] for f in self.families]
        norms = {f.name: group_norms(f, parameters) for f in families}
        scores = {n: v / v.mean() if bool(v.any()) else v for n, v in norms.items()}
        kept = to_target(families, scores, coupling.macs, goal, Limits(minimum), scope, what="macs")
        return Plan.from_keep(coupling, kept)

    def describe(self) -> dict[str, Any]:
        """Return name and choices; families by name, size and slots."""
        return super().describe() | {"families": describe_families(self.families)}


def regularised(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the parameters that the regulariser counts and pushes: weights and norm scales that are trained."""
    named = unwrap(model).named_parameters(remove_duplicate=False)
    return {n: p for n, p in named if p.requires_grad and n.rpartition(".")[2] != "bias"}
