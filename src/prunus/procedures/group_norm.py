"""Group-norm pruning as whole trainings: coupled channels decay together, the weakest are cut for real, fine-tuning.

Source: DepGraph: Towards Any Structural Pruning (Fang et al., CVPR 2023), its sparse training.
"""

from __future__ import annotations

from typing import Any

from prunus.errors import NothingPrunable, unknown
from prunus.methods.group_norm import GroupNorm
from prunus.procedures.common import Outcome, check_sparsity, dense, held_out, length, shorter, whole_epochs
from prunus.procedures.cutting import coupling_of, cut_state, kept_masks, widths
from prunus.run.stages import Run, State
from prunus.structured.select import SCOPES, Limits


def group_norm(
    run: Run,
    *,
    sparsity: float = 0.5,
    scope: str = "local",
    minimum: int = 1,
    strength: float = 1e-4,
    alpha: float = 4.0,
    dense_epochs: int | None = None,
    epochs: int | None = None,
    tune_epochs: int | None = None,
    tune_lr: float = 0.1,
) -> Outcome:
    """Train dense, train on with `GroupNorm` on all coupled channels, cut the weakest, fine-tune.

    Args:
        run: stages, data, model and training choices.
        sparsity: share of the multiply-accumulates that goes.
        scope, minimum: see `GroupNorm.plan`.
        strength, alpha: see `prunus.methods.group_norm.GroupNorm`.
        dense_epochs, epochs, tune_epochs: lengths of dense training, regularised training and fine-tuning; default a
            third of the run's each.
        tune_lr: peak learning rate of fine-tuning, as a share of the run's.

    Raises:
        NothingPrunable: no channels can be cut.
        Infeasible: with `minimum` channels in every family too much arithmetic stays.
    """
    check_sparsity(sparsity)
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES)
    Limits(minimum)  # refuses a bad minimum before anything is trained
    third = max(1, whole_epochs(run) // 3)
    lengths = [third if e is None else e for e in (dense_epochs, epochs, tune_epochs)]
    base, again = shorter(run.training, lengths[0]), shorter(run.training, lengths[1])
    tuning = shorter(run.training, lengths[2], lr=run.training.lr * tune_lr)
    trained = dense(run, base)
    coupling = coupling_of(run, trained)
    families = coupling.primary()
    if not families:
        why = "; ".join(f"{n}: {r}" for n, r in list(coupling.unprunable.items())[:4])
        raise NothingPrunable(f"no channels of this network can be cut. {why}")
    method = GroupNorm(strength=strength, alpha=alpha, families=tuple(families))
    pushed = run.train("sparse", start=trained, method=method, training=again)
    pushed = State.of(pushed.weights, None, 0, pushed.metrics)  # the weights' masks were all ones

    plan = method.plan(pushed.model(run), coupling, sparsity, scope=scope, minimum=minimum)
    small = cut_state(run, pushed, plan)
    split = held_out(run)
    details: dict[str, Any] = {
        "channels": {f.name: f.size for f in families},
        "channels_kept": {f.name: f.size for f in families} | widths(plan),
        "blocked": dict(plan.blocked),
        "before_cut": run.evaluate(pushed, split),
        "after_cut": run.evaluate(small, split),
        "split": split,
        "macs_share": coupling.macs(kept_masks(plan, families)) / coupling.macs(),
    }
    state = run.train("tune", start=small, training=tuning)
    return Outcome(state, length(run, base) + length(run, again) + length(run, tuning), details)
