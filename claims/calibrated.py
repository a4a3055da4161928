"""Pruning without retraining: magnitudes against magnitudes times the norm of their inputs."""

from __future__ import annotations

from claims.bench import Bench, digits, world
from claims.claim import Claim, Experiment
from claims.rules import Above
from prunus.procedures.common import calibration_inputs, cut, dense
from prunus.procedures.imp import rewound
from prunus.run.stages import State
from prunus.train.training import Training

SOURCE = "Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024"
SETTINGS: tuple[tuple[str, float, str], ...] = (
    ("50%", 0.5, "weight"),
    ("60%", 0.6, "weight"),
    ("80%", 0.8, "weight"),
    ("2:4", 0.5, "2:4"),
)


def wanda(bench: Bench) -> dict[str, float]:
    """Prune a trained network by both scores; measure test loss and accuracy without retraining."""
    trained = dense(bench)
    found = {"loss, dense": bench.loss(trained)}
    inputs = [calibration_inputs(bench, 128)]
    for label, sparsity, unit in SETTINGS:
        for arm, score, budget, data in (
            ("magnitude", "magnitude", "uniform", None),
            ("Wanda", "wanda", "row-wise", inputs),
        ):
            name = f"{score}-{label}".replace("%", "").replace(":", "-of-")
            masks = cut(bench, name, trained, sparsity, score=score, budget=budget, unit=unit, data=data)
            state = rewound(State.of(trained.weights), masks, bench)
            found[f"loss, {arm} {label}"] = bench.loss(state)
            found[f"{arm} {label}"] = bench.accuracy(state)
    return found


DIGITS = Experiment(
    name="wanda",
    setup="digits, 30 epochs dense, pruned once without retraining; magnitudes compete in their layer, Wanda scores in "
    "their row; 128 unlabelled training inputs",
    world=digits(30),
    measure=wanda,
    cost=1,
    quick=True,
)
FASHION = Experiment(
    name="wanda-fashion",
    setup="4,000 images of Fashion-MNIST, LeNet-300-100, 10 epochs at rate 0.05, pruned once without retraining",
    world=world("fashion-mnist", "lenet", Training(epochs=10, lr=0.05), limit=4000),
    measure=wanda,
    cost=15,
    needs="fashion-mnist",
    seeds=3,
)

CLAIMS = [
    Claim(
        name=f"{prefix}wanda-beats-magnitude-{label.replace('%', '').replace(':', '-of-')}",
        method="llm-oneshot",
        source=SOURCE,
        statement=f"At {label} sparsity without retraining Wanda has a lower test loss than magnitude pruning{where}.",
        experiment=experiment,
        rule=Above(f"loss, magnitude {label}", f"loss, Wanda {label}"),
        unit="number",
    )
    for experiment, prefix, where in ((DIGITS, "", ""), (FASHION, "fashion-", " (Fashion-MNIST)"))
    for label, _, _ in SETTINGS
]
