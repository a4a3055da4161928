"""Wide residual networks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from prunus.errors import InvalidValue
from prunus.models.initialise import kaiming
from prunus.models.resnet import image_channels


class WideBlock(nn.Module):
    """Pre-activation block: batch norm, ReLU, 3x3 convolution, twice, with dropout between.

    Where the number of channels changes, the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        active = F.relu(self.bn1(x))
        y = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(active)))))
        return y + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """WRN-depth-width: stem of 16 channels, three stages of 16, 32, 64 times `width` channels.

    Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016, table 1.

    Args:
        num_classes: number of outputs.
        input_shape: (C, H, W).
        depth: 6 n + 4, counting convolutions along the main path; 16, 22, 28, 40...
        width: factor on the channels.
        dropout: probability inside the blocks.

    Raises:
        InvalidValue: a depth that is not 6 n + 4, a width below 1, or an input that is not an image.
    """

    def __init__(
        self,
        num_classes: int,
        input_shape: tuple[int, ...],
        *,
        depth: int = 16,
        width: int = 4,
        dropout: float = 0.0,
    ):
        super().__init__()
        channels = image_channels(input_shape, "wrn")
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise InvalidValue(f"wrn needs depth = 6 n + 4 (10, 16, 22, 28...) and width >= 1, got {depth}, {width}")
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        inputs = 16
        stages = []
        for stage in range(3):
            outputs = 16 * 2**stage * width
            blocks = []
            for block in range((depth - 4) // 6):
                blocks.append(WideBlock(inputs, outputs, 2 if stage and not block else 1, dropout))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(inputs)
        self.linear = nn.Linear(inputs, num_classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to logits (N, num_classes)."""
        x = F.relu(self.bn(self.stages(self.conv1(x))))
        return self.linear(x.mean((2, 3)))
