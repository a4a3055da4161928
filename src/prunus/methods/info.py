"""What the table of methods says about each. No import of torch here."""

from __future__ import annotations

from dataclasses import dataclass

from prunus.catalog import Entry


@dataclass(frozen=True, kw_only=True)
class MethodInfo(Entry):
    """One method, on the axes of the pruning literature.

    Attributes:
        kind: "step" (attaches to any training loop) or "procedure" (runs whole trainings as stages).
        unit: what goes: "weight", "N:M", ...
        when: "at initialisation", "during training", "after training", or combinations.
        score: what ranks.
        scope: who competes.
        data: what it needs beyond the training loop: "none", "labelled batch", "calibration inputs".
        retraining: whether training goes on after pruning: "trains sparse", "fine-tunes", "retrains", "no".
        fusion: what it combines with.
        speedup: "specific" (needs sparse kernels or hardware) or "universal".
        source: where it comes from.
        note: what deviates from the source, or is not verified there.
    """

    kind: str
    unit: str
    when: str
    score: str
    scope: str
    data: str
    retraining: str
    fusion: str
    speedup: str
    source: str
    note: str
