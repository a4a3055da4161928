"""`unit="layer"`: whole residual blocks go, and what is left runs on without them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunus.errors import InvalidValue, NothingPrunable, Unsupported, did_you_mean
from prunus.evidence import Loss
from prunus.graph.couple import Family
from prunus.graph.fit import EXACT
from prunus.graph.plan import Plan, difference
from prunus.graph.record import arguments, plain_forward
from prunus.measure.cost import dense_bytes
from prunus.parameters import copied
from prunus.structured.layers import Blocks, residual_blocks, score_blocks
from prunus.structured.report import sizes
from prunus.structured.select import Kept, Limits, by_share, check_share, to_target
from prunus.structured.small import Facts, SmallModel, finished, without_numbers
from prunus.structured.target import Target
from prunus.structured.timing import ALL, Stopwatch, to_latency
from prunus.structured.unit_scores import info_for


def prune_layers(
    model: nn.Module,
    target: Target,
    *,
    example: Any,
    score: str = "magnitude",
    pool: str | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    minimum: int | float = 1,
    round_to: int = 1,
    protect: Sequence[str] = (),
    seed: int = 0,
    inplace: bool = False,
    measure: bool = True,
    verify: bool = True,
    on_stage: Callable[[str], None] | None = None,
) -> SmallModel:
    """Replace residual blocks by the identity, lowest score first, until the target is met.

    All removable blocks of the network compete (see `prunus.structured.layers.residual_blocks`), so sparsity is the
    share of them that goes, and macs, params and bytes are those of the whole network.

    Args:
        model: untouched unless `inplace`.
        target: what may remain.
        example: a batch of real inputs; which blocks are removable is measured on it.
        score: see `prunus.structured.layers.score_blocks`.
        pool: "sum" or "mean" (default) of the scores of a block's weights.
        protect: shell patterns of block paths, or of their parameters, that stay.
        minimum, round_to: for the removable blocks together.
        data, loss, seed, inplace, measure, verify, on_stage: as in `prunus.prune`.

    Raises:
        NothingPrunable: no block can go.
        Infeasible: the target cannot be reached by blocks.
        Unsupported: the model is on the meta device, so nothing can be measured.
    """
    start = time.perf_counter()
    if without_numbers(model):
        raise Unsupported("which blocks are residual is found by running them; load the weights first.")
    info_for(score, "layer")
    args, kwargs = arguments(example)
    inputs: Any = kwargs if kwargs and not args else args
    blocks = residual_blocks(model, inputs)
    removable = blocks.removable
    names = [n for n in removable if n not in _protected(model, removable, protect)]
    if not names:
        raise NothingPrunable("every block that could go is protected; protect fewer.")
    everything = score_blocks(model, names, score, data=data, aggregate=pool or "mean", loss=loss, seed=seed)
    family = Family("blocks", "layer", len(names), (), np.arange(len(names)))
    scores = {family.name: torch.tensor([everything[n] for n in names], dtype=torch.float64)}
    limits = Limits(minimum, round_to)
    parameters, size = sizes(model)

    def removed(kept: Mapping[str, Any]) -> list[str]:
        stays = kept.get(family.name, torch.ones(len(names), dtype=torch.bool))
        return [n for n, s in zip(names, stays.tolist(), strict=True) if not s]

    def chosen(share: float) -> Kept:
        return by_share([family], scores, share, limits, "local")

    achieved, notes = None, []
    if target.what == "sparsity":
        kept = chosen(check_share("sparsity", target.asked))
    elif target.timed:
        found = to_latency(
            target,
            lambda share: chosen(min(share, ALL)),
            lambda k: Plan(removed_modules=removed(k)).apply(model),
            Stopwatch(model, inputs),
            key=lambda k: tuple(removed(k)),
            on_stage=on_stage,
        )
        kept, achieved, notes = found.choice, found.achieved, [found.note] if found.note else []
    else:
        cost = _costs(model, blocks)[target.what]
        amount = target.amount(cost([]))
        kept = to_target([family], scores, lambda k: cost(removed(k)), amount, limits, "local", what=target.what)
    gone = removed(kept)
    plan = Plan(removed_modules=gone)
    apart = None
    if verify:
        apart = _apart(model, plan, example)
        if apart > EXACT:
            raise Unsupported(
                f"removing {', '.join(gone)} differs from switching them off by {apart:.1e} relative on this example; "
                "give an example of real inputs."
            )
    for stage in blocks.emptied(gone):
        notes.append(f"stage {stage} has no removable block left")
    small = plan.apply(model, inplace=inplace)
    macs = blocks.macs - sum(removable[n].macs for n in gone)
    stages: dict[int, dict[str, Any]] = {}
    for block in removable.values():
        row = stages.setdefault(block.stage, {"name": f"stage {block.stage}", "kind": "layer", "size": 0, "kept": 0})
        row["size"] += 1
        row["kept"] += block.name not in gone
    facts = Facts(
        unit="layer",
        target=target,
        families=tuple(stages.values()),
        macs=(blocks.macs, macs),
        difference=apart,
        seconds=time.perf_counter() - start,
        notes=notes,
        unprunable={b.name: b.reason for b in blocks.every if b.reason},
        achieved=achieved,
    )
    return finished(None if inplace else model, (parameters, size), small, plan, example, facts, measure=measure)


def _protected(model: nn.Module, removable: Iterable[str], patterns: Sequence[str]) -> set[str]:
    parameters = {n: [f"{n}.{p}" for p, _ in model.get_submodule(n).named_parameters()] for n in removable}
    result: set[str] = set()
    for pattern in patterns:
        hit = {n for n, own in parameters.items() if any(fnmatchcase(x, pattern) for x in (n, *own))}
        if not hit:
            raise InvalidValue(
                f"pattern {pattern!r} matches no block that could go.{did_you_mean(pattern, list(parameters))}"
            )
        result |= hit
    return result


def _costs(model: nn.Module, blocks: Blocks) -> dict[str, Callable[[list[str]], float]]:
    """Return what remains of macs, params and bytes when some blocks are gone."""
    own = {n: model.get_submodule(n) for n in blocks.removable}
    whole = {"params": sizes(model)[0], "bytes": sizes(model)[1]}
    params = {n: b.params for n, b in blocks.removable.items()}
    held = {n: dense_bytes(m) for n, m in own.items()}
    return {
        "macs": lambda gone: blocks.macs - sum(blocks.removable[n].macs for n in gone),
        "params": lambda gone: whole["params"] - sum(params[n] for n in gone),
        "bytes": lambda gone: whole["bytes"] - sum(held[n] for n in gone),
    }


@torch.no_grad()
def _apart(model: nn.Module, plan: Plan, example: Any) -> float:
    """Return how far the cut model is from one in which all parameters of the removed blocks are zero, relative."""
    off = copied(model)
    for path in plan.removed_modules:
        for parameter in off.get_submodule(path).parameters():
            if parameter.is_floating_point():
                parameter.zero_()
    args, kwargs = arguments(example)
    results = []
    for net in (off, plan.apply(model)):
        with plain_forward(net):
            results.append([t for t in tree_leaves(net(*args, **kwargs)) if isinstance(t, Tensor)])
    return difference(results[0], results[1])
