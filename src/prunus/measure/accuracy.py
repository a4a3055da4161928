"""How good a classifier is: accuracy, its worst class, its loss, and whether its confidence can be believed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunus.errors import DataDamaged, InvalidValue, NonFinite
from prunus.measure.forwarding import call, device_of, evaluating, logits_of, to_device

BINS = 15


@dataclass(frozen=True)
class Evaluation:
    """What one pass over labelled examples says about a classifier.

    Attributes:
        accuracy: share of examples whose largest logit is at the label (the lowest class wins ties).
        loss: mean of the loss that was asked for over the examples; the negative log-likelihood by default.
        n: how many examples.
        per_class_accuracy: one share per class, None for a class without examples.
        worst_class: the class with the lowest accuracy (lowest index among equals).
        ece: expected calibration error over 15 equally wide confidence bins.
        nll: mean negative log-likelihood in nats.
    """

    accuracy: float
    loss: float
    n: int
    per_class_accuracy: tuple[float | None, ...]
    worst_class: int
    ece: float
    nll: float

    @property
    def error(self) -> float:
        """Share of examples that are classified wrongly."""
        return 1.0 - self.accuracy

    @property
    def worst_class_accuracy(self) -> float:
        """Accuracy of the worst class that has examples."""
        return min(a for a in self.per_class_accuracy if a is not None)


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Evaluation:
    """Evaluate a classifier in eval mode without gradients; the modes of all its modules are restored.

    The result does not depend on how the examples are cut into batches, up to float64 rounding of the sums (and up to
    what the model itself computes differently for another batch size).

    Args:
        model: maps x to logits of shape (batch, classes), or to an object with such `.logits`.
        batches: yields (x, y) or (x, y, ids); y holds class indices of shape (batch,). Tensors are moved to the
            device of the model.
        loss: a function of (logits, y) that returns the mean over the batch; default cross-entropy.

    Raises:
        InvalidValue: no examples, or shapes that do not fit.
        DataDamaged: a label is not one of the classes.
        NonFinite: a logit is NaN or infinite.
    """
    device = device_of(model)
    sums: _Sums | None = None
    with evaluating(model), torch.inference_mode():
        for batch in batches:
            x, y = to_device(batch[0], device), to_device(batch[1], device)
            if len(y) == 0:
                continue
            logits = logits_of(call(model, x))
            _check(logits, y, 0 if sums is None else sums.n)
            if sums is None:
                sums = _Sums(logits.shape[1])
            sums.add(logits, y, loss)
    if sums is None:
        raise InvalidValue("no examples to evaluate on: the batches were empty.")
    return sums.result()


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Return the expected calibration error of predicted probabilities.

    Bin b holds the examples whose largest probability lies in (b / bins, (b + 1) / bins];
    ECE = sum_b |correct_b - confidence_b| / n, with sums over the examples of a bin.

    Args:
        probabilities: shape (n, classes), rows sum to 1.
        labels: shape (n,), class indices.
        bins: how many equally wide bins.

    Source: Naeini, Cooper and Hauskrecht, AAAI 2015; the 15 bins follow Guo et al., ICML 2017.
    """
    confidence, predicted = probabilities.to(torch.float64).max(dim=1)
    gap = _binned(confidence, predicted == labels, bins)
    return float(gap.abs().sum() / max(1, len(labels)))


def _binned(confidence: Tensor, correct: Tensor, bins: int) -> Tensor:
    """Return the sum of (correct - confidence) per bin, float64 of shape (bins,)."""
    edges = torch.arange(1, bins, dtype=torch.float64, device=confidence.device) / bins
    index = torch.bucketize(confidence, edges)
    gap = correct.to(torch.float64) - confidence
    # On the CPU, so that the order of the sum (hence its last bit) is fixed.
    return torch.zeros(bins, dtype=torch.float64).index_add_(0, index.cpu(), gap.cpu())


def _check(logits: Tensor, labels: Tensor, offset: int) -> None:
    if logits.ndim != 2 or labels.ndim != 1 or len(logits) != len(labels):
        raise InvalidValue(
            f"expected logits of shape (batch, classes) and labels of shape (batch,), "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    finite = torch.isfinite(logits).all(dim=1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise NonFinite(
            f"the logits of example {offset + row} contain NaN or infinity; the weights or the inputs are broken "
            "(a learning rate that is too large is the usual cause)."
        )
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise DataDamaged(
            f"labels run from {int(labels.min())} to {int(labels.max())}, "
            f"but the model has the {logits.shape[1]} classes 0..{logits.shape[1] - 1}."
        )


class _Sums:
    """Running sums of one evaluation, in float64 and integers."""

    def __init__(self, classes: int):
        self.n = 0
        self.correct = torch.zeros(classes, dtype=torch.int64)
        self.count = torch.zeros(classes, dtype=torch.int64)
        self.gap = torch.zeros(BINS, dtype=torch.float64)
        self.nll = 0.0
        self.loss: float | None = None

    def add(self, logits: Tensor, labels: Tensor, loss: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        classes = len(self.count)
        log_probabilities = F.log_softmax(logits.to(torch.float64), dim=1)
        confidence = log_probabilities.amax(dim=1).exp()
        right = logits.argmax(dim=1) == labels
        self.n += len(labels)
        self.count += torch.bincount(labels, minlength=classes).cpu()
        self.correct += torch.bincount(labels[right], minlength=classes).cpu()
        self.gap += _binned(confidence, right, BINS)
        self.nll += float(F.nll_loss(log_probabilities, labels, reduction="sum"))
        if loss is not None:
            self.loss = (self.loss or 0.0) + float(loss(logits, labels)) * len(labels)

    def result(self) -> Evaluation:
        per_class = tuple(
            int(c) / int(n) if int(n) else None for c, n in zip(self.correct.tolist(), self.count.tolist())
        )
        seen = [(a, i) for i, a in enumerate(per_class) if a is not None]
        nll = self.nll / self.n
        return Evaluation(
            accuracy=int(self.correct.sum()) / self.n,
            loss=nll if self.loss is None else self.loss / self.n,
            n=self.n,
            per_class_accuracy=per_class,
            worst_class=min(seen)[1],
            ece=float(self.gap.abs().sum()) / self.n,
            nll=nll,
        )
