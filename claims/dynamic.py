"""Masks that move while training goes on: gradual pruning, SET and RigL, GraNet, pruning plasticity."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from claims.bench import Bench, digits, percent, prune_and_tune
from claims.claim import Claim, Experiment
from claims.rules import Above, Every, Exactly, NotBelow, Ordered, Rule
from prunus.data.batches import Batches
from prunus.masks import Masks
from prunus.measure.accuracy import evaluate
from prunus.measure.plasticity import plasticity
from prunus.methods.gmp import GMP
from prunus.methods.gradual import Gradual
from prunus.methods.granet import GraNet
from prunus.methods.rigl import RigL
from prunus.methods.set import SET
from prunus.methods.static import Static
from prunus.procedures.common import dense, shorter
from prunus.run.stages import State
from prunus.train.loop import fit

GMP_SOURCE = "Zhu and Gupta, To prune, or not to prune, ICLR workshop 2018"
SET_SOURCE = "Mocanu et al., Scalable training with adaptive sparse connectivity, Nature Communications 2018"
RIGL_SOURCE = "Evci et al., Rigging the Lottery, ICML 2020"
GRANET_SOURCE = "Liu et al., Sparse Training via Boosting Pruning Plasticity, NeurIPS 2021"
BUDGETS = {"uniform": "uniform", "global": "global", "LAMP": "lamp"}


def gradual(bench: Bench) -> dict[str, float]:
    """Prune along the cubic ramp, and at once, in equally many epochs."""
    found = {}
    trained = dense(bench, shorter(bench.training, 30))
    for arm, budget in BUDGETS.items():
        method = GMP(sparsity=0.98, budget=budget, begin="3ep", end="30ep", every=8)
        found[f"gradual {arm}"] = bench.accuracy(bench.train(f"gradual-{budget}", method=method))
        found[f"one-shot {arm}"] = bench.accuracy(prune_and_tune(bench, f"one-shot-{budget}", trained, 0.02, budget))
    return found


def exchange(bench: Bench) -> dict[str, float]:
    """Train at constant density under a fixed mask, with random regrowth, and with regrowth by gradient."""
    found = {}
    for density in (0.02, 0.05):
        methods = {
            "static": Static(sparsity=1 - density),
            "SET": SET(sparsity=1 - density, every="1ep"),
            "RigL": RigL(sparsity=1 - density, every="1ep"),
        }
        for arm, method in methods.items():
            found[f"{arm} {percent(density)}"] = bench.accuracy(bench.train(f"{arm}-{density}", method=method))
    return found


def granet(bench: Bench) -> dict[str, float]:
    """Train GraNet from half and from all weights, with and without regrowth, and its special cases."""
    ramp: dict[str, Any] = {"sparsity": 0.98, "every": 8, "ramp_end": "30ep"}
    still: dict[str, Any] = {"fraction": 0.0, "fraction_end": 0.0}
    methods: dict[str, Any] = {
        "GraNet from 0.5": GraNet(**ramp, initial=0.5),
        "GraNet from dense": GraNet(**ramp, initial=0.0),
        "ramp from 0.5": GraNet(**ramp, initial=0.5, **still),
        "GraNet without exchange": GraNet(**ramp, initial=0.0, **still),
        "GMP": Gradual(sparsity=0.98, budget="global", end="30ep", every=8),
        "RigL": RigL(sparsity=0.98, every="1ep"),
        "static": Static(sparsity=0.98),
    }
    states = {arm: bench.train(arm.replace(" ", "-"), method=method) for arm, method in methods.items()}
    found = {arm: bench.accuracy(state) for arm, state in states.items()}
    plain, none = states["GMP"], states["GraNet without exchange"]
    assert plain.masks is not None
    assert none.masks is not None
    found["mask entries that differ"] = plain.masks.churn(none.masks) * plain.masks.total
    apart = [float((plain.weights[n] - none.weights[n]).abs().max()) for n in plain.weights]
    found["largest weight difference"] = max(apart)
    return found


def pruning_plasticity(bench: Bench) -> dict[str, float]:
    """Prune to 2% at learning rates 0.1, 0.01 and 0.001 of one training, and train on for five epochs."""
    found = {}
    per_epoch = bench.steps_per_epoch()
    state, step = bench.initial, 0
    for epoch, rate in ((15, 0.1), (25, 0.01), (35, 0.001)):
        state = bench.train(
            f"to-{epoch}", start=state, start_step=step, until=f"{epoch}ep", continue_optimizer=step > 0
        )
        step = epoch * per_epoch
        for regrown in (0.0, 0.5):
            inputs = {"state": state, "step": step, "regrown": regrown}
            work = partial(_probe, bench, state, epoch, regrown)
            found[f"{'regrown ' if regrown else ''}at rate {rate:g}"] = bench.compute(
                f"probe-{epoch}-{regrown}", inputs, work
            )
    return found


def _probe(bench: Bench, state: State, epoch: int, regrown: float) -> float:
    """Return the plasticity of a checkpoint: test accuracy gained over it five epochs after pruning."""
    training = bench.training
    test = Batches(bench.splits.test, 256, shuffle=False, device=bench.device)
    coming = Batches(bench.splits.train, training.batch_size, seed=bench.seed, device=bench.device).batch(epoch, 0)

    def go_on(model: nn.Module, masks: Masks) -> None:
        fit(
            model,
            bench.splits,
            training,
            masks=masks,
            seed=bench.seed,
            start_step=state.step,
            until=f"{epoch + 5}ep",
            optimizer_start=state.optimizer,
        )

    return plasticity(
        state.model(bench),
        sparsity=0.98,
        evaluate=lambda model: evaluate(model, test).accuracy,
        go_on=go_on,
        regeneration=regrown,
        batch=coming[:2] if regrown else None,
        seed=bench.seed,
    ).value


GRADUAL = Experiment(
    name="gradual",
    setup="digits, 45 epochs, 2% density: cubic ramp from epoch 3 to 30 every 8 steps; one-shot: 30 epochs dense, one "
    "cut, 15 epochs of tuning from half the rate",
    world=digits(45),
    measure=gradual,
    cost=7,
)
EXCHANGE = Experiment(
    name="sparse-training",
    setup="digits, 45 epochs, ERK ratios, an exchange per epoch of a share of 0.3",
    world=digits(45),
    measure=exchange,
    cost=9,
    quick=True,
)
GRANET = Experiment(
    name="granet",
    setup="digits, 45 epochs, 2% density, ramp to epoch 30, an update every 8 steps, exchanged share from 0.5; RigL "
    "and static with ERK ratios",
    world=digits(45),
    measure=granet,
    cost=14,
)
PLASTICITY = Experiment(
    name="plasticity",
    setup="digits, 40 epochs, rate 0.1 divided by ten after 20 and 30 epochs; checkpoints after 15, 25 and 35 epochs "
    "pruned to 2% in every layer and trained on for 5 epochs of the same schedule; accuracy gained over the "
    "checkpoint; regrown: right after the cut half of what is kept is exchanged by gradient, as in a GraNet update",
    world=digits(40, schedule="step"),
    measure=pruning_plasticity,
    cost=2,
    quick=True,
)


def _claim(
    name: str, method: str, source: str, statement: str, experiment: Experiment, rule: Rule, **more: Any
) -> Claim:
    return Claim(name=name, method=method, source=source, statement=statement, experiment=experiment, rule=rule, **more)


CLAIMS = [
    *(
        _claim(
            f"gradual-beats-one-shot-{arm}".lower(),
            "gmp-cubic",
            GMP_SOURCE,
            f"At 2% density and equal epochs gradual pruning beats one cut ({arm} budget).",
            GRADUAL,
            Above(f"gradual {arm}", f"one-shot {arm}"),
        )
        for arm in BUDGETS
    ),
    _claim(
        "rigl-beats-set-2",
        "rigl",
        RIGL_SOURCE,
        "At 2% density growing by gradient beats growing at random.",
        EXCHANGE,
        Above("RigL 2%", "SET 2%"),
    ),
    _claim(
        "set-beats-static-2",
        "set",
        SET_SOURCE,
        "At 2% density a mask that evolves beats a fixed one.",
        EXCHANGE,
        Above("SET 2%", "static 2%"),
    ),
    _claim(
        "rigl-beats-static-2",
        "rigl",
        RIGL_SOURCE,
        "At 2% density RigL beats a fixed mask.",
        EXCHANGE,
        Above("RigL 2%", "static 2%"),
    ),
    _claim(
        "rigl-beats-static-5",
        "rigl",
        RIGL_SOURCE,
        "At 5% density RigL beats a fixed mask.",
        EXCHANGE,
        Above("RigL 5%", "static 5%"),
    ),
    _claim(
        "control-static-beats-rigl-2",
        "random-pruning",
        "none: the sentence is false and has to be reported so",
        "Control: at 2% density a fixed random mask beats RigL.",
        EXCHANGE,
        Above("static 2%", "RigL 2%"),
        control=True,
    ),
    _claim(
        "granet-beats-rigl",
        "granet",
        GRANET_SOURCE,
        "At 2% density GraNet from half the weights beats RigL, and RigL a fixed mask.",
        GRANET,
        Ordered(("GraNet from 0.5", "RigL", "static")),
    ),
    _claim(
        "granet-not-below-gmp",
        "granet",
        GRANET_SOURCE,
        "GraNet from half the weights keeps up with gradual pruning of a dense network.",
        GRANET,
        NotBelow("GraNet from 0.5", "GMP", 0.01),
    ),
    _claim(
        "granet-dense-beats-gmp",
        "granet",
        GRANET_SOURCE,
        "From a dense start, regrowth improves on gradual pruning without it.",
        GRANET,
        Above("GraNet from dense", "GMP"),
    ),
    _claim(
        "granet-half-beats-ramp",
        "granet",
        GRANET_SOURCE,
        "From half the weights, regrowth improves on the same ramp without it.",
        GRANET,
        Above("GraNet from 0.5", "ramp from 0.5"),
    ),
    _claim(
        "granet-without-exchange-is-gmp",
        "granet",
        GRANET_SOURCE,
        "With an exchanged share of 0, GraNet from dense is global gradual pruning, bit for bit.",
        GRANET,
        Every((Exactly("mask entries that differ", 0.0), Exactly("largest weight difference", 0.0))),
        unit="number",
    ),
    _claim(
        "plasticity-falls-with-rate",
        "granet",
        GRANET_SOURCE,
        "The lower the learning rate when it is pruned, the less a network recovers.",
        PLASTICITY,
        Ordered(("at rate 0.1", "at rate 0.01", "at rate 0.001")),
    ),
    *(
        _claim(
            f"regrowth-raises-plasticity-{rate}",
            "granet",
            GRANET_SOURCE,
            f"Exchanging half of what is left by gradient helps recovery at rate {rate}.",
            PLASTICITY,
            Above(f"regrown at rate {rate}", f"at rate {rate}"),
        )
        for rate in ("0.1", "0.01", "0.001")
    ),
]
