"""What the tests of coupled axes share: small networks with random tensors, and the proof that a cut is exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunus.graph.couple import Coupling, couple
from prunus.graph.plan import Plan
from prunus.graph.record import arguments, plain_forward, record

TIGHT = 1e-5


class Net(nn.Module):
    """A network written as one function of itself and its inputs."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function."""
        return self.function(self, *args, **kwargs)


@torch.no_grad()
def scrambled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every floating tensor with numbers that hide nothing: no zeros, no ones, no unit variances."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            numbers = torch.rand(tensor.shape, generator=generator) + 0.25
            if not name.endswith(("running_var", "positive")):
                sign = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
                numbers = numbers * sign / max(1.0, tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 1.0)
            tensor.copy_(numbers)
        elif tensor.is_complex():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
    return model.eval()


def numbers(*shape: int, seed: int = 1) -> Tensor:
    """Return a normal random example."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coupled(model: nn.Module, example: Any) -> Coupling:
    """Couple the axes of a model."""
    return couple(record(model, example))


def some(size: int, rng: np.random.Generator) -> np.ndarray:
    """Return which units stay, at random: at least one stays, at least one goes."""
    keep = rng.random(size) < rng.uniform(0.3, 0.8)
    keep[rng.integers(size)] = True
    if keep.all():
        keep[rng.integers(size)] = False
    return keep


def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """Return every tensor the model gives for the example, in eval mode."""
    args, kwargs = arguments(example)
    with plain_forward(model):
        return [t for t in torch.utils._pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]


def prove(model: nn.Module, example: Any, coupling: Coupling, keep: Mapping[str, Any]) -> Plan:
    """Cut, and assert: nothing is left whole, removed equals masked, shapes and counts are as said."""
    before = {n: t.clone() for n, t in model.state_dict().items() if isinstance(t, Tensor)}
    plan = Plan.from_keep(coupling, keep)
    assert not plan.blocked, plan.blocked
    assert plan
    assert plan.verify(model, example) <= TIGHT
    small = plan.apply(model)
    assert [t.shape for t in outputs(small, example)] == [t.shape for t in outputs(model, example)]
    used = {v.name for v in coupling.graph.values if v.kind == "parameter"}
    assert coupling.parameters(keep) == sum(p.numel() for n, p in small.named_parameters() if n in used)
    for name, shape in zip((v.name for v in coupling.graph.values), coupling.shapes(keep), strict=True):
        if name:
            assert tuple(dict([*small.named_parameters(), *small.named_buffers()])[name].shape) == shape
    for name, tensor in before.items():
        assert torch.equal(tensor, model.state_dict()[name])
    return plan


def families(coupling: Coupling) -> dict[str, int]:
    """Return family name -> size."""
    return {f.name: f.size for f in coupling.families}


def check(
    model: nn.Module,
    example: Any,
    expected: Mapping[str, int],
    stays: Mapping[str, str] | None = None,
    *,
    heads: tuple[str, ...] = (),
    blocked: tuple[str, ...] = (),
    rounds: int = 1,
) -> Coupling:
    """Assert the families written down by hand, then cut each family alone and all primary ones together at random.

    Args:
        model, example: the network.
        expected: family name -> size.
        stays: "tensor:axis" -> part of the reason why it is never cut.
        heads: the families that are heads.
        blocked: families whose cut the forward does not survive, because it spells a number out.
        rounds: how many random cuts of all families together.
    """
    scrambled(model)
    coupling = coupled(model, example)
    assert families(coupling) == dict(expected)
    assert {f.name for f in coupling.families if f.kind == "head"} == set(heads)
    for name, reason in (stays or {}).items():
        assert reason in coupling.unprunable[name], coupling.unprunable
    assert not coupling.without_rule
    rng = np.random.default_rng(0)
    for family in coupling.families:
        keep = {family.name: some(family.size, rng)}
        if family.name in blocked:
            # The forward spells a number that no cut can change: said, and left whole.
            plan = Plan.from_keep(coupling, keep)
            assert set(plan.blocked) == {family.name}
            assert not plan
            assert plan.verify(model, example) == 0
        elif family.size > 1:
            prove(model, example, coupling, keep)
    primary = [f for f in coupling.primary() if f.size > 1 and f.name not in blocked]
    for _ in range(rounds if len(primary) > 1 else 0):
        prove(model, example, coupling, {f.name: some(f.size, rng) for f in primary})
    return coupling
