"""RigL in a hand-written loop: the call of `prunus.sparsify` is the only line that a dense training does not have.

Run it with `python examples/plain_loop.py`. It trains on the digits that come with scikit-learn, in seconds. The
other loops of this folder (Lightning, Accelerate, several processes) are the same training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import prunus
from prunus.data.load import load
from prunus.models.create import create

EPOCHS = 10
BATCH = 50


@dataclass(frozen=True)
class Outcome:
    """What a training gave: test accuracy in [0, 1], share of zeros among prunable weights, digest of the masks."""

    accuracy: float
    sparsity: float
    digest: str


def prepare() -> tuple[nn.Module, torch.optim.Optimizer, DataLoader]:
    """Return a LeNet-300-100, SGD with momentum, and batches of 1,000 digits."""
    train = load("digits", validation=0).train
    model = create("lenet", num_classes=10, input_shape=train.input_shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    # These examples come shuffled. Frameworks draw from a loader's generator at other moments, so that shuffling
    # anew in every epoch would give each loop of this folder another order of the same batches.
    return model, optimizer, DataLoader(train, BATCH)


def judge(model: nn.Module, sparse: prunus.Sparsifier) -> Outcome:
    """Measure the trained model on the 797 test digits."""
    test = load("digits", validation=0).test
    with torch.no_grad():
        predicted = model(test.normalise(test.x)).argmax(1)
    accuracy = float((predicted == test.y).float().mean())
    return Outcome(accuracy, sparse.masks.sparsity, sparse.masks.digest())


def main(epochs: int = EPOCHS) -> Outcome:
    """Train at 90 % sparsity for `epochs` passes over the data."""
    model, optimizer, batches = prepare()

    sparse = prunus.sparsify(model, optimizer, prunus.RigL(sparsity=0.9, every=5), steps=epochs * len(batches))

    for _ in range(epochs):
        for x, y, _ids in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return judge(model, sparse)


if __name__ == "__main__":
    print(main())
