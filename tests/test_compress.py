"""`prunus.compress`: a compressed model computes what the pruned one does, and says what it is made of."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import prunus
from prunus.errors import InvalidValue, Unsupported
from prunus.runtime.library import why_not
from prunus.runtime.region import EngineRegion
from prunus.runtime.trace import exported, regions

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"no native engine: {why_not()}")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.two = nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.norm(self.one(x)))
        out = self.two(out)
        out += x
        return self.relu(out)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.SiLU())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.Sequential(Block(16), Block(16))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.blocks(self.pool(self.stem(x)))
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


class Mixed(nn.Module):
    """Images, an operator that the engine does not know, then tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, 4)
        self.norm = nn.LayerNorm(24)
        self.up, self.down = nn.Linear(24, 96), nn.Linear(96, 24)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        return x + self.down(nn.functional.gelu(self.up(self.norm(x)))).cumsum(1)


def pruned(model: nn.Module, sparsity: float = 0.8) -> nn.Module:
    for number, tensor in enumerate(model.state_dict().values()):
        if tensor.is_floating_point():
            torch.manual_seed(number)
            tensor.uniform_(0.5, 1.5) if tensor.ndim == 1 else tensor.normal_(0, 0.2)
    return prunus.prune(model, sparsity).model.eval()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return pruned(Net())


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def fast(net, image):
    return prunus.compress(net, image, engine="always", timing=False)


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= 1e-5 * float(a.abs().max())


def test_outputs_are_those_of_the_pruned_model_at_every_batch_size(net, fast):
    for batch, size in ((1, 32), (2, 32), (5, 32), (16, 32), (40, 32), (2, 47)):
        x = torch.randn(batch, 3, size, size)
        with torch.no_grad():
            same(net(x), fast(x))
    assert fast(torch.empty(0, 3, 32, 32)).shape == (0, 10)
    strided = torch.randn(2, 3, 32, 64)[..., ::2]
    with torch.no_grad():
        same(net(strided), fast(strided))


def test_the_whole_network_is_one_region_with_norms_and_sums_folded(net, fast, image):
    _, found, reasons = regions(exported(copy.deepcopy(net), image))
    assert len(found) == 1
    assert not reasons
    ops = [layer.op for layer in found[0].network.layers]
    assert ops == ["input", "convolution", "max_pool", *["convolution"] * 4, "mean", "flatten", "linear"]
    assert [layer.residual is not None for layer in found[0].network.layers].count(True) == 2
    report = fast.report
    assert report.difference < 1e-5
    assert not report.in_torch
    by_name = {layer.name: layer for layer in report.layers}
    assert by_name["head"].operator == "linear"
    weight = net.get_submodule("blocks.0.two").weight
    assert by_name["blocks.0.two"].density == pytest.approx(float((weight != 0).float().mean()), abs=1e-6)
    assert sum(layer.share for layer in report.layers) == pytest.approx(1, abs=0.2)
    assert str(report).splitlines()[0] == report.sentence


def test_shortcuts_without_weights_are_convolutions_by_an_identity(image):
    from prunus.models.resnet import resnet20

    model = pruned(resnet20(10, (3, 32, 32)))
    _, found, reasons = regions(exported(copy.deepcopy(model), image))
    assert len(found) == 1
    assert not reasons
    steps = [layer for layer in found[0].network.layers if layer.options.get("stride") == (2, 2)]
    assert sorted(layer.weight.shape for layer in steps) == [
        (32, 16, 1, 1),
        (32, 16, 3, 3),
        (64, 32, 1, 1),
        (64, 32, 3, 3),
    ]
    fast = prunus.compress(model, image, engine="always", timing=False)
    for batch in (1, 2, 20):
        x = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            same(model(x), fast(x))


class Slices(nn.Module):
    """Slices and pads that are and are not what the engine takes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x):
        x = self.layer(x)
        steps = nn.functional.pad(x[:, :, ::3, ::2], (0, 0, 0, 0, 1, 2))
        window = nn.functional.pad(x[:, 1:4, 1:9, 2:], (1, 1), value=2.0)
        return steps.relu(), window, x[..., ::2]


def test_slices_and_pads(image):
    model = Slices().eval()
    fast = prunus.compress(model, image, engine="always", timing=False)
    with torch.no_grad():
        for want, got in zip(model(image), fast(image), strict=True):
            same(want, got)


def test_what_the_engine_does_not_know_stays_in_torch_and_is_named(image):
    model = pruned(Mixed())
    fast = prunus.compress(model, image, engine="always", timing=False)
    with pytest.raises(InvalidValue, match="compress it again"):
        fast(torch.randn(2, 3, 64, 64))
    assert sum(isinstance(m, EngineRegion) for m in fast.modules()) >= 2
    assert any("layer_norm" in reason for reason in fast.report.in_torch.values())
    for batch in (1, 2, 3):
        x = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            same(model(x), fast(x))


def test_dense_layers_stay_in_torch_when_that_is_faster():
    model = nn.Sequential(nn.Linear(300, 300), nn.LayerNorm(300), nn.Linear(300, 300)).eval()
    x = torch.randn(1, 300)
    fast = prunus.compress(model, x)
    with torch.no_grad():
        same(model(x), fast(x))
    kept = [r for r in fast.report.in_torch.values() if "faster in torch" in r]
    assert len(kept) + sum(isinstance(m, EngineRegion) for m in fast.modules()) == 2


def test_the_model_is_untouched(net, image):
    before = {n: t.clone() for n, t in net.state_dict().items()}
    net.train()
    prunus.compress(net, image, engine="always", timing=False)
    assert net.training
    assert all(m.training for m in net.modules())
    net.eval()
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_several_threads_may_call_one_model(net, fast):
    inputs = [torch.randn(1 + i % 3, 3, 32, 32) for i in range(12)]
    with torch.no_grad():
        wanted = [net(x) for x in inputs]
    got: dict[int, torch.Tensor] = {}

    def work(first: int) -> None:
        for i in range(first, 12, 4):
            for _ in range(5):
                got[i] = fast(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, want in enumerate(wanted):
        same(want, got[i])


class Predictions(torch.utils.data.Dataset):
    """Outputs of a model, computed where the data loader's worker runs."""

    def __init__(self, model: nn.Module, inputs: torch.Tensor) -> None:
        self.model, self.inputs = model, inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.model(self.inputs[i : i + 1])[0]


def test_it_works_in_a_worker_of_a_data_loader(fast, image):
    fast(image)  # threads of this process are there before the fork
    inputs = torch.randn(4, 3, 32, 32)
    loader = torch.utils.data.DataLoader(
        Predictions(fast, inputs), batch_size=2, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    same(fast(inputs), torch.cat(list(loader)))


def test_export_and_compile_look_through_the_operator(fast, image):
    program = torch.export.export(fast, (image,), strict=False)
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    assert any("prunus.region" in str(n.target) for graph in graphs for n in graph.nodes)
    same(fast(image), program.module()(image))


def test_numbers_of_threads_are_torchs(fast, image):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(fast(image))
        assert torch.equal(*results)
    finally:
        torch.set_num_threads(before)


def test_training_and_gradients_are_refused(fast, image):
    with pytest.raises(Unsupported, match="train the model"):
        fast.train()
    with pytest.raises(Unsupported, match="no gradients"):
        fast(image.clone().requires_grad_())
    assert fast.eval() is fast
    assert not fast(image).requires_grad


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (lambda x: x.double(), InvalidValue, "float32"),
        (lambda x: x[:, :2], InvalidValue, "reads 3 channels"),
        (lambda x: x[0], InvalidValue, "reads 3 channels|given"),
        (lambda x: torch.zeros(1, 3, 0, 0), InvalidValue, "larger inputs"),
    ],
)
def test_inputs_that_the_engine_cannot_read(fast, image, spoil, error, says):
    with pytest.raises(error, match=says):
        fast(spoil(image))
    fast(image)  # nothing is broken by it


def test_models_that_cannot_be_compressed(net, image):
    with pytest.raises(InvalidValue, match="float32"):
        prunus.compress(copy.deepcopy(net).double(), image.double())
    with pytest.raises(InvalidValue, match="cannot run the example"):
        prunus.compress(net, torch.randn(2, 5, 32, 32))
    with pytest.raises(InvalidValue, match="always"):
        prunus.compress(net, image, engine="sometimes")
    with pytest.raises(Unsupported, match="move the model"):
        prunus.compress(copy.deepcopy(net).to("meta"), image)


def test_without_the_library_torch_does_what_it_can_and_says_so(monkeypatch):
    monkeypatch.setattr("prunus.runtime.compress.why_not", lambda: "no compiler")
    model = pruned(nn.Sequential(nn.Linear(2000, 2000), nn.ReLU(), nn.Linear(2000, 10)), 0.99)
    x = torch.randn(3, 2000)
    fast = prunus.compress(model, x)
    same(model(x).detach(), fast(x))
    assert fast(torch.randn(2, 5, 2000)).shape == (2, 5, 10)
    assert "no compiler" in fast.report.sentence
    assert [layer.name for layer in fast.report.layers][:1] == ["0"]
    assert fast.report.layers[0].kernel == "torch CSR"
    assert fast.report.layers[0].density < 0.02
    assert isinstance(model[0], nn.Linear)
    with pytest.raises(Unsupported, match="no compiler"):
        prunus.compress(model, x, engine="always")
    with pytest.raises(InvalidValue, match="cannot run"):
        prunus.compress(model, x[:, :5])


def test_a_model_that_draws_at_random_is_refused(image):
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.layer(x) + torch.rand(1)

    with pytest.raises(Unsupported, match="differ"):
        prunus.compress(Noisy(), image, engine="always", timing=False)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch copies its own graphs so
def test_copies_and_forgotten_regions(fast, image):
    other = copy.deepcopy(fast)
    same(fast(image), other(image))
    with pytest.raises(InvalidValue, match="gone"):
        torch.ops.prunus.region([image], 10**9)
