"""What may be searched in a network: widths of its channel families, depths of its stages, and what each costs.

Source: Dong and Yang, Network Pruning via Transformable Architecture Search, NeurIPS 2019 (arXiv 1905.09717). The paper
gives every convolution a width of its own. Here a width belongs to a channel family, the channels that can only go
together: convolutions that write into one residual stream share it, so that what is found is the given network with
channels and blocks taken out, without the extra projections where unequal widths meet.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunus.errors import Infeasible, Unsupported
from prunus.graph.couple import Coupling, Family
from prunus.graph.plan import Plan
from prunus.structured.tas.sampling import (
    expected_count,
    keep_probabilities,
)


@dataclass(frozen=True, eq=False)
class Width:
    """A channel family whose width is searched; `choices` are numbers of first channels, the last one all."""

    family: Family
    choices: tuple[int, ...]


@dataclass(frozen=True)
class Stage:
    """A chain of blocks of equal shape whose length is searched.

    Attributes:
        path: of its `nn.Sequential`.
        blocks: names of its children.
        depths: numbers of first blocks to choose from, the last one all.
    """

    path: str
    blocks: tuple[str, ...]
    depths: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Part:
    """Output channels of one convolution that belong to one family.

    Attributes:
        width: index of the searched family, or None for channels that always stay.
        positions: (units, channels per unit) int64 on the output axis; the first c rows stay at width c.
    """

    width: int | None
    positions: np.ndarray


@dataclass(frozen=True, eq=False)
class Pair:
    """A convolution and the batch norm that reads its output, by module path, cut into parts."""

    conv: str
    norm: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Term:
    """Multiply-accumulates of one weight tensor: `positions` times the product of the lengths of its axes.

    Attributes:
        positions: uses of each weight for one example.
        axes: per axis the entries that always stay, and (index of a width, entries per channel).
        stage, block: where it lies, when it is inside a stage.
    """

    positions: int
    axes: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]
    stage: int | None = None
    block: int = 0


@dataclass(frozen=True)
class Found:
    """An architecture: channels kept per family (the first ones) and blocks kept per stage, as indices of choices."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """All architectures that a search may choose from. As a shape of a run it makes the search network.

    Attributes:
        widths, stages: what is searched.
        pairs: convolutions with their batch norms whose widths move.
        terms: what each weight tensor costs.
        coupling: of the network it was made for.
        seed: of the initial logits, N(0, 0.01^2).
    """

    widths: tuple[Width, ...]
    stages: tuple[Stage, ...]
    pairs: tuple[Pair, ...]
    terms: tuple[Term, ...]
    coupling: Coupling = field(repr=False)
    seed: int = 0

    @property
    def whole(self) -> Found:
        """The network itself."""
        return Found(tuple(len(w.choices) - 1 for w in self.widths), tuple(len(s.depths) - 1 for s in self.stages))

    @property
    def least(self) -> Found:
        """The smallest architecture."""
        return Found((0,) * len(self.widths), (0,) * len(self.stages))

    def macs(self, found: Found) -> int:
        """Return the multiply-accumulates of one example, classifier included."""
        counts = [w.choices[k] for w, k in zip(self.widths, found.widths, strict=True)]
        depths = [s.depths[k] for s, k in zip(self.stages, found.depths, strict=True)]
        total = 0
        for term in self.terms:
            if term.stage is not None and term.block >= depths[term.stage]:
                continue
            product = term.positions
            for fixed, parts in term.axes:
                product *= fixed + sum(entries * counts[width] for width, entries in parts)
            total += product
        return total

    def expected_macs(self, widths: Sequence[Tensor], depths: Sequence[Tensor]) -> Tensor:
        """Return the expected multiply-accumulates under the logits, a float64 scalar with gradient.

        Expected numbers of channels are multiplied as if layers were independent, and a layer in a block counts with
        the probability that the block stays.

        Args:
            widths, depths: logits, one vector per searched family and stage.
        """
        counts = [expected_count(a, w.choices) for a, w in zip(widths, self.widths, strict=True)]
        stays = [keep_probabilities(a, s.depths) for a, s in zip(depths, self.stages, strict=True)]
        total: Any = 0.0
        for term in self.terms:
            product: Any = float(term.positions)
            for fixed, parts in term.axes:
                product = product * (fixed + sum(entries * counts[width] for width, entries in parts))
            total = total + (product if term.stage is None else product * stays[term.stage][term.block])
        return torch.as_tensor(total, dtype=torch.float64)

    def likeliest(self, widths: Sequence[Tensor], depths: Sequence[Tensor]) -> Found:
        """Return the arg-max of every distribution; of equal logits the smaller choice."""
        return Found(tuple(int(a.argmax()) for a in widths), tuple(int(a.argmax()) for a in depths))

    def counts(self, found: Found) -> tuple[dict[str, int], dict[str, int]]:
        """Return channels kept by family and blocks kept by path of the stage."""
        widths = {w.family.name: w.choices[k] for w, k in zip(self.widths, found.widths, strict=True)}
        return widths, {s.path: s.depths[k] for s, k in zip(self.stages, found.depths, strict=True)}

    def plan(self, found: Found) -> Plan:
        """Return what makes the network an architecture: channels and blocks to remove.

        Raises:
            Unsupported: the network's own code does not run with these widths.
        """
        widths, depths = self.counts(found)
        plan = Plan.from_keep(self.coupling, first_channels({w.family: widths[w.family.name] for w in self.widths}))
        if plan.blocked:
            name, reason = next(iter(plan.blocked.items()))
            raise Unsupported(f"family {name!r} cannot have {widths[name]} channels: {reason}; exclude its tensors.")
        gone = [f"{s.path}.{block}" for s in self.stages for block in s.blocks[depths[s.path] :]]
        return plan.without_modules(gone) if gone else plan

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the search network for `model`, which stays as it is."""
        from prunus.structured.tas.network import SearchNet

        return SearchNet(copy.deepcopy(model), self)

    def describe(self) -> dict[str, Any]:
        """Return all choices as JSON values."""
        return {
            "type": type(self).__name__,
            "widths": [[w.family.name, w.family.size, list(w.choices)] for w in self.widths],
            "stages": [[s.path, list(s.depths)] for s in self.stages],
            "seed": self.seed,
        }


def into_band(
    space: SearchSpace,
    found: Found,
    widths: Sequence[Tensor],
    depths: Sequence[Tensor],
    target: float,
    tolerance: float,
) -> Found:
    """Move single choices of an architecture until its cost lies between target - tolerance and target.

    First down, then up as long as the target is not exceeded; each move is the one that loses the least
    log-probability per multiply-accumulate. An architecture inside the band comes back as it is. This step is not in
    the paper, which searches until the band is reached; it serves searches that end before that.

    Raises:
        Infeasible: even the smallest architecture costs more than the target.
    """
    least = space.macs(space.least)
    if least > target:
        share = least / space.macs(space.whole)
        raise Infeasible(
            f"the smallest architecture keeps {share:.1%} of the multiply-accumulates, more than is asked for; "
            "allow smaller fractions or ask for less sparsity."
        )
    logs = [torch.log_softmax(a.double(), 0).tolist() for a in (*widths, *depths)]
    cost = space.macs(found)
    while cost > target:
        found, cost = _best_move(space, found, logs, cost, lambda c, now=cost: c < now)  # type: ignore[misc]
    while cost < target - tolerance:
        moved, higher = _best_move(space, found, logs, cost, lambda c, now=cost: now < c <= target)  # type: ignore[misc]
        if moved == found:
            break
        found, cost = moved, higher
    return found


def _best_move(space: SearchSpace, found: Found, logs: list[list[float]], cost: int, fits: Any) -> tuple[Found, int]:
    """Return the cheapest change of one choice whose new cost fits, and that cost; the same when there is none."""
    flat, split = [*found.widths, *found.depths], len(found.widths)
    best: tuple[float, Found, int] | None = None
    for place, log in enumerate(logs):
        for choice in range(len(log)):
            changed = [*flat[:place], choice, *flat[place + 1 :]]
            other = Found(tuple(changed[:split]), tuple(changed[split:]))
            moved = space.macs(other)
            if choice == flat[place] or not fits(moved):
                continue
            price = (log[flat[place]] - log[choice]) / abs(moved - cost)
            if best is None or price < best[0]:
                best = (price, other, moved)
    return (found, cost) if best is None else best[1:]


def first_channels(counts: Mapping[Family, int]) -> dict[str, np.ndarray]:
    """Return what `Plan.from_keep` takes for the first channels of each family."""
    return {f.name: np.arange(f.size) < count for f, count in counts.items()}
