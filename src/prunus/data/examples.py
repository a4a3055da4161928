"""Examples in memory: inputs, labels and the stable ids by which everything else refers to them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from prunus.errors import DataDamaged, InvalidValue


@dataclass(frozen=True, eq=False)
class Examples(Dataset):  # type: ignore[type-arg]
    """A set of labelled examples, all in memory; also a torch map-style data set giving (x, y, id).

    Attributes:
        x: (N, ...) inputs as they were read, uint8 (0..255) or float32.
        y: (N,) int64 labels, 0 <= y < len(classes).
        ids: (N,) int64, distinct: the position in the official file set. Subsets keep them, so a table keyed
            by id (errors, weights, teacher outputs) fits every subset.
        classes: the class names; their number is the number of classes.
        mean, std: float32 tensors that broadcast against one input, (C, 1, 1) for images or the shape of the
            input for per-feature statistics; in units of `scaled` inputs (uint8 is first divided by 255).
        name: what the set is called in reports and errors.
    """

    x: Tensor
    y: Tensor
    ids: Tensor
    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor
    name: str = "examples"

    def __len__(self) -> int:
        return self.y.numel()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (normalised float32 input, int64 label, int64 id) of the example at `index`."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} examples, there is none at {index}")
        return self.normalise(self.x[index]), self.y[index], self.ids[index]

    @property
    def num_classes(self) -> int:
        """The number of classes, whether or not each occurs here."""
        return len(self.classes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.x.shape[1:])

    def normalise(self, x: Tensor) -> Tensor:
        """Return inputs (raw, batched or single) as float32, scaled to 0..1 if uint8, minus mean, over std."""
        mean, std = self.mean.to(x.device), self.std.to(x.device)
        if x.dtype == torch.uint8:
            # (x / 255 - mean) / std in one pass over the data: x * a + b.
            scale = 1 / (255 * std)
            return torch.addcmul(-mean / std, x.to(torch.float32), scale)
        return (x.to(torch.float32) - mean) / std

    def normalised_by(self, mean: Tensor | Sequence[float], std: Tensor | Sequence[float]) -> Examples:
        """Return the same examples with other statistics.

        Args:
            mean, std: one number per channel, or tensors that broadcast against one input.

        Raises:
            InvalidValue: the statistics do not fit the inputs, or a standard deviation is not above zero.
        """
        mean, std = (_statistic(v, self.input_shape) for v in (mean, std))
        if not bool((std > 0).all()):
            raise InvalidValue(f"std of {self.name} must be above zero, got {std.min().item()}")
        return replace(self, mean=mean, std=std)

    def subset(self, indices: Tensor | Sequence[int]) -> Examples:
        """Return the examples at these positions, in this order; ids are kept.

        Raises:
            InvalidValue: a position does not exist or occurs twice.
        """
        index = torch.as_tensor(indices, dtype=torch.int64)
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= len(self)):
            raise InvalidValue(
                f"positions must lie in 0..{len(self) - 1} of {self.name}, got {int(index.min())}..{int(index.max())}"
            )
        if index.unique().numel() != index.numel():
            raise InvalidValue(f"a position occurs twice in a subset of {self.name}; name each example once")
        return replace(self, x=self.x[index], y=self.y[index], ids=self.ids[index])

    def with_ids(self, ids: Tensor | Sequence[int]) -> Examples:
        """Return the examples that carry these ids, in this order.

        Raises:
            InvalidValue: an id does not occur here, or is asked for twice.
        """
        wanted = torch.as_tensor(ids, dtype=torch.int64)
        if not len(self):
            if wanted.numel():
                raise InvalidValue(f"{self.name} is empty and has no id {int(wanted[0])}")
            return self
        order = self.ids.argsort()
        ordered = self.ids[order]
        place = torch.searchsorted(ordered, wanted).clamp(max=len(self) - 1)
        absent = ordered[place] != wanted
        if bool(absent.any()):
            raise InvalidValue(
                f"{self.name} has no example with id {int(wanted[absent][0])} ({int(absent.sum())} ids missing)"
            )
        return self.subset(order[place])

    def content_hash(self) -> str:
        """Return the SHA-256 (hex) of inputs, labels and ids, with their types and shapes."""
        digest = hashlib.sha256()
        for tensor in (self.x, self.y, self.ids):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def counts(self) -> Tensor:
        """Return the (num_classes,) int64 number of examples of each class."""
        return torch.bincount(self.y, minlength=self.num_classes)

    @classmethod
    def from_arrays(
        cls,
        x: Any,
        y: Any,
        ids: Any = None,
        *,
        classes: Sequence[str] | int | None = None,
        mean: Tensor | Sequence[float] | None = None,
        std: Tensor | Sequence[float] | None = None,
        name: str = "arrays",
    ) -> Examples:
        """Build checked examples from numpy arrays or tensors.

        Args:
            x: (N, ...) inputs; uint8 and float32 are kept, every other numeric type becomes float32.
            y: (N,) whole-number labels.
            ids: (N,) distinct ids; default 0..N-1.
            classes: class names or their number; default: as many as the largest label asks for.
            mean, std: statistics for `normalise`; default 0 and 1 (inputs stay as they are, uint8 over 255).
            name: what errors call the set.

        Raises:
            DataDamaged: no examples, lengths that differ, labels that are out of range, not whole or all the
                same, NaN or infinite inputs, ids that repeat.
        """
        x, y = _inputs(x, name), _whole_numbers(y, "labels", name)
        n = y.numel()
        ids = torch.arange(n) if ids is None else _whole_numbers(ids, "ids", name)
        if not n:
            raise DataDamaged(f"{name} is empty: there must be at least one example")
        if x.shape[0] != n or ids.numel() != n:
            raise DataDamaged(
                f"{name} has {x.shape[0]} inputs, {n} labels and {ids.numel()} ids; the numbers must be equal"
            )
        if classes is None:
            classes = max(int(y.max()) + 1, 1)
        names = tuple(str(i) for i in range(classes)) if isinstance(classes, int) else tuple(classes)
        check_labels(y, len(names), name)
        if ids.unique().numel() != n:
            values, counts = ids.unique(return_counts=True)
            raise DataDamaged(
                f"{name} has repeated ids, such as {int(values[counts > 1][0])}; each example needs its own"
            )
        zero, one = torch.zeros(()), torch.ones(())
        made = cls(x=x, y=y, ids=ids, classes=names, mean=zero, std=one, name=name)
        if (mean is None) != (std is None):
            raise InvalidValue(f"give both mean and std for {name}, or neither")
        return made if mean is None or std is None else made.normalised_by(mean, std)

    @classmethod
    def from_dataset(cls, dataset: Any, *, classes: Sequence[str] | int | None = None) -> Examples:
        """Read a torch map-style data set giving (x, y) or (x, y, id) into memory.

        Inputs may be tensors, arrays or PIL images (which become (C, H, W) uint8); without ids the position
        serves as id. `Examples` are returned as they are.

        Raises:
            InvalidValue: the items are not pairs or triples, or inputs differ in shape.
            DataDamaged: as `from_arrays`.
        """
        if isinstance(dataset, Examples):
            return dataset
        name = type(dataset).__name__
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise InvalidValue(f"{name} has no length or no items; a map-style data set is needed")
        rows = [dataset[i] for i in range(len(dataset))]
        if not rows:
            raise DataDamaged(f"{name} is empty: there must be at least one example")
        widths = {len(row) if isinstance(row, (tuple, list)) else 0 for row in rows}
        if widths not in ({2}, {3}):
            raise InvalidValue(f"items of {name} must all be (x, y) or all (x, y, id)")
        inputs = [_one_input(row[0]) for row in rows]
        shapes = {tuple(x.shape) for x in inputs}
        if len(shapes) > 1:
            raise InvalidValue(f"inputs of {name} have {len(shapes)} shapes, such as {sorted(shapes)[:3]}; resize them")
        labels = [int(row[1]) for row in rows]
        ids = [int(row[2]) for row in rows] if widths == {3} else None
        if classes is None:
            classes = getattr(dataset, "classes", None)
        return cls.from_arrays(torch.stack(inputs), labels, ids, classes=classes, name=name)


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set ready for use: three sets of examples that share classes and statistics.

    Attributes:
        train, validation, test: validation is carved from the training files, never from the test files, and
            is empty when none was asked for. Ids of train and validation are disjoint; test ids count the
            test files on their own unless one file holds everything (as digits does).
        name: the data set's name.
    """

    train: Examples
    validation: Examples
    test: Examples
    name: str

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return self.train.num_classes

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, (C, H, W) or (features,)."""
        return self.train.input_shape

    def map(self, change: Callable[[Examples], Examples]) -> Splits:
        """Return the splits with `change` applied to each set."""
        return replace(self, train=change(self.train), validation=change(self.validation), test=change(self.test))


def statistics(x: Tensor, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """Return float32 mean and population standard deviation of inputs, uint8 counted as 0..1.

    Images (N, C, H, W) give one pair per channel, shape (C, 1, 1); anything else one per feature, shape of one
    input. A feature that never changes gets the standard deviation 1, so that normalising leaves it at 0.
    Sums run in float64 over chunks, so that memory stays small and rounding does not matter.
    """
    axes = (0, 2, 3) if x.dim() == 4 else (0,)
    count, total, square = 0, torch.zeros(()), torch.zeros(())
    first = x[:1].to(torch.float64).mean(axes, keepdim=True)
    for part in x.split(chunk):
        # Shifting by one example keeps the difference of squares below free of cancellation.
        shifted = part.to(torch.float64) - first
        total = total + shifted.sum(axes, keepdim=True)
        square = square + shifted.square().sum(axes, keepdim=True)
        count += part.numel() // first.numel()
    mean = total / count
    std = (square / count - mean.square()).clamp(min=0).sqrt()
    scale = 255.0 if x.dtype == torch.uint8 else 1.0
    mean, std = ((mean + first) / scale).squeeze(0), (std / scale).squeeze(0)
    std = torch.where(std > 1e-12, std, torch.ones_like(std))
    return mean.to(torch.float32), std.to(torch.float32)


def check_labels(y: Tensor, classes: int, name: str) -> None:
    """Check int64 labels.

    Raises:
        DataDamaged: a label is not in 0..classes-1, or all labels are the same.
    """
    wrong = (y < 0) | (y >= classes)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise DataDamaged(f"label {int(y[at])} of example {at} in {name} is not in 0..{classes - 1}")
    if y.numel() and int(y.min()) == int(y.max()):
        raise DataDamaged(f"all {y.numel()} examples of {name} have label {int(y[0])}; two classes are needed")


def _statistic(value: Tensor | Sequence[float], shape: tuple[int, ...]) -> Tensor:
    tensor = torch.as_tensor(value, dtype=torch.float32)
    if tensor.dim() == 1 and len(shape) == 3:
        tensor = tensor.view(-1, 1, 1)
    try:
        fits = torch.broadcast_shapes(tensor.shape, shape) == torch.Size(shape)
    except RuntimeError:
        fits = False
    if not fits:
        raise InvalidValue(f"statistics of shape {tuple(tensor.shape)} do not fit inputs of shape {shape}")
    return tensor


def _inputs(x: Any, name: str) -> Tensor:
    tensor = _numbers(x, "inputs", name)
    if tensor.dtype not in (torch.uint8, torch.float32):
        if tensor.is_complex():
            raise DataDamaged(f"inputs of {name} are complex numbers; real numbers are needed")
        tensor = tensor.to(torch.float32)
    if tensor.dim() < 2:
        raise DataDamaged(f"inputs of {name} have shape {tuple(tensor.shape)}; (examples, ...) is needed")
    if tensor.dtype == torch.float32 and not bool(torch.isfinite(tensor).all()):
        at = int((~torch.isfinite(tensor)).flatten(1).any(1).nonzero()[0])
        raise DataDamaged(f"the input of example {at} in {name} holds NaN or infinity")
    return tensor.contiguous()


def _whole_numbers(values: Any, what: str, name: str) -> Tensor:
    tensor = _numbers(values, what, name)
    if tensor.dim() != 1:
        raise DataDamaged(f"{what} of {name} have shape {tuple(tensor.shape)}; one number per example is needed")
    whole = tensor.to(torch.int64)
    if tensor.is_floating_point() and not bool((whole == tensor).all()):
        raise DataDamaged(f"{what} of {name} are not whole numbers")
    return whole


def _numbers(values: Any, what: str, name: str) -> Tensor:
    try:
        return torch.as_tensor(np.asarray(values) if isinstance(values, (list, tuple)) else values)
    except (TypeError, ValueError) as error:
        raise DataDamaged(f"{what} of {name} are not an array of numbers: {error}") from error


def _one_input(x: Any) -> Tensor:
    if hasattr(x, "getbands"):
        pixels = np.array(x, dtype=np.uint8)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(pixels))
    return torch.as_tensor(x)
