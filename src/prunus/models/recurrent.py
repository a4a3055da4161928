"""Recurrent networks: sequence classifiers and language models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from prunus.errors import InvalidValue, unknown

CELLS: dict[str, Callable[..., nn.RNNBase]] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


def _recurrent(cell: str, inputs: int, hidden: int, layers: int, dropout: float) -> nn.RNNBase:
    if cell not in CELLS:
        raise unknown("recurrent cell", cell, CELLS)
    if hidden < 1 or layers < 1:
        raise InvalidValue(f"hidden={hidden} and layers={layers} must be 1 or more")
    if dropout and layers == 1:
        raise InvalidValue(f"dropout={dropout} acts between recurrent layers; with layers=1 there is nothing between")
    return CELLS[cell](inputs, hidden, num_layers=layers, dropout=dropout, batch_first=True)


class SequenceClassifier(nn.Module):
    """A recurrent network whose last state is classified by a linear layer.

    Args:
        num_classes: number of outputs.
        input_shape: (C, H, W) is read as H steps of C W numbers, (steps, features) as it is, (features,) as
            so many steps of one number.
        cell: "rnn", "gru" or "lstm".
        hidden: width of the state.
        layers: recurrent layers.
        dropout: probability between recurrent layers.
    """

    def __init__(
        self,
        num_classes: int,
        input_shape: tuple[int, ...],
        *,
        cell: str = "gru",
        hidden: int = 64,
        layers: int = 1,
        dropout: float = 0.0,
    ):
        super().__init__()
        if len(input_shape) not in (1, 2, 3) or min(input_shape) < 1:
            raise InvalidValue(
                f"a sequence classifier reads (C, H, W), (steps, features) or (steps,), got {input_shape}"
            )
        features = {1: 1, 2: input_shape[-1], 3: input_shape[0] * input_shape[-1]}[len(input_shape)]
        self.recurrent = _recurrent(cell, features, hidden, layers, dropout)
        self.linear = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, *input_shape) to logits (N, num_classes)."""
        if x.dim() == 4:
            x = x.transpose(1, 2).flatten(2)
        elif x.dim() == 2:
            x = x.unsqueeze(2)
        states, _ = self.recurrent(x)
        return self.linear(states[:, -1])


class LanguageModel(nn.Module):
    """Embedding, recurrent layers, linear head over the vocabulary.

    Zaremba et al., Recurrent Neural Network Regularization, 2014; tied weights after Press and Wolf, Using the
    Output Embedding to Improve Language Models, EACL 2017.

    Args:
        vocabulary: number of tokens.
        input_shape: (tokens,), the length of a sequence; other lengths work too.
        cell: "rnn", "gru" or "lstm".
        embedding: width of the embedding.
        hidden: width of the state.
        layers: recurrent layers.
        dropout: probability on embeddings, between recurrent layers and before the head.
        tied: the head uses the embedding's weights; needs embedding = hidden.
    """

    def __init__(
        self,
        vocabulary: int,
        input_shape: tuple[int, ...],
        *,
        cell: str = "lstm",
        embedding: int = 128,
        hidden: int = 128,
        layers: int = 1,
        dropout: float = 0.0,
        tied: bool = False,
    ):
        super().__init__()
        if len(input_shape) != 1:
            raise InvalidValue(f"a language model reads (tokens,), got input_shape={input_shape}")
        if tied and embedding != hidden:
            raise InvalidValue(f"tied=True needs embedding = hidden, got {embedding} and {hidden}")
        self.dropout = nn.Dropout(dropout)
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.recurrent = _recurrent(cell, embedding, hidden, layers, dropout if layers > 1 else 0.0)
        self.head = nn.Linear(hidden, vocabulary)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.head.weight, -0.1, 0.1)
        nn.init.zeros_(self.head.bias)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (N, T) int64 to next-token logits (N, T, vocabulary), starting from a state of zeros."""
        return self.step(tokens)[0]

    def step(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Map tokens (N, T) and the state after the tokens before (None: zeros) to (logits, new state)."""
        states, state = self.recurrent(self.dropout(self.embedding(tokens)), state)
        return self.head(self.dropout(states)), state


def rnn(
    num_classes: int, input_shape: tuple[int, ...], *, hidden: int = 64, layers: int = 1, dropout: float = 0.0
) -> SequenceClassifier:
    """Elman network (tanh) as a sequence classifier."""
    return SequenceClassifier(num_classes, input_shape, cell="rnn", hidden=hidden, layers=layers, dropout=dropout)


def gru(
    num_classes: int, input_shape: tuple[int, ...], *, hidden: int = 64, layers: int = 1, dropout: float = 0.0
) -> SequenceClassifier:
    """GRU sequence classifier: Cho et al., Learning Phrase Representations, EMNLP 2014."""
    return SequenceClassifier(num_classes, input_shape, cell="gru", hidden=hidden, layers=layers, dropout=dropout)


def lstm(
    num_classes: int, input_shape: tuple[int, ...], *, hidden: int = 64, layers: int = 1, dropout: float = 0.0
) -> SequenceClassifier:
    """LSTM sequence classifier: Hochreiter and Schmidhuber, Long Short-Term Memory, 1997."""
    return SequenceClassifier(num_classes, input_shape, cell="lstm", hidden=hidden, layers=layers, dropout=dropout)


def gru_lm(
    num_classes: int,
    input_shape: tuple[int, ...],
    *,
    embedding: int = 128,
    hidden: int = 128,
    layers: int = 1,
    dropout: float = 0.0,
    tied: bool = False,
) -> LanguageModel:
    """GRU language model over `num_classes` tokens."""
    return LanguageModel(
        num_classes,
        input_shape,
        cell="gru",
        embedding=embedding,
        hidden=hidden,
        layers=layers,
        dropout=dropout,
        tied=tied,
    )


def lstm_lm(
    num_classes: int,
    input_shape: tuple[int, ...],
    *,
    embedding: int = 128,
    hidden: int = 128,
    layers: int = 1,
    dropout: float = 0.0,
    tied: bool = False,
) -> LanguageModel:
    """LSTM language model over `num_classes` tokens."""
    return LanguageModel(
        num_classes,
        input_shape,
        cell="lstm",
        embedding=embedding,
        hidden=hidden,
        layers=layers,
        dropout=dropout,
        tied=tied,
    )
