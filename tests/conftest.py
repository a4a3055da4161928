"""What all tests share: two threads, and where real data lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Return the folder of real data sets, or skip with the remedy."""
    root = os.environ.get("PRUNUS_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("set PRUNUS_DATA to a folder with cifar-10-batches-bin, MNIST/raw, FashionMNIST/raw to run this")
    return Path(root)
