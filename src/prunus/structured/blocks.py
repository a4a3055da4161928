"""Dense blocks: a mask as rectangles (row set x column set), and layers run as one small product per rectangle.

Source: the execution model of Chen et al., ICML 2022 (arXiv 2202.04736) and Rumi et al., PACT 2020: for every block the
inputs it reads are gathered, multiplied by a small dense matrix, and the results scattered to its outputs. This is the
reference semantics in plain torch; no claim of speed is made for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunus.errors import InvalidValue, MaskMismatch, Unsupported
from prunus.parameters import Address, prunable
from prunus.structured.refill import check_matrix


@dataclass(frozen=True, eq=False)
class DenseBlock:
    """A rectangle of a matrix that is kept whole.

    Attributes:
        rows: int64, ascending row numbers.
        columns: int64, ascending column numbers.
    """

    rows: Tensor
    columns: Tensor

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.rows.numel() * self.columns.numel()


def cover(blocks: Sequence[DenseBlock], shape: tuple[int, int]) -> Tensor:
    """Return the bool matrix of this shape that is True inside the blocks.

    Raises:
        InvalidValue: a row or column number does not lie in the matrix.
    """
    mask = torch.zeros(shape, dtype=torch.bool)
    for block in blocks:
        for what, numbers, end in (("row", block.rows, shape[0]), ("column", block.columns, shape[1])):
            if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < end:
                raise InvalidValue(
                    f"a block has {what} numbers {int(numbers.min())}..{int(numbers.max())}, outside a matrix of "
                    f"shape {shape}."
                )
        mask[block.rows[:, None], block.columns[None, :]] = True
    return mask


def blocks_of(mask: Tensor) -> list[DenseBlock]:
    """Return the rectangles with disjoint row sets that a mask consists of: rows with equal columns go together.

    Exact for any mask (`cover` of the result gives it back); a mask without structure has about as many blocks as rows.

    Args:
        mask: bool (rows, columns).

    Returns:
        Blocks in order of their first rows; empty rows belong to none.
    """
    check_matrix(mask)
    filled = mask.any(1).nonzero().flatten()
    if not filled.numel():
        return []
    patterns, member = mask[filled].unique(dim=0, return_inverse=True)
    blocks = [
        DenseBlock(filled[member == number].cpu(), pattern.nonzero().flatten().cpu())
        for number, pattern in enumerate(patterns)
    ]
    return sorted(blocks, key=lambda block: int(block.rows[0]))


def split_rows(blocks: Sequence[DenseBlock], multiple: int = 32) -> list[DenseBlock]:
    """Return the same mask with blocks of more than `multiple` rows in two: a multiple of it, and the rest.

    Matrix libraries prefer such row counts. Raises `InvalidValue` for a multiple below 1.
    """
    if multiple < 1:
        raise InvalidValue(f"multiple={multiple} must be 1 or more.")
    parts = []
    for block in blocks:
        whole = block.rows.numel() // multiple * multiple
        cuts = [whole] if block.rows.numel() > multiple and whole < block.rows.numel() else []
        parts += [DenseBlock(rows, block.columns) for rows in block.rows.tensor_split(cuts)]
    return parts


def block_matmul(weight: Tensor, x: Tensor, blocks: Sequence[DenseBlock]) -> Tensor:
    """Return (weight inside the blocks) @ x as one small product per block.

    Args:
        weight: (rows, columns); entries outside the blocks are never read.
        x: (..., columns, positions).
        blocks: blocks that share a row add up.

    Returns:
        (..., rows, positions); rows of no block are 0.

    Raises:
        InvalidValue: shapes do not fit.
    """
    if weight.ndim != 2 or x.ndim < 2 or x.shape[-2] != weight.shape[1]:
        raise InvalidValue(
            f"a matrix {tuple(weight.shape)} and inputs {tuple(x.shape)} do not fit; inputs are (..., columns, "
            "positions)."
        )
    result = x.new_zeros(*x.shape[:-2], weight.shape[0], x.shape[-1])
    for block in blocks:
        rows, columns = block.rows.to(x.device), block.columns.to(x.device)
        small = weight.index_select(0, rows).index_select(1, columns)
        result.index_add_(-2, rows, small @ x.index_select(-2, columns))
    return result


def block_forward(module: nn.Linear | nn.Conv2d, x: Tensor, mask: Tensor, *, multiple: int | None = None) -> Tensor:
    """Return what the layer with masked weights gives for `x`, computed block by block.

    A convolution becomes products with its patches (im2col), group by group.

    Args:
        module: a linear layer or a 2-D convolution of any stride, padding, dilation and groups.
        x: (..., features), or (N, C, H, W).
        mask: bool, in the shape of the weight.
        multiple: split blocks as `split_rows` does.

    Raises:
        MaskMismatch: the mask has another shape than the weight.
        Unsupported: another kind of layer.
        InvalidValue: inputs of a convolution without a batch axis.
    """
    if not isinstance(module, nn.Linear | nn.Conv2d):
        raise Unsupported(f"{type(module).__name__} cannot be run block by block; nn.Linear and nn.Conv2d can be.")
    if mask.shape != module.weight.shape:
        raise MaskMismatch(f"the mask has shape {tuple(mask.shape)}, the weight {tuple(module.weight.shape)}.")
    address = prunable(module)["weight"]
    if isinstance(module, nn.Linear):
        result = block_matmul(module.weight, x.reshape(-1, x.shape[-1]).T, _blocks(mask, multiple)).T
        result = result.reshape(*x.shape[:-1], -1)
        return result if module.bias is None else result + module.bias
    if x.ndim != 4:
        raise InvalidValue(f"inputs have shape {tuple(x.shape)}; give a batch (N, C, H, W).")
    patches, height, width = _patches(module, x)
    parts = [
        block_matmul(weight, patches[:, group], _blocks(part, multiple))
        for group, (weight, part) in enumerate(
            zip(by_group(address, module.weight), by_group(address, mask), strict=True)
        )
    ]
    result = torch.cat(parts, dim=1).unflatten(-1, (height, width))
    return result if module.bias is None else result + module.bias[:, None, None]


def by_group(address: Address, tensor: Tensor) -> Tensor:
    """Lay a tensor out as (groups, outputs of a group, weights of one output): rows of a group read the same inputs."""
    rows = address.rows(tensor)
    return rows.reshape(address.groups, -1, rows.shape[1])


def _blocks(mask: Tensor, multiple: int | None) -> list[DenseBlock]:
    blocks = blocks_of(mask)
    return blocks if multiple is None else split_rows(blocks, multiple)


def _patches(module: nn.Conv2d, x: Tensor) -> tuple[Tensor, int, int]:
    """Return patches (N, groups, taps x channels of a group, positions) in the column order of `Address.rows`."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    height, width = (
        (size - spread * (taps - 1) - 1) // jump + 1
        for size, taps, jump, spread in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    )
    columns = F.unfold(x, kernel, dilation=dilation, stride=stride)
    split = columns.unflatten(1, (module.groups, -1, kernel[0] * kernel[1]))
    return split.transpose(2, 3).flatten(2, 3), height, width
