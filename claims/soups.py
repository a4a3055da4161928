"""Sparse model soups: the average of retrained copies against the copies."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import torch

from claims.bench import Bench, digits
from claims.claim import Claim, Experiment
from claims.rules import Above, Exactly, NotBelow
from prunus.data.examples import Splits
from prunus.procedures.averaging import average
from prunus.procedures.common import cut, dense, length, shorter
from prunus.randomness import generator, key
from prunus.run.stages import State
from prunus.run.store import Store
from prunus.train.rates import retraining

SOURCE = "Zimmer, Spiegel and Pokutta, Sparse Model Soups, ICLR 2024"
RATES = (0.2, 0.1, 0.05)


def noisy(splits: Splits, share: float) -> Splits:
    """Return the splits with the labels of a share of the training examples moved to another class."""
    train = splits.train
    draws = generator(0, "label noise")
    chosen = torch.randperm(len(train), generator=draws)[: round(share * len(train))]
    y = train.y.clone()
    shift = torch.randint(1, train.num_classes, (len(chosen),), generator=draws)
    y[chosen] = (y[chosen] + shift) % train.num_classes
    return replace(splits, train=replace(train, y=y, name=f"{train.name}/noisy"))


def noisy_digits(store: Store | None, seed: int) -> Bench:
    """Return the digits protocol with 20% wrong training labels; test labels are right."""
    bench = digits(30)(store, seed)
    bench.splits = noisy(bench.splits, 0.2)
    return bench


def soup(bench: Bench) -> dict[str, float]:
    """Prune to 10%, retrain five copies that differ in data order, at three rates, and average each five."""
    trained = dense(bench)
    masks = cut(bench, "masks", trained, 0.9)
    found = {}
    for rate in RATES:
        again = shorter(bench.training, 10, lr=rate)
        schedule = retraining("llr", original=[rate], steps=length(bench, again))
        members = [
            bench.train(
                f"rate-{rate}/member-{number}",
                start=State.of(trained.weights),
                masks=masks,
                training=again,
                rates=schedule,
                seed=key(bench.seed, "member", number),
            )
            for number in range(5)
        ]
        mixed = State.of(average([m.weights for m in members], [m.masks for m in members]), masks)
        found[f"member loss, rate {rate:g}"] = fmean(bench.loss(m) for m in members)
        found[f"soup loss, rate {rate:g}"] = bench.loss(mixed)
        found[f"member, rate {rate:g}"] = fmean(bench.accuracy(m) for m in members)
        found[f"best member, rate {rate:g}"] = max(bench.accuracy(m) for m in members)
        found[f"soup, rate {rate:g}"] = bench.accuracy(mixed)
        alive = sum(int(torch.count_nonzero(mixed.weights[n])) for n in masks)
        found[f"weights above the budget, rate {rate:g}"] = float(max(0, alive - masks.kept))
    return found


SOUP = Experiment(
    name="soups",
    setup="digits with 20% wrong training labels, 30 epochs dense, one global cut to 10%, five copies retrained for 10 "
    "epochs from the given rate linearly to 0",
    world=noisy_digits,
    measure=soup,
    cost=7,
)

CLAIMS = [
    *(
        Claim(
            name=f"soup-lowers-loss-{rate:g}",
            method="sparse-model-soups",
            source=SOURCE,
            statement=f"Retrained from rate {rate:g}, the soup has a lower test loss than its members have on average.",
            experiment=SOUP,
            rule=Above(f"member loss, rate {rate:g}", f"soup loss, rate {rate:g}"),
            unit="number",
        )
        for rate in RATES
    ),
    Claim(
        name="soup-keeps-sparsity",
        method="sparse-model-soups",
        source=SOURCE,
        statement="The soup is as sparse as its members.",
        experiment=SOUP,
        rule=Exactly("weights above the budget, rate 0.1", 0.0),
        unit="count",
    ),
    Claim(
        name="soup-not-below-members",
        method="sparse-model-soups",
        source=SOURCE,
        statement="Retrained from rate 0.1, the soup is as accurate as its members are on average.",
        experiment=SOUP,
        rule=NotBelow("soup, rate 0.1", "member, rate 0.1", 0.005),
    ),
    Claim(
        name="soup-beats-best-member",
        method="sparse-model-soups",
        source=SOURCE,
        statement="Retrained from rate 0.1, the soup is more accurate than the member that is best on the test images.",
        experiment=SOUP,
        rule=Above("soup, rate 0.1", "best member, rate 0.1"),
    ),
]
