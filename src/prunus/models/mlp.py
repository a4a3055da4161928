"""Fully connected networks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

from prunus.errors import InvalidValue
from prunus.models.initialise import kaiming


class MLP(nn.Module):
    """Flatten, then linear layers with ReLU between them.

    Args:
        num_classes: number of outputs.
        input_shape: shape of one input; it is flattened.
        hidden: widths of the hidden layers, first to last; none makes a linear classifier.

    Raises:
        InvalidValue: a width below 1.
    """

    def __init__(self, num_classes: int, input_shape: tuple[int, ...], *, hidden: Sequence[int] = (256, 128)):
        super().__init__()
        if any(width < 1 for width in hidden):
            raise InvalidValue(f"widths of hidden layers must be 1 or more, got {tuple(hidden)}")
        widths = [math.prod(input_shape), *hidden]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.flatten = nn.Flatten()
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, *input_shape) to logits (N, num_classes)."""
        return self.layers(self.flatten(x))


def lenet(num_classes: int, input_shape: tuple[int, ...]) -> MLP:
    """LeNet-300-100: LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998, with ReLU."""
    return MLP(num_classes, input_shape, hidden=(300, 100))
