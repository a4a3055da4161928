"""Chase as whole trainings: the network gets really narrower while it trains sparse.

Source: Dynamic Sparsity Is Channel-Level Sparsity Learner (Yin et al., NeurIPS 2023, arXiv 2305.19454), from the
authors' code, which masks channels to the end and cuts once; cutting at every removal is this library's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prunus.errors import NothingPrunable
from prunus.graph.couple import Coupling
from prunus.graph.plan import Plan
from prunus.measure.recalibrate import recalibrate
from prunus.methods.channels import ChannelFamily
from prunus.methods.chase import Chase, origin_of, removable
from prunus.parameters import parameters_of, prunable
from prunus.procedures.common import Outcome, check_sparsity, diagnose, held_out, in_order, length
from prunus.procedures.cutting import coupling_of, cut_state, widths
from prunus.run.stages import Run, State
from prunus.schedule import Duration


def chase(
    run: Run,
    *,
    sparsity: float = 0.9,
    channel_sparsity: float = 0.4,
    channel_score: str = "umm",
    floor: float = 0.5,
    streams: bool = False,
    channel_every: Duration = "0.1dur",
    channel_end: Duration = "0.81dur",
    every: Duration = "0.014dur",
    explore_end: Duration = "0.81dur",
    bound: float = 0.05,
    fraction: float = 0.5,
    fraction_end: float = 0.005,
    refresh: bool = True,
) -> Outcome:
    """Train sparse from random ERK masks; at every removal cut the channels out, weights, masks and moments alike.

    Each removal ends a stage and the next one trains the smaller network on, at the same step of the schedule, so the
    course is that of the step method `prunus.methods.chase.Chase` up to rounding. With `Training(checkpoint_best=True)`
    the best checkpoint is taken from the stage after the last removal.

    Args:
        run: stages, data, model and training choices.
        sparsity: 1 - d; d times the weights of the dense network are kept to the end, wherever they are.
        channel_sparsity: S_c, the share of the removable channels that is gone in the end; 0 removes none.
        channel_score, floor: see `Chase`.
        streams: residual streams and channels with several readers may go, too (the paper's "prune skip").
        channel_every: interval of removals; wider than the authors' because each is a cut.
        channel_end, every, explore_end, bound, fraction, fraction_end: see `Chase` and `SoftBound`.
        refresh: measure BatchNorm statistics anew over the training examples at the end.

    Raises:
        NothingPrunable: no channels can be removed and some are to go.
        Infeasible: the channels that are left have no room for the weights.
    """
    check_sparsity(sparsity)
    whole, per_epoch = length(run), run.steps_per_epoch()
    coupling = coupling_of(run, run.initial)
    families = candidates(run, run.initial, coupling, streams) if channel_sparsity else ()
    if channel_sparsity and not families:
        raise NothingPrunable("no channels of this network can be removed; use channel_sparsity=0, or streams=True.")
    first = weights_of(run, run.initial)
    choices: dict[str, Any] = {
        "sparsity": sparsity,
        "every": every,
        "explore_end": explore_end,
        "bound": bound,
        "fraction": fraction,
        "fraction_end": fraction_end,
    }
    method = Chase(
        families=families,
        channel_sparsity=channel_sparsity,
        channel_score=channel_score,
        floor=floor,
        channel_every=channel_every,
        channel_end=channel_end,
        origin=origin_of(families, first),
        dense=sum(w.numel() for w in first.values()),
        **choices,
    )
    method.check(whole, per_epoch)
    method.check_room(first)
    state: State | None = None
    history: list[dict[str, Any]] = []
    plain = replace(run.training, checkpoint_best=False)
    for number, step in enumerate(method.removals(whole, per_epoch), start=1):
        at = 0 if state is None else state.step
        state = run.train(f"until-{number}", method=stage(method, at), until=step, training=plain, **continuing(state))
        coupling = coupling_of(run, state)
        now = replace(method, families=candidates(run, state, coupling, streams))
        plan = removal(run, now, state, coupling, step, whole, per_epoch)
        state = cut_state(run, state, plan, training=plain)
        channels = left(families, now.families, plan)
        history.append({"step": step, "channels": sum(channels.values()), "blocked": dict(plan.blocked)})
    at = 0 if state is None else state.step
    state = run.train("last", method=stage(method, at), **continuing(state))
    if refresh:
        state = refreshed(run, state)
    assert state.masks is not None
    coupling = coupling_of(run, state)
    final = candidates(run, state, coupling, streams) if channel_sparsity else ()
    details: dict[str, Any] = {
        "channels": {f.name: f.size for f in families},
        "channels_kept": left(families, final, Plan()),
        "dense_weights": method.dense,
        "kept": state.masks.kept,
        "room": state.masks.total,
        "removals": history,
        "held_out": run.evaluate(state, held_out(run)),
    }
    return Outcome(state, whole, details)


def stage(method: Chase, since: int) -> Chase:
    """Return the method of one stage: no removals inside, events and budget those of the whole training."""
    return replace(method, families=(), channel_sparsity=0.0, since=since)


def continuing(state: State | None) -> dict[str, Any]:
    """Return what `Run.train` needs to go on from a state."""
    if state is None:
        return {}
    return {"start": state, "masks": state.masks, "start_step": state.step, "continue_optimizer": True}


def weights_of(run: Run, state: State) -> dict[str, Tensor]:
    """Return the prunable weights of a state by name, within the run's patterns."""
    model = state.model(run)
    names = prunable(model, include=run.include, exclude=run.exclude)
    return {n: p.detach() for n, p in parameters_of(model, names).items()}


def candidates(run: Run, state: State, coupling: Coupling, streams: bool) -> tuple[ChannelFamily, ...]:
    """Return the families whose channels may go: all their weights are prunable."""
    masked = weights_of(run, state)
    everything = dict(state.model(run).named_parameters())
    offered: tuple[ChannelFamily, ...] = coupling.primary() if streams else removable(coupling.families, everything)
    return tuple(
        f
        for f in offered
        if any(s.tensor in masked and s.role == "output" for s in f.slots)
        and all(s.tensor in masked for s in f.slots if s.tensor in everything and everything[s.tensor].ndim > 1)
    )


def removal(run: Run, method: Chase, state: State, coupling: Coupling, step: int, whole: int, per_epoch: int) -> Plan:
    """Return the cut of one removal."""
    assert state.masks is not None
    weights = weights_of(run, state)
    alive = {f.name: torch.ones(f.size, dtype=torch.bool) for f in method.families}
    keep = method.survivors(step, whole, per_epoch, weights=weights, masks=state.masks, alive=alive)
    return Plan.from_keep(coupling, keep)


def left(families: tuple[ChannelFamily, ...], now: tuple[ChannelFamily, ...], plan: Plan) -> dict[str, int]:
    """Return family name -> channels after a cut; a family of the start that is none any more has a single one."""
    sizes = {f.name: f.size for f in now} | widths(plan)
    return {f.name: sizes.get(f.name, 1) for f in families}


def refreshed(run: Run, state: State) -> State:
    """Return the network with BatchNorm statistics of the whole training set, as a stage of the run."""

    def work() -> dict[str, Tensor]:
        model = state.model(run)
        recalibrate(model, in_order(run, run.splits.train))
        return dict(model.state_dict())

    weights = diagnose(run, "statistics", {"state": state, "data": run.splits.train}, work, state.weights)
    assert isinstance(weights, dict)
    return State.of(weights, state.masks, state.step, state.metrics, shape=state.shape)
