"""RigL under Hugging Face Accelerate, with two batches accumulated into every step.

Run it with `python examples/accelerate_loop.py`, or on several devices with `accelerate launch`. `sparsify` takes
the prepared objects or the ones before `prepare`; the steps it counts are optimizer steps, not batches.
"""

from __future__ import annotations

import torch.nn.functional as F
from plain_loop import EPOCHS, Outcome, judge, prepare

import prunus


def main(epochs: int = EPOCHS, accumulate: int = 2) -> Outcome:
    """Train at 90 % sparsity for `epochs` passes over the data, `accumulate` batches per step."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model, optimizer, batches = accelerator.prepare(*prepare())

    steps = epochs * -(-len(batches) // accumulate)
    sparse = prunus.sparsify(model, optimizer, prunus.RigL(sparsity=0.9, every=5), steps=steps)

    for _ in range(epochs):
        for x, y, _ids in batches:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
    return judge(accelerator.unwrap_model(model), sparse)


if __name__ == "__main__":
    print(main())
