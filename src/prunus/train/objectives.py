"""Objectives: pure functions from logits and targets to one number to minimise."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from prunus.errors import InvalidValue


def cross_entropy(logits: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy of softmax(logits) against labels.

    With smoothing e the target of class k is (1 - e) [k = y] + e / C (Szegedy et al., Rethinking the Inception
    Architecture, CVPR 2016, section 7).

    Args:
        logits: (B, C) or (B, C, ...) floating point.
        y: (B,) or (B, ...) int64 labels in 0..C-1.
        label_smoothing: e, in [0, 1].

    Returns:
        A scalar, in nats.
    """
    return F.cross_entropy(logits, y, label_smoothing=label_smoothing)


def distillation(
    logits: Tensor,
    teacher_logits: Tensor,
    y: Tensor,
    temperature: float = 4.0,
    weight: float = 0.9,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return (1 - weight) cross-entropy + weight T^2 KL(teacher at T || student at T).

    Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, section 2. Both softmaxes are
    taken of logits / T; the factor T^2 keeps the gradient's size when T changes. The divergence is summed over
    classes and averaged over the batch. No gradient flows to the teacher.

    Args:
        logits, teacher_logits: (B, C) floating point.
        y: (B,) int64 labels.
        temperature: T > 0.
        weight: share of the teacher, in [0, 1]; 0 is plain cross-entropy.
        label_smoothing: of the cross-entropy part.

    Raises:
        InvalidValue: the two sets of logits differ in shape.
    """
    if logits.shape != teacher_logits.shape:
        raise InvalidValue(
            f"the teacher's logits have shape {tuple(teacher_logits.shape)}, the student's {tuple(logits.shape)}; "
            "distillation needs a teacher with the same classes."
        )
    student = F.log_softmax(logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    soft = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
    return (1.0 - weight) * cross_entropy(logits, y, label_smoothing) + weight * soft
