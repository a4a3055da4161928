"""Widths chosen before training: do layer densities decide, whatever the granularity, and which densities are good?"""

from __future__ import annotations

import torch

from claims.bench import Bench, digits, percent, world
from claims.claim import Claim, Experiment
from claims.rules import Above, Alike, NotBelow
from prunus.budget.select import keep_best, round_half_up
from prunus.masks import Masks
from prunus.procedures.imp import rewound
from prunus.procedures.precrop import precrop
from prunus.randomness import generator
from prunus.run.stages import State
from prunus.train.training import Training

SOURCE = "Cai et al., Structured Pruning is All You Need for Pruning CNNs at Initialization, 2022"


def scattered(bench: Bench, name: str, densities: dict[str, float]) -> State:
    """Train the network of full width under random masks that keep these shares of each weight tensor."""
    masks = {}
    for tensor, density in densities.items():
        weight = bench.initial.weights[tensor]
        noise = torch.rand(weight.shape, generator=generator(bench.seed, "scattered", tensor))
        masks[tensor] = keep_best(noise, max(1, round_half_up(density * weight.numel())))
    held = Masks(masks)
    return bench.train(name, start=rewound(bench.initial, held, bench), masks=held)


def widths(bench: Bench, *shares: float) -> dict[str, float]:
    """Crop to shares of the parameters in several ways; train also random masks of the same layer densities."""
    found = {"dense": bench.accuracy(bench.train("dense"))}
    for share in shares:
        for arm, realise in (("cropped", "root"), ("best flow", "flow"), ("uniform", "uniform")):
            outcome = precrop(bench.within(f"{realise}-{share}"), params=share, realise=realise)
            found[f"{arm} {percent(share)}"] = bench.accuracy(outcome.state)
            if realise == "root":
                state = scattered(bench, f"masked-{share}", outcome.details["densities"])
                found[f"masked {percent(share)}"] = bench.accuracy(state)
    return found


IMAGES = Experiment(
    name="precrop-images",
    setup="4,000 images of Fashion-MNIST, six convolutions of 16 to 64 channels with batch norm, 10 epochs at rate "
    "0.05; channels cropped before training to a share of the parameters; masked: random masks on single weights with "
    "the layer densities of the cropped network",
    world=world("fashion-mnist", "vgg-small", Training(epochs=10, lr=0.05), limit=4000, model_options={"width": 16}),
    measure=lambda bench: widths(bench, 0.2),
    cost=400,
    needs="fashion-mnist",
    seeds=3,
)
DIGITS = Experiment(
    name="precrop-digits",
    setup="digits, three hidden layers of 256, 128 and 64, 30 epochs; hidden units cropped before training",
    world=digits(30, hidden=(256, 128, 64)),
    measure=lambda bench: widths(bench, 0.2, 0.05),
    cost=6,
    quick=True,
)

CLAIMS = [
    Claim(
        name="cropping-is-as-good-as-masks-images",
        method="precrop",
        source=SOURCE,
        statement="At 20% of the parameters a narrower network and random masks of its layer densities differ by less "
        "than one point (Fashion-MNIST).",
        experiment=IMAGES,
        rule=Alike("cropped 20%", "masked 20%", 0.01),
    ),
    Claim(
        name="cropping-not-below-uniform-images",
        method="precrop",
        source=SOURCE,
        statement="At 20% of the parameters widths from the largest expected flow are no worse than uniform ones "
        "(Fashion-MNIST).",
        experiment=IMAGES,
        rule=NotBelow("cropped 20%", "uniform 20%", 0.005),
    ),
    Claim(
        name="root-beats-direct-flow-images",
        method="precrop",
        source=SOURCE,
        statement="Square roots of the layer densities are no worse than widths that maximise the expected flow "
        "directly, which alternate between wide and narrow (Fashion-MNIST).",
        experiment=IMAGES,
        rule=NotBelow("cropped 20%", "best flow 20%", 0.005),
    ),
    *(
        Claim(
            name=f"cropping-is-as-good-as-masks-{share}",
            method="precrop",
            source=SOURCE,
            statement=f"At {share}% of the parameters a narrower fully connected network and random masks of its layer "
            "densities differ by less than 1.5 points.",
            experiment=DIGITS,
            rule=Alike(f"cropped {share}%", f"masked {share}%", 0.015),
        )
        for share in (20, 5)
    ),
    Claim(
        name="cropping-costs-at-5",
        method="precrop",
        source=SOURCE,
        statement="At 5% of the parameters the narrower network is less accurate than the whole one.",
        experiment=DIGITS,
        rule=Above("dense", "cropped 5%"),
    ),
]
