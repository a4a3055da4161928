"""Iterative soft shrinkage: unimportant weights shrink a little every step instead of being cut at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from claims.bench import Bench, digits, percent
from claims.claim import Claim, Experiment
from claims.rules import Above, Ordered
from prunus.data.examples import Examples, Splits
from prunus.data.load import load
from prunus.methods.base import Method
from prunus.methods.iss_p import ISSP
from prunus.methods.static import Static
from prunus.models.create import seeded
from prunus.run.stages import State
from prunus.run.store import Store
from prunus.train.rates import rates
from prunus.train.training import Training

SOURCE = "Wang et al., Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution, ICCV 2023"
FACTORS = (0.0, 0.5, 0.95, 0.99)


def shrinkage(bench: Bench) -> dict[str, float]:
    """Search for 25 epochs at a constant rate with several shrink factors, then tune for 20 with the mask fixed."""
    per_epoch = bench.steps_per_epoch()
    schedule = rates("constant", 25 * per_epoch, 0.05) + rates("cosine", 20 * per_epoch, 0.05)
    found = {}
    for density in (0.02, 0.05):
        sparsity = 1 - density
        methods: dict[str, Method] = {"static": Static(sparsity=sparsity, score="magnitude", budget="uniform")}
        for factor in FACTORS:
            methods[f"alpha {factor:g}"] = ISSP(sparsity=sparsity, factor=factor, search_end="25ep")
        for arm, method in methods.items():
            state = bench.train(f"{arm.replace(' ', '-')}-{density}", method=method, rates=schedule)
            found[f"{arm} {percent(density)}"] = bench.accuracy(state)
    return found


class Upscaler(nn.Module):
    """Three 3x3 convolutions on the small image; pixel shuffle adds what they find to the enlarged image."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.head = nn.Conv2d(1, width, 3, padding=1)
        self.body = nn.Conv2d(width, width, 3, padding=1)
        self.tail = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 1, H, W) to (N, 1, 2 H, 2 W)."""
        detail = self.tail(F.relu(self.body(F.relu(self.head(x)))))
        return F.interpolate(x, scale_factor=2.0) + F.pixel_shuffle(detail, 2)


class Pixels:
    """Mean absolute error against the large image of the same id."""

    def __init__(self, large: Tensor):
        self.large = large

    def __call__(self, output: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        """Return the loss of outputs (N, 1, H, W) for examples `ids`."""
        return F.l1_loss(output, self.large.to(output.device)[ids.to(self.large.device)].to(output.device))

    def describe(self) -> dict[str, Any]:
        """Return what it is made of."""
        return {"type": "Pixels", "shape": list(self.large.shape), "sum": float(self.large.double().sum())}


def small_and_large(store: Store | None, seed: int) -> Bench:
    """Return a run that enlarges digits from 4x4 to 8x8 pixels (2x2 means of the 8x8 images are the inputs)."""
    original = load("digits", validation=0)

    def halved(examples: Examples) -> Examples:
        small = F.avg_pool2d(examples.x, 2)
        none, one = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
        return replace(examples, x=small, mean=none, std=one, name=f"{examples.name}/4x4")

    splits = Splits(
        train=halved(original.train),
        validation=halved(original.validation),
        test=halved(original.test),
        name="digits-x2",
    )

    def build(number: int) -> nn.Module:
        with seeded(number, "upscaler"):
            return Upscaler()

    training = Training(epochs=60, optimizer="adam", lr=1e-3, weight_decay=0.0, schedule="constant")
    return Bench(store, splits=splits, make_model=build, training=training, seed=seed)


@torch.no_grad()
def signal_to_noise(bench: Bench, state: State, large: Tensor) -> float:
    """Return the mean over test images of 10 log10(1 / MSE), pixels in 0..1, outputs clipped to it, no border cut."""
    test = bench.splits.test
    made = state.model(bench).eval()(test.x.to(bench.device)).cpu().clamp(0, 1)
    error = (made - large[test.ids]).double().square().flatten(1).mean(1)
    return float((-10 * torch.log10(error.clamp(min=1e-12))).mean())


def super_resolution(bench: Bench) -> dict[str, float]:
    """Train the upscaler dense, under a fixed magnitude mask, and with soft shrinkage, at 90% sparsity."""
    original = load("digits", validation=0)
    large = torch.zeros(len(original.train) + len(original.test), 1, 8, 8)
    for part in (original.train, original.test):
        large[part.ids] = part.x
    methods: dict[str, Method | None] = {
        "dense": None,
        "static": Static(sparsity=0.9, score="magnitude", budget="uniform"),
        "alpha 0.95": ISSP(sparsity=0.9, factor=0.95, search_end="0.5dur"),
    }
    objective = Pixels(large)
    found = {}
    for arm, method in methods.items():
        state = bench.train(arm.replace(" ", "-"), method=method, objective=objective)
        found[arm] = signal_to_noise(bench, state, large)
    return found


SHRINKAGE = Experiment(
    name="soft-shrinkage",
    setup="digits, uniform ratios, 25 epochs at rate 0.05, then 20 epochs along a cosine from there; static: the "
    "magnitude mask of the initial weights",
    world=digits(45),
    measure=shrinkage,
    cost=30,
)
SUPER = Experiment(
    name="super-resolution",
    setup="digits enlarged from 4x4 to 8x8 pixels by three convolutions of width 32, 60 epochs of Adam at 1e-3, L1 "
    "loss, 90% sparsity, shrinking during the first half; PSNR in dB on the test images",
    world=small_and_large,
    measure=super_resolution,
    cost=12,
)

CLAIMS = [
    Claim(
        name="soft-beats-hard-beats-static-2",
        method="iss-p",
        source=SOURCE,
        statement="At 2% density soft shrinkage beats hard thresholding, and that a fixed magnitude mask.",
        experiment=SHRINKAGE,
        rule=Ordered(("alpha 0.95 2%", "alpha 0 2%", "static 2%")),
    ),
    Claim(
        name="soft-beats-static-2",
        method="iss-p",
        source=SOURCE,
        statement="At 2% density soft shrinkage beats the magnitude mask of the initial weights.",
        experiment=SHRINKAGE,
        rule=Above("alpha 0.95 2%", "static 2%"),
    ),
    Claim(
        name="soft-beats-static-5",
        method="iss-p",
        source=SOURCE,
        statement="At 5% density soft shrinkage beats the magnitude mask of the initial weights.",
        experiment=SHRINKAGE,
        rule=Above("alpha 0.95 5%", "static 5%"),
    ),
    Claim(
        name="soft-beats-static-psnr",
        method="iss-p",
        source=SOURCE,
        statement="In super-resolution at 10% density soft shrinkage gives a higher PSNR than a fixed magnitude mask.",
        experiment=SUPER,
        rule=Above("alpha 0.95", "static"),
        unit="number",
    ),
]
