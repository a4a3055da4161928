"""N of every M weights: masks that follow the weights against fixed ones, and how much they flicker."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F

from claims.bench import Bench, digits, world
from claims.claim import Claim, Experiment
from claims.rules import Above, NotBelow
from prunus.data.batches import Batches
from prunus.methods.base import Method
from prunus.methods.sr_ste import SRSTE
from prunus.methods.static import Static
from prunus.sparsifier import sparsify
from prunus.train.optim import build
from prunus.train.training import Training

SOURCE = "Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, ICLR 2021"


def fixed_or_moving(bench: Bench, pattern: str) -> dict[str, float]:
    """Train with SR-STE, with plain STE, and under fixed magnitude and random masks of a pattern."""
    kept, group = (int(part) for part in pattern.split(":"))
    sparsity = 1 - kept / group
    methods: dict[str, Method] = {
        "SR-STE": SRSTE(unit=pattern),
        "STE": SRSTE(unit=pattern, decay=0.0),
        "magnitude": Static(sparsity=sparsity, unit=pattern, score="magnitude"),
        "random": Static(sparsity=sparsity, unit=pattern, score="random"),
    }
    name = pattern.replace(":", "of")
    return {
        f"{arm} {pattern}": bench.accuracy(bench.train(f"{arm}-{name}", method=method))
        for arm, method in methods.items()
    }


def changes(bench: Bench, decay: float) -> float:
    """Return how many of 10,000 mask positions change per step while SR-STE trains with this decay."""
    model, training = bench.model, bench.training
    optimizer = build(
        model, training.optimizer, lr=training.lr, weight_decay=training.weight_decay, **training.optimizer_options()
    )
    batches = Batches(bench.splits.train, training.batch_size, seed=bench.seed, device=bench.device)
    schedule = bench.learning_rates()
    handle = sparsify(model, optimizer, SRSTE(unit="1:4", decay=decay), steps=len(schedule), seed=bench.seed)
    moved, before = 0.0, handle.masks
    for step, rate in enumerate(schedule):
        x, y, _ = batches.batch(*divmod(step, batches.steps_per_epoch))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        moved += before.churn(handle.masks)
        before = handle.masks
    handle.detach()
    return 1e4 * moved / len(schedule)


def flicker(bench: Bench) -> dict[str, float]:
    """Return how much masks at 1:4 change with and without decay."""
    found = {}
    for label, decay in (("with decay", 2e-4), ("without decay", 0.0)):
        work = partial(changes, bench, decay)
        found[f"changes {label}"] = bench.compute(f"changes-{decay}", {"decay": decay}, work)
    return found


def patterns(bench: Bench) -> dict[str, float]:
    """Compare masks at 1:4 and 1:16, and the flicker of masks with and without decay."""
    return fixed_or_moving(bench, "1:4") | fixed_or_moving(bench, "1:16") | flicker(bench)


def pictures(bench: Bench) -> dict[str, float]:
    """Compare masks at 1:4 in a convolutional network, and the flicker of masks."""
    return fixed_or_moving(bench, "1:4") | flicker(bench)


PATTERNS = Experiment(
    name="n-of-m",
    setup="digits, 30 epochs, all layers in the pattern; fixed masks: of the initial magnitudes, and "
    "random; changes: of 10,000 mask positions, per step",
    world=digits(30),
    measure=patterns,
    cost=16,
)
PICTURES = Experiment(
    name="n-of-m-fashion",
    setup="4,000 images of Fashion-MNIST, six convolutions of 8 to 32 channels, 6 epochs at rate 0.05, 1:4; "
    "changes: of 10,000 mask positions, per step",
    world=world("fashion-mnist", "vgg-small", Training(epochs=6, lr=0.05), limit=4000, model_options={"width": 8}),
    measure=pictures,
    cost=150,
    needs="fashion-mnist",
    seeds=3,
)


def _claims(experiment: Experiment, pattern: str, prefix: str, where: str) -> list[Claim]:
    return [
        Claim(
            name=f"{prefix}sr-ste-not-below-magnitude-{pattern.replace(':', '-of-')}",
            method="nm-sparsity",
            source=SOURCE,
            statement=f"At {pattern} SR-STE is at least as good as the magnitude mask of the initial weights{where}.",
            experiment=experiment,
            rule=NotBelow(f"SR-STE {pattern}", f"magnitude {pattern}", 0.005),
        ),
        Claim(
            name=f"{prefix}magnitude-not-below-random-{pattern.replace(':', '-of-')}",
            method="nm-sparsity",
            source=SOURCE,
            statement=f"At {pattern} the magnitude mask of the initial weights is as good as a random one{where}.",
            experiment=experiment,
            rule=NotBelow(f"magnitude {pattern}", f"random {pattern}", 0.005),
        ),
    ]


def _settles(experiment: Experiment, prefix: str, where: str) -> Claim:
    return Claim(
        name=f"{prefix}decay-settles-masks",
        method="nm-sparsity",
        source=SOURCE,
        statement=f"The decay of removed weights (2e-4) makes 1:4 masks change less during training{where}.",
        experiment=experiment,
        rule=Above("changes without decay", "changes with decay"),
        unit="number",
    )


CLAIMS = [
    *_claims(PATTERNS, "1:4", "", ""),
    *_claims(PATTERNS, "1:16", "", ""),
    _settles(PATTERNS, "", ""),
    *_claims(PICTURES, "1:4", "fashion-", " (Fashion-MNIST)"),
    _settles(PICTURES, "fashion-", " (Fashion-MNIST)"),
]
