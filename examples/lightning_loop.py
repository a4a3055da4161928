"""RigL under Lightning: `sparsify` in `configure_optimizers`, and nothing else changes.

Run it with `python examples/lightning_loop.py`. Lightning computes gradients inside `optimizer.step(closure)`;
growth sees them there, before they are masked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from plain_loop import EPOCHS, Outcome, judge, prepare
from torch import Tensor, nn

import prunus
from prunus.models.vision_repair import repair_torchvision

# Lightning imports torchvision, whose PyPI build does not load beside the CPU build of torch.
repair_torchvision()

import lightning.pytorch as lightning  # noqa: E402


class Digits(lightning.LightningModule):
    """A LightningModule around any network and its optimizer."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer):
        super().__init__()
        self.net = net
        self._optimizer = optimizer

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], index: int) -> Tensor:
        """Return the loss of one batch."""
        x, y, _ = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Attach the method; Lightning knows by now how many optimizer steps there will be."""
        steps = int(self.trainer.estimated_stepping_batches)
        self.sparse = prunus.sparsify(self.net, self._optimizer, prunus.RigL(sparsity=0.9, every=5), steps=steps)
        return self._optimizer


def main(epochs: int = EPOCHS) -> Outcome:
    """Train at 90 % sparsity for `epochs` passes over the data."""
    net, optimizer, batches = prepare()
    module = Digits(net, optimizer)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches)
    return judge(net, module.sparse)


if __name__ == "__main__":
    print(main())
