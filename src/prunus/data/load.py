"""`load`: one function from a data set's name to its checked, split examples."""

from __future__ import annotations

import inspect
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prunus.data.examples import Examples, Splits, check_labels
from prunus.data.options import check_options
from prunus.data.registry import DATASETS
from prunus.data.split import amount, stratified
from prunus.errors import InvalidValue


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """Return where data files are looked for: `root`, else the environment's PRUNUS_DATA, else ./data."""
    return Path(root if root is not None else os.environ.get("PRUNUS_DATA") or "data").expanduser()


def load(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    validation: float | int | None = 0.1,
    seed: int = 0,
    limit: int | None = None,
    **options: Any,
) -> Splits:
    """Read a data set and split it.

    Args:
        name: a name of `prunus.data.registry.DATASETS`.
        root: folder of the data files (for "arrays" also the .npz file itself); default PRUNUS_DATA, else ./data.
        validation: how much of the training files becomes the validation set: a fraction, a count, or 0. Drawn
            class by class in proportion, keyed by `seed`. If the data set has a validation part of its own, a
            number first joins it to the training part, and None takes it as it is (None without one: empty).
        seed: key of the split and of `limit`.
        limit: keep only so many training examples (after validation is set aside), equally many of each class.
        **options: what the reader of this data set takes.

    Raises:
        UnknownName: no such data set or option.
        DataMissing: files are not there; the message names them and where they were looked for.
        DataDamaged: files are truncated, have labels out of range, a single class, or nothing in them.
        InvalidValue: a size that cannot be met.
    """
    entry = DATASETS.entry(name)
    read = entry.load()
    check_options(read, options, f"option of data set {entry.name!r}")
    if "seed" in inspect.signature(read).parameters:
        options["seed"] = seed
    train, own, test = read(data_root(root), **options)
    empty = torch.empty(0, dtype=torch.int64)
    if own is None or validation is not None:
        train = train if own is None else join(train, own)
        held = stratified(
            train.y, amount(validation or 0, len(train), "validation"), train.num_classes, seed, "validation"
        )
        kept = torch.ones(len(train), dtype=torch.bool)
        kept[held] = False
        own, train = (
            (train.subset(held), train.subset(kept.nonzero().flatten())) if len(held) else (train.subset(empty), train)
        )
    if limit is not None:
        if not 2 <= limit <= len(train):
            raise InvalidValue(f"limit={limit} must lie in 2..{len(train)}, the training examples of {entry.name}")
        train = train.subset(stratified(train.y, limit, train.num_classes, seed, "limit", balanced=True))
    check_labels(train.y, train.num_classes, f"{entry.name} (train)")
    parts = [
        replace(part, name=f"{entry.name}/{role}")
        for part, role in ((train, "train"), (own, "validation"), (test, "test"))
    ]
    return Splits(train=parts[0], validation=parts[1], test=parts[2], name=entry.name)


def join(first: Examples, second: Examples) -> Examples:
    """Return both sets as one, with the classes and statistics of the first.

    Raises:
        InvalidValue: classes or input shapes differ, or an id occurs in both.
    """
    if first.classes != second.classes or first.input_shape != second.input_shape:
        raise InvalidValue(f"{first.name} and {second.name} differ in classes or input shape and cannot be joined")
    ids = torch.cat([first.ids, second.ids])
    if ids.unique().numel() != ids.numel():
        raise InvalidValue(f"{first.name} and {second.name} share ids and cannot be joined")
    return replace(first, x=torch.cat([first.x, second.x]), y=torch.cat([first.y, second.y]), ids=ids)
