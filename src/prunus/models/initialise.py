"""Initial weights for networks of rectified linear units."""

from __future__ import annotations

from torch import nn


def kaiming(model: nn.Module) -> None:
    """Draw weights of linear and convolution layers from N(0, 2 / fan_in), in module order; biases become 0.

    He et al., Delving Deep into Rectifiers, ICCV 2015, equation 10. Normalisation layers keep scale 1 and shift 0.
    Draws come from torch's global generator, which `prunus.models.create.seeded` keys and restores.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
