"""A run to be killed: `python killed_run.py FOLDER SECONDS...` kills it after each of SECONDS, then lets it finish.

Torch is imported once; each life of the run is a fork, so that killing one costs no new start.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from prunus.data.examples import Examples, Splits
from prunus.masks import Masks
from prunus.methods.rigl import RigL
from prunus.run.stages import Run, State
from prunus.run.store import Store
from prunus.train.callback import Callback
from prunus.train.optim import build
from prunus.train.training import Training

TRAINING = Training(epochs=6, batch_size=8, lr=0.05, augment="crop1,flip", evaluate_every=2)
RIGL = RigL(sparsity=0.7, every=3, end="0.8dur")


def splits() -> Splits:
    """Small random images; the label is the pair of rows that is bright, 3 for none (mirroring does not change it)."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 4
    x = torch.rand(120, 1, 6, 6, generator=g)
    for i, label in enumerate(y.tolist()):
        x[i, 0, 2 * label : 2 * label + 2] += 2.0
    every = Examples.from_arrays(x, y, classes=4, name="rows")
    parts = (range(48), range(48, 80), range(80, 120))
    train, validation, test = (every.subset(list(p)) for p in parts)
    return Splits(train, validation, test, "rows")


def network(seed: int) -> nn.Module:
    """A small network with batch norm (buffers) and dropout (randomness inside the model)."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 4)
    )


def work(
    store: Store | None,
    *,
    steps: int | None = 4,
    should_stop: Callable[[], bool] | None = None,
    callbacks: tuple[Callback, ...] = (),
    pause: float = 0.0,
) -> State:
    """Warm up, prune while training, and retrain the masks from the warm-up."""

    def wait(*progress: object) -> None:
        time.sleep(pause)

    run = Run(
        store,
        splits=splits(),
        make_model=network,
        training=TRAINING,
        seed=3,
        name_prefix="seed-3/",
        should_stop=should_stop,
        checkpoint_seconds=None,
        checkpoint_steps=steps,
        on_progress=wait if pause else None,
    )
    early = run.train("early", until="1ep")
    sparse = run.train("sparse", method=RIGL, until="5ep", callbacks=callbacks)
    masks = run.compute("masks", {"from": sparse}, lambda: sparse.masks)
    assert isinstance(masks, Masks)
    return run.train("ticket", start=early, start_step=early.step, masks=masks, callbacks=callbacks)


def main() -> None:
    folder, delays = Path(sys.argv[1]), [float(s) for s in sys.argv[2:]]
    torch.set_num_threads(1)
    # The first optimizer of a process imports a good part of torch: done once here, not in every life.
    build([nn.Parameter(torch.zeros(1))], lr=0.0)
    for delay in (*delays, None):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            with Store.create(folder, {"name": "killed"}, {}) as store:
                work(store, pause=0.01)
            os._exit(0)
        if delay is not None:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print("killed" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}", flush=True)


if __name__ == "__main__":
    main()
