"""A class-balanced batch, as scores at initialisation (SNIP, GraSP) ask for."""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.data.examples import Examples
from prunus.errors import InvalidValue
from prunus.randomness import generator


def balanced_batch(examples: Examples, per_class: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw `per_class` distinct examples of every class.

    Wang, Zhang and Grosse, Picking Winning Tickets Before Training by Preserving Gradient Flow, ICLR 2020, score
    on 10 examples of each class.

    Args:
        examples: where they come from.
        per_class: examples of each class, >= 1.
        seed: key of the draw.

    Returns:
        x (K per_class, ...) float32 normalised, y and ids int64; classes take turns (0, 1, ..., K-1, 0, ...), so
        that every cut at a multiple of K is balanced too.

    Raises:
        InvalidValue: `per_class` is below 1 or more than the smallest class has.
    """
    counts = examples.counts()
    if not 1 <= per_class <= int(counts.min()):
        raise InvalidValue(
            f"per_class={per_class} must lie in 1..{int(counts.min())}: class "
            f"{examples.classes[int(counts.argmin())]!r} of {examples.name} has {int(counts.min())} examples"
        )
    picks = []
    for label in range(examples.num_classes):
        members = (examples.y == label).nonzero().flatten()
        order = torch.randperm(members.numel(), generator=generator(seed, "balanced", label))
        picks.append(members[order[:per_class]])
    index = torch.stack(picks, dim=1).flatten()
    return examples.normalise(examples.x[index]), examples.y[index], examples.ids[index]
