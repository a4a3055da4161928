"""Structural tickets: a ticket of iterative magnitude pruning, made of whole channels or dense blocks, trained once.

Source: Chen, Chen, Ma, Wang and Wang, "Coarsening the Granularity: Towards Structurally Sparse Lottery Tickets",
ICML 2022 (arXiv 2202.04736).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from prunus.budget.allocate import check_fraction
from prunus.data.balanced import balanced_batch
from prunus.errors import InvalidValue, NothingPrunable, unknown
from prunus.masks import Masks
from prunus.parameters import Address, prunable
from prunus.procedures.common import Outcome, check_sparsity, cut, fresh, length, shorter
from prunus.procedures.imp import prune_in_rounds, rewound, rounds_for
from prunus.randomness import generator
from prunus.run.stages import Run, State
from prunus.schedule import Duration
from prunus.structured.blocks import blocks_of, by_group
from prunus.structured.features import FEATURE_SCORES, feature_scores
from prunus.structured.refill import WEIGHT_SCORES, channel_budget, refill_masks, weight_scores, whole_rows
from prunus.structured.regroup import regroup, regroup_masks

BRANCHES = ("ticket", "reinit", "random")
CHANNEL_SCORES = (*WEIGHT_SCORES, *FEATURE_SCORES)
# The options of each conversion with their defaults; one given to another conversion is refused, not ignored.
_BLOCKS: dict[str, Any] = {
    "clusters": 8,
    "min_rows": 2,
    "min_columns": 2,
    "min_nonzeros": "filling",
    "passes": None,
    "partition": "hypergraph",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "refill": {"channel_score": "weight-l1"},
    "refill+": {"channel_score": "weight-l1", "fillback": 0.25},
    "regroup": _BLOCKS,
}


def targets(run: Run) -> dict[str, Address]:
    """Return the tensors that are pruned: convolutions but the first; without convolutions, inner linear layers.

    Raises:
        NothingPrunable: none is left.
    """
    every = prunable(run.model, include=run.include, exclude=run.exclude)
    convolutions = [n for n, a in every.items() if a.kind in ("conv", "conv-transpose")]
    linear = [n for n, a in every.items() if a.kind == "linear"]
    names = convolutions[1:] if convolutions else linear[1:-1]
    if not names:
        raise NothingPrunable(
            "the first and the output layer stay dense, and no other is left to convert; use a network with at least "
            "two convolutions, or three linear layers."
        )
    return {n: every[n] for n in names}


def convert(
    run: Run, name: str, state: State, addresses: Mapping[str, Address], conversion: str, options: Mapping[str, Any]
) -> Masks:
    """Turn the masks of `state` into structured ones, once, as a stage of the run.

    Args:
        run: data and model; scores of feature maps see ten training examples per class.
        name: of the stage.
        state: an unstructured ticket with the trained weights of its round.
        addresses: the tensors that its masks name.
        conversion: "refill", "refill+" or "regroup".
        options: all options of the conversion, see `OPTIONS`.
    """
    masks = state.masks
    assert masks is not None
    kind = options.get("channel_score")
    data = None
    if kind in FEATURE_SCORES:
        x, y, _ = balanced_batch(run.splits.train, 10, seed=run.seed)
        data = [(x.to(run.device), y.to(run.device))]

    def work() -> Masks:
        if conversion == "regroup":
            return regroup_masks(masks, addresses, **options)
        if data is None:
            scores = weight_scores(masks, state.weights, addresses, options["channel_score"])
        else:
            model = state.model(run)
            masks.apply(model)
            scores = feature_scores(model, addresses, data, options["channel_score"])
        return refill_masks(masks, scores, addresses, fillback=options.get("fillback", 0.0))

    inputs = {"state": state, "masks": masks, "conversion": conversion, "options": dict(options), "data": data}
    result = run.compute(name, inputs, work)
    assert isinstance(result, Masks)
    return result


def random_channels(masks: Masks, addresses: Mapping[str, Address], seed: int) -> Masks:
    """Return masks of random whole channels: per tensor as many as its kept weights would fill, rounded up."""
    made = {}
    for name, mask in masks.items():
        rows = addresses[name].rows(mask)
        noise = torch.rand(len(rows), generator=generator(seed, "random channels", name))
        made[name] = addresses[name].unrows(whole_rows(noise, channel_budget(rows), rows.shape[1]))
    return Masks(made)


def structures(before: Masks, after: Masks, addresses: Mapping[str, Address]) -> dict[str, dict[str, Any]]:
    """Return per tensor its density before and after, and how many rows are used and rectangles they form."""
    found = {}
    for name, mask in after.items():
        groups = by_group(addresses[name], mask)
        found[name] = {
            "density_before": before.count(name) / mask.numel(),
            "density": after.count(name) / mask.numel(),
            "rows": int(groups.any(2).sum()),
            "of_rows": groups.shape[0] * groups.shape[1],
            "blocks": sum(len(blocks_of(matrix)) for matrix in groups),
        }
    return found


def structure_lth(
    run: Run,
    *,
    sparsity: float = 0.5,
    conversion: str = "refill",
    channel_score: str | None = None,
    fillback: float | None = None,
    clusters: int | None = None,
    min_rows: int | None = None,
    min_columns: int | None = None,
    min_nonzeros: int | str | None = None,
    passes: int | None = None,
    partition: str | None = None,
    branch: str = "ticket",
    rate: float = 0.2,
    rewind_to: Duration = "0.05dur",
    score: str = "magnitude",
    budget: str | Mapping[str, Any] = "global",
    epochs: int | None = None,
) -> Outcome:
    """Find a ticket by iterative pruning with rewinding, make it structured, and train it once more.

    Masks cover convolutions except the first; in networks without convolutions the linear layers except the first and
    the last (our extension). All other layers stay dense and are not part of the masks.

    Args:
        run: stages, data, model and training choices.
        sparsity: share of zeros of the unstructured ticket among the masked weights. That of the result differs: whole
            channels round up, Refill+ adds some, and blocks fill in and cut off. Both are in the details.
        conversion: "refill" (whole output channels), "refill+" (more of them) or "regroup" (dense blocks).
        channel_score: for refill: "weight-l1" (default), "remaining", "feature-l1", "feature-l2" or "saliency".
        fillback: for refill+: share of the channels beyond the budget that come back too; default 0.25 (our choice).
        clusters, min_rows, min_columns, min_nonzeros, passes, partition: for regroup, with the defaults of
            `prunus.structured.regroup.regroup`.
        branch: the control to train instead: "reinit" (the same masks, fresh initial weights) or "random" (the
            rewound weights, random channels, per layer as many as the converted mask would fill).
        rate: largest share of the remaining weights removed per round.
        rewind_to: moment of the dense training that weights are rewound to; the paper takes 5% of it.
        score, budget: of the rounds, as in `prunus.prune`.
        epochs: length of each training; default the run's.

    Pruned weights that come back start from their rewound values. The conversion is not fed back into the rounds.

    Raises:
        InvalidValue: an option of another conversion is given, or a value out of range.
        NothingPrunable: the network has no layer between the first and the last.
    """
    check_sparsity(sparsity)
    if check_fraction("rate", rate, one_allowed=False) == 0:
        raise InvalidValue("rate 0 never prunes; the usual share per round is 0.2.")
    if branch not in BRANCHES:
        raise unknown("branch", branch, BRANCHES)
    given = {
        "channel_score": channel_score,
        "fillback": fillback,
        "clusters": clusters,
        "min_rows": min_rows,
        "min_columns": min_columns,
        "min_nonzeros": min_nonzeros,
        "passes": passes,
        "partition": partition,
    }
    options = _options(conversion, given)
    addresses = targets(run)
    every = prunable(run.model, include=run.include, exclude=run.exclude)
    others = tuple(n for n in every if n not in addresses)
    training = run.training if epochs is None else shorter(run.training, epochs)

    def choose(name: str, start: State, trained: State, target: float, masks: Masks | None) -> Masks:
        return cut(run, name, trained, target, score=score, budget=budget, masks=masks, exclude=others)

    found = prune_in_rounds(
        run, rounds_for(sparsity, rate), choose, training=training, again=training, rewind_to=rewind_to
    )
    ticket = Masks.full(run.model, include=run.include, exclude=(*run.exclude, *others))
    ticket = (ticket if found.masks is None else found.masks).to("cpu")
    trained = State.of(found.trained.weights, ticket)
    masks = convert(run, f"{conversion}-masks", trained, addresses, conversion, options)
    if branch == "random":
        masks = random_channels(masks, addresses, run.seed)
    state = run.train(
        conversion if branch == "ticket" else f"{conversion}-{branch}",
        start=rewound(fresh(run) if branch == "reinit" else found.early, masks, run),
        masks=masks,
        training=training,
        start_step=found.moment,
        continue_optimizer=found.moment > 0 and branch != "reinit",
    )
    details = {
        "conversion": conversion,
        "branch": branch,
        "options": options,
        "rounds": found.history,
        "ticket_sparsity": ticket.sparsity,
        "sparsity": masks.sparsity,
        "layers": structures(ticket, masks, addresses),
    }
    return Outcome(state, found.steps + length(run, training) - found.moment, details)


def _options(conversion: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a conversion with its defaults filled in, all checked."""
    if conversion not in OPTIONS:
        raise unknown("conversion", conversion, OPTIONS)
    own = OPTIONS[conversion]
    for name, value in given.items():
        if value is not None and name not in own:
            raise InvalidValue(f"{name}={value!r} means nothing to {conversion!r}, whose options are {', '.join(own)}.")
    options = {n: default if given[n] is None else given[n] for n, default in own.items()}
    if options.get("channel_score", CHANNEL_SCORES[0]) not in CHANNEL_SCORES:
        raise unknown("channel score", options["channel_score"], CHANNEL_SCORES)
    check_fraction("fillback", options.get("fillback", 0.0))
    if conversion == "regroup":
        # Bad values are to be noticed now, not after all rounds of training.
        regroup(torch.ones(1, 1, dtype=torch.bool), **options)
    return options
