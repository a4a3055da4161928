"""What this machine has: one line per finding, with the remedy where something is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

_OPTIONAL = {
    "torchvision": "vision",
    "timm": "vision",
    "transformers": "llm",
    "accelerate": "llm",
    "datasets": "llm",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "openvino": "bench",
}


class Finding(NamedTuple):
    """One line: what was looked at, what was found, and whether it is as it should be."""

    what: str
    value: str
    ok: bool


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine() -> list[Finding]:
    """Look at versions, threads, the native engine, data folders, disk and optional libraries; nothing is changed."""
    import torch

    found = [
        Finding("prunus", _version("prunus") or "not installed (running from source)", True),
        Finding("python", platform.python_version(), sys.version_info >= (3, 11)),
        Finding("torch", str(torch.__version__), True),
        Finding("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores", True),
        Finding("instructions", str(torch.backends.cpu.get_cpu_capability()), True),
        Finding(
            "accelerator", torch.cuda.get_device_name() if torch.cuda.is_available() else "none (not needed)", True
        ),
    ]
    found.append(_engine())
    for package in ("numpy", "safetensors", "jsonargparse", "rich", "matplotlib", "scikit-learn"):
        version = _version(package)
        found.append(Finding(package, version or "missing; reinstall prunus", version is not None))
    for package, extra in _OPTIONAL.items():
        version = _version(package)
        remedy = f"not installed (optional; pip install 'prunus[{extra}]' with a constraints file that pins torch)"
        found.append(Finding(package, version or remedy, True))
    found += _data()
    free = shutil.disk_usage(".").free / 1e9
    found.append(Finding("disk", f"{free:.1f} GB free here", free > 1.0))
    found.append(
        Finding("this folder", "writable" if os.access(".", os.W_OK) else "not writable", os.access(".", os.W_OK))
    )
    return found


def _engine() -> Finding:
    from prunus.runtime.library import engine, why_not

    if why := why_not():
        return Finding("engine", f"none: {why}", False)
    best, *rest = engine().sets
    return Finding("engine", f"{engine().path}, uses {best}" + (f" (also has {', '.join(rest)})" if rest else ""), True)


def _data() -> list[Finding]:
    root = Path(os.environ.get("PRUNUS_DATA") or "data")
    found = [Finding("digits", "embedded", True)]
    for name, folder in (
        ("cifar10", "cifar-10-batches-bin"),
        ("cifar100", "cifar-100-binary"),
        ("mnist", "MNIST/raw"),
        ("fashion-mnist", "FashionMNIST/raw"),
    ):
        there = (root / folder).is_dir()
        text = str(root / folder) if there else f"not in {root / folder}; set PRUNUS_DATA to the folder that holds it"
        found.append(Finding(name, text, there or "PRUNUS_DATA" not in os.environ))
    return found
