"""Residual networks for small images: ResNet-20/32/44/56/110 of the CIFAR experiments, and ResNet-18."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from prunus.errors import InvalidValue, unknown
from prunus.models.initialise import kaiming

SHORTCUTS = ("A", "B")


class PadShortcut(nn.Module):
    """Shortcut A: keep every `stride`-th pixel and add channels of zeros before and after; no parameters.

    Args:
        before, after: how many channels of zeros on either side.
        stride: step in rows and columns.
    """

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.before = before
        self.after = after
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, before + C + after, ceil(H / stride), ceil(W / stride))."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to the shortcut.

    Args:
        inputs, outputs: channels.
        stride: step of the first convolution.
        shortcut: "A" or "B", used where shapes change; elsewhere the shortcut is the identity.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            if shortcut == "A":
                before = (outputs - inputs) // 2
                self.shortcut = PadShortcut(before, outputs - inputs - before, stride)
            else:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
                )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """3x3 stem, stages of basic blocks (channels double and sides halve from stage to stage), mean pool, linear.

    He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2.

    Args:
        num_classes: number of outputs.
        input_shape: (C, H, W); any channels, sides from 2 ^ (stages - 1) pixels on make sense.
        blocks: blocks of each stage.
        width: channels of the stem and the first stage.
        shortcut: "A" (zeros, the CIFAR nets of the paper) or "B" (1x1 convolution) where shapes change.

    Raises:
        InvalidValue: an input that is not an image, or a width below 1.
        UnknownName: a shortcut that is neither.
    """

    def __init__(
        self,
        num_classes: int,
        input_shape: tuple[int, ...],
        *,
        blocks: Sequence[int] = (3, 3, 3),
        width: int = 16,
        shortcut: str = "A",
    ):
        super().__init__()
        channels = image_channels(input_shape, type(self).__name__)
        if width < 1 or not blocks or min(blocks) < 1:
            raise InvalidValue(f"width={width} and blocks={tuple(blocks)} must be 1 or more")
        if shortcut not in SHORTCUTS:
            raise unknown("shortcut", shortcut, SHORTCUTS)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages = len(blocks)
        inputs = width
        for stage, count in enumerate(blocks):
            outputs = width * 2**stage
            layers = []
            for block in range(count):
                stride = 2 if stage and not block else 1
                layers.append(BasicBlock(inputs, outputs, stride, shortcut))
                inputs = outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.linear = nn.Linear(inputs, num_classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to logits (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.linear(x.mean((2, 3)))


def image_channels(input_shape: tuple[int, ...], model: str) -> int:
    """Return the channels of an image shape (C, H, W).

    Raises:
        InvalidValue: the shape is not that of an image.
    """
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise InvalidValue(f"{model} reads images (channels, height, width), got input_shape={input_shape}")
    return input_shape[0]


def resnet20(num_classes: int, input_shape: tuple[int, ...], *, width: int = 16, shortcut: str = "A") -> ResNet:
    """ResNet-20: 3 blocks per stage; 269,722 parameters on CIFAR-10 with shortcut A."""
    return ResNet(num_classes, input_shape, blocks=(3, 3, 3), width=width, shortcut=shortcut)


def resnet32(num_classes: int, input_shape: tuple[int, ...], *, width: int = 16, shortcut: str = "A") -> ResNet:
    """ResNet-32: 5 blocks per stage."""
    return ResNet(num_classes, input_shape, blocks=(5, 5, 5), width=width, shortcut=shortcut)


def resnet44(num_classes: int, input_shape: tuple[int, ...], *, width: int = 16, shortcut: str = "A") -> ResNet:
    """ResNet-44: 7 blocks per stage."""
    return ResNet(num_classes, input_shape, blocks=(7, 7, 7), width=width, shortcut=shortcut)


def resnet56(num_classes: int, input_shape: tuple[int, ...], *, width: int = 16, shortcut: str = "A") -> ResNet:
    """ResNet-56: 9 blocks per stage."""
    return ResNet(num_classes, input_shape, blocks=(9, 9, 9), width=width, shortcut=shortcut)


def resnet110(num_classes: int, input_shape: tuple[int, ...], *, width: int = 16, shortcut: str = "A") -> ResNet:
    """ResNet-110: 18 blocks per stage."""
    return ResNet(num_classes, input_shape, blocks=(18, 18, 18), width=width, shortcut=shortcut)


def resnet18(num_classes: int, input_shape: tuple[int, ...], *, width: int = 64, shortcut: str = "B") -> ResNet:
    """ResNet-18 with a 3x3 stem and no first pooling, as is usual for 32x32 images."""
    return ResNet(num_classes, input_shape, blocks=(2, 2, 2, 2), width=width, shortcut=shortcut)
