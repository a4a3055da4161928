"""`sparsify` under the Lightning Trainer: the bits of trainings written out by hand."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import prunus
from loop_reference import METHODS, STEPS, assert_same, backward, batch, by_hand, method, network, weights_of

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="needs `pip install lightning`"),
    # Lightning's own: its use of torch's pytree, and advice about loaders without workers.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*Precision bf16-mixed is not supported by the model summary.*"),
]


@pytest.fixture(scope="module")
def lightning():
    """Lightning, which imports torchvision, which may need its repair first."""
    from prunus.models.vision_repair import repair_torchvision

    repair_torchvision()
    import lightning.pytorch

    return lightning.pytorch


@pytest.fixture(autouse=True)
def one_thread():
    """These nets are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Steps(Dataset):
    """The batches of the reference, whole, or cut in `parts`."""

    def __init__(self, dtype, parts):
        cut = [zip(*(t.chunk(parts) for t in batch(step, dtype=dtype))) for step in range(STEPS)]
        self.batches = [pair for pairs in cut for pair in pairs]

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def module_class(lightning):
    class Module(lightning.LightningModule):
        """Any net and optimizer under Lightning; the method is attached where optimizers are configured."""

        def __init__(self, net, name, make, *, manual=False, late=False, schedule=None):
            super().__init__()
            self.net, self.name, self.make, self.schedule, self.late = net, name, make, schedule, late
            self.automatic_optimization = not manual
            self.handle = None

        def attach(self, optimizer):
            self.handle = prunus.sparsify(self.net, optimizer, method(self.name), steps=STEPS)
            self.start = {n: m.clone() for n, m in self.handle.masks.items()}

        def configure_optimizers(self):
            optimizer = self.make(self.net.parameters())
            if not self.late:
                assert int(self.trainer.estimated_stepping_batches) == STEPS
                self.attach(optimizer)
            if self.schedule is None:
                return optimizer
            return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]

        def on_fit_start(self):
            if self.late:
                wrapped = self.optimizers()
                assert type(wrapped).__name__.startswith("Lightning")
                self.attach(wrapped)

        def training_step(self, pair, index):
            x, y = pair
            if self.automatic_optimization:
                return F.cross_entropy(self.net(x), y)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.net(x), y))
            optimizer.step()
            return None

    return Module


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, foreach=True, weight_decay=1e-3)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


def fit(lightning, tmp_path, name, make=momentum, *, dtype=torch.float64, parts=1, trainer=(), **options):
    """Train under Lightning; return the module and a fresh twin of its net with an optimizer of its own."""
    module = module_class(lightning)(network(dtype), name, make, **options)
    runner = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(tmp_path),
        **dict(trainer),
    )
    runner.fit(module, DataLoader(Steps(dtype, parts), batch_size=None))
    assert module.handle.step == STEPS
    twin = network(dtype)
    return module, twin, make(twin.parameters())


def compare(module, twin, other, fill, **options):
    start = module.start if module.name in ("RigL", "GraNet") else None
    keep = by_hand(twin, other, module.name, fill, start=start, **options)
    assert_same(module.net, module.handle.masks, twin, keep)


@pytest.mark.parametrize("make", [momentum, adamw])
@pytest.mark.parametrize("name", METHODS)
def test_automatic_optimization(name, make, lightning, tmp_path):
    module, twin, other = fit(lightning, tmp_path, name, make)
    compare(module, twin, other, lambda step: backward(twin, step))


@pytest.mark.parametrize("name", METHODS)
def test_manual_optimization(name, lightning, tmp_path):
    module, twin, other = fit(lightning, tmp_path, name, manual=True)
    compare(module, twin, other, lambda step: backward(twin, step))


def test_growth_reads_the_dense_gradients_of_its_own_step(lightning, tmp_path, monkeypatch):
    """Masked gradients, or those of the step before, would let RigL grow elsewhere: watch what it is given."""
    from prunus.methods.regrow import Regrow

    seen = {}
    original = Regrow.growth_scores

    def watching(self, s):
        seen[s.step] = s.gradients()
        return original(self, s)

    monkeypatch.setattr(Regrow, "growth_scores", watching)
    module, twin, other = fit(lightning, tmp_path, "RigL")
    expected = {}

    def fill(step):
        backward(twin, step)
        expected[step + 1] = {n: w.grad.clone() for n, w in weights_of(twin).items()}

    compare(module, twin, other, fill)
    assert sorted(seen) == [3, 6, 9]
    for step, gradients in seen.items():
        for n, g in gradients.items():
            assert torch.equal(g, expected[step][n])
            assert bool((g[~module.start[n]] != 0).any())


@pytest.mark.parametrize("name", METHODS)
def test_attaching_to_lightnings_wrapper_of_the_optimizer(name, lightning, tmp_path):
    module, twin, other = fit(lightning, tmp_path, name, late=True)
    assert type(module.handle.optimizer) is torch.optim.SGD
    compare(module, twin, other, lambda step: backward(twin, step))


@pytest.mark.parametrize("name", METHODS)
def test_accumulation_and_clipping(name, lightning, tmp_path):
    """Lightning clips inside the closure, before pruned gradients are masked, as a loop that clips before the step."""
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    module, twin, other = fit(lightning, tmp_path, name, parts=2, trainer=options)

    def fill(step):
        twin.zero_grad()
        for x, y in zip(*(t.chunk(2) for t in batch(step))):
            (F.cross_entropy(twin(x), y) / 2).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)

    compare(module, twin, other, fill)


@pytest.mark.parametrize("name", METHODS)
def test_bf16_and_a_schedule(name, lightning, tmp_path):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    module, twin, other = fit(
        lightning, tmp_path, name, dtype=torch.float32, schedule=schedule, trainer={"precision": "bf16-mixed"}
    )

    def fill(step):
        twin.zero_grad()
        x, y = batch(step, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(twin(x), y)
        loss.backward()

    compare(module, twin, other, fill, after=schedule(other).step)


def test_lbfgs_with_a_fixed_mask(lightning, tmp_path):
    module, twin, other = fit(lightning, tmp_path, "Static", lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3))
    keep = {n: m.clone() for n, m in module.handle.masks.items()}
    for n, w in weights_of(twin).items():
        w.data[~keep[n]] = 0.0
    for step in range(STEPS):

        def closure(step=step):
            backward(twin, step)
            for n, w in weights_of(twin).items():
                w.grad[~keep[n]] = 0.0
            x, y = batch(step)
            return F.cross_entropy(twin(x), y).detach()

        other.step(closure)
    assert_same(module.net, module.handle.masks, twin, keep)


def test_the_example_is_the_plain_example(lightning, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    plain = runpy.run_path(str(EXAMPLES / "plain_loop.py"))["main"](epochs=2)
    outcome = runpy.run_path(str(EXAMPLES / "lightning_loop.py"))["main"](epochs=2)
    sys.modules.pop("plain_loop", None)
    assert vars(outcome) == vars(plain)
