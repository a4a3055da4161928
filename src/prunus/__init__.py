"""Prunus: prune neural networks and the data they learn from, together.

The names below are imported when first used, so `import prunus` itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Masks": "prunus.masks",
    "prune": "prunus.oneshot",
    "Pruned": "prunus.oneshot",
    "load": "prunus.oneshot",
    "compress": "prunus.runtime.compress",
    "Compressed": "prunus.runtime.compress",
    "export": "prunus.runtime.export",
    "profile": "prunus.runtime.profile",
    "Profile": "prunus.runtime.profile",
    "sparsify": "prunus.sparsifier",
    "Sparsifier": "prunus.sparsifier",
    "Schedule": "prunus.schedule",
    "Plan": "prunus.graph.plan",
    "SmallModel": "prunus.structured.prune",
    "Weight": "prunus.units",
    "NM": "prunus.units",
    "Block": "prunus.units",
    "Row": "prunus.units",
    "Static": "prunus.methods.static",
    "Gradual": "prunus.methods.gradual",
    "GMP": "prunus.methods.gmp",
    "GlobalMP": "prunus.methods.global_mp",
    "LAMPPruning": "prunus.methods.lamp",
    "SET": "prunus.methods.set",
    "RigL": "prunus.methods.rigl",
    "ITOP": "prunus.methods.itop",
    "GraNet": "prunus.methods.granet",
    "ISSP": "prunus.methods.iss_p",
    "SRSTE": "prunus.methods.sr_ste",
    "SoftBound": "prunus.methods.soft_bound",
    "Chase": "prunus.methods.chase",
    "MaskSparsity": "prunus.methods.mask_sparsity",
    "GroupNorm": "prunus.methods.group_norm",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from prunus.masks import Masks as Masks


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'prunus' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
