"""Evaluation of classifiers: hand cases, brute force, independence of batches, and refusal of broken numbers."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunus.errors import DataDamaged, InvalidValue, NonFinite
from prunus.measure.accuracy import evaluate, expected_calibration_error
from prunus.randomness import generator


class Echo(nn.Module):
    """Returns its input as logits."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def logits_and_labels(n: int = 200, classes: int = 7) -> tuple[Tensor, Tensor]:
    g = generator(0, "logits")
    return 2 * torch.randn(n, classes, generator=g), torch.randint(classes, (n,), generator=g)


def test_hand_case() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [2.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    found = evaluate(Echo(), [(logits, torch.tensor([0, 1, 1, 1]))])
    confidence = math.exp(2) / (math.exp(2) + 2)
    assert (found.accuracy, found.error, found.n) == (0.75, 0.25, 4)
    assert found.per_class_accuracy == (1.0, 2 / 3, None)
    assert (found.worst_class, found.worst_class_accuracy) == (1, 2 / 3)
    assert found.ece == pytest.approx(abs(0.75 - confidence))
    assert found.nll == found.loss == pytest.approx(-(3 * math.log(confidence) + math.log((1 - confidence) / 2)) / 4)


def brute_force_ece(probabilities: Tensor, labels: Tensor, bins: int) -> float:
    total = 0.0
    for b in range(bins):
        rows = [
            (float(p.max()), int(p.argmax()) == int(y))
            for p, y in zip(probabilities, labels)
            if b / bins < float(p.max()) <= (b + 1) / bins
        ]
        if rows:
            accuracy = sum(right for _, right in rows) / len(rows)
            confidence = sum(c for c, _ in rows) / len(rows)
            total += len(rows) / len(labels) * abs(accuracy - confidence)
    return total


def test_against_brute_force() -> None:
    logits, labels = logits_and_labels()
    found = evaluate(Echo(), [(logits, labels)])
    probabilities = logits.double().softmax(1)
    assert found.ece == pytest.approx(brute_force_ece(probabilities, labels, 15), abs=1e-12)
    assert expected_calibration_error(probabilities, labels, 4) == pytest.approx(
        brute_force_ece(probabilities, labels, 4), abs=1e-12
    )
    assert found.nll == pytest.approx(float(F.cross_entropy(logits.double(), labels)), abs=1e-12)
    assert found.accuracy == float((logits.argmax(1) == labels).double().mean())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 199), max_size=5))
def test_the_cut_into_batches_does_not_matter(cuts: list[int]) -> None:
    logits, labels = logits_and_labels()
    bounds = [0, *sorted(set(cuts)), 200]
    pieces = [(logits[a:b], labels[a:b], torch.arange(a, b)) for a, b in itertools.pairwise(bounds)]
    one, many = evaluate(Echo(), [(logits, labels)]), evaluate(Echo(), pieces)
    assert one.per_class_accuracy == many.per_class_accuracy
    assert (one.accuracy, one.n, one.worst_class) == (many.accuracy, many.n, many.worst_class)
    assert one.ece == pytest.approx(many.ece, abs=1e-12)
    assert one.nll == pytest.approx(many.nll, abs=1e-12)


def test_certain_and_right_is_perfectly_calibrated_and_certain_and_wrong_is_not() -> None:
    logits = torch.tensor([[1000.0, 0.0]] * 4)
    assert evaluate(Echo(), [(logits, torch.zeros(4, dtype=torch.long))]).ece == 0.0
    assert evaluate(Echo(), [(logits, torch.ones(4, dtype=torch.long))]).ece == 1.0


def test_own_loss_is_averaged_over_examples_not_batches() -> None:
    logits, labels = logits_and_labels()

    def squared(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits - F.one_hot(labels, 7)).square().mean()

    found = evaluate(Echo(), [(logits[:3], labels[:3]), (logits[3:], labels[3:])], loss=squared)
    assert found.loss == pytest.approx(float(squared(logits, labels)), rel=1e-5)
    assert found.nll != found.loss


def test_modes_gradients_and_randomness_are_left_alone() -> None:
    net = nn.Sequential(nn.Linear(4, 7), nn.Dropout(0.5), nn.BatchNorm1d(7))
    net[2].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes, state = [m.training for m in net.modules()], torch.random.get_rng_state()
    x, y = torch.ones(3, 4), torch.zeros(3, dtype=torch.long)
    assert evaluate(net, [(x, y)]) == evaluate(net, [(x, y)])
    assert modes == [m.training for m in net.modules()]
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with pytest.raises(NonFinite):
        evaluate(net, [(x * math.nan, y)])
    assert modes == [m.training for m in net.modules()]


def test_structured_outputs_are_understood() -> None:
    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=x)

    logits, labels = logits_and_labels()
    assert evaluate(Wrapped(), [(logits, labels)]) == evaluate(Echo(), [(logits, labels)])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_logits_are_refused_with_the_example(bad: float) -> None:
    logits, labels = logits_and_labels()
    logits[123, 4] = bad
    with pytest.raises(NonFinite, match="example 123"):
        evaluate(Echo(), zip(logits.split(50), labels.split(50)))


def test_labels_shapes_and_emptiness() -> None:
    with pytest.raises(DataDamaged, match=r"from -1 to 3.*0\.\.2"):
        evaluate(Echo(), [(torch.zeros(2, 3), torch.tensor([-1, 3]))])
    with pytest.raises(InvalidValue, match="shape"):
        evaluate(Echo(), [(torch.zeros(2, 3, 4), torch.tensor([0, 1]))])
    with pytest.raises(InvalidValue, match="no examples"):
        evaluate(Echo(), [])
