"""The sentence in one call: choose units, score them, spend a budget - and the masks that result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunus.budget.allocate import check_fraction
from prunus.budget.budgets import Budget, Problem, decide
from prunus.budget.budgets import budget as budget_of
from prunus.budget.select import keep_count, some_kept
from prunus.distributed import agree
from prunus.errors import Infeasible, InvalidValue
from prunus.evidence import Batch, Loss, preserved, read_batch
from prunus.masks import Masks
from prunus.parameters import Prunable, check_finite, parameters_of, prunable
from prunus.schedule import exponential
from prunus.scores.registry import SCORES
from prunus.stats import gather
from prunus.units import NM, Unit
from prunus.units import unit as unit_of


def choose(
    model: nn.Module,
    sparsity: float | None = None,
    *,
    keep: int | None = None,
    unit: str | Unit = "weight",
    score: str = "magnitude",
    budget: str | Mapping[str, Any] | Budget | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    rounds: int | None = None,
    masks: Masks | None = None,
    include: Sequence[str] | str = (),
    exclude: Sequence[str] | str = (),
    seed: int = 0,
    train_mode: bool = False,
    on_round: Callable[[int, int], None] | None = None,
) -> Masks:
    """Return the masks that `prunus.prune` would apply; the model's weights come back as they were.

    Arguments and errors are those of `prunus.prune`. With several rounds the density falls exponentially,
    d_e = d^(e/E), and what a round prunes stays pruned.
    """
    what, info = unit_of(unit), SCORES.entry(score)
    addresses = prunable(model, include=include, exclude=exclude)
    parameters = parameters_of(model, addresses)
    if masks is not None:
        masks.check_same(parameters)
    target = _target(addresses, what, sparsity, keep)
    check_finite({n: p.detach() for n, p in parameters.items()}, "weight")
    chosen = budget_of(budget if budget is not None else "row-wise" if info.name == "wanda" else "global")
    device = next(iter(parameters.values())).device
    read = read_data(data, None, None, device)
    rounds = info.rounds if rounds is None else rounds
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise InvalidValue(f"rounds {rounds!r} must be a whole number from 1 up.")

    current = masks if masks is not None else Masks.full(model, include=include, exclude=exclude)
    if current.kept < target and not isinstance(what, NM):
        raise Infeasible(
            f"the given masks keep {current.kept} of {addresses.total} weights, fewer than the {target} asked for; "
            "ask for more sparsity, or leave masks out."
        )
    start, total = current.sparsity, addresses.total
    # Scores see the net as pruned so far; the weights taken away for that are put back at the end.
    saved = {n: p.detach().clone() for n, p in parameters.items()} if masks is not None or rounds > 1 else {}
    try:
        for number in range(1, rounds + 1):
            now = exponential(start, 1.0 - target / total, number / rounds)
            if saved:
                current.apply(model)
            names = [info.name, *chosen.needs_scores]
            scores, ratio_scores = _scores(model, addresses, names, read, loss, current, seed, number, train_mode)
            problem = Problem(
                addresses=addresses,
                scores=scores,
                # Whole rows and blocks may have left less in the last round than this one asks for.
                keep=min(target if number == rounds else keep_count(total, now), current.kept if number > 1 else total),
                unit=what,
                ratio_scores=ratio_scores,
                distortion=_distortion(model, parameters, read) if chosen.needs_distortion else None,
            )
            current = agree(decide(problem, chosen) & current)
            if on_round is not None:
                on_round(number, rounds)
    finally:
        with torch.no_grad():
            for name, value in saved.items():
                parameters[name].copy_(value)
    return current


def _target(addresses: Prunable, what: Unit, sparsity: float | None, keep: int | None) -> int:
    """Return how many elements stay, from a share, a count, or a pattern."""
    total = addresses.total
    if isinstance(what, NM):
        if keep is not None or (
            sparsity is not None and abs(check_fraction("sparsity", sparsity) - 1 + what.density) > 1e-6
        ):
            raise InvalidValue(
                f"pattern {what} fixes the sparsity at {1 - what.density:g}; leave sparsity and "
                "keep out, or give that value."
            )
        return sum(what.kept(a) for a in addresses.values())
    if (sparsity is None) == (keep is None):
        raise InvalidValue("give exactly one of sparsity (a share of zeros in [0, 1)) and keep (a count of weights).")
    if keep is not None:
        if isinstance(keep, bool) or not isinstance(keep, int) or not 0 < keep <= total:
            raise InvalidValue(
                f"keep {keep!r} must be a whole number from 1 to {total}, the number of prunable weights."
            )
        return keep
    assert sparsity is not None
    return some_kept(total, check_fraction("sparsity", sparsity, one_allowed=False))


def read_data(data: Any, batches: int | None, example: Any, device: torch.device) -> list[Batch]:
    """Return `data` as at most `batches` batches, or `example` alone, or nothing.

    A tuple of tensors of one length, such as (x, y), is one batch and not two.

    Raises:
        InvalidValue: data is given but empty.
    """
    if data is None:
        return [read_batch(example, device)] if example is not None else []
    read: list[Batch] = []
    if isinstance(data, tuple) and len(data) > 1 and all(isinstance(t, Tensor) and t.ndim > 0 for t in data):
        data = [data] if len({len(t) for t in data}) == 1 else data
    for batch in data:
        if batches is not None and len(read) >= batches:
            break
        read.append(read_batch(batch, device))
    if not read:
        raise InvalidValue("data is empty; give at least one batch.")
    return read


def _scores(
    model: nn.Module,
    addresses: Prunable,
    names: Sequence[str],
    read: Sequence[Any],
    loss: Loss | None,
    current: Masks,
    seed: int,
    number: int,
    train_mode: bool,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Return the first score, and all of them by name, with pruned entries at -inf."""
    infos = [SCORES.entry(n) for n in names]
    needs = [need for info in infos for need in info.needs]
    evidence = gather(
        model, addresses, needs, data=read, loss=loss, seed=seed + number - 1, round=number, train=train_mode
    )
    result: dict[str, dict[str, Tensor]] = {}
    for info in infos:
        function = info.load()
        result[info.name] = {}
        for name in addresses:
            value = function(**{need: evidence[name][need] for need in info.needs}).to(current[name].device)
            if current.count(name) < value.numel():
                value = value.masked_fill(~current[name], -torch.inf)
            result[info.name][name] = value
    return result[infos[0].name], {n: result[SCORES.entry(n).name] for n in names[1:]}


def _distortion(model: nn.Module, parameters: Mapping[str, Tensor], read: Sequence[Batch]) -> Any:
    """Return a function from masks of some tensors to the mean squared change of the model's output."""
    if not read:
        raise InvalidValue("a rate-distortion budget compares outputs on calibration inputs; pass data=.")

    def outputs() -> list[Tensor]:
        with preserved(model), torch.no_grad():
            found = [model(*b.args, **b.kwargs) for b in read]
        return [getattr(o, "logits", o).double() for o in found]

    reference = outputs()

    @torch.no_grad()
    def distortion(masks: Mapping[str, Tensor]) -> float:
        saved = {n: parameters[n].detach().clone() for n in masks}
        try:
            for name, mask in masks.items():
                parameters[name].masked_fill_(~mask.to(parameters[name].device), 0.0)
            now = outputs()
        finally:
            for name, value in saved.items():
                parameters[name].copy_(value)
        changed = sum(float((a - b).square().sum()) for a, b in zip(now, reference, strict=True))
        return changed / sum(r.numel() for r in reference)

    return distortion
