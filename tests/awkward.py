"""Models that break assumptions: each with inputs and labels that fit it, built alike every time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

CLASSES = 3
BATCH = 6


@dataclass(frozen=True)
class Case:
    """One model builder, the shape of one of its inputs (or the size of its vocabulary), and its dtype."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (8,)
    vocabulary: int = 0
    dtype: torch.dtype = torch.float32

    def build(self, seed: int = 0) -> nn.Module:
        """Return the model, the same for equal seeds; the global random state is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make()

    def batch(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return inputs and labels."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        if self.vocabulary:
            return torch.randint(self.vocabulary, (BATCH, *self.shape), generator=generator), labels
        return torch.randn(BATCH, *self.shape, generator=generator).to(self.dtype), labels

    def batches(self, count: int = 2) -> list[tuple[Tensor, Tensor]]:
        """Return several batches."""
        return [self.batch(seed) for seed in range(count)]

    def __str__(self) -> str:
        return self.name


class Pooled(nn.Module):
    """Convolutions, then the mean over positions, then a linear classifier."""

    def __init__(self, *layers: nn.Module, channels: int):
        super().__init__()
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(2).mean(2))


class Recurrent(nn.Module):
    """A recurrent layer whose outputs are averaged and classified."""

    def __init__(self, layer: nn.RNNBase, width: int):
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0].mean(1))


class Attention(nn.Module):
    """Self-attention, averaged and classified; `kdim` splits the packed projection into three."""

    def __init__(self, kdim: int | None = None):
        super().__init__()
        self.keys = nn.Linear(8, kdim) if kdim else nn.Identity()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=kdim, vdim=kdim)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        keys = self.keys(x)
        return self.head(self.attention(x, keys, keys)[0].mean(1))


class TiedEmbedding(nn.Module):
    """A token model whose output layer shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.middle = nn.Linear(8, 8)
        self.output = nn.Linear(8, 7, bias=False)
        self.output.weight = self.embedding.weight
        self.head = nn.Linear(7, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.output(self.middle(self.embedding(ids)).relu()).mean(1))


class TiedLinear(nn.Module):
    """Two layers of different names with one weight between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu())


class Twice(nn.Module):
    """One module that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(x).relu()).relu())


class Unused(nn.Module):
    """A model with a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.never = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).relu())


class Oddities(nn.Module):
    """Parameters that cannot be pruned beside ones that can: a scalar, an empty tensor, whole numbers, complex ones."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.empty = nn.Parameter(torch.zeros(0, 8))
        self.whole = nn.Parameter(torch.ones(4, 4, dtype=torch.int64), requires_grad=False)
        self.phase = nn.Parameter(torch.ones(4, 4, dtype=torch.complex64))
        self.layer = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).relu() * self.scale)


class TwoInputs(nn.Module):
    """A bilinear layer fed with one tensor twice."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(8, 8, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pair(x, x).relu())


def mlp(width: int = 20, inputs: int = 8) -> nn.Module:
    """Return the plain case; the sizes 8 * 20, 20 * 10 and 10 * 3 are multiples of five and ten."""
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, 10), nn.ReLU(), nn.Linear(10, CLASSES))


def _frozen() -> nn.Module:
    model = mlp()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    return model


def _spectral() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 10)), nn.ReLU(), nn.Linear(10, CLASSES))


def _weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 10)), nn.ReLU(), nn.Linear(10, CLASSES))


def _torch_pruned() -> nn.Module:
    model = mlp()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def _compiled() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.compile(mlp(), backend="eager")  # type: ignore[return-value]


def _norms_and_dropout() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, CLASSES, bias=False)
    )


MLP = Case("mlp", mlp)
CONV = Case(
    "convolution",
    lambda: Pooled(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), channels=4),
    (3, 5, 5),
)

AWKWARD: tuple[Case, ...] = (
    MLP,
    CONV,
    Case("tied embedding", TiedEmbedding, (4,), vocabulary=7),
    Case("tied linear", TiedLinear),
    Case("shared module", Twice),
    Case("grouped", lambda: Pooled(nn.Conv2d(6, 8, 3, groups=2), nn.ReLU(), channels=8), (6, 4, 4)),
    Case("depthwise", lambda: Pooled(nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), channels=6), (6, 4, 4)),
    Case("one-dimensional", lambda: Pooled(nn.Conv1d(4, 8, 3), nn.ReLU(), channels=8), (4, 9)),
    Case("three-dimensional", lambda: Pooled(nn.Conv3d(2, 4, 2), nn.ReLU(), channels=4), (2, 3, 3, 3)),
    Case("transposed", lambda: Pooled(nn.ConvTranspose2d(6, 4, 3), nn.ReLU(), channels=4), (6, 3, 3)),
    Case("grouped transposed", lambda: Pooled(nn.ConvTranspose2d(6, 4, 3, groups=2), nn.ReLU(), channels=4), (6, 3, 3)),
    Case(
        "channels last",
        lambda: Pooled(nn.Conv2d(3, 8, 3), nn.ReLU(), channels=8).to(memory_format=torch.channels_last),
        (3, 5, 5),
    ),
    Case("frozen", _frozen),
    Case("bf16", lambda: mlp().to(torch.bfloat16), dtype=torch.bfloat16),
    Case("float64", lambda: mlp().double(), dtype=torch.float64),
    Case("spectral norm", _spectral),
    Case("weight norm", _weight_norm),
    Case("torch.nn.utils.prune", _torch_pruned),
    Case("batch norm and dropout", _norms_and_dropout),
    Case("lstm", lambda: Recurrent(nn.LSTM(5, 6, batch_first=True, bidirectional=True), 12), (4, 5)),
    Case("lstm with projection", lambda: Recurrent(nn.LSTM(5, 6, 2, batch_first=True, proj_size=3), 3), (4, 5)),
    Case("gru", lambda: Recurrent(nn.GRU(5, 6, batch_first=True), 6), (4, 5)),
    Case("rnn", lambda: Recurrent(nn.RNN(5, 6, batch_first=True), 6), (4, 5)),
    Case("attention", Attention, (4, 8)),
    Case("attention with other keys", lambda: Attention(6), (4, 8)),
    Case("bilinear", TwoInputs),
    Case("compiled", _compiled),
    Case("layer that never runs", Unused),
    Case("tiny", lambda: nn.Sequential(nn.Linear(1, 1), nn.Linear(1, CLASSES)), (1,)),
    Case("oddities", Oddities),
)

NOTHING_PRUNABLE = Case("only norms", lambda: nn.Sequential(nn.BatchNorm1d(8), nn.LayerNorm(8)))


def case(name: str) -> Case:
    """Return the case called `name`."""
    return next(c for c in AWKWARD if c.name == name)
