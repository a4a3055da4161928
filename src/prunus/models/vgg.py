"""A small plain convolutional network in the manner of VGG."""

from __future__ import annotations

from torch import Tensor, nn

from prunus.errors import InvalidValue
from prunus.models.initialise import kaiming
from prunus.models.resnet import image_channels


class VGGSmall(nn.Module):
    """Three stages of two 3x3 convolutions with batch norm and ReLU, max pooling after each, then linear.

    After Simonyan and Zisserman, Very Deep Convolutional Networks, ICLR 2015, with batch norm, mean pooling and
    a single linear layer, as is usual for 32x32 images. Sides of one pixel are not pooled further.

    Args:
        num_classes: number of outputs.
        input_shape: (C, H, W).
        width: channels of the first stage; the others have 2 and 4 times as many.

    Raises:
        InvalidValue: a width below 1, or an input that is not an image.
    """

    def __init__(self, num_classes: int, input_shape: tuple[int, ...], *, width: int = 64):
        super().__init__()
        inputs = image_channels(input_shape, "vgg-small")
        if width < 1:
            raise InvalidValue(f"width must be 1 or more, got {width}")
        side = min(input_shape[1:])
        layers: list[nn.Module] = []
        for outputs in (width, 2 * width, 4 * width):
            for _ in range(2):
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            if side >= 2:
                layers.append(nn.MaxPool2d(2))
                side //= 2
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(inputs, num_classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to logits (N, num_classes)."""
        return self.linear(self.features(x).mean((2, 3)))
