"""RigL with DistributedDataParallel: masks are decided once and are the same on every process.

Run it with `torchrun --nproc-per-node 2 examples/ddp_loop.py`; or with `python examples/ddp_loop.py`, which starts
two processes on this machine itself. Each process reads every second example of a batch, so both see together what
one process would see alone.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain_loop import EPOCHS, Outcome, judge, prepare
from torch.nn.parallel import DistributedDataParallel

import prunus


def train(epochs: int) -> Outcome:
    """Train at 90 % sparsity in a process group that is already there."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model, optimizer, batches = prepare()
    parallel = DistributedDataParallel(model)

    sparse = prunus.sparsify(parallel, optimizer, prunus.RigL(sparsity=0.9, every=5), steps=epochs * len(batches))

    for _ in range(epochs):
        for x, y, _ids in batches:
            optimizer.zero_grad()
            F.cross_entropy(parallel(x[rank::size]), y[rank::size]).backward()
            optimizer.step()
    return judge(model, sparse)


def worker(rank: int, size: int, port: int, epochs: int, threads: int) -> None:
    """Join `size` processes that meet at a port of this machine, train, and print what rank 0 got."""
    torch.set_num_threads(threads)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    outcome = train(epochs)
    if rank == 0:
        print(outcome)
    dist.destroy_process_group()


def main(epochs: int = EPOCHS, size: int = 2) -> None:
    """Train under torchrun when it started this process, else in `size` processes of our own."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        outcome = train(epochs)
        if dist.get_rank() == 0:
            print(outcome)
        dist.destroy_process_group()
        return
    # The store listens on a port that the system chose, so no other program can take it in between.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(worker, (size, store.port, epochs, 1), nprocs=size)


if __name__ == "__main__":
    main()
