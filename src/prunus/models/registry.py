"""The table of reference networks. Importing it does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from prunus.catalog import Catalog, Entry


@dataclass(frozen=True, kw_only=True)
class ModelInfo(Entry):
    """One row of the table of models.

    Attributes:
        family: "mlp", "cnn", "resnet", "transformer", "recurrent" or "language".
        input_shape: the shape of one input that the network was designed for; others work where sensible.
    """

    family: str
    input_shape: tuple[int, ...]


_CIFAR = (3, 32, 32)


def _resnet(depth: int) -> ModelInfo:
    return ModelInfo(
        name=f"resnet{depth}",
        target=f"prunus.models.resnet:resnet{depth}",
        summary=f"ResNet-{depth} for CIFAR, 16-32-64 channels, shortcut A or B",
        family="resnet",
        input_shape=_CIFAR,
    )


MODELS: Catalog[ModelInfo] = Catalog(
    "model",
    [
        ModelInfo(
            name="mlp",
            target="prunus.models.mlp:MLP",
            summary="fully connected, hidden layers of your choice, ReLU",
            family="mlp",
            input_shape=(1, 8, 8),
        ),
        ModelInfo(
            name="lenet",
            target="prunus.models.mlp:lenet",
            summary="LeNet-300-100, fully connected",
            family="mlp",
            input_shape=(1, 28, 28),
        ),
        ModelInfo(
            name="lenet5",
            target="prunus.models.lenet5:LeNet5",
            summary="LeNet-5, convolutional, ReLU and max pooling",
            family="cnn",
            input_shape=(1, 28, 28),
        ),
        ModelInfo(
            name="vgg-small",
            target="prunus.models.vgg:VGGSmall",
            summary="six 3x3 convolutions with batch norm, 64-128-256 channels",
            family="cnn",
            input_shape=_CIFAR,
        ),
        *(_resnet(depth) for depth in (20, 32, 44, 56, 110)),
        ModelInfo(
            name="resnet18",
            target="prunus.models.resnet:resnet18",
            summary="ResNet-18 with a 3x3 stem for 32x32 images, 64-128-256-512 channels",
            family="resnet",
            input_shape=_CIFAR,
        ),
        ModelInfo(
            name="wrn",
            target="prunus.models.wrn:WideResNet",
            summary="wide ResNet, pre-activation, depth and width of your choice (WRN-16-4)",
            family="resnet",
            input_shape=_CIFAR,
        ),
        ModelInfo(
            name="vit",
            target="prunus.models.vit:ViT",
            summary="small vision transformer for small images",
            family="transformer",
            input_shape=_CIFAR,
        ),
        *(
            ModelInfo(
                name=cell,
                target=f"prunus.models.recurrent:{cell}",
                summary=f"{cell.upper()} sequence classifier; an image is read row by row",
                family="recurrent",
                input_shape=(1, 28, 28),
            )
            for cell in ("rnn", "gru", "lstm")
        ),
        ModelInfo(
            name="random-graph-rnn",
            target="prunus.models.random_graph_rnn:RandomGraphRNN",
            summary="recurrent sequence classifier wired like a random graph; drawing one needs networkx",
            family="recurrent",
            input_shape=(1, 28, 28),
        ),
        *(
            ModelInfo(
                name=f"{cell}-lm",
                target=f"prunus.models.recurrent:{cell}_lm",
                summary=f"{cell.upper()} language model; num_classes is the vocabulary, input (tokens,)",
                family="language",
                input_shape=(35,),
            )
            for cell in ("gru", "lstm")
        ),
    ],
)
