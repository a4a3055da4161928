"""Transformable architecture search: learn widths and depths by gradients, train what was found with distillation.

Source: Dong and Yang, Network Pruning via Transformable Architecture Search, NeurIPS 2019 (arXiv 1905.09717).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from prunus.budget.allocate import check_fraction
from prunus.data.examples import Examples, Splits
from prunus.data.split import stratified
from prunus.errors import InvalidValue
from prunus.parameters import prunable
from prunus.procedures.common import Outcome, check_sparsity, dense, length, measure, shorter, whole_epochs
from prunus.procedures.cutting import Cut
from prunus.run.stages import Run, Shape, State
from prunus.structured.precrop import reinitialise
from prunus.structured.tas.network import SearchNet
from prunus.structured.tas.reading import search_space
from prunus.structured.tas.sampling import FRACTIONS
from prunus.structured.tas.space import Found, SearchSpace, into_band
from prunus.structured.tas.step import ArchitectureStep


def tas(
    run: Run,
    *,
    sparsity: float = 0.5,
    fractions: Sequence[float] = FRACTIONS,
    depth: bool = True,
    tolerance: float = 0.05,
    cost_weight: float = 2.0,
    architecture_lr: float = 1e-3,
    architecture_decay: float = 1e-3,
    betas: Sequence[float] = (0.5, 0.999),
    tau: Sequence[float] = (5.0, 0.1),
    distill_weight: float = 0.9,
    distill_temperature: float = 4.0,
    dense_epochs: int | None = None,
    search_epochs: int | None = None,
    epochs: int | None = None,
) -> Outcome:
    """Search a smaller architecture, then train it from new weights with the whole network as teacher.

    Search: on one half of the training examples the weights of a network that samples widths and depths are trained
    as the run trains, on the other half the logits of the choices. The result is the arg-max architecture of the epoch
    that did best on the second half among those whose cost lies between 1 - sparsity - tolerance and 1 - sparsity of
    the whole network; if there was none, the last epoch's, moved into the band by `into_band`.

    Args:
        run: stages, data, model and training choices.
        sparsity: share of the multiply-accumulates to be removed, classifier included; never less is removed.
        fractions: choices of width, as shares of each channel family.
        depth: whether the lengths of residual stages are searched too.
        tolerance: of the cost, as a share of the whole network's.
        cost_weight: of the band loss beside the cross-entropy.
        architecture_lr, architecture_decay, betas: of Adam on the logits.
        tau: first and last temperature of the samples.
        distill_weight, distill_temperature: of the final training; 0 trains without a teacher.
        dense_epochs: length of the teacher's training; default the run's.
        search_epochs: length of the search; default the run's (600 passes over one half on CIFAR in the paper).
        epochs: length of the final training; default the run's (300 and 5 of warm-up in the paper).

    Raises:
        Infeasible: even the smallest architecture costs too much.
        NothingPrunable: nothing can be searched in the model.

    The details hold widths, depths and costs, and how the architecture was chosen.
    """
    check_sparsity(sparsity)
    check_fraction("tolerance", tolerance)
    for name, pair in (("betas", betas), ("tau", tau)):
        if len(pair) != 2:
            raise InvalidValue(f"{name}={tuple(pair)} must be two numbers.")
    if min(tau) <= 0:
        raise InvalidValue(f"tau={tuple(tau)} must be above 0.")
    whole = whole_epochs(run)
    passes = whole if search_epochs is None else search_epochs
    plain = replace(run.training, distill_weight=0.0, distill_temperature=None)
    search_training = shorter(plain, passes, checkpoint_best=False, evaluate_every=None)
    final = shorter(plain, whole if epochs is None else epochs)

    space = space_of(run, fractions=fractions, depth=depth)
    most = space.macs(space.whole)
    target, band = (1 - sparsity) * most, tolerance * most
    into_band(space, space.least, *_flat(space), target, band)  # a target out of reach is refused before training
    weights_half, logits_half = halves(run.splits.train, run.seed)
    step = ArchitectureStep(
        logits_half,
        target=target,
        tolerance=band,
        epochs=passes,
        steps_per_epoch=run.steps_per_epoch(search_training, weights_half),
        weight=cost_weight,
        lr=architecture_lr,
        betas=(float(betas[0]), float(betas[1])),
        weight_decay=architecture_decay,
        tau=(float(tau[0]), float(tau[1])),
        batch_size=search_training.batch_size,
        augment=search_training.augment,
        seed=run.seed,
    )
    searched = run.train(
        "search",
        start=State.of(space.apply(run.model).state_dict(), shape=space),
        training=search_training,
        data=Splits(weights_half, run.splits.validation.subset([]), run.splits.test, run.splits.name),
        callbacks=[step],
    )
    chosen, how, accuracy = decide(searched.model(run), target, band)
    shape = Cut(space.plan(chosen))
    widths, depths = space.counts(chosen)
    steps = search_training.total_steps(step.steps_per_epoch) + length(run, final)

    teacher = None
    if distill_weight:
        first = shorter(plain, whole if dense_epochs is None else dense_epochs)
        teacher = dense(run, first)
        steps += length(run, first)
        final = replace(final, distill_weight=distill_weight, distill_temperature=distill_temperature)
    state = run.train("train", start=new_weights(run, shape), training=final, teacher=teacher)
    details: dict[str, Any] = {
        "widths": widths,
        "depths": depths,
        "dense_macs": most,
        "macs": space.macs(chosen),
        "macs_share": space.macs(chosen) / most,
        "in_band": target - band <= space.macs(chosen) <= target,
        "chosen": how,
        "search_accuracy": accuracy,
    }
    if teacher is not None:
        details["teacher"] = measure(run, teacher)
    return Outcome(state, steps, details)


def space_of(run: Run, *, fractions: Sequence[float] = FRACTIONS, depth: bool = True) -> SearchSpace:
    """Return what can be searched in the run's model, within its patterns of prunable tensors."""
    example, _, _ = run.splits.train[0]
    names = prunable(run.model, include=run.include, exclude=run.exclude)
    patterns = run.include or run.exclude
    return search_space(
        run.model,
        torch.stack([example, example]).to(run.device),
        fractions=fractions,
        depth=depth,
        prunable=set(names) if patterns else None,
        seed=run.seed,
    )


def halves(examples: Examples, seed: int) -> tuple[Examples, Examples]:
    """Cut examples into two halves with equal shares of each class; the first has one more when they are odd.

    Raises:
        InvalidValue: fewer than two examples.
    """
    if len(examples) < 2:
        raise InvalidValue(f"{examples.name} has {len(examples)} examples; a search needs some for either half.")
    second = stratified(examples.y, len(examples) // 2, examples.num_classes, seed, "architecture half")
    chosen = torch.zeros(len(examples), dtype=torch.bool)
    chosen[second] = True
    return examples.subset((~chosen).nonzero().flatten()), examples.subset(second)


def decide(net: torch.nn.Module, target: float, tolerance: float) -> tuple[Found, str, float | None]:
    """Return the architecture of a searched network, how it was chosen, and its accuracy where one was measured.

    "best": an epoch inside the band; "moved": the last epoch, moved into the band.
    """
    assert isinstance(net, SearchNet)
    if float(net.best_accuracy) >= 0:
        return net.space.likeliest(*net.logits(best=True)), "best", float(net.best_accuracy)
    last = net.space.likeliest(*net.logits())
    return into_band(net.space, last, *net.logits(), target, tolerance), "moved", None


def new_weights(run: Run, shape: Shape) -> State:
    """Return a network of this shape with weights drawn anew for its own fan, not inherited ones."""
    return State.of(reinitialise(shape.apply(run.model), run.seed).state_dict(), shape=shape)


def _flat(space: SearchSpace) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return logits that prefer nothing."""
    return [torch.zeros(len(w.choices)) for w in space.widths], [torch.zeros(len(s.depths)) for s in space.stages]
