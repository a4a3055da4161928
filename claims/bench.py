"""Where experiments run: the digits protocol, and the few steps that several experiments share.

Every training that does not say otherwise: scikit-learn's digits (1,000 training and 797 test images, pixels
standardised one by one), a fully connected network 64-256-128-10 with ReLU, SGD with momentum 0.9, weight decay
5e-4, batches of 64, learning rate 0.1 along a cosine to 0. All weight matrices can be pruned, biases cannot. No
examples are held out because nothing is selected: accuracies are those of the last weights on the test images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunus.data.examples import Splits
from prunus.data.load import load
from prunus.masks import Masks
from prunus.models.create import create
from prunus.procedures.common import cut, shorter
from prunus.run.stages import Run, State
from prunus.run.store import Store
from prunus.train.training import Training

World = Callable[[Store | None, int], "Bench"]


class Bench(Run):
    """A run that remembers what its stages trained.

    Attributes:
        trained: state by the full name of its stage, for procedures that hand back only the last one.
    """

    def __init__(self, store: Store | None = None, **choices: Any):
        super().__init__(store, **choices)
        self.trained: dict[str, State] = {}

    def train(self, name: str, **choices: Any) -> State:
        """Train, or load (see `Run.train`)."""
        state = super().train(name, **choices)
        self.trained[f"{self.name_prefix}{name}"] = state
        return state

    def within(self, name: str) -> Bench:
        """Return this run for the stages of one method (see `Run.within`)."""
        inner = super().within(name)
        assert isinstance(inner, Bench)
        return inner

    def variant(
        self,
        name: str,
        *,
        make_model: Callable[[int], nn.Module] | None = None,
        training: Training | None = None,
        splits: Splits | None = None,
    ) -> Bench:
        """Return a run of its own with the same seed and store, and something changed."""
        other = copy.copy(self)
        other.name_prefix = f"{self.name_prefix}{name}/"
        other.root = other
        other._initial = None
        other.make_model = self.make_model if make_model is None else make_model
        other.training = self.training if training is None else training
        other.splits = self.splits if splits is None else splits
        return other

    def accuracy(self, state: State) -> float:
        """Return the share of test images classified correctly."""
        return self.evaluate(state)["accuracy"]

    def loss(self, state: State) -> float:
        """Return the mean negative log-likelihood of the test labels."""
        return self.evaluate(state)["loss"]


def world(
    data: str,
    model: str,
    training: Training,
    *,
    limit: int | None = None,
    model_options: Mapping[str, Any] | None = None,
) -> World:
    """Return what makes the run of one seed: data, network and training by name.

    Args:
        data: name of a data set; all its training examples are trained on.
        model: name of a network.
        training: the choices of a stage that does not say otherwise.
        limit: train only on so many examples, equally many of each class, the same for every seed.
        model_options: what the network's constructor takes.
    """

    def make(store: Store | None, seed: int) -> Bench:
        splits = load(data, validation=0, limit=limit)
        shape, classes = splits.train.input_shape, splits.train.num_classes

        def build(number: int) -> nn.Module:
            options = dict(model_options or {})
            return create(model, num_classes=classes, input_shape=shape, seed=number, **options)

        return Bench(store, splits=splits, make_model=build, training=training, seed=seed)

    return make


def digits(epochs: int, *, hidden: Sequence[int] = (256, 128), **choices: Any) -> World:
    """Return the digits protocol with so many epochs (and other changes to the training)."""
    return world("digits", "mlp", Training(epochs=epochs, **choices), model_options={"hidden": tuple(hidden)})


def mlp(*hidden: int) -> Callable[[int], nn.Module]:
    """Return what makes a fully connected network for digits with these hidden widths."""
    return lambda seed: create("mlp", input_shape=(1, 8, 8), seed=seed, hidden=hidden)


def tuned(bench: Run, name: str, trained: State, masks: Masks, *, epochs: int = 15, lr: float = 0.05) -> State:
    """Go on from the kept weights with the mask fixed: `epochs` along a cosine from half the usual rate."""
    start = State.of(trained.weights)
    return bench.train(name, start=start, masks=masks, training=shorter(bench.training, epochs, lr=lr))


def prune_and_tune(
    bench: Run, name: str, trained: State, density: float, budget: str | Mapping[str, Any], score: str = "magnitude"
) -> State:
    """Prune a trained network in one cut to `density`, then go on as `tuned` does."""
    masks = cut(bench, f"{name}/masks", trained, 1 - density, score=score, budget=budget)
    return tuned(bench, f"{name}/tuned", trained, masks)


@torch.no_grad()
def outputs(bench: Run, state: State, split: str = "test") -> Tensor:
    """Return what a network says about a split: one row per example, in order."""
    examples = {"train": bench.splits.train, "test": bench.splits.test}[split]
    model = state.model(bench).eval()
    parts = [model(examples.normalise(x).to(bench.device)).cpu() for x in examples.x.split(512)]
    return torch.cat(parts)


def percent(density: float) -> str:
    """Return a share as it stands in the name of an arm: 0.02 -> "2%"."""
    return f"{density * 100:g}%"
