"""MaskSparsity: decide which channels go first, then push only their norm scales to zero.

Source: Pruning-aware Sparse Regularization for Network Pruning (Jiang et al., 2022, arXiv 2201.06776; later Machine
Intelligence Research), from the abstract and the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunus.budget.channels import above_energy, above_threshold, check_scales, vote
from prunus.budget.select import keep_best, keep_count
from prunus.errors import InvalidValue, MaskMismatch, NothingPrunable, Unsupported, unknown
from prunus.masks import Masks
from prunus.methods.channels import ChannelFamily, restricted
from prunus.methods.penalised import Penalised
from prunus.methods.penalties import PENALTIES, scale_penalty
from prunus.parameters import unwrap

if TYPE_CHECKING:
    from prunus.graph.couple import Coupling
    from prunus.graph.plan import Plan
    from prunus.sparsifier import Sparsifier

RULES = ("threshold", "energy", "ratio")


def norm_scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the scales of all BatchNorm layers of `model` by parameter name, in module order.

    Raises:
        NothingPrunable: there are none.
    """
    model = unwrap(model)
    found: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and isinstance(module.weight, nn.Parameter):
            found[f"{path}.weight" if path else "weight"] = module.weight
    if not found:
        raise NothingPrunable(
            f"{type(model).__name__} has no BatchNorm layer with scales, which MaskSparsity acts on; GroupNorm "
            "regularises any coupled channels."
        )
    return found


def scale_masks(
    scales: Mapping[str, Tensor],
    rule: str = "threshold",
    *,
    threshold: float = 0.01,
    share: float = 1e-4,
    ratio: float = 0.5,
    minimum: int = 1,
) -> Masks:
    """Choose the channels that stay in every norm layer on its own, by the size of their scales.

    Args:
        scales: parameter name -> (C,) scales.
        rule: "threshold" (|scale| > `threshold`), "energy" (`above_energy` with `share`) or "ratio" (the share `ratio`
            of each layer's channels goes, smallest scales first, exact counts).
        threshold, share, ratio: of the rule of that name.
        minimum: channels that stay in every layer.

    Returns:
        Masks over the scales, True = the channel stays: what `MaskSparsity(keep=...)` takes.
    """
    if rule == "threshold":
        return Masks({n: above_threshold(v, threshold, minimum) for n, v in scales.items()})
    if rule == "energy":
        return Masks({n: above_energy(v, share, minimum=minimum) for n, v in scales.items()})
    if rule != "ratio":
        raise unknown("rule", rule, RULES)
    if not 0 <= ratio < 1:
        raise InvalidValue(f"ratio {ratio!r} must be in [0, 1).")
    counts = {n: max(keep_count(v.numel(), ratio), min(minimum, v.numel())) for n, v in scales.items()}
    return Masks({n: keep_best(check_scales(v), counts[n]) for n, v in scales.items()})


def agreed(keep: Mapping[str, Tensor], families: tuple[ChannelFamily, ...]) -> dict[str, Tensor]:
    """Agree per family of coupled channels on what stays: the norm layers of a residual stage vote.

    A layer without an entry has no victims, so nothing goes from its family. The scale of a depthwise convolution votes
    with that of its producer, where the authors' code lets it inherit the producer's mask.

    Args:
        keep: scale name -> bool (C,), True = stays.
        families: coupled channels (see `prunus.methods.channels`).

    Returns:
        family name -> bool (units,), for families with a norm scale from which something goes.
    """
    found = {}
    for family in families:
        layers = []
        for slot in family.slots:
            if slot.role == "affine" and slot.tensor.endswith("weight"):
                mask = keep.get(slot.tensor)
                layers.append(torch.ones(family.size, dtype=torch.bool) if mask is None else restricted(mask, slot))
        if layers:
            together = vote(layers)
            if not bool(together.all()):
                found[family.name] = together
    return found


@dataclass(frozen=True)
class MaskSparsity(Penalised):
    """Add strength * sign(scale) to the gradients of the norm scales that a mask gives up, and of no others.

    Attributes:
        keep: masks over BatchNorm scales ("layer1.0.bn1.weight" -> bool (C,)), True = the channel stays and is not
            touched; layers without an entry are left alone. None: every scale is a victim, which is Network Slimming
            and the way to find a mask (`scale_masks`).
        strength: s (authors: 5e-4).
        penalty: "l1", "l2" or "smooth-l1", which looks at the current learning rate.
    """

    strength: float = 5e-4
    keep: Masks | None = None
    penalty: str = "l1"

    def check(self, steps: int, steps_per_epoch: int | None) -> None:
        """Check strength, penalty and the kind of mask."""
        super().check(steps, steps_per_epoch)
        if self.penalty not in PENALTIES:
            raise unknown("penalty", self.penalty, PENALTIES)
        if self.keep is not None and not isinstance(self.keep, Masks):
            raise InvalidValue(
                f"keep must be prunus.Masks over norm scales, not {type(self.keep).__name__}; wrap a dict of bool "
                "tensors as Masks({...}), or read one with Masks.load."
            )

    def start(self, s: Sparsifier) -> Masks:
        """Check that the masks fit the norm layers, and return the weights' masks: those given, or everything."""
        self.victims(s)
        return super().start(s)

    def victims(self, s: Sparsifier) -> dict[str, tuple[nn.Parameter, Tensor]]:
        """Return scale and bool victims per norm layer that has any entry in `keep`.

        Raises:
            MaskMismatch: an entry is no BatchNorm scale of the model, or has another shape.
            NothingPrunable: the model has no BatchNorm scales.
        """
        scales = norm_scales(s.model)
        if self.keep is None:
            return {n: (p, torch.ones_like(p, dtype=torch.bool)) for n, p in scales.items()}
        for name, mask in self.keep.items():
            if name not in scales:
                raise MaskMismatch(f"keep names {name!r}, which is no BatchNorm scale; there are {', '.join(scales)}.")
            if mask.shape != scales[name].shape:
                raise MaskMismatch(f"keep of {name!r} has shape {tuple(mask.shape)}, not {tuple(scales[name].shape)}.")
        return {n: (scales[n], ~m.to(scales[n].device)) for n, m in self.keep.items()}

    def penalties(self, s: Sparsifier) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every norm layer's scales with the gradient of the penalty on its victims."""
        rates = {id(p): float(g["lr"]) for g in s.optimizer.param_groups for p in g["params"]}
        for name, (scale, victims) in self.victims(s).items():
            if id(scale) not in rates:
                raise Unsupported(f"the optimizer does not train {name!r}, so no penalty can reach it; add it.")
            if bool(victims.any()):
                yield scale, scale_penalty(scale.detach(), victims, self.strength, self.penalty, rates[id(scale)])

    def plan(self, model: nn.Module, coupling: Coupling, *, threshold: float = 0.01) -> Plan:
        """Return the physical cut after training: exactly the mask, or scales up to `threshold` when there is none.

        Args:
            model: the trained model.
            coupling: of this model (`couple(record(model, example))`); coupled layers vote.
            threshold: must be above learning rate times strength (authors: 0.01).
        """
        from prunus.graph.plan import Plan

        keep = self.keep if self.keep is not None else scale_masks(norm_scales(model), threshold=threshold)
        return Plan.from_keep(coupling, agreed(keep, coupling.families))

    def describe(self) -> dict[str, Any]:
        """Return name and choices; masks are named by their digest."""
        return super().describe() | {"keep": None if self.keep is None else self.keep.digest()}
