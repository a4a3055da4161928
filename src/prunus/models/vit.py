"""A small vision transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunus.errors import InvalidValue
from prunus.models.resnet import image_channels


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        width: features of a token.
        heads: number of heads.
        head_width: features of a head; kept apart from `width` so that heads can be removed.
    """

    def __init__(self, width: int, heads: int, head_width: int):
        super().__init__()
        self.heads = heads
        self.head_width = head_width
        self.qkv = nn.Linear(width, 3 * heads * head_width)
        self.proj = nn.Linear(heads * head_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (N, T, width) to (N, T, width)."""
        n, tokens, _ = x.shape
        qkv = self.qkv(x).view(n, tokens, 3, self.heads, self.head_width).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(y.transpose(1, 2).reshape(n, tokens, self.heads * self.head_width))


class Feedforward(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and feed-forward, each after layer norm and added to its input."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, width // heads)
        self.norm2 = nn.LayerNorm(width)
        self.feedforward = Feedforward(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (N, T, width) to (N, T, width)."""
        x = x + self.attention(self.norm1(x))
        return x + self.feedforward(self.norm2(x))


class ViT(nn.Module):
    """Patches as tokens, a class token, learned positions, pre-norm blocks, linear on the class token.

    Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, equations 1 to 4.

    Args:
        num_classes: number of outputs.
        input_shape: (C, H, W), sides divisible by `patch`.
        patch: side of a patch; default H / 8, at least 1, which makes 64 tokens of a square image.
        width: features of a token, divisible by `heads`.
        depth: number of blocks.
        heads: attention heads.
        ratio: hidden width of the feed-forward part over `width`.

    Raises:
        InvalidValue: sides that patches, or a width that heads, do not divide.
    """

    def __init__(
        self,
        num_classes: int,
        input_shape: tuple[int, ...],
        *,
        patch: int | None = None,
        width: int = 128,
        depth: int = 6,
        heads: int = 4,
        ratio: float = 2.0,
    ):
        super().__init__()
        channels = image_channels(input_shape, "vit")
        _, height, breadth = input_shape
        patch = max(height // 8, 1) if patch is None else patch
        if patch < 1 or height % patch or breadth % patch:
            raise InvalidValue(f"patches of {patch} pixels do not tile images of {height}x{breadth}")
        if heads < 1 or width % heads or depth < 1 or ratio <= 0:
            raise InvalidValue(
                f"width={width} must be a multiple of heads={heads}; depth={depth}, ratio={ratio} above 0"
            )
        tokens = (height // patch) * (breadth // patch)
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, tokens + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads, round(width * ratio)) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.position, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to logits (N, num_classes)."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])
