"""Scores from paths through the net, without data."""

from __future__ import annotations

from torch import Tensor


def synflow(weight: Tensor, flow_gradient: Tensor) -> Tensor:
    """Return |w * dR/d|w||, where R is the summed output for an all-ones input with all parameters made positive.

    Summed over a layer it equals R for bias-free ReLU nets (conservation), so no layer collapses while rounds are
    many. Gates and normalised weights can make dR/d|w| negative; its size counts, as in the authors' code. Source:
    SynFlow (Tanaka et al., NeurIPS 2020, eq. 9).
    """
    return (weight * flow_gradient).abs()
