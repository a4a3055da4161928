"""The same claims on CIFAR-10 images and a convolutional network with batch norm; needs the files of the data set."""

from __future__ import annotations

from statistics import fmean

from claims.bench import Bench, world
from claims.claim import Claim, Experiment
from claims.rules import Above, NotBelow, Ordered
from prunus.methods.base import Method
from prunus.methods.gmp import GMP
from prunus.methods.rigl import RigL
from prunus.methods.set import SET
from prunus.methods.static import Static
from prunus.procedures.soups import soups
from prunus.train.training import Training

RANDOM = "Liu et al., The Unreasonable Effectiveness of Random Pruning, ICLR 2022"
RIGL = "Evci et al., Rigging the Lottery, ICML 2020"
GMP_SOURCE = "Zhu and Gupta, To prune, or not to prune, ICLR workshop 2018"
SOUPS = "Zimmer, Spiegel and Pokutta, Sparse Model Soups, ICLR 2024"


def masks_in_training(bench: Bench) -> dict[str, float]:
    """Train at 5% density under fixed, evolving and shrinking masks."""
    methods: dict[str, Method] = {
        "uniform": Static(sparsity=0.95, budget="uniform"),
        "ERK": Static(sparsity=0.95),
        "SET": SET(sparsity=0.95),
        "RigL": RigL(sparsity=0.95, every="1ep"),
        "gradual": GMP(sparsity=0.95, budget="global", every=8),
    }
    return {arm: bench.accuracy(bench.train(arm, method=method)) for arm, method in methods.items()}


def soup(bench: Bench) -> dict[str, float]:
    """Average three copies retrained under one mask of 5%."""
    outcome = soups(bench, sparsity=0.95, phases=1, members=3, dense_epochs=6, epochs=4)
    members = [bench.trained[f"phase-1/member-{number}"] for number in range(3)]
    return {
        "soup": bench.accuracy(outcome.state),
        "member": fmean(bench.accuracy(m) for m in members),
        "best member": max(bench.accuracy(m) for m in members),
    }


MASKS = Experiment(
    name="cifar-masks",
    setup="4,000 images of CIFAR-10 with crops and flips, six convolutions of 8 to 32 channels, 10 epochs at rate "
    "0.05, 5% density; exchanges once per epoch, the ramp over the first two thirds",
    world=world(
        "cifar10",
        "vgg-small",
        Training(epochs=10, lr=0.05, augment="crop,flip"),
        limit=4000,
        model_options={"width": 8},
    ),
    measure=masks_in_training,
    cost=220,
    needs="cifar10",
    seeds=3,
)
SOUP = Experiment(
    name="cifar-soup",
    setup="4,000 images of CIFAR-10 with crops and flips, six convolutions of 8 to 32 channels, 6 epochs dense at rate "
    "0.05, one global cut to 5%, three copies retrained for 4 epochs; batch statistics measured anew",
    world=world(
        "cifar10",
        "vgg-small",
        Training(epochs=10, lr=0.05, augment="crop,flip"),
        limit=4000,
        model_options={"width": 8},
    ),
    measure=soup,
    cost=80,
    needs="cifar10",
    seeds=3,
)

CLAIMS = [
    Claim(
        name="cifar-erk-beats-uniform",
        method="random-pruning",
        source=RANDOM,
        statement="At 5% density random masks train better with ERK layer ratios than with uniform ones (CIFAR-10).",
        experiment=MASKS,
        rule=Above("ERK", "uniform"),
    ),
    Claim(
        name="cifar-rigl-beats-set-beats-static",
        method="rigl",
        source=RIGL,
        statement="At 5% density growing by gradient beats growing at random, and that a fixed mask (CIFAR-10).",
        experiment=MASKS,
        rule=Ordered(("RigL", "SET", "ERK")),
    ),
    Claim(
        name="cifar-gradual-beats-static",
        method="gmp-cubic",
        source=GMP_SOURCE,
        statement="Gradual pruning to 5% beats a fixed random mask of that density (CIFAR-10).",
        experiment=MASKS,
        rule=Above("gradual", "ERK"),
    ),
    Claim(
        name="cifar-soup-beats-members",
        method="sparse-model-soups",
        source=SOUPS,
        statement="The soup of three retrained copies is more accurate than they are on average (CIFAR-10).",
        experiment=SOUP,
        rule=Above("soup", "member"),
    ),
    Claim(
        name="cifar-soup-not-below-best",
        method="sparse-model-soups",
        source=SOUPS,
        statement="The soup is as accurate as the copy that is best on the test images (CIFAR-10).",
        experiment=SOUP,
        rule=NotBelow("soup", "best member", 0.005),
    ),
]
