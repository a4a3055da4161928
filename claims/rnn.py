"""Pruning the gate matrices of recurrent networks."""

from __future__ import annotations

from functools import partial

from torch import nn

from claims.bench import Bench, world
from claims.claim import Claim, Experiment
from claims.rules import Above, NotBelow
from prunus.models.create import create
from prunus.parameters import prunable
from prunus.procedures.common import cut, dense, shorter
from prunus.procedures.imp import rewound
from prunus.procedures.rnn import gate_matrices
from prunus.run.stages import State
from prunus.train.training import Training

SOURCE = "Darji, Investigating Sparsity in Recurrent Neural Networks, University of Passau, 2024"
TARGETS = {"i2h": "input-hidden", "h2h": "hidden-hidden", "both": "both"}


def reader(cell: str, seed: int) -> nn.Module:
    """Return a recurrent network of 64 units that reads digits row by row."""
    return create(cell, input_shape=(1, 8, 8), seed=seed)


def gates(bench: Bench) -> dict[str, float]:
    """Prune the gate matrices of a GRU and an LSTM by one threshold per target, evaluate, and retrain."""
    found = {}
    for cell in ("gru", "lstm"):
        inner = bench.variant(cell, make_model=partial(reader, cell))
        trained = dense(inner)
        found[f"{cell.upper()} dense"] = inner.accuracy(trained)
        every = prunable(inner.model)
        for sparsity in (0.5, 0.7, 0.9):
            for label, target in TARGETS.items():
                others = tuple(n for n in every if n not in gate_matrices(inner, target))
                name = f"{label}-{sparsity}"
                masks = cut(inner, f"{name}/masks", trained, sparsity, exclude=others)
                start = rewound(State.of(trained.weights), masks, inner)
                arm = f"{cell.upper()} {label} {sparsity * 100:g}%"
                found[f"{arm} before"] = inner.accuracy(start)
                if sparsity > 0.5:
                    again = shorter(inner.training, 5)
                    state = inner.train(f"{name}/retrained", start=start, masks=masks, training=again)
                    found[f"{arm} after"] = inner.accuracy(state)
    return found


GATES = Experiment(
    name="gates",
    setup="digits read row by row (8 steps of 8 pixels), 64 units, 25 epochs of Adam at 0.005 with gradients clipped "
    "to norm 5; one cut by one magnitude threshold per target; 5 epochs of retraining",
    world=world(
        "digits",
        "gru",
        Training(epochs=25, optimizer="adam", lr=5e-3, weight_decay=0.0, schedule="constant", clip_norm=5.0),
    ),
    measure=gates,
    cost=8,
)

CLAIMS = [
    *(
        Claim(
            name=f"{cell}-half-is-free-{label}".lower(),
            method="rnn-sparsity",
            source=SOURCE,
            statement=f"Half of the {TARGETS[label]} weights of a {cell} ({label}) can go without retraining."
            if label != "both"
            else f"Half of all gate weights of a {cell} can go without retraining.",
            experiment=GATES,
            rule=NotBelow(f"{cell} {label} 50% before", f"{cell} dense", 0.02),
        )
        for cell in ("GRU", "LSTM")
        for label in TARGETS
    ),
    *(
        Claim(
            name=f"{cell}-recovers-at-70-{label}".lower(),
            method="rnn-sparsity",
            source=SOURCE,
            statement=f"After 70% pruning ({label}) a short retraining brings the accuracy of a {cell} back.",
            experiment=GATES,
            rule=NotBelow(f"{cell} {label} 70% after", f"{cell} dense", 0.01),
        )
        for cell in ("GRU", "LSTM")
        for label in TARGETS
    ),
    *(
        Claim(
            name=f"{cell}-minds-recurrent-pruning-less".lower(),
            method="rnn-sparsity",
            source=SOURCE,
            statement=f"Without retraining a {cell} minds losing 90% of its hidden-hidden weights less than 90% of its "
            "input-hidden ones.",
            experiment=GATES,
            rule=Above(f"{cell} h2h 90% before", f"{cell} i2h 90% before"),
        )
        for cell in ("GRU", "LSTM")
    ),
]
