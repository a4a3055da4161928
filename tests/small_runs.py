"""Runs small enough for tests of procedures: digits with a small network, or images with BatchNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prunus.data.examples import Examples, Splits
from prunus.data.load import load
from prunus.models.create import create
from prunus.run.stages import Run, State
from prunus.train.training import Training


def digits_run(
    *,
    epochs: int = 2,
    seed: int = 0,
    validation: int = 100,
    hidden: tuple[int, ...] = (32, 16),
    store: Any = None,
    make: Callable[[int], nn.Module] | None = None,
    kind: type[Run] = Run,
    limit: int | None = None,
    **options: Any,
) -> Run:
    """Digits, MLP, SGD with a cosine."""

    def network(seed: int) -> nn.Module:
        return create("mlp", input_shape=(1, 8, 8), hidden=hidden, seed=seed)

    training = options.pop("training", None) or Training(epochs=epochs)
    splits = load("digits", validation=validation, limit=limit)
    return kind(store, splits=splits, make_model=make or network, training=training, seed=seed, **options)


def striped(n: int = 96, test: int = 48) -> Splits:
    """Images of 6x6 pixels with one of three pairs of rows bright, or none."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n + test) % 4
    x = torch.rand(n + test, 1, 6, 6, generator=g)
    for i, label in enumerate(y.tolist()):
        x[i, 0, 2 * label : 2 * label + 2] += 1.0
    every = Examples.from_arrays(x, y, classes=4, name="rows")
    third = n // 3
    parts = (range(n - third), range(n - third, n), range(n, n + test))
    train, validation, held = (every.subset(list(p)) for p in parts)
    return Splits(train, validation, held, "rows")


class Normed(nn.Module):
    """A convolution with BatchNorm and a linear layer."""

    def __init__(self, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(1, 6, 3)
            self.norm = nn.BatchNorm2d(6)
            self.linear = nn.Linear(96, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(self.conv(x)).relu().flatten(1))


def normed_run(*, epochs: int = 2, seed: int = 0, store: Any = None, kind: type[Run] = Run, **options: Any) -> Run:
    """Small images, a convolution with BatchNorm unless `make` builds something else."""
    training = options.pop("training", None) or Training(epochs=epochs, batch_size=16, lr=0.05)
    make = options.pop("make", None) or Normed
    return kind(store, splits=striped(), make_model=make, training=training, seed=seed, **options)


class Watched(Run):
    """A run that remembers what each stage began with: name -> (start, the other arguments)."""

    seen: dict[str, tuple[State, dict[str, Any]]]

    def train(self, name: str, **choices: Any) -> State:
        """Note the arguments, then train."""
        if not hasattr(self.root, "seen"):
            self.root.seen = {}  # type: ignore[attr-defined]
        self.root.seen[name] = (choices.get("start") or self.initial, choices)  # type: ignore[attr-defined]
        return super().train(name, **choices)


def same_weights(a: State, b: State) -> bool:
    """Tell whether two states hold the same bits."""
    return set(a.weights) == set(b.weights) and all(torch.equal(a.weights[n], b.weights[n]) for n in a.weights)


def masked(state: State, masks: Any) -> dict[str, Tensor]:
    """Return m * w for the masked tensors."""
    return {n: state.weights[n] * m for n, m in masks.items()}
