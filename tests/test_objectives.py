"""Objectives against values worked out by hand."""

import math

import pytest
import torch

from prunus.errors import InvalidValue
from prunus.train.objectives import cross_entropy, distillation


def test_cross_entropy_by_hand():
    # softmax of (ln 3, 0) is (3/4, 1/4).
    logits = torch.tensor([[math.log(3.0), 0.0], [math.log(3.0), 0.0]], dtype=torch.float64)
    y = torch.tensor([0, 1])
    assert cross_entropy(logits, y).item() == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)


def test_label_smoothing_by_hand():
    logits = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    # e = 0.2 over two classes: targets 0.9 and 0.1.
    expected = -(0.9 * math.log(0.75) + 0.1 * math.log(0.25))
    assert cross_entropy(logits, torch.tensor([0]), 0.2).item() == pytest.approx(expected)


def test_distillation_by_hand():
    # At temperature 2 the student's (2 ln 3, 0) becomes (ln 3, 0): probabilities (3/4, 1/4); the teacher's (0, 0): 1/2.
    student = torch.tensor([[2 * math.log(3.0), 0.0]], dtype=torch.float64)
    teacher = torch.zeros(1, 2, dtype=torch.float64)
    divergence = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    hard = -math.log(0.9)
    found = distillation(student, teacher, torch.tensor([0]), temperature=2.0, weight=0.3)
    assert found.item() == pytest.approx(0.7 * hard + 0.3 * 4.0 * divergence)


def test_distillation_identities():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=g, dtype=torch.float64)
    y = torch.randint(4, (5,), generator=g)
    assert distillation(logits, logits, y, 3.0, 1.0).item() == pytest.approx(0.0, abs=1e-12)
    assert distillation(logits, -logits, y, 3.0, 0.0).item() == pytest.approx(cross_entropy(logits, y).item())


def test_no_gradient_reaches_the_teacher():
    student = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    teacher = torch.zeros(3, 4, requires_grad=True)
    distillation(student, teacher, torch.tensor([0, 1, 2])).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_gradient_size_survives_the_temperature():
    # Hinton et al.: with the factor T^2 the soft gradient tends to (student - teacher) / C for zero-mean logits.
    student = torch.tensor([[0.3, -0.3]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-0.1, 0.1]], dtype=torch.float64)
    distillation(student, teacher, torch.tensor([0]), temperature=1000.0, weight=1.0).backward()
    assert student.grad.tolist()[0] == pytest.approx([0.2, -0.2], rel=1e-3)


def test_other_classes_are_refused():
    with pytest.raises(InvalidValue, match="same classes"):
        distillation(torch.zeros(2, 3), torch.zeros(2, 4), torch.tensor([0, 1]))
