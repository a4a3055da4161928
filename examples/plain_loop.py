"""RigL in a hand-written loop: the call of `prunus.sparsify` is the only line that a dense training does not have.

Run it with `python examples/plain_loop.py`. It trains on the digits that come with scikit-learn, in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import prunus
from prunus.data.batches import Batches
from prunus.data.load import load
from prunus.models.create import create

EPOCHS = 20
BATCH = 50


@dataclass(frozen=True)
class Outcome:
    """What a training gave: test accuracy in [0, 1], share of zeros among prunable weights, digest of the masks."""

    accuracy: float
    sparsity: float
    digest: str


def main(epochs: int = EPOCHS) -> Outcome:
    """Train a 90 % sparse LeNet-300-100 for `epochs` passes over 1,000 digits."""
    digits = load("digits", validation=0)
    batches = Batches(digits.train, BATCH)
    model = create("lenet-300-100", num_classes=10, input_shape=digits.train.input_shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    total = epochs * batches.steps_per_epoch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)

    sparse = prunus.sparsify(model, optimizer, prunus.RigL(sparsity=0.9, every=10), steps=total)  # the added line

    for epoch in range(epochs):
        for x, y, _ in batches.epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()

    with torch.no_grad():
        predicted = model(digits.test.normalise(digits.test.x)).argmax(1)
    accuracy = float((predicted == digits.test.y).float().mean())
    return Outcome(accuracy, sparse.masks.sparsity, sparse.masks.digest())


if __name__ == "__main__":
    print(main())
