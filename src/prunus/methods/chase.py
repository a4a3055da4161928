"""Chase: dynamic sparse training that removes starved channels on the way and ends as a narrower network.

Source: Dynamic Sparsity Is Channel-Level Sparsity Learner (Yin et al., NeurIPS 2023, arXiv 2305.19454), from the
authors' code; the names of the channel scores other than UMM are reconstructed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunus.budget.allocate import check_fraction
from prunus.budget.channels import channel_floor, keep_channels
from prunus.budget.select import round_half_up, some_kept
from prunus.distributed import agree_tensors
from prunus.errors import Infeasible, InvalidValue, MaskMismatch, ScheduleTooShort, unknown
from prunus.hold import state_tensors
from prunus.masks import Masks
from prunus.methods.channels import (
    ChannelFamily,
    along,
    check_families,
    describe_families,
    parameter_slots,
    spread,
    unit_kernels,
)
from prunus.methods.soft_bound import SoftBound
from prunus.parameters import unwrap
from prunus.schedule import Duration, cubic, interval_of, progress, steps_of
from prunus.scores.channel import CHANNEL_SCORES
from prunus.sparsifier import Sparsifier

if TYPE_CHECKING:
    from prunus.graph.couple import Coupling
    from prunus.graph.plan import Plan

Origin = Mapping[str, Sequence[int]]


def removable(families: Sequence[ChannelFamily], tensors: Mapping[str, Tensor]) -> tuple[ChannelFamily, ...]:
    """Return the families of channels that one weight makes and one other weight reads: never a residual stream.

    These are the inner convolutions of residual blocks and the chain of a VGG. The paper's are followed by another
    convolution; here the reader may be a linear layer.

    Args:
        families: coupled channels from `prunus.graph`.
        tensors: parameters of the model by name.
    """
    found = []
    for family in families:
        weights = [(slot, tensor) for slot, tensor in parameter_slots(family, tensors) if tensor.ndim > 1]
        if [slot.role for slot, _ in weights] in (["output", "input"], ["input", "output"]):
            found.append(family)
    return tuple(found)


def origin_of(families: Sequence[ChannelFamily], tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return family name -> [channels, weights per channel, kernels per channel] as they are in `tensors`."""
    found = {}
    for family in families:
        weights = kernels = 0
        for slot, tensor in parameter_slots(family, tensors, roles=("output",)):
            if tensor.ndim > 1:
                _, count, taps = unit_kernels(tensor, slot).shape
                weights, kernels = weights + count * taps, kernels + count
        found[family.name] = [int(family.size), weights, kernels]
    return found


def channel_scores(
    family: ChannelFamily,
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    origin: Sequence[int],
    score: str = "umm",
) -> Tensor:
    """Return one score per channel of a family, higher = keep, from the weights that make it.

    Args:
        family: coupled channels.
        weights: masked weights by name.
        masks: their masks.
        origin: (channels, weights per channel, kernels per channel) in the dense network.
        score: one of `prunus.scores.channel.CHANNEL_SCORES`.

    Raises:
        UnknownName: no such score.
    """
    if score not in CHANNEL_SCORES:
        raise unknown("channel score", score, CHANNEL_SCORES)
    values, bits = [], []
    for slot, weight in parameter_slots(family, weights, roles=("output",)):
        values.append(unit_kernels(weight, slot))
        bits.append(unit_kernels(masks[slot.tensor].to(weight.device), slot))
    taps = max(v.shape[2] for v in values)
    # Several producers (a residual stream) count as one long channel; missing taps are no weights.
    value = torch.cat([torch.nn.functional.pad(v, (0, taps - v.shape[2])) for v in values], 1)
    bit = torch.cat([torch.nn.functional.pad(b, (0, taps - b.shape[2])) for b in bits], 1)
    return CHANNEL_SCORES[score](value, bit, origin[1], origin[2])


def living(
    families: Sequence[ChannelFamily], alive: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return which entries of every tensor lie in living channels, bool by name; dead ones are rows and columns."""
    found = {n: torch.ones_like(t, dtype=torch.bool) for n, t in tensors.items()}
    for family in families:
        for slot, tensor in parameter_slots(family, tensors):
            there = spread(alive[family.name].bool().to(tensor.device), slot, tensor.shape[slot.axis], True)
            found[slot.tensor] &= along(there, tensor, slot.axis)
    return found


@dataclass(frozen=True)
class Chase(SoftBound):
    """`SoftBound` that also removes channels for ever until `channel_end`; the number of weights stays.

    At step t a share S(t) = channel_sparsity (1 - (1 - t / channel_end)^3) of the removable channels is gone, the
    lowest scores of all families together, none below `floor` of its fair share. The budget B belongs to the dense
    network, so the weights of removed channels move to the others. Removal masks what makes a channel and what reads
    it, and zeroes its bias and norm parameters, so that cutting it (`plan`) changes nothing. `channel_sparsity=0` is
    `SoftBound`, bit for bit.

    Attributes:
        families: channels that may go, from `prunus.graph`: `removable(couple(record(model, x)).families, parameters)`.
        channel_sparsity: S_c, the final share of them that is gone (paper: 0.3 to 0.5).
        channel_score: "umm" (paper), "mm", "kept-fraction" or "nonempty-kernels".
        floor: beta; no family keeps fewer than truncate(channels * (1 - S_c) * beta), and never none (paper: 0.2 to
            0.5).
        channel_every: interval of removals, which lie half an exploration period after multiples of it (paper:
            1,000 to 8,000 of 72,000 steps).
        channel_end: T_c, the moment of the last removal; not after `explore_end`, and where that is the same moment,
            one step earlier, so that the end of exploration refills what it took.
        origin: sizes of the dense network (`origin_of`), when it was cut since then.
    """

    families: tuple[ChannelFamily, ...] = ()
    channel_sparsity: float = 0.4
    channel_score: str = "umm"
    floor: float = 0.5
    channel_every: Duration = "0.014dur"
    channel_end: Duration = "0.81dur"
    origin: Origin | None = None

    def check(self, steps: int, steps_per_epoch: int | None) -> None:
        """Check the shares, and that removals end before exploration does."""
        super().check(steps, steps_per_epoch)
        check_fraction("channel_sparsity", self.channel_sparsity, one_allowed=False)
        check_fraction("floor", self.floor)
        if self.channel_score not in CHANNEL_SCORES:
            raise unknown("channel score", self.channel_score, CHANNEL_SCORES)
        if self.channel_sparsity == 0:
            return
        if not self.families:
            raise InvalidValue(
                "Chase removes channels, so it must know which are coupled; give families=removable(couple("
                "record(model, example)).families, dict(model.named_parameters())), or channel_sparsity=0."
            )
        whole = self.since + steps
        wanted = steps_of(self.channel_end, total_steps=whole, steps_per_epoch=steps_per_epoch)
        if wanted > self.explored_until(whole, steps_per_epoch):
            raise InvalidValue(
                f"removals end at step {wanted} ({self.channel_end!r}), after exploration ({self.explore_end!r}), "
                "which would not grow back what they take; set channel_end to explore_end or earlier."
            )
        if self.last_removal(whole, steps_per_epoch) < 1:
            raise ScheduleTooShort(
                f"channel_end {self.channel_end!r} with explore_end {self.explore_end!r} leaves no step for removals; "
                "train longer, or set them later."
            )

    def last_removal(self, whole: int, steps_per_epoch: int | None) -> int:
        """Return T_c in steps of the whole training."""
        end = steps_of(self.channel_end, total_steps=whole, steps_per_epoch=steps_per_epoch)
        return min(end, self.explored_until(whole, steps_per_epoch) - 1)

    def removals(self, whole: int, steps_per_epoch: int | None) -> list[int]:
        """Return the steps of a training of `whole` steps after which channels are removed; the last is T_c."""
        if self.channel_sparsity == 0:
            return []
        span = {"total_steps": whole, "steps_per_epoch": steps_per_epoch}
        every, half = interval_of(self.channel_every, **span), interval_of(self.every, **span) // 2  # type: ignore[arg-type]
        end = self.last_removal(whole, steps_per_epoch)
        return [*range(every + half, end, every), end]

    def share_gone(self, step: int, whole: int, steps_per_epoch: int | None) -> float:
        """Return S(t) at a step of the whole training."""
        return cubic(0.0, self.channel_sparsity, progress(step, 0, self.last_removal(whole, steps_per_epoch)))

    def survivors(
        self,
        step: int,
        whole: int,
        steps_per_epoch: int | None,
        *,
        weights: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        alive: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return which channels are left after the removal of `step`: family name -> bool.

        Args:
            step, whole, steps_per_epoch: the moment, and the length of the whole training.
            weights, masks: masked weights and their masks, by name.
            alive: family name -> bool, the channels there are.
        """
        origin = self.origin if self.origin is not None else origin_of(self.families, weights)
        scores = {f.name: channel_scores(f, weights, masks, origin[f.name], self.channel_score) for f in self.families}
        # A family that was cut to a single channel is no family any more: nothing couples, nothing can go.
        single = len([n for n in origin if n not in scores])
        first = sum(sizes[0] for sizes in origin.values())
        there = sum(int(a.sum()) for a in alive.values()) + single
        goal = first - round_half_up(first * self.share_gone(step, whole, steps_per_epoch))
        floors = {
            f.name: max(1, channel_floor(origin[f.name][0], self.channel_sparsity, self.floor)) for f in self.families
        }
        return keep_channels(scores, alive, max(0, there - goal), floors)

    def start(self, s: Sparsifier) -> Masks:
        """Check the families against the model, mark every channel alive, and start as `SoftBound`.

        Raises:
            MaskMismatch: a weight of a family is not masked, so that its channels could not be held at zero.
            Infeasible: evenly narrower layers would not have room for the budget.
        """
        masks = super().start(s)
        if self.channel_sparsity == 0:
            return masks
        everything = parameters(s.model)
        check_families(self.families, everything)
        for family in self.families:
            weights = [slot for slot, tensor in parameter_slots(family, everything) if tensor.ndim > 1]
            loose = [slot.tensor for slot in weights if slot.tensor not in s.parameters]
            if loose or not any(slot.role == "output" for slot in weights):
                what = repr(loose[0]) if loose else "a weight that makes them"
                raise MaskMismatch(
                    f"channels of {family.name!r} cannot be removed: {what} is not among the prunable weights; leave "
                    "the family out, or include the weight."
                )
            s.memory[f"alive/{family.name}"] = torch.ones(family.size, dtype=torch.uint8)
        missing = [f.name for f in self.families if self.origin is not None and f.name not in self.origin]
        if missing:
            raise InvalidValue(f"origin has no sizes of {missing[0]!r}; give origin_of(families, parameters) in full.")
        if self.since == 0:
            self.check_room(s.parameters)
        return masks

    def check_room(self, weights: Mapping[str, Tensor]) -> None:
        """Raise `Infeasible` when evenly narrower layers of this dense network could not hold the budget.

        Removals need not be even; when they leave too little room after all, the event that cannot refill says so.
        """
        floors = {f.name: max(1, channel_floor(f.size, self.channel_sparsity, 1.0)) for f in self.families}
        even = {f.name: torch.arange(f.size) < floors[f.name] for f in self.families}
        room = sum(int(torch.count_nonzero(a)) for a in living(self.families, even, weights).values())
        kept = some_kept(sum(w.numel() for w in weights.values()), self.sparsity)
        if room < kept:
            raise Infeasible(
                f"a network with {self.channel_sparsity:g} of its removable channels gone has about {room} weights, "
                f"fewer than the {kept} of sparsity {self.sparsity:g}; remove fewer channels, or ask for more sparsity."
            )

    def alive(self, s: Sparsifier) -> dict[str, Tensor]:
        """Return the channels that are left: family name -> bool (channels,), on the CPU."""
        if self.channel_sparsity == 0:
            return {f.name: torch.ones(f.size, dtype=torch.bool) for f in self.families}
        return {f.name: s.memory[f"alive/{f.name}"].bool().cpu() for f in self.families}

    def allowed(self, s: Sparsifier) -> Mapping[str, Tensor] | None:
        """Weights may grow in living channels only."""
        return None if self.channel_sparsity == 0 else living(self.families, self.alive(s), s.parameters)

    def after(self, s: Sparsifier) -> None:
        """Act as `SoftBound`, then remove channels when due, and keep what belongs to removed ones at zero."""
        super().after(s)
        whole = self.since + s.steps
        if self.since + s.step in self.removals(whole, s.steps_per_epoch):
            alive = self.survivors(
                self.since + s.step,
                whole,
                s.steps_per_epoch,
                weights=s.weights(),
                masks=s.masks,
                alive=self.alive(s),
            )
            s.memory |= agree_tensors({f"alive/{n}": a.to(torch.uint8).cpu() for n, a in alive.items()})
            room = living(self.families, self.alive(s), s.parameters)
            s.update(Masks({n: m.to(room[n].device) & room[n] for n, m in s.masks.items()}))
        if self.channel_sparsity:
            self._silence(s)

    @torch.no_grad()
    def _silence(self, s: Sparsifier) -> None:
        """Zero biases and norm parameters of removed channels, and their optimizer state."""
        everything, alive = parameters(s.model), self.alive(s)
        for family in self.families:
            gone = ~alive[family.name]
            if not bool(gone.any()):
                continue
            for slot, tensor in parameter_slots(family, everything):
                if tensor.ndim == 1:
                    hole = spread(gone.to(tensor.device), slot, tensor.shape[0], False)
                    for values in (tensor, *state_tensors(s.optimizer, tensor)):
                        values.masked_fill_(hole, 0.0)

    def plan(self, s: Sparsifier, coupling: Coupling) -> Plan:
        """Return the physical cut of the removed channels, exact by construction (see `prunus.graph.plan`)."""
        from prunus.graph.plan import Plan

        return Plan.from_keep(coupling, self.alive(s))

    def describe(self) -> dict[str, Any]:
        """Return name and choices; families by name, size and slots."""
        origin = None if self.origin is None else {n: [int(v) for v in sizes] for n, sizes in self.origin.items()}
        return super().describe() | {"families": describe_families(self.families), "origin": origin}


def parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return all parameters of a model by name, tied ones under each of theirs."""
    return dict(unwrap(model).named_parameters(remove_duplicate=False))
