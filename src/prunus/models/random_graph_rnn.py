"""Recurrent networks whose wiring is a random graph: one unit per vertex, one layer per depth of the graph.

Source: Darji, Investigating Sparsity in Recurrent Neural Networks, master's thesis, University of Passau, 2024
(arXiv 2407.20601).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prunus.errors import InvalidValue, MaskMismatch, unknown
from prunus.models.random_graph import Edge, Wiring, random_wiring, wiring

MODES = {"rnn_tanh": ("RNN_TANH", 1), "rnn_relu": ("RNN_RELU", 1), "gru": ("GRU", 3), "lstm": ("LSTM", 4)}


def tile_gates(mask: Tensor, gates: int) -> Tensor:
    """Return the mask of all gates, (gates * hidden, inputs), from that of the units, (hidden, inputs).

    Gates lie one below the other in blocks of `hidden` rows, so the whole mask is repeated, not each row: rows u,
    hidden + u, 2 hidden + u, ... belong to unit u.
    """
    return mask.repeat(gates, 1)


class MaskedRecurrent(nn.RNNBase):
    """One recurrent layer, batch first, with a fixed pattern of connections on each of its two matrices.

    Parameters are those of torch's RNN, GRU and LSTM (names, shapes, gate order), so weights can be copied both ways;
    with full patterns the outputs are the same. Entries outside the patterns are zero, have zero gradients, and act
    on nothing.

    Args:
        mode: "rnn_tanh", "rnn_relu", "gru" or "lstm".
        input_size, hidden_size: as in torch.
        inputs: bool (hidden, inputs), which input reaches which unit; default all.
        states: bool (hidden, hidden), which unit's state reaches which unit; default all.

    Raises:
        UnknownName: no such mode.
        MaskMismatch: a pattern of another shape or type.
    """

    pattern_ih: Tensor
    pattern_hh: Tensor
    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    bias_ih_l0: Tensor
    bias_hh_l0: Tensor

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        *,
        inputs: Tensor | None = None,
        states: Tensor | None = None,
    ):
        if mode not in MODES:
            raise unknown("recurrent cell", mode, MODES)
        name, gates = MODES[mode]
        super().__init__(name, input_size, hidden_size, batch_first=True)
        for role, pattern, width in (("ih", inputs, input_size), ("hh", states, hidden_size)):
            if pattern is None:
                pattern = torch.ones(hidden_size, width, dtype=torch.bool)
            if pattern.shape != (hidden_size, width) or pattern.dtype != torch.bool:
                raise MaskMismatch(
                    f"a pattern of {pattern.dtype} {tuple(pattern.shape)} was given where bool "
                    f"{(hidden_size, width)} is needed"
                )
            self.register_buffer(f"pattern_{role}", tile_gates(pattern, gates))
        self.clear()

    @torch.no_grad()
    def clear(self) -> None:
        """Set weights outside the patterns to zero; call it after writing weights from elsewhere."""
        self.weight_ih_l0.masked_fill_(~self.pattern_ih, 0.0)
        self.weight_hh_l0.masked_fill_(~self.pattern_hh, 0.0)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Map (N, T, inputs) to the states of all steps, (N, T, hidden), starting from zeros or `state` (N, hidden).

        An LSTM starts with a cell of zeros in both cases.
        """
        if state is None:
            state = x.new_zeros(x.shape[0], self.hidden_size)
        start = state.unsqueeze(0)
        weights = [
            self.weight_ih_l0 * self.pattern_ih,
            self.weight_hh_l0 * self.pattern_hh,
            self.bias_ih_l0,
            self.bias_hh_l0,
        ]
        # Has biases, one layer, no dropout, not bidirectional, batch first.
        options = (True, 1, 0.0, self.training, False, True)
        if self.mode == "LSTM":
            return torch.lstm(x, [start, torch.zeros_like(start)], weights, *options)[0]
        function = {"RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu, "GRU": torch.gru}[self.mode]
        return function(x, start, weights, *options)[0]


class RandomGraphRNN(nn.Module):
    """A sequence classifier wired like a random graph.

    Inputs are embedded to as many numbers as the first layer has vertices (a linear map without bias: for one-hot
    symbols an embedding table) and run through one recurrent layer per layer of the graph. Consecutive layers are
    joined where the graph has an edge. Edges that skip layers get a recurrent layer of their own from source to target
    layer, whose output sequence is added to that of the target layer. States feed back densely inside each layer.
    Many small recurrent layers run one after another, so time grows with the depth and the skips of the graph, not
    with the number of weights.

    Args:
        num_classes: number of outputs.
        input_shape: (C, H, W) is read as H steps of C W numbers, (steps, features) as it is, (features,) as so many
            steps of one number.
        cell: "rnn_tanh", "rnn_relu", "gru" or "lstm".
        family: "barabasi-albert" or "watts-strogatz".
        nodes: number of vertices, that is of units.
        graph_seed: key of the graph; the seed of the weights does not change it.
        edges: pairs of vertices to use instead of a random graph; then `family` and `graph_seed` have no part.
        padded: classify the last step that is not all zero, instead of the last one: for sequences padded on the
            right with zeros. (The thesis reads short sequences through their padding.)
    """

    def __init__(
        self,
        num_classes: int,
        input_shape: tuple[int, ...],
        *,
        cell: str = "gru",
        family: str = "barabasi-albert",
        nodes: int = 20,
        graph_seed: int = 0,
        edges: Sequence[Edge] | None = None,
        padded: bool = False,
    ):
        super().__init__()
        if len(input_shape) not in (1, 2, 3) or min(input_shape) < 1:
            raise InvalidValue(
                f"a sequence classifier reads (C, H, W), (steps, features) or (steps,), got {input_shape}"
            )
        features = {1: 1, 2: input_shape[-1], 3: input_shape[0] * input_shape[-1]}[len(input_shape)]
        if edges is None:
            self.wiring = random_wiring(family, nodes, graph_seed)
        else:
            self.wiring = wiring(nodes, [(int(a), int(b)) for a, b in edges])
        self.padded = padded
        sizes = [len(layer) for layer in self.wiring.layers]
        self.embedding = nn.Linear(features, sizes[0], bias=False)
        # Rows of an embedding table are drawn from N(0, 1); for dense features that is scaled to unit variance.
        nn.init.normal_(self.embedding.weight, std=1.0 if len(input_shape) == 2 else 1 / math.sqrt(features))
        self.layers = nn.ModuleList(
            MaskedRecurrent(
                cell,
                sizes[max(d - 1, 0)],
                sizes[d],
                inputs=edge_mask(self.wiring, d - 1, d) if d else None,
            )
            for d in range(len(sizes))
        )
        self.skips = nn.ModuleDict()
        for target in range(2, len(sizes)):
            for source in range(target - 1):
                if self.wiring.between(source, target):
                    pattern = edge_mask(self.wiring, source, target)
                    self.skips[f"{source}-{target}"] = MaskedRecurrent(
                        cell, sizes[source], sizes[target], inputs=pattern
                    )
        self.linear = nn.Linear(sizes[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, *input_shape) to logits (N, num_classes)."""
        if x.dim() == 4:
            x = x.transpose(1, 2).flatten(2)
        elif x.dim() == 2:
            x = x.unsqueeze(2)
        sequence = self.embedding(x)
        outputs: list[Tensor] = []
        for target, layer in enumerate(self.layers):
            sequence = layer(sequence)
            for source in range(target - 1):
                name = f"{source}-{target}"
                if name in self.skips:
                    sequence = sequence + self.skips[name](outputs[source])
            outputs.append(sequence)
        if not self.padded:
            return self.linear(sequence[:, -1])
        return self.linear(sequence[torch.arange(len(x), device=x.device), last_step(x)])


def last_step(x: Tensor) -> Tensor:
    """Return the (N,) int64 position of the last step of (N, T, features) that is not all zero (0 when all are)."""
    filled = (x != 0).any(dim=2)
    steps = torch.arange(x.shape[1], device=x.device)
    return (filled * steps).amax(dim=1)


def edge_mask(plan: Wiring, source: int, target: int) -> Tensor:
    """Return bool (units of layer `target`, units of layer `source`), True where the graph has an edge."""
    mask = torch.zeros(len(plan.layers[target]), len(plan.layers[source]), dtype=torch.bool)
    for a, b in plan.between(source, target):
        mask[b, a] = True
    return mask
