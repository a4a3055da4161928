"""Batches whose content depends only on (seed, epoch, step): never on workers or on where a run was cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from prunus.data.augment import Augment, parse
from prunus.data.examples import Examples
from prunus.errors import InvalidValue
from prunus.randomness import generator


class Batches:
    """Cut examples into normalised, augmented batches of (x, y, ids).

    The order of an epoch draws from the key (seed, "shuffle", epoch), the augmentation of a batch from
    (seed, "augment", epoch, step): any batch can be made again on its own, which is what exact resuming needs.
    Images are normalised first and augmented then, so that what `crop` and `cutout` fill in is the mean.

    Args:
        examples: where batches come from.
        batch_size: examples in a batch, >= 1.
        seed: key of shuffling and augmentation.
        shuffle: a new order each epoch, or the order of `examples`.
        augment: names as `prunus.data.augment.parse` takes them, or functions (x, generator) -> x.
        drop_last: leave out the last batch of an epoch when it is not full.
        device: where batches are put.

    Raises:
        InvalidValue: a batch size below 1, no batch in an epoch, or augmentation of what is not images.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        augment: str | Sequence[str | Augment] = (),
        drop_last: bool = False,
        device: torch.device | str = "cpu",
    ):
        if batch_size < 1:
            raise InvalidValue(f"batch_size must be 1 or more, got {batch_size}")
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.augment = parse(augment)
        self.drop_last = drop_last
        self.device = torch.device(device)
        if drop_last and self.steps_per_epoch == 0:
            raise InvalidValue(
                f"{examples.name} has {len(examples)} examples, no full batch of {batch_size}; "
                "use a smaller batch_size or drop_last=False"
            )
        if self.augment and len(examples.input_shape) != 3:
            raise InvalidValue(
                f"augmentation works on images (C, H, W); inputs of {examples.name} have shape {examples.input_shape}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches in an epoch."""
        full, rest = divmod(len(self.examples), self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return self.epoch(0)

    def order(self, epoch: int) -> Tensor:
        """Return the (N,) int64 positions of the examples in the order in which epoch `epoch` visits them."""
        if not self.shuffle:
            return torch.arange(len(self.examples))
        return torch.randperm(len(self.examples), generator=generator(self.seed, "shuffle", epoch))

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return batch `step` of epoch `epoch`: x (B, ...) float32, y (B,) int64, ids (B,) int64, on `device`."""
        return self._make(self.order(epoch), epoch, step)

    def epoch(self, number: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the batches of epoch `number` from `start_step` on, as `batch` returns them.

        Raises:
            InvalidValue: `start_step` is not in 0..steps_per_epoch.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise InvalidValue(f"start_step={start_step} is not in 0..{self.steps_per_epoch}")
        order = self.order(number)
        return (self._make(order, number, step) for step in range(start_step, self.steps_per_epoch))

    def _make(self, order: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        if not 0 <= step < self.steps_per_epoch:
            raise InvalidValue(f"step {step} is not in 0..{self.steps_per_epoch - 1}")
        index = order[step * self.batch_size : (step + 1) * self.batch_size]
        x = self.examples.normalise(self.examples.x[index])
        if self.augment:
            draws = generator(self.seed, "augment", epoch, step)
            for change in self.augment:
                x = change(x, draws)
        y, ids = self.examples.y[index], self.examples.ids[index]
        return x.to(self.device), y.to(self.device), ids.to(self.device)
