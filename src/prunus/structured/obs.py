"""Optimal brain surgery on the columns of a matrix: what it costs to remove some, and how the others make up for it.

For outputs W X the change of ||W X||^2 is quadratic in the change of W, with Hessian H = 2 X X^T for every row. With
G = H^-1 the removal of the columns S, all other columns readjusted, costs 1/2 tr(W_S (G_SS)^-1 W_S^T), reached by
W - W_S (G_SS)^-1 G_S,:. Sources: Hassibi and Stork, NIPS 1992; Frantar and Alistarh, NeurIPS 2022 (layer by layer).
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.errors import InvalidValue


def hessian(gram: Tensor, damp: float = 0.01) -> tuple[Tensor, Tensor]:
    """Return H = 2 gram + damp * mean(diag) * I and which inputs are dead.

    Dead inputs, always zero on the data, get the diagonal entry 1 and do not count in the mean; nothing is known
    about their weights, so removing them costs nothing and moves nothing.

    Args:
        gram: (d, d), X X^T up to scale.
        damp: share of the mean diagonal added to it; 0 needs more examples than columns.

    Raises:
        InvalidValue: damp is negative or not finite.
    """
    if not 0 <= damp < float("inf"):
        raise InvalidValue(f"damp={damp!r} must be a finite number from 0 up.")
    h = 2 * gram.to(torch.float64)
    diagonal = h.diagonal()
    dead = diagonal == 0
    if not bool(dead.all()):
        diagonal += damp * diagonal[~dead].mean()
    diagonal[dead] = 1.0
    return h, dead


def inverse(h: Tensor) -> Tensor:
    """Return the inverse of a positive definite matrix (d, d).

    Raises:
        InvalidValue: it is not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(h)
    if int(failed):
        raise InvalidValue("the inputs of a layer are linearly dependent; use damp > 0 or more data.")
    return torch.cholesky_inverse(factor)


def removal_costs(weight: Tensor, g: Tensor, sets: Tensor) -> Tensor:
    """Return 1/2 tr(W_S (G_SS)^-1 W_S^T) for each set S of columns, removed alone with all other columns readjusted.

    Args:
        weight: (out, d).
        g: (d, d), inverse Hessian.
        sets: (n, k) int64, columns of each set.

    Returns:
        (n,) float64.
    """
    if not sets.numel():
        return g.new_zeros(len(sets))
    weight = weight.to(g.dtype)
    costs = []
    for some in sets.split(max(1, (1 << 23) // (sets.shape[1] * max(sets.shape[1], len(weight))))):
        block = g[some[:, :, None], some[:, None, :]]
        part = weight[:, some].permute(1, 2, 0)  # (n, k, out)
        costs.append(0.5 * (part * torch.linalg.solve(block, part)).sum((1, 2)))
    return torch.cat(costs)


def column_costs(weight: Tensor, g: Tensor) -> Tensor:
    """Return, per column, the sum over rows of W_ij^2 / (2 G_jj): the cost of removing that column alone, (d,)."""
    return 0.5 * weight.to(g.dtype).square().sum(0) / g.diagonal()


def without(weight: Tensor, g: Tensor, columns: Tensor) -> Tensor:
    """Return W - W_S (G_SS)^-1 G_S,: with the columns S exactly zero, in the dtype of `g`.

    Args:
        weight: (out, d).
        g: (d, d), inverse Hessian.
        columns: (k,) int64, the set S; k < d leaves something to readjust.
    """
    weight = weight.to(g.dtype)
    if not columns.numel():
        return weight.clone()
    rows = g[columns]
    updated = weight - weight[:, columns] @ torch.linalg.solve(rows[:, columns], rows)
    updated[:, columns] = 0.0
    return updated
