"""Make torchvision importable beside a torch whose build its compiled extension was not made for.

The CPU build of torch together with the torchvision of PyPI cannot load torchvision's extension; the import then
stops because two operators, nms and qnms, are not known. Declaring their schemas is enough for models, transforms
and data sets; the operators themselves stay unavailable.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path

import torch

_SCHEMAS = tuple(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms"))


def repair_torchvision() -> bool:
    """Declare what torchvision misses, if it is installed, not yet imported and its extension cannot load.

    Returns:
        Whether the schemas are declared by this function, now or earlier. Calling it again changes nothing.
    """
    if "torchvision" in sys.modules or hasattr(torch.ops.torchvision, "nms"):
        return _declare.cache_info().currsize > 0
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations or _loads(Path(spec.submodule_search_locations[0])):
        return False
    _declare()
    return True


def _loads(package: Path) -> bool:
    """Whether torchvision's compiled extension, if it has one, loads into this process."""
    for path in sorted([*package.glob("_C*.so"), *package.glob("_C*.pyd")]):
        try:
            torch.ops.load_library(path)
        except OSError:
            continue
        return True
    return False


@functools.cache
def _declare() -> torch.library.Library:
    # The cache keeps the library referenced: when it is collected, its schemas vanish.
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    return library
