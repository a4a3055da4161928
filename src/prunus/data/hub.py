"""Image classification sets of the Hugging Face `datasets` library, by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from prunus.data.arrays import carve
from prunus.data.examples import Examples, statistics
from prunus.data.folder import to_pixels
from prunus.errors import DataDamaged, DataMissing, InvalidValue, MissingExtra, Unsupported

_IMAGES = ("image", "img", "pixels")
_LABELS = ("label", "labels", "fine_label")


def read(
    root: Path,
    *,
    dataset: str,
    config: str | None = None,
    image: str | None = None,
    label: str | None = None,
    size: int | tuple[int, int] | None = None,
    grey: bool = False,
    test: float | int = 0.2,
    online: bool = False,
    seed: int = 0,
) -> tuple[Examples, Examples | None, Examples]:
    """Read a set of images and labels into memory as uint8 (N, C, H, W); ids are row numbers.

    Splits named "train", "validation" (or "val", "valid") and "test" are used. Without "test" the validation split
    serves as test set; with "train" alone the test part is drawn class by class.

    Args:
        root: where a set written by `Dataset.save_to_disk` is looked for, as root / dataset; otherwise not used.
        dataset: its name on the hub, or its folder below `root`.
        config: the configuration, for sets that have several.
        image, label: column names; default: the usual ones ("image", "img"; "label", "fine_label").
        size: resize every image to this side, or (height, width).
        grey: read one channel.
        test: fraction or count of test examples when there is only "train".
        online: allow the library to use the network; otherwise only its cache on this machine is read.
        seed: key of the test split.

    Raises:
        MissingExtra: `datasets` is not installed.
        DataMissing: the set is not on this machine and `online` is False.
        Unsupported: columns that are not one image and one class label (text, several labels).
        DataDamaged: as `Examples.from_arrays`, or sizes that differ without `size`.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("Hugging Face data sets need the llm extra: pip install 'prunus[llm]'") from error
    local = root / dataset
    if (local / "dataset_dict.json").is_file() or (local / "dataset_info.json").is_file():
        loaded = datasets.load_from_disk(str(local))
    else:
        try:
            with _network(datasets, online):
                loaded = datasets.load_dataset(dataset, config)
        except (OSError, ValueError, RuntimeError) as error:
            hint = "" if online else "; give online=True to let the library fetch it"
            raise DataMissing(f"the data set {dataset!r} cannot be loaded ({error}){hint}") from error
    splits = dict(loaded) if hasattr(loaded, "keys") else {"train": loaded}
    parts = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation", "test": "test"}
    named = {parts[name]: rows for name, rows in splits.items() if name in parts}
    if "train" not in named:
        raise Unsupported(f"{dataset!r} has the splits {sorted(splits)}; one called train is needed")
    if "test" not in named and "validation" in named:
        named["test"] = named.pop("validation")
    made: dict[str, Examples] = {}
    for part in ("train", "validation", "test"):
        if part in named:
            start = len(made["train"]) if part == "validation" else 0
            made[part] = _examples(named[part], image, label, size, grey, start, f"{dataset} ({part})")
    if "test" not in made:
        return carve(made["train"], test, seed, standardise=True)
    mean, std = statistics(made["train"].x)
    made = {part: examples.normalised_by(mean, std) for part, examples in made.items()}
    return made["train"], made.get("validation"), made["test"]


def _examples(
    rows: Any, image: str | None, label: str | None, size: Any, grey: bool, start: int, name: str
) -> Examples:
    columns = list(rows.column_names)
    image, label = _column(columns, image, _IMAGES, "image", name), _column(columns, label, _LABELS, "label", name)
    feature = rows.features[label]
    classes = getattr(feature, "names", None)
    pixels = []
    for value in rows[image]:
        if not hasattr(value, "convert"):
            raise Unsupported(f"column {image!r} of {name} holds {type(value).__name__}, not images")
        pixels.append(to_pixels(value, size, grey))
    if len({p.shape for p in pixels}) > 1:
        raise DataDamaged(f"images of {name} differ in size; give size= to resize them all")
    if not pixels:
        raise DataDamaged(f"{name} is empty: there must be at least one example")
    labels = list(rows[label])
    if not all(isinstance(value, int) for value in labels):
        raise Unsupported(f"column {label!r} of {name} does not hold one whole number for each image")
    return Examples.from_arrays(
        np.stack(pixels), labels, np.arange(start, start + len(labels)), classes=classes, name=name
    )


def _column(columns: list[str], chosen: str | None, usual: tuple[str, ...], what: str, name: str) -> str:
    if chosen is not None:
        if chosen not in columns:
            raise InvalidValue(f"{name} has no column {chosen!r}; it has {', '.join(columns)}")
        return chosen
    for column in usual:
        if column in columns:
            return column
    raise Unsupported(
        f"{name} has the columns {', '.join(columns)} and none called {' or '.join(usual)}: only sets of images with "
        f"one label are read; name the column with {what}= if it has one, and turn text into arrays yourself"
    )


@contextmanager
def _network(datasets: Any, online: bool) -> Iterator[None]:
    """Keep the libraries off the network for as long as the block runs, unless `online`."""
    places = [datasets.config]
    if importlib.util.find_spec("huggingface_hub") is not None:
        from huggingface_hub import constants

        places.append(constants)
    before = [getattr(place, "HF_HUB_OFFLINE", False) for place in places]
    try:
        if not online:
            for place in places:
                place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before):
            place.HF_HUB_OFFLINE = value
