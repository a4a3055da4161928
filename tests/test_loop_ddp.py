"""`sparsify` in two processes: the same masks everywhere, and those of one process at the global batch."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

import prunus
from loop_reference import METHODS, STEPS, assert_same, backward, batch, by_hand, method, network, weights_of
from prunus import distributed
from prunus.errors import MaskMismatch

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZE = 2
# Two halves of a batch are summed in another order than the whole: float64 dust after 12 steps.
TOLERANCE = 1e-9

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch was built without gloo"
)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


# -- in the processes -----------------------------------------------------------------------------------------------


class Recorder:
    """Writes what a rank ended with where the tests read it."""

    def __init__(self, folder, rank):
        self.folder, self.rank = Path(folder), rank
        self.values = {}

    def training(self, scenario, net, handle):
        tensors = {f"parameter/{n}": p.detach().clone() for n, p in net.named_parameters()}
        tensors |= {f"mask/{n}": m.clone() for n, m in handle.masks.items()}
        save_file(tensors, self.folder / f"{scenario}-{self.rank}.safetensors")

    def finish(self):
        (self.folder / f"values-{self.rank}.json").write_text(json.dumps(self.values))


def train(parallel, optimizer, rank, *, micro=1, perturb=None):
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = (t[rank::SIZE] for t in batch(step))
        for number, (mine, labels) in enumerate(zip(x.chunk(micro), y.chunk(micro))):
            with contextlib.nullcontext() if number == micro - 1 else parallel.no_sync():
                (F.cross_entropy(parallel(mine), labels) / micro).backward()
        if perturb is not None:
            perturb(parallel, step)
        optimizer.step()


def wrapped_first(record, rank, name):
    net = network()
    parallel = DistributedDataParallel(net, gradient_as_bucket_view=True)
    optimizer = momentum(parallel.parameters())
    handle = prunus.sparsify(parallel, optimizer, method(name), steps=STEPS)
    train(parallel, optimizer, rank)
    record.training(f"wrapped-first-{name}", net, handle)


def attached_first(record, rank, name):
    """Ranks start from different weights; what counts is rank 0, as for DistributedDataParallel itself."""
    net = network(seed=rank)
    optimizer = momentum(net.parameters())
    handle = prunus.sparsify(net, optimizer, method(name), steps=STEPS)
    parallel = DistributedDataParallel(net)
    train(parallel, optimizer, rank)
    record.training(f"attached-first-{name}", net, handle)


def accumulated(record, rank):
    net = network()
    parallel = DistributedDataParallel(net)
    optimizer = momentum(net.parameters())
    handle = prunus.sparsify(parallel, optimizer, method("RigL"), steps=STEPS)
    train(parallel, optimizer, rank, micro=2)
    record.training("accumulated", net, handle)


def diverging(record, rank, name):
    """After the all-reduce rank 1 damages its gradients, so that it would decide on masks of its own."""
    original, proposals, agreements = distributed.agree, [], []

    def watching(masks):
        proposals.append(masks.digest())
        agreed = original(masks)
        agreements.append(agreed.digest())
        return agreed

    def perturb(parallel, step):
        if rank == 1:
            for p in parallel.parameters():
                p.grad += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(step), dtype=p.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunus.sparsifier.agree", watching)
        net = network()
        parallel = DistributedDataParallel(net)
        optimizer = momentum(net.parameters())
        handle = prunus.sparsify(parallel, optimizer, method(name), steps=STEPS)
        # Damaged weights must not reach rank 0 by the way of averaged gradients.
        with parallel.no_sync():
            for step in range(STEPS):
                backward(parallel, step)
                perturb(parallel, step)
                optimizer.step()
    record.training(f"diverging-{name}", net, handle)
    record.values[f"diverging-{name}"] = {"proposals": proposals, "agreements": agreements}


def different_masks_given(record, rank):
    net = network()
    masks = prunus.Masks(
        {
            n: torch.rand(p.shape, generator=torch.Generator().manual_seed(rank)) > 0.5
            for n, p in weights_of(net).items()
        }
    )
    handle = prunus.sparsify(net, momentum(net.parameters()), masks=masks, steps=STEPS)
    record.training("different-masks-given", net, handle)
    record.values["own masks"] = masks.digest()


def damaged_on_the_way(record, rank, how):
    """Rank 1 receives other bytes than rank 0 sent: every rank must stop, and none may wait for ever."""
    net = network()
    optimizer = momentum(net.parameters())
    handle = prunus.sparsify(net, optimizer, method("Static"), steps=STEPS)
    original = distributed._broadcast_bytes

    def tampering(data, device):
        received = original(data, device)
        if rank == 0:
            return received
        if how == "bit":
            return received[:-1] + bytes([received[-1] ^ 1])
        return (~prunus.Masks.from_bytes(received)).to_bytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "_broadcast_bytes", tampering)
        try:
            handle.update(handle.masks)
            record.values[f"damaged-{how}"] = "nothing was noticed"
        except MaskMismatch as error:
            record.values[f"damaged-{how}"] = str(error)
    handle.update(handle.masks)  # the group is still usable


def example(record):
    sys.path.insert(0, str(EXAMPLES))
    record.values["example"] = vars(runpy.run_path(str(EXAMPLES / "ddp_loop.py"))["train"](2))
    sys.path.remove(str(EXAMPLES))


def worker(rank, port, folder):
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE, timeout=datetime.timedelta(seconds=90))
    record = Recorder(folder, rank)
    for name in METHODS:
        wrapped_first(record, rank, name)
        attached_first(record, rank, name)
        diverging(record, rank, name)
    accumulated(record, rank)
    different_masks_given(record, rank)
    damaged_on_the_way(record, rank, "masks")
    damaged_on_the_way(record, rank, "bit")
    example(record)
    record.finish()
    dist.destroy_process_group()


# -- in the test ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run everything once in two processes; return a reader of what they wrote."""
    folder = tmp_path_factory.mktemp("ddp")
    # The store listens on a port that the system chose, so no other program can take it in between.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(worker, (store.port, str(folder)), nprocs=SIZE)

    class Results:
        def __init__(self):
            self.values = [json.loads((folder / f"values-{rank}.json").read_text()) for rank in range(SIZE)]

        def training(self, scenario, rank):
            tensors = load_file(folder / f"{scenario}-{rank}.safetensors")
            masks = {n.removeprefix("mask/"): t for n, t in tensors.items() if n.startswith("mask/")}
            net = network()
            net.load_state_dict({n.removeprefix("parameter/"): t for n, t in tensors.items() if "parameter/" in n})
            return net, prunus.Masks(masks)

    return Results()


def alone(name):
    """One process at the global batch, written by hand."""
    net, twin = network(), network()
    handle = prunus.sparsify(net, momentum(net.parameters()), method(name), steps=STEPS)
    start = {n: m.clone() for n, m in handle.masks.items()} if name in ("RigL", "GraNet") else None
    return twin, by_hand(twin, momentum(twin.parameters()), name, lambda step: backward(twin, step), start=start)


@pytest.mark.parametrize("scenario", ["wrapped-first", "attached-first"])
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_are_one_at_the_global_batch(name, scenario, results):
    (net, masks), (other, others) = (results.training(f"{scenario}-{name}", rank) for rank in range(SIZE))
    assert masks.digest() == others.digest()
    assert_same(net, masks, other, dict(others))
    twin, keep = alone(name)
    assert_same(net, masks, twin, keep, rtol=TOLERANCE)


def test_accumulation_without_synchronisation(results):
    (net, masks), (other, others) = (results.training("accumulated", rank) for rank in range(SIZE))
    assert_same(net, masks, other, dict(others))
    twin, keep = alone("RigL")
    assert_same(net, masks, twin, keep, rtol=TOLERANCE)


@pytest.mark.parametrize("name", METHODS)
def test_when_ranks_would_decide_differently_rank_0_decides(name, results):
    zero, one = (values[f"diverging-{name}"] for values in results.values)
    assert zero["proposals"] == zero["agreements"] == one["agreements"]
    # Static decides before the first gradient; every other method would have gone another way on rank 1.
    assert (zero["proposals"] != one["proposals"]) == (name != "Static")
    net, masks = results.training(f"diverging-{name}", 0)
    _, others = results.training(f"diverging-{name}", 1)
    assert masks.digest() == others.digest()
    twin, keep = alone(name)
    assert_same(net, masks, twin, keep)


def test_different_masks_given_are_rank_0s(results):
    own = [values["own masks"] for values in results.values]
    assert own[0] != own[1]
    assert [results.training("different-masks-given", rank)[1].digest() for rank in range(SIZE)] == [own[0], own[0]]


@pytest.mark.parametrize("how", ["masks", "bit"])
def test_every_rank_stops_when_one_received_something_else(how, results):
    for values in results.values:
        assert "the ranks hold different masks" in values[f"damaged-{how}"]


def test_the_example_is_the_same_on_both_ranks_and_near_the_plain_one(results, monkeypatch):
    first, second = (values["example"] for values in results.values)
    assert first == second
    monkeypatch.syspath_prepend(str(EXAMPLES))
    plain = runpy.run_path(str(EXAMPLES / "plain_loop.py"))["main"](2)
    assert first["sparsity"] == plain.sparsity
    # float32, where the order of a sum may decide which of two near-equal weights stays.
    assert first["accuracy"] == pytest.approx(plain.accuracy, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]])
def test_the_example_as_a_program(launcher):
    command = [sys.executable, *launcher, str(EXAMPLES / "ddp_loop.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=True)
    assert done.stdout.count("Outcome(accuracy=0.9") == 1
