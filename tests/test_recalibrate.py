"""BatchNorm re-estimation: equal to the statistics of the data, whatever the cut, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prunus.errors import InvalidValue, NonFinite
from prunus.measure.recalibrate import recalibrate
from prunus.randomness import generator


def images(n: int = 23) -> Tensor:
    return 2.0 + 3.0 * torch.randn(n, 3, 5, 5, generator=generator(0, "images"))


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 2, 1))


@pytest.mark.parametrize("size", [23, 8, 5, 2])
def test_equals_the_true_statistics_however_the_data_is_cut(size: int) -> None:
    x, net = images(), network()
    batches = [b for b in x.split(size) if len(b) > 1]
    used = torch.cat(batches)
    assert recalibrate(net, batches) == len(used)
    with torch.no_grad():
        inner = net[0](used).double().movedim(1, 0).reshape(4, -1)
    norm = net[1]
    torch.testing.assert_close(norm.running_mean.double(), inner.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), inner.var(1, unbiased=True), rtol=1e-5, atol=1e-6)
    assert int(norm.num_batches_tracked) == len(batches)


def test_one_batch_equals_a_training_step_with_momentum_one() -> None:
    x, net, reference = images(), network(), network()
    reference[1].momentum = 1.0
    reference[:2](x)
    recalibrate(net, [(x, torch.zeros(len(x)), torch.arange(len(x)))])
    torch.testing.assert_close(net[1].running_mean, reference[1].running_mean)
    torch.testing.assert_close(net[1].running_var, reference[1].running_var)


def test_nothing_else_changes() -> None:
    net = network()
    net.train()
    net[3].eval()
    net[1].momentum = 0.3
    before = {k: v.clone() for k, v in net.state_dict().items() if "running" not in k and "tracked" not in k}
    modes = [m.training for m in net.modules()]
    state = torch.random.get_rng_state()
    recalibrate(net, [images()])
    assert torch.equal(state, torch.random.get_rng_state())  # dropout did not draw
    assert modes == [m.training for m in net.modules()]
    assert net[1].momentum == 0.3
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_old_statistics_have_no_influence_and_a_second_pass_changes_nothing() -> None:
    a, b = network(), network()
    b[1].running_mean.fill_(1e3)
    b[1].running_var.fill_(1e-3)
    recalibrate(a, images().split(6))
    recalibrate(b, images().split(6))
    assert torch.equal(a[1].running_mean, b[1].running_mean)
    once = a[1].running_var.clone()
    recalibrate(a, images().split(6))
    assert torch.equal(once, a[1].running_var)


def test_without_batchnorm_the_data_is_not_even_read() -> None:
    def explode() -> object:
        raise AssertionError("read")
        yield

    assert recalibrate(nn.Linear(2, 2), explode()) == 0  # type: ignore[arg-type]
    assert recalibrate(nn.BatchNorm1d(2, track_running_stats=False), explode()) == 0  # type: ignore[arg-type]


def test_failures_bring_the_old_statistics_back() -> None:
    net = network()
    net[1].running_mean.fill_(7.0)
    with pytest.raises(InvalidValue, match="two examples"):
        recalibrate(net, images().split(1))
    with pytest.raises(NonFinite, match="'1'"):
        recalibrate(net, [images(), images() * float("nan")])
    assert net[1].running_mean.tolist() == [7.0] * 4
    assert int(net[1].num_batches_tracked) == 0


def test_a_layer_the_data_never_reaches_keeps_what_it_had() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    net = Two()
    recalibrate(net, [torch.tensor([[1.0, 2.0], [3.0, 4.0]])])
    assert net.used.running_mean.tolist() == [2.0, 3.0]  # type: ignore[union-attr]
    assert net.unused.running_mean.tolist() == [0.0, 0.0]  # type: ignore[union-attr]


def test_a_shared_layer_pools_all_its_uses() -> None:
    norm = nn.BatchNorm1d(1)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(x + 10.0)

    recalibrate(Twice(), [torch.tensor([[0.0], [2.0]])])
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.running_mean.tolist() == [6.0]
    assert norm.running_var.item() == pytest.approx(torch.tensor([0.0, 2.0, 10.0, 12.0]).var().item())
