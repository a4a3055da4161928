"""Several networks as one: the average of their weights, the ensemble of their answers, and how far apart they lie."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from prunus.errors import InvalidValue, MaskMismatch
from prunus.measure.similarity import effective_state


def average(
    states: Sequence[Mapping[str, Tensor]], masks: Sequence[Mapping[str, Tensor] | None] | None = None
) -> dict[str, Tensor]:
    """Return the mean of several states of one network: of effective weights, in float64, rounded back at the end.

    Floating-point entries (weights, biases, running statistics) are averaged. Whole numbers (counters) cannot be and
    come from the first state; bool entries must agree. The mean of equal states is that state, bit for bit.

    Args:
        states: state dicts with the same names, shapes and dtypes.
        masks: name -> bool tensor (True = kept) of each state, or None for a dense one; they must be the same for
            all, since the mean of different masks is denser than each. Pruned entries count as zero.

    Raises:
        InvalidValue: nothing to average, or states of different architectures.
        MaskMismatch: masks that differ, or do not fit.
    """
    if not states:
        raise InvalidValue("there is no network to average.")
    given = [None] * len(states) if masks is None else list(masks)
    if len(given) != len(states):
        raise InvalidValue(f"{len(states)} states came with {len(given)} masks; give one for each, or None.")
    for other in given[1:]:
        _check_same_masks(given[0], other)
    effective = [effective_state(state, mask) for state, mask in zip(states, given, strict=True)]
    first = effective[0]
    for state in effective[1:]:
        odd = [n for n in {*first, *state} if n not in first or n not in state or _kind(first[n]) != _kind(state[n])]
        if odd:
            raise InvalidValue(f"the networks differ in {min(odd)!r}; only networks of one shape can be averaged.")
    mean: dict[str, Tensor] = {}
    for name, value in first.items():
        values = [state[name].detach() for state in effective]
        if value.is_floating_point():
            total = torch.zeros_like(value, dtype=torch.float64)
            for one in values:
                total += one
            mean[name] = (total / len(values)).to(value.dtype)
            continue
        if value.dtype == torch.bool and not all(torch.equal(value, one) for one in values):
            raise MaskMismatch(f"the bool entries of {name!r} differ between the networks, so they have no average.")
        mean[name] = value.detach().clone()
    return mean


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _check_same_masks(first: Mapping[str, Tensor] | None, second: Mapping[str, Tensor] | None) -> None:
    if (first is None) != (second is None):
        raise MaskMismatch("one network has masks and another has none; their average would not be sparse.")
    if first is None or second is None:
        return
    for name in {*first, *second}:
        if name not in first or name not in second or not torch.equal(first[name].cpu(), second[name].cpu()):
            raise MaskMismatch(f"the masks of {name!r} differ; only networks retrained under one mask make a soup.")


def distances(states: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> dict[str, float]:
    """Return how far apart networks lie: L2 distances and angles over the tensors `names`, as one long vector.

    Returns:
        "pairwise_min", "pairwise_mean", "pairwise_max", "to_mean" (mean distance to the average) and
        "angle_max_degrees"; all 0 for a single network.
    """
    vectors = [torch.cat([s[n].detach().double().reshape(-1).cpu() for n in names]) for s in states]
    centre = torch.stack(vectors).mean(dim=0)
    pairs = list(itertools.combinations(vectors, 2))
    apart = [float((a - b).norm()) for a, b in pairs] or [0.0]
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in pairs if a.any() and b.any()] or [1.0]
    return {
        "pairwise_min": min(apart),
        "pairwise_mean": sum(apart) / len(apart),
        "pairwise_max": max(apart),
        "to_mean": sum(float((v - centre).norm()) for v in vectors) / len(vectors),
        "angle_max_degrees": math.degrees(math.acos(max(-1.0, min(1.0, min(cosines))))),
    }


class Ensemble(nn.Module):
    """Several classifiers as one: log of the mean of their softmax outputs, (N, classes)."""

    def __init__(self, models: Sequence[nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs to log-probabilities."""
        logs = torch.stack([model(x).log_softmax(dim=1) for model in self.models])
        return logs.logsumexp(dim=0) - math.log(len(self.models))
