"""The search network: every convolution at several widths, every stage at several depths, mixed by sampled weights.

Source: Dong and Yang, Network Pruning via Transformable Architecture Search, NeurIPS 2019 (arXiv 1905.09717),
section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunus.randomness import generator
from prunus.structured.tas.sampling import channel_wise_interpolation, draw, gumbel, mixture, perturbed
from prunus.structured.tas.space import Found, Pair, Part, SearchSpace, Stage


@dataclass
class Sample:
    """What the current forward pass uses.

    Attributes:
        widths: per searched family the drawn choices and their weights (None: the first alone).
        depths: per stage the weights of all depths, or the number of blocks.
    """

    widths: list[tuple[list[int], Tensor | None]] = field(default_factory=list)
    depths: list[Tensor | int] = field(default_factory=list)


class SearchConv(nn.Module):
    """A convolution with one weight tensor and one batch norm per width.

    Two drawn widths are computed, aligned to the wider one by channel-wise interpolation and mixed; channels beyond are
    zero, so that whatever reads them sees the full width.

    Args:
        conv, norm: the modules it stands for; weights and statistics are taken over.
        parts: output channels by family.
        choices: widths per searched family.
        sample: shared by the whole network.
    """

    def __init__(
        self, conv: nn.Module, norm: _BatchNorm, parts: tuple[Part, ...], choices: list[tuple[int, ...]], sample: Sample
    ):
        super().__init__()
        self.conv = conv
        self.sample = sample
        self.owners = [part.width for part in parts]
        self.norms = nn.ModuleList()
        self.places: list[list[tuple[Tensor, int | None]]] = []
        for part in parts:
            counts = (len(part.positions),) if part.width is None else choices[part.width]
            places = [torch.from_numpy(part.positions[:count].reshape(-1).copy()) for count in counts]
            self.places.append([(place, _first_of_run(place)) for place in places])
            self.norms.append(nn.ModuleList([sliced_norm(norm, place) for place in places]))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, ...) to (N, C_out, ...) with zeros beyond the widths drawn."""
        y = self.conv(x)
        out: Tensor | None = None
        for owner, norms, places in zip(self.owners, self.norms, self.places, strict=True):
            drawn, weights = ([0], None) if owner is None else self.sample.widths[owner]
            pieces = [norms[k](_take(y, *places[k])) for k in drawn]  # type: ignore[index]
            widest, start = max((places[k] for k in drawn), key=lambda place: len(place[0]))
            mixed = pieces[0]
            if weights is not None:
                mixed = sum(
                    w * channel_wise_interpolation(p, len(widest)) for w, p in zip(weights, pieces, strict=True)
                )
            if len(self.owners) == 1 and start == 0:
                return F.pad(mixed, [0, 0] * (y.ndim - 2) + [0, y.shape[1] - len(widest)])
            out = torch.zeros_like(y) if out is None else out
            out = out.index_copy(1, widest.to(y.device), mixed.to(out.dtype))
        assert out is not None
        return out


class SearchStage(nn.Sequential):
    """A stage whose outputs after each allowed depth are mixed.

    All depths have the width of their residual stream, so that nothing has to be aligned between them.
    """

    def __init__(self, stage: nn.Sequential, choices: Stage, number: int, sample: Sample):
        super().__init__()
        for name, block in stage.named_children():
            self.add_module(name, block)
        self.depths = choices.depths
        self.number = number
        self.sample = sample

    def forward(self, x: Tensor) -> Tensor:
        """Map a block's input to the mixture of outputs, or to the output after the given number of blocks."""
        chosen = self.sample.depths[self.number]
        if isinstance(chosen, int):
            for block in list(self)[:chosen]:
                x = block(x)
            return x
        mixed: Any = 0.0
        for index, block in enumerate(self, start=1):
            x = block(x)
            if index in self.depths:
                mixed = mixed + chosen[self.depths.index(index)] * x
        return mixed


class SearchNet(nn.Module):
    """A network whose architecture is sampled in training mode and is the arg-max of the logits in eval mode.

    The logits are buffers: they are saved with the weights, and the optimizer of the weights does not see them.
    In training mode noise comes from torch's global CPU generator.

    Args:
        network: the network to search in; it is taken apart.
        space: what is searched; made for a network of this architecture.

    Attributes:
        tau: temperature of the samples; whoever trains sets it.
    """

    best_accuracy: Tensor

    def __init__(self, network: nn.Module, space: SearchSpace):
        super().__init__()
        self.space = space
        self.tau = 5.0
        self.sample = Sample()
        choices = [w.choices for w in space.widths]
        for pair in space.pairs:
            _install(network, pair, choices, self.sample)
        for number, stage in enumerate(space.stages):
            chain = network.get_submodule(stage.path)
            assert isinstance(chain, nn.Sequential)
            _replace(network, stage.path, SearchStage(chain, stage, number, self.sample))
        self.network = network
        for kind, sizes in (("width", [len(c) for c in choices]), ("depth", [len(s.depths) for s in space.stages])):
            for number, size in enumerate(sizes):
                noise = torch.randn(size, generator=generator(space.seed, "architecture logits", kind, number))
                self.register_buffer(f"{kind}_{number}", 0.01 * noise)
                self.register_buffer(f"best_{kind}_{number}", 0.01 * noise)
        # Below every accuracy: no epoch has been inside the band yet.
        self.register_buffer("best_accuracy", torch.tensor(-1.0, dtype=torch.float64))

    def logits(self, best: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """Return the logits of widths and of depths (those remembered as the best)."""
        start = "best_" if best else ""
        widths = [self.get_buffer(f"{start}width_{n}") for n in range(len(self.space.widths))]
        return widths, [self.get_buffer(f"{start}depth_{n}") for n in range(len(self.space.stages))]

    def forward(self, x: Tensor) -> Tensor:
        """Map a batch to logits, under a fresh sample (training mode) or the arg-max architecture (eval mode)."""
        if self.training:
            self.draw()
        else:
            self.choose(self.space.likeliest(*self.logits()))
        return self.network(x)

    def draw(self) -> None:
        """Sample two widths per family and weights of all depths per stage."""
        widths, depths = self.logits()
        self.sample.widths, self.sample.depths = [], []
        for alpha in widths:
            noisy = perturbed(alpha, self.tau, gumbel(alpha.shape))
            drawn = draw(noisy)
            self.sample.widths.append((drawn.tolist(), mixture(noisy, drawn)))
        for alpha in depths:
            self.sample.depths.append(torch.softmax(perturbed(alpha, self.tau, gumbel(alpha.shape)), 0))

    def choose(self, found: Found) -> None:
        """Use one architecture."""
        self.sample.widths = [([k], None) for k in found.widths]
        self.sample.depths = [s.depths[k] for s, k in zip(self.space.stages, found.depths, strict=True)]


def sliced_norm(norm: _BatchNorm, place: Tensor) -> _BatchNorm:
    """Return a batch norm for the channels at `place`, with their parameters and statistics."""
    small = type(norm)(
        len(place),
        eps=norm.eps,
        momentum=norm.momentum,
        affine=norm.affine,
        track_running_stats=norm.track_running_stats,
    )
    values = {n: t[place.to(t.device)] if t.ndim else t for n, t in norm.state_dict().items()}
    small.load_state_dict(values)
    return small.to(next(iter(values.values())).device) if values else small


def _install(network: nn.Module, pair: Pair, choices: list[tuple[int, ...]], sample: Sample) -> None:
    """Put a search convolution in place of a convolution, and nothing in place of its batch norm."""
    norm = network.get_submodule(pair.norm)
    assert isinstance(norm, _BatchNorm)
    made = SearchConv(network.get_submodule(pair.conv), norm, pair.parts, choices, sample)
    _replace(network, pair.conv, made)
    _replace(network, pair.norm, nn.Identity())


def _replace(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)


def _first_of_run(place: Tensor) -> int | None:
    """Return the first of consecutive positions, or None when they are not consecutive."""
    first = int(place[0])
    return first if torch.equal(place, torch.arange(first, first + len(place))) else None


def _take(y: Tensor, place: Tensor, start: int | None) -> Tensor:
    return y.index_select(1, place.to(y.device)) if start is None else y.narrow(1, start, len(place))
