"""The table of data sets: what each holds and which files it needs. Importing it does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from prunus.catalog import Catalog, Entry


@dataclass(frozen=True, kw_only=True)
class DatasetInfo(Entry):
    """One row of the table of data sets.

    Attributes:
        classes: number of classes, or None when the files decide.
        input_shape: shape of one example, (channels, height, width), or None when the files decide.
        files: what has to lie under the data root; empty when the data come with an installed package.
        licence: what the makers say about use.
    """

    classes: int | None
    input_shape: tuple[int, ...] | None
    files: tuple[str, ...] = ()
    licence: str

    @property
    def needs_files(self) -> bool:
        """Whether the user has to put files under the data root."""
        return bool(self.files)


_CIFAR_LICENCE = "no explicit licence; cite Krizhevsky, Learning Multiple Layers of Features, 2009"

DATASETS: Catalog[DatasetInfo] = Catalog(
    "data set",
    [
        DatasetInfo(
            name="digits",
            target="prunus.data.digits:read",
            summary="1,797 handwritten digits of 8x8 pixels, shipped with scikit-learn; no files needed",
            classes=10,
            input_shape=(1, 8, 8),
            licence="CC BY 4.0 (UCI, Optical Recognition of Handwritten Digits)",
        ),
        DatasetInfo(
            name="mnist",
            target="prunus.data.files:read_mnist",
            summary="70,000 handwritten digits of 28x28 pixels, idx files",
            classes=10,
            input_shape=(1, 28, 28),
            files=("MNIST/raw",),
            licence="no explicit licence; cite LeCun et al., Gradient-Based Learning, 1998",
        ),
        DatasetInfo(
            name="fashion-mnist",
            target="prunus.data.files:read_fashion_mnist",
            summary="70,000 pieces of clothing of 28x28 pixels, idx files",
            classes=10,
            input_shape=(1, 28, 28),
            files=("FashionMNIST/raw",),
            licence="MIT (Zalando)",
        ),
        DatasetInfo(
            name="cifar10",
            target="prunus.data.files:read_cifar10",
            summary="60,000 colour photographs of 32x32 pixels in 10 classes, binary version",
            classes=10,
            input_shape=(3, 32, 32),
            files=("cifar-10-batches-bin",),
            licence=_CIFAR_LICENCE,
        ),
        DatasetInfo(
            name="cifar100",
            target="prunus.data.files:read_cifar100",
            summary="colour photographs of 32x32 pixels in 100 fine or 20 coarse classes, binary version",
            classes=100,
            input_shape=(3, 32, 32),
            files=("cifar-100-binary",),
            licence=_CIFAR_LICENCE,
        ),
        DatasetInfo(
            name="image-folder",
            target="prunus.data.folder:read",
            summary="your images, one folder per class, optionally below train / validation / test",
            classes=None,
            input_shape=None,
            files=("CLASS/IMAGE or SPLIT/CLASS/IMAGE",),
            licence="yours",
        ),
        DatasetInfo(
            name="arrays",
            target="prunus.data.arrays:read",
            summary="your numpy arrays in one .npz file: x and y, or x_train, y_train, x_test, y_test",
            classes=None,
            input_shape=None,
            files=("arrays.npz",),
            licence="yours",
        ),
        DatasetInfo(
            name="huggingface",
            target="prunus.data.hub:read",
            summary="an image classification set of the `datasets` library, by name; offline unless online=True",
            classes=None,
            input_shape=None,
            licence="see the data set's own card",
        ),
    ],
)
