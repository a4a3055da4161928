"""Pruned channels rebuilt from the kept ones by the next layer, without data.

A channel that goes is written as a combination of channels of the same layer that stay, and the weights of the layers
that read it absorb the combination. Source: Bai, Chen, Shen, Qian and Liu, Unified Data-Free Compression, ICCV 2023
(arXiv 2308.07209), the pruning half. The paper's text was not at hand: the normal equations are derived from its
abstract, and which of its two coefficients weighs which term is not verified. One term per channel is Neuron Merging
(Kim, Kim and Kang, NeurIPS 2020).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunus.errors import InvalidValue, Unsupported
from prunus.graph.couple import Coupling, Family, Slot
from prunus.graph.ir import Graph, Node, Value
from prunus.graph.plan import Plan
from prunus.parameters import check_finite, copied, unwrap
from prunus.structured.removal import Compensated, Keep, as_plan, kept_units


def fold(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return rows A and shifts c so that channel i, normalised, is A_i * x + c_i.

    A_i = scale_i / sigma_i W_i and c_i = shift_i + scale_i (bias_i - mean_i) / sigma_i with sigma = sqrt(var + eps).

    Args:
        weight: (N, D), one row per channel.
        bias, scale, shift, mean, var: (N,); default 0, 1, 0, 0, 1.
        eps: of the norm.

    Returns:
        (N, D) and (N,), float64.
    """
    weight = weight.to(torch.float64)
    zero, one = weight.new_zeros(len(weight)), weight.new_ones(len(weight))
    bias, shift, mean = (zero if t is None else t.to(weight.dtype) for t in (bias, shift, mean))
    scale, var = (one if t is None else t.to(weight.dtype) for t in (scale, var))
    factor = scale / (var + eps).sqrt()
    return factor[:, None] * weight, shift + factor * (bias - mean)


def joined(rows: Tensor, shifts: Tensor, a1: float = 0.01) -> Tensor:
    """Return [A, sqrt(a1) c]: rows whose squared distance is ||A_j - A_i||^2 + a1 ||c_j - c_i||^2.

    Args:
        rows: (n, D).
        shifts: (n,), or (n, k) for units of several channels.
        a1: weight of the shifts.
    """
    return torch.cat([rows, a1**0.5 * shifts.reshape(len(rows), -1)], dim=1)


def coefficients(
    kept: Tensor, gone: Tensor, a2: float = 0.008, *, nonneg: bool = False, max_terms: int | None = None
) -> Tensor:
    """Return S with the least ||gone_j - sum_i S_ji kept_i||^2 + a2 ||S_j||^2 for every j.

    All rows of `gone` share one factorisation of kept kept^T + a2 I.

    Args:
        kept: (r, D) rows that stay (see `joined`).
        gone: (m, D) rows that go.
        a2: weight of the coefficients' squares; 0 needs linearly independent rows.
        nonneg: require S >= 0, for which rectification between the layers commutes with single terms.
        max_terms: 1: only the kept row of the highest cosine, with the ratio of norms as coefficient, or nothing when
            no cosine is positive (`a2` has no say). None: all.

    Returns:
        (m, r) float64.

    Raises:
        InvalidValue: a negative a2, another max_terms, or dependent rows with a2 = 0.
    """
    if not 0 <= a2 < float("inf"):
        raise InvalidValue(f"a2={a2!r} must be a finite number from 0 up.")
    if max_terms not in (None, 1):
        raise InvalidValue(f"max_terms={max_terms!r} must be None (all kept channels) or 1 (the nearest one).")
    kept, gone = kept.to(torch.float64), gone.to(torch.float64)
    if not len(kept) or not len(gone):
        return kept.new_zeros(len(gone), len(kept))
    if max_terms == 1:
        return _nearest(kept, gone)
    normal = kept @ kept.T
    normal.diagonal().add_(a2)
    factor, failed = torch.linalg.cholesky_ex(normal)
    if int(failed):
        raise InvalidValue("kept channels are linearly dependent; use a2 > 0.")
    right = kept @ gone.T
    if not nonneg:
        return torch.cholesky_solve(right, factor).T
    from scipy.optimize import nnls

    # ||L^T s - L^-1 b||^2 differs from the objective by a constant, with as many rows as unknowns.
    target = torch.linalg.solve_triangular(factor, right, upper=False).cpu().numpy()
    matrix = factor.T.cpu().numpy()
    found = [torch.from_numpy(nnls(matrix, target[:, j])[0]) for j in range(target.shape[1])]
    return torch.stack(found).to(kept.device)


def _nearest(kept: Tensor, gone: Tensor) -> Tensor:
    lengths, theirs = kept.norm(dim=1), gone.norm(dim=1)
    tiny = torch.finfo(kept.dtype).tiny
    cosine = (gone @ kept.T) / (theirs[:, None] * lengths).clamp(min=tiny)
    best, where = cosine.max(dim=1)
    ratio = torch.where(best > 0, theirs / lengths[where].clamp(min=tiny), 0.0)
    return torch.zeros_like(cosine).scatter_(1, where[:, None], ratio[:, None])


def objective(kept: Tensor, gone: Tensor, s: Tensor, a2: float = 0.008) -> Tensor:
    """Return E_p of each removed row, (m,): ||gone_j - sum_i s_ji kept_i||^2 + a2 ||s_j||^2."""
    return (gone - s @ kept).square().sum(1) + a2 * s.square().sum(1)


def absorb(weight: Tensor, axis: int, index: Tensor, kept: Tensor, s: Tensor) -> Tensor:
    """Return the next layer's weight with kept inputs carrying the removed ones, and those zero.

    V[:, i] + sum_j s_ji V[:, j] for every kept unit i, where all V[:, j] are the original ones.

    Args:
        weight: any shape.
        axis: its input axis.
        index: (units, k) positions of each unit on that axis.
        kept: (units,) bool.
        s: (removed units, kept units).
    """
    table = weight.detach().movedim(axis, 0).clone()
    old = table[index[~kept]].double()
    more = torch.tensordot(s.T.to(old), old, dims=1)
    table[index[kept]] = (table[index[kept]].double() + more).to(table.dtype)
    table[index[~kept]] = 0
    return table.movedim(0, axis)


@dataclass(frozen=True)
class _Use:
    """The one product with a weight: its operator, its bias, and the batch norm that alone reads the result."""

    node: Node
    bias: str
    norm: Node | None

    @property
    def groups(self) -> int:
        """Groups of a convolution, 1 for other layers."""
        return int(self.node.args.get("groups", 1))


def compensate(
    model: nn.Module,
    coupling: Coupling,
    keep: Keep,
    *,
    a1: float = 0.01,
    a2: float = 0.008,
    nonneg: bool = False,
    max_terms: int | None = None,
    shift: bool = False,
) -> Compensated:
    """Let every layer that loses inputs rebuild them from those it keeps; no data is used.

    Families are visited in forward order, so that rows are compared as they are after their own correction. Between
    the layers there may be a nonlinearity: a single non-negative term passes a ReLU exactly, several approximately.

    Args:
        model: untouched.
        coupling: of this model.
        keep: a plan, or {family name: which units stay}.
        a1: weight of shifts against rows.
        a2: weight of the squares of the coefficients.
        nonneg, max_terms: see `coefficients`.
        shift: also add what remains of the removed shifts, times the weights that read them, to the bias of the reader
            or to the mean of the batch norm behind it. Exact without a nonlinearity, and away from padded borders;
            behind a rectifier, which holds back part of the shift, it can do harm.

    Returns:
        The model, and per family the objective that is left as a share of its value without terms. Families with
        several producers (residual streams, depthwise convolutions, gates) or other things than one batch norm behind
        their producer are cut without compensation and listed in `skipped`.

    Raises:
        InvalidValue: a negative or infinite coefficient.
        NonFinite: weights with NaN or infinity.
    """
    if not 0 <= a1 < float("inf"):
        raise InvalidValue(f"a1={a1!r} must be a finite number from 0 up.")
    plan = as_plan(coupling, keep)
    work = copied(unwrap(model))
    graph = coupling.graph
    place = {id(n): i for i, n in enumerate(graph.nodes)}
    skipped: dict[str, str] = {}
    plain: dict[str, Tensor] = {}
    rebuilt: list[tuple[int, Family, Slot, _Use]] = []
    for family in coupling.families:
        stays = kept_units(plan, family)
        if stays.all():
            continue
        try:
            maker, use = _producer(graph, family)
        except Unsupported as reason:
            skipped[family.name] = str(reason)
            plain[family.name] = torch.from_numpy(stays)
            continue
        rebuilt.append((place[id(use.node)], family, maker, use))
    if plain:
        work = Plan.from_keep(coupling, plain).mask(work)
    tensors = {**dict(work.named_parameters(remove_duplicate=False)), **dict(work.named_buffers())}
    errors: dict[str, float] = {}
    for _, family, maker, use in sorted(rebuilt, key=lambda r: r[0]):
        kept = torch.from_numpy(kept_units(plan, family))
        rows, shifts = _rows(tensors, maker, use)
        z = joined(rows, shifts, a1)
        check_finite({family.name: z}, "folded channel")
        s = coefficients(z[kept], z[~kept], a2, nonneg=nonneg, max_terms=max_terms)
        alone = z[~kept].square().sum()
        left = objective(z[kept], z[~kept], s, 0.0 if max_terms else a2).sum()
        errors[family.name] = float(left / alone) if float(alone) else 0.0
        residual = shifts[~kept] - s @ shifts[kept]
        for reader in (r for r in family.slots if r.role == "input"):
            weight = tensors[reader.tensor]
            index = torch.as_tensor(reader.index, device=weight.device)
            if shift:
                _hand_on(tensors, graph, reader, index[~kept], residual, skipped)
            with torch.no_grad():
                weight.copy_(absorb(weight, reader.axis, index, kept.to(weight.device), s))
    return Compensated(plan.mask(work), plan, errors, skipped)


def _rows(tensors: dict[str, Tensor], maker: Slot, use: _Use) -> tuple[Tensor, Tensor]:
    """Return the folded rows (units, k x D) and shifts (units, k) of the k channels of each unit."""
    weight = tensors[maker.tensor].detach()
    table = weight.movedim(maker.axis, 0).flatten(1)
    named: dict[str, Tensor | None] = {"bias": tensors[use.bias] if use.bias else None}
    eps = 0.0
    if use.norm is not None:
        for ours, theirs in (("scale", "weight"), ("shift", "bias"), ("mean", "running_mean"), ("var", "running_var")):
            value = use.norm.args.get(theirs)
            named[ours] = tensors[value.name] if isinstance(value, Value) else None
        eps = float(use.norm.args["eps"])
    index = torch.as_tensor(maker.index, device=weight.device)
    detached = {k: None if t is None else t.detach() for k, t in named.items()}
    rows, shifts = fold(table, eps=eps, **detached)
    return rows[index].flatten(1), shifts[index]


def _hand_on(
    tensors: dict[str, Tensor],
    graph: Graph,
    reader: Slot,
    index: Tensor,
    residual: Tensor,
    skipped: dict[str, str],
) -> None:
    """Add what constants on the removed inputs give to the outputs of a layer: sums of its weights over taps."""
    try:
        use = _single_use(graph, reader.tensor)
        if use.groups != 1 or residual.shape[1] != 1:
            raise Unsupported("units of several channels, read in groups")
        mean = use.norm.args.get("running_mean") if use.norm is not None else None
        if not use.bias and not isinstance(mean, Value):
            raise Unsupported("there is neither a bias nor a batch norm that could take it")
    except Unsupported as reason:
        skipped[reader.tensor] = f"residual shift: {reason}"
        return
    table = tensors[reader.tensor].detach().double().movedim((reader.axis, 1 - reader.axis), (0, 1))
    amount = (residual[:, :, None] * table.reshape(*table.shape[:2], -1).sum(2)[index]).sum((0, 1))
    with torch.no_grad():
        if use.bias:
            tensors[use.bias] += amount.to(tensors[use.bias])
        elif isinstance(mean, Value):
            tensors[mean.name] -= amount.to(tensors[mean.name])


def _producer(graph: Graph, family: Family) -> tuple[Slot, _Use]:
    """Return the slot of the one layer that makes a family's channels, and how it is used."""
    makers = [s for s in family.slots if s.role == "output"]
    if not any(s.role == "input" for s in family.slots):
        raise Unsupported("no layer reads these channels")
    if len(makers) != 1:
        listed = ", ".join(s.tensor for s in makers) or "none"
        raise Unsupported(f"not made by one layer alone (residual stream, depthwise convolution or gate): {listed}")
    use = _single_use(graph, makers[0].tensor)
    expected = {use.bias, makers[0].tensor}
    if use.norm is not None:
        expected |= {v.name for v in use.norm.inputs() if v.stored}
    others = [s.tensor for s in family.slots if s.role != "input" and s.tensor not in expected]
    if others:
        raise Unsupported(f"{others[0]!r} acts on the channels, and only a batch norm right behind the layer is folded")
    if use.groups != 1:
        # Rows of different groups read different channels and cannot stand for each other.
        group = makers[0].index // (makers[0].shape[0] // use.groups)
        if use.node.args.get("transposed") or (group != group[0]).any():
            raise Unsupported(f"{makers[0].tensor!r} is a convolution in groups, and whole groups go")
    return makers[0], use


def _single_use(graph: Graph, name: str) -> _Use:
    """Return the one product of a weight in the graph."""
    value = graph.stored[name]
    node = _only(_readers(graph, value), f"{name!r} is used more than once")
    while node.op in ("t", "transpose", "permute", "numpy_T", "mT", "detach", "alias"):
        turned = node.outputs[0]
        assert turned is not None
        node = _only(_readers(graph, turned), f"{name!r} is used more than once")
    if node.op not in ("convolution", "addmm", "mm"):
        raise Unsupported(f"{name!r} is used by {node}, which is no layer that could be rebuilt")
    bias = node.args.get("self" if node.op == "addmm" else "bias")
    bias = bias if node.op != "mm" and isinstance(bias, Value) else None
    if bias is not None and not bias.stored:
        raise Unsupported(f"the bias of {name!r} is computed")
    made = node.outputs[0]
    assert made is not None
    readers = _readers(graph, made)
    norm = readers[0] if len(readers) == 1 and "batch_norm" in readers[0].op else None
    if norm is not None and not isinstance(norm.args.get("running_mean"), Value):
        raise Unsupported(f"the batch norm behind {name!r} has no running statistics")
    return _Use(node, bias.name if bias is not None else "", norm)


def _readers(graph: Graph, value: Value) -> list[Node]:
    return [n for n in graph.nodes if any(v is value for v in n.inputs())]


def _only(nodes: Iterable[Node], problem: str) -> Node:
    found = list(nodes)
    if len(found) != 1:
        raise Unsupported(problem if found else "the layer is not part of the recorded graph")
    return found[0]
