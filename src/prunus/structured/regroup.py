"""Regroup: turn an unstructured mask into a union of dense row x column blocks.

Source: Chen, Chen, Ma, Wang and Wang, "Coarsening the Granularity: Towards Structurally Sparse Lottery Tickets",
ICML 2022 (arXiv 2202.04736), after Rumi, Ma, Wang and Jiang, PACT 2020. Per layer: rows that use the same columns are
clustered, and in every cluster the columns that are used enough become dense. Where the paper repeats this "on what is
left", rows that are in no block yet are meant here, so that blocks never share a row (a reading, not verified).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from prunus.errors import InvalidValue, MaskMismatch
from prunus.masks import Masks
from prunus.parameters import Address
from prunus.structured.blocks import DenseBlock, by_group, cover
from prunus.structured.partition import Partitioner, check_partition, partitioner
from prunus.structured.refill import check_matrix

ColumnRule = Callable[[Tensor], Tensor]


def at_least(cluster: Tensor, count: int) -> Tensor:
    """Mark the columns with at least `count` non-zeros in a cluster (the paper's t2)."""
    return cluster.sum(0) >= count


def filling(cluster: Tensor) -> Tensor:
    """Mark as many columns, fullest first, as the non-zeros of the cluster fill: ceil(non-zeros / rows).

    A rule of ours that keeps the density of the mask; equal columns keep the earlier one.
    """
    count = -(-int(torch.count_nonzero(cluster)) // len(cluster))
    return _fullest(cluster, count)


def covering(cluster: Tensor, slack: float = 1.5) -> Tensor:
    """Mark the shortest prefix of the columns, fullest first, after which i > slack x u_r for every row r.

    i is the length of the prefix, u_r the number of non-zeros of row r outside it: the rule of the released code, with
    its two slips repaired (it counts down by unsorted column numbers, and stops updating at the first violating row).
    """
    counts = cluster.sum(0)
    order = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
    inside = cluster[:, order].long().cumsum(1)
    uncovered = (cluster.sum(1, keepdim=True) - inside).max(0).values
    length = torch.arange(1, len(order) + 1, device=cluster.device)
    enough = (length > slack * uncovered).nonzero().flatten()
    return _fullest(cluster, int(enough[0]) + 1 if enough.numel() else 0)


def _fullest(cluster: Tensor, count: int) -> Tensor:
    order = cluster.sum(0).argsort(descending=True, stable=True)
    keep = torch.zeros(cluster.shape[1], dtype=torch.bool, device=cluster.device)
    keep[order[:count]] = True
    return keep


def column_rule(spec: int | str) -> ColumnRule:
    """Return the rule that `spec` names: a whole number (`at_least` so many non-zeros), "filling" or "covering".

    Raises:
        InvalidValue: none of these.
    """
    rules: dict[str, ColumnRule] = {"filling": filling, "covering": covering}
    if isinstance(spec, str) and spec in rules:
        return rules[spec]
    if isinstance(spec, str) and re.fullmatch(r"\d+", spec):
        spec = int(spec)
    if isinstance(spec, bool) or not isinstance(spec, int) or spec < 1:
        raise InvalidValue(
            f"min_nonzeros={spec!r} must be a whole number from 1 up (columns of a block need so many non-zeros), "
            "'filling' (as many columns as keep the density) or 'covering' (the rule of the authors' code)."
        )
    return partial(at_least, count=spec)


def regroup(
    mask: Tensor,
    *,
    clusters: int = 8,
    min_rows: int = 2,
    min_columns: int = 2,
    min_nonzeros: int | str = "filling",
    passes: int | None = None,
    partition: str | Partitioner = "hypergraph",
    imbalance: float = 0.1,
) -> list[DenseBlock]:
    """Return the dense blocks that stand for a mask, with disjoint rows; no blocks when none is large enough.

    Each pass drops empty rows and columns, divides the rows into clusters, and turns every cluster of enough rows into
    a block of the columns that the rule marks, if these are enough; the next pass works on the rows in no block.

    Args:
        mask: bool (outputs, weights of one output), True = kept.
        clusters: t1 of the paper (the authors' code: 8); fewer where they would have less than `min_rows` rows each.
        min_rows, min_columns: b1 and b2, the smallest block (the code: 17 rows). Their values in the paper are
            unverified; the defaults are the smallest that make a block.
        min_nonzeros: t2, or the name of another rule for columns, see `column_rule`. The default is ours.
        passes: at most so many (the code: 1); None: until one finds nothing.
        partition: "hypergraph" or "jaccard", or a function, see `prunus.structured.partition`.
        imbalance: tolerance of cluster sizes of the named partitioners (the code: 10%).

    Raises:
        InvalidValue: not a bool matrix, a number below 1, or a partitioner that loses rows.
        UnknownName: no such partitioner.
    """
    check_matrix(mask)
    numbers = {"clusters": clusters, "min_rows": min_rows, "min_columns": min_columns}
    for name, value in (numbers | ({} if passes is None else {"passes": passes})).items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidValue(f"{name}={value!r} must be a whole number from 1 up.")
    rule, divide = column_rule(min_nonzeros), partitioner(partition, imbalance)
    mask = mask.cpu()
    left = mask.clone()
    blocks: list[DenseBlock] = []
    number = 0
    while passes is None or number < passes:
        number += 1
        rows, columns = (left.any(axis).nonzero().flatten() for axis in (1, 0))
        count = min(clusters, rows.numel() // min_rows)
        if not count:
            break
        dense = left[rows][:, columns]
        found = []
        for part in check_partition(divide(dense, count), rows.numel()):
            marked = rule(dense[part]).nonzero().flatten()
            if part.numel() >= min_rows and marked.numel() >= min_columns:
                found.append(DenseBlock(rows[part], columns[marked]))
        if not found:
            break
        blocks += found
        left[torch.cat([block.rows for block in found])] = False
    return sorted(blocks, key=lambda block: int(block.rows[0]))


def regroup_masks(
    masks: Masks,
    addresses: Mapping[str, Address],
    *,
    clusters: int = 8,
    min_rows: int = 2,
    min_columns: int = 2,
    min_nonzeros: int | str = "filling",
    passes: int | None = None,
    partition: str | Partitioner = "hypergraph",
    imbalance: float = 0.1,
) -> Masks:
    """Return the masks with every tensor regrouped; `.density` of the result is the new density.

    Blocks fill in pruned weights and cut isolated ones, so the density may rise or fall. A tensor without any block
    keeps its mask. The groups of a grouped convolution read different inputs, so each is a matrix of its own; a group
    without any block keeps its mask as well.

    Args:
        masks: the unstructured masks.
        addresses: where the tensors lie, see `prunus.parameters.prunable`.
        clusters, min_rows, min_columns, min_nonzeros, passes, partition, imbalance: see `regroup`.

    Raises:
        MaskMismatch: addresses lack a tensor or have it in another shape.
        InvalidValue, UnknownName: as `regroup`.
    """

    def one(matrix: Tensor) -> Tensor:
        blocks = regroup(
            matrix,
            clusters=clusters,
            min_rows=min_rows,
            min_columns=min_columns,
            min_nonzeros=min_nonzeros,
            passes=passes,
            partition=partition,
            imbalance=imbalance,
        )
        rows, columns = matrix.shape
        return cover(blocks, (rows, columns)).to(matrix.device) if blocks else matrix

    result = {}
    for name, mask in masks.items():
        address = addresses.get(name)
        if address is None or address.shape != tuple(mask.shape):
            raise MaskMismatch(f"mask {name!r} of shape {tuple(mask.shape)} belongs to no tensor given.")
        parts = torch.cat([one(matrix) for matrix in by_group(address, mask)])
        result[name] = address.unrows(parts)
    return Masks(result)
