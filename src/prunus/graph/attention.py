"""A multi-head attention whose number of heads is free of its embedding size, so that heads can be removed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HeadwiseAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with the same tensors, names and results, for any number of heads of `head_dim`.

    torch's own forward computes the size of a head as embed_dim / num_heads, which is wrong once heads are gone. An
    existing module becomes one of these by changing its class; its tensors stay where they are.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments, shapes and results are those of `nn.MultiheadAttention.forward`."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        elif not self.batch_first:
            same_key, same_value = key is query, value is key
            query = query.transpose(0, 1)
            key = query if same_key else key.transpose(0, 1)
            value = key if same_value else value.transpose(0, 1)
        q, k, v = self._projected(query, key, value)
        batch, targets = q.shape[:2]
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(batch, -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(batch, -1, -1)], 1)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        if self.add_zero_attn:
            k = F.pad(k, (0, 0, 0, 1))
            v = F.pad(v, (0, 0, 0, 1))
        mask = self._mask(q, k, key_padding_mask, attn_mask, batched)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-1, -2)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            mixed = weights @ v
        else:
            # A causal mask always comes as a tensor here, so the flag adds nothing.
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.head_dim**-0.5)
        output = self.out_proj(mixed.transpose(1, 2).reshape(batch, targets, -1))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = self.in_proj_bias.chunk(3) if self.in_proj_bias is not None else (None, None, None)
            return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))  # type: ignore[return-value]
        if query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
            return q, k, v
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3) if self.in_proj_bias is not None else (None, None, None)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))  # type: ignore[return-value]

    def _mask(
        self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, batched: bool
    ) -> Tensor | None:
        """Return the additive mask, broadcastable to (batch, heads, targets, sources), or None."""
        mask: Tensor | None = None
        if attn_mask is not None:
            mask = _additive(attn_mask, q.dtype)
            if mask.dim() == 3:
                mask = mask.unflatten(0, (q.shape[0], -1))
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q.dtype)
            padding = (padding if batched else padding.unsqueeze(0))[:, None, None, :]
            extra = k.shape[-2] - padding.shape[-1]
            padding = F.pad(padding, (0, extra)) if extra else padding
            if mask is not None and mask.shape[-1] != k.shape[-2]:
                mask = F.pad(mask, (0, extra))
            mask = padding if mask is None else mask + padding
        elif mask is not None and mask.shape[-1] != k.shape[-2]:
            mask = F.pad(mask, (0, k.shape[-2] - mask.shape[-1]))
        return mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
    return mask.to(dtype)


@contextlib.contextmanager
def headwise(model: nn.Module) -> Iterator[list[str]]:
    """Let every plain `nn.MultiheadAttention` compute as `HeadwiseAttention` meanwhile; yield their paths."""
    plain = [(path, m) for path, m in model.named_modules() if type(m) is nn.MultiheadAttention]
    for _, module in plain:
        module.__class__ = HeadwiseAttention
    try:
        yield [path for path, _ in plain]
    finally:
        for _, module in plain:
            module.__class__ = nn.MultiheadAttention
