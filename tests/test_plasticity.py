"""Pruning plasticity: what is exchanged, what stays as it was, and what the three numbers mean."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunus.errors import InvalidValue
from prunus.masks import Masks
from prunus.measure.plasticity import plasticity, regenerate
from prunus.randomness import generator


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(200, 6, generator=generator(seed, "x"))
    return x, (x[:, 0] + x[:, 1] > 0).long()


def network(seed: int = 0) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator(seed, name)))
    return model


def accuracy(model: nn.Module) -> float:
    x, y = data(1)
    model.eval()
    with torch.no_grad():
        found = float((model(x).argmax(1) == y).float().mean())
    model.train()
    return found


def trainer(steps: int, rate: float) -> object:
    def go_on(model: nn.Module, masks: Masks) -> None:
        x, y = data()
        model.eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        hold = masks.hold(model, optimizer)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        hold.detach()
        model.train()

    return go_on


def nothing(model: nn.Module, masks: Masks) -> None:
    return None


def test_exchange_by_hand() -> None:
    weights = {"a": torch.tensor([[5.0, -1.0, 0.0, 0.0, 3.0]])}
    masks = Masks({"a": torch.tensor([[True, True, False, False, True]])})
    gradients = {"a": torch.tensor([[0.0, 0.1, -2.0, 1.0, 9.0]])}
    # Half of three kept is two: -1 and 3 go; of what is then free, position 4 has the largest gradient, then 2.
    assert regenerate(weights, masks, gradients, 0.5)["a"].tolist() == [[True, False, True, False, True]]
    assert regenerate(weights, masks, gradients, 0.0) == masks


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_exchange_against_brute_force(share: float) -> None:
    draws = generator(0, share)
    shape = (2, 4)
    weight, gradient = torch.randn(shape, generator=draws), torch.randn(shape, generator=draws)
    mask = torch.rand(shape, generator=draws) > 0.4
    kept = int(mask.sum())
    count = -(-int(share * kept * 1000) // 1000)
    found = regenerate({"w": weight}, Masks({"w": mask}), {"w": gradient}, share)["w"].flatten()
    places = range(mask.numel())
    flat_w, flat_g, flat_m = weight.flatten().abs(), gradient.flatten().abs(), mask.flatten()
    alive = [i for i in places if flat_m[i]]
    stay = max(itertools.combinations(alive, kept - count), key=lambda c: sum(float(flat_w[i]) for i in c))
    free = [i for i in places if i not in stay]
    grown = max(itertools.combinations(free, count), key=lambda c: sum(float(flat_g[i]) for i in c))
    assert {i for i in places if found[i]} == {*stay, *grown}


def test_counts_of_layers_stay() -> None:
    model = network()
    plain = plasticity(model, sparsity=0.7, evaluate=accuracy, go_on=nothing)
    regrown = plasticity(model, sparsity=0.7, evaluate=accuracy, go_on=nothing, regeneration=0.5, batch=data())
    assert [r.kept for r in plain.masks.table()] == [r.kept for r in regrown.masks.table()]
    assert plain.masks != regrown.masks


def test_model_is_not_changed() -> None:
    model = network()
    model[2].eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    plasticity(model, sparsity=0.8, evaluate=lambda m: 0.0, go_on=trainer(3, 0.1), regeneration=0.3, batch=data())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert model.training
    assert not model[2].training
    assert all(p.grad is None for p in model.parameters())


def test_nothing_pruned_nothing_lost() -> None:
    found = plasticity(network(), sparsity=0.0, evaluate=accuracy, go_on=nothing)
    assert found.before == found.pruned == found.after
    assert found.value == 0.0
    assert found.masks.sparsity == 0.0


def test_training_recovers_and_holds_masks() -> None:
    model = network()
    trainer(200, 0.2)(model, Masks.full(model))  # type: ignore[operator]
    seen: list[Tensor] = []

    def go_on(worked: nn.Module, masks: Masks) -> None:
        assert all(not bool(p[~masks[n]].any()) for n, p in masks.parameters(worked).items())
        trainer(100, 0.2)(worked, masks)  # type: ignore[operator]
        seen.extend(p.detach()[~masks[n]] for n, p in masks.parameters(worked).items())

    fast = plasticity(model, sparsity=0.85, evaluate=accuracy, go_on=go_on)
    slow = plasticity(model, sparsity=0.85, evaluate=accuracy, go_on=trainer(100, 1e-5))
    assert not torch.cat(seen).any()
    assert fast.before == slow.before
    assert fast.pruned == slow.pruned < fast.before
    assert fast.value > slow.value
    assert slow.after == pytest.approx(slow.pruned, abs=0.02)


def test_equal_calls_equal_results() -> None:
    first, second = (
        plasticity(network(), sparsity=0.6, evaluate=accuracy, go_on=trainer(5, 0.1), regeneration=0.2, batch=data())
        for _ in range(2)
    )
    assert (first.before, first.pruned, first.after) == (second.before, second.pruned, second.after)
    assert first.masks == second.masks


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"regeneration": 0.5}, "without a batch"),
        ({"batch": (torch.zeros(1, 6), torch.zeros(1, dtype=torch.int64))}, "with a batch"),
        ({"regeneration": 1.5, "batch": (torch.zeros(1, 6), torch.zeros(1, dtype=torch.int64))}, "regeneration"),
        ({"sparsity": 1.0}, "sparsity"),
    ],
)
def test_refusals(options: dict[str, object], word: str) -> None:
    choices: dict[str, object] = {"sparsity": 0.5, "evaluate": accuracy, "go_on": nothing} | options
    with pytest.raises(InvalidValue, match=word):
        plasticity(network(), **choices)  # type: ignore[arg-type]
