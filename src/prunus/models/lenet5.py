"""LeNet-5, the convolutional network of the MNIST experiments."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from prunus.errors import InvalidValue
from prunus.models.initialise import kaiming
from prunus.models.resnet import image_channels


class LeNet5(nn.Module):
    """Convolutions 6 and 16 (5x5) with max pooling, convolution 120 (5x5), linear 84, linear.

    LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998, figure 2, with ReLU, max pooling and
    full connections. Images of 28 to 31 pixels get a border of 2, which makes 28 the 32 of the paper.

    Args:
        num_classes: number of outputs.
        input_shape: (C, H, W), sides of 28 pixels or more.

    Raises:
        InvalidValue: an input that is not an image or too small.
    """

    def __init__(self, num_classes: int, input_shape: tuple[int, ...]):
        super().__init__()
        channels = image_channels(input_shape, "lenet5")
        if min(input_shape[1:]) < 28:
            raise InvalidValue(
                f"lenet5 needs sides of 28 pixels or more, got {input_shape}; use 'lenet' or 'vgg-small'"
            )
        border = 2 if min(input_shape[1:]) < 32 else 0
        self.conv1 = nn.Conv2d(channels, 6, 5, padding=border)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.conv3 = nn.Conv2d(16, 120, 5)
        height, width = (((side + 2 * border - 4) // 2 - 4) // 2 - 4 for side in input_shape[1:])
        self.linear1 = nn.Linear(120 * height * width, 84)
        self.linear2 = nn.Linear(84, num_classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to logits (N, num_classes)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.conv3(x)).flatten(1)
        return self.linear2(F.relu(self.linear1(x)))
