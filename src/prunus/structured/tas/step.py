"""The other half of the bi-level search: after each step of the weights, one step of the architecture.

Source: Dong and Yang, Network Pruning via Transformable Architecture Search, NeurIPS 2019 (arXiv 1905.09717), algorithm
1 and section 3.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunus.data.batches import Batches
from prunus.data.examples import Examples
from prunus.measure.accuracy import evaluate
from prunus.parameters import unwrap
from prunus.randomness import key
from prunus.structured.tas.network import SearchNet
from prunus.structured.tas.sampling import band_loss, temperature
from prunus.train.callback import Callback
from prunus.train.checkpoint import load_optimizer_state, optimizer_state
from prunus.train.objectives import cross_entropy


class ArchitectureStep(Callback):
    """Trains the logits of a `SearchNet` on examples that its weights do not see.

    After every step of the weights: cross-entropy of a fresh sample on the next batch plus `weight` times the band
    loss, one step of Adam on the logits alone. After every epoch of the weights: the arg-max network is evaluated on
    all these examples, and the logits of the highest accuracy (the first on ties) whose cost lies in the band are kept
    in the network's `best_...` buffers.

    Args:
        examples: the architecture's share of the training examples.
        target: multiply-accumulates at most wanted.
        tolerance: width of the band below the target, in multiply-accumulates.
        epochs, steps_per_epoch: of the training of the weights.
        weight: of the band loss (lambda, 2 in the paper).
        lr, betas, weight_decay: of Adam.
        tau: first and last temperature.
        batch_size: examples per step.
        augment: as in `Training`.
        seed: of batches and samples.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        target: float,
        tolerance: float,
        epochs: int,
        steps_per_epoch: int,
        weight: float = 2.0,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.5, 0.999),
        weight_decay: float = 1e-3,
        tau: tuple[float, float] = (5.0, 0.1),
        batch_size: int = 256,
        augment: str = "",
        seed: int = 0,
    ):
        self.target, self.tolerance, self.weight = target, tolerance, weight
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self.lr, self.betas, self.weight_decay, self.tau = lr, tuple(betas), weight_decay, tuple(tau)
        self.batch_size, self.augment, self.seed = batch_size, augment, seed
        self._examples = examples
        self._batches: Batches | None = None
        self._adam: torch.optim.Adam | None = None
        self._saved: dict[str, Any] | None = None

    def describe(self) -> dict[str, Any]:
        """Return the choices and the hash of the examples."""
        return super().describe() | {
            "betas": list(self.betas),
            "tau": list(self.tau),
            "examples": self._examples.content_hash(),
        }

    def perturb(self, step: int, model: nn.Module) -> None:
        """Set the temperature of the epoch."""
        _search_net(model).tau = temperature(step // self.steps_per_epoch, self.epochs, *self.tau)

    def gradients(self, step: int, model: nn.Module) -> None:
        """Give parameters of choices that were not drawn a gradient of zero.

        Momentum and decay go on, as in the authors' code, and fused optimizers find the gradients they cannot do
        without.
        """
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def event(self, step: int, model: nn.Module) -> None:
        """Train the logits; at the end of an epoch also evaluate the arg-max network."""
        net = _search_net(model)
        adam = self._optimizer(net)
        done = step - 1
        torch.random.default_generator.manual_seed(key(self.seed, "architecture sample", done))
        assert self._batches is not None
        x, y, _ = self._batches.batch(*divmod(done, self._batches.steps_per_epoch))
        widths, depths = net.logits()
        alphas = [*widths, *depths]
        for alpha in alphas:
            alpha.requires_grad_(True)
        try:
            loss = cross_entropy(net(x), y) + self.weight * self._cost(net, widths, depths)
            for alpha, gradient in zip(alphas, torch.autograd.grad(loss, alphas), strict=True):
                alpha.grad = gradient
        finally:
            for alpha in alphas:
                alpha.requires_grad_(False)
        adam.step()
        adam.zero_grad()
        if step % self.steps_per_epoch == 0:
            self._remember(net)

    def _cost(self, net: SearchNet, widths: list[Tensor], depths: list[Tensor]) -> Tensor:
        space = net.space
        discrete = space.macs(space.likeliest(widths, depths))
        return band_loss(space.expected_macs(widths, depths), discrete, self.target, self.tolerance)

    def _remember(self, net: SearchNet) -> None:
        """Keep the logits if their arg-max lies in the band and beats all before it."""
        cost = net.space.macs(net.space.likeliest(*net.logits()))
        if not self.target - self.tolerance <= cost <= self.target:
            return
        assert self._batches is not None
        batches = Batches(self._examples, max(self.batch_size, 256), shuffle=False, device=self._batches.device)
        accuracy = evaluate(net, batches).accuracy
        if accuracy > float(net.best_accuracy):
            net.best_accuracy.fill_(accuracy)
            for kind in (0, 1):
                for kept, alpha in zip(net.logits(best=True)[kind], net.logits()[kind], strict=True):
                    kept.copy_(alpha)

    def _optimizer(self, net: SearchNet) -> torch.optim.Adam:
        """Return Adam over the logits of `net`, with the state of a checkpoint if there was one."""
        if self._adam is None:
            widths, depths = net.logits()
            alphas = [*widths, *depths]
            self._adam = torch.optim.Adam(alphas, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)  # type: ignore[arg-type]
            self._batches = Batches(
                self._examples, self.batch_size, seed=self.seed, augment=self.augment, device=alphas[0].device
            )
            if self._saved is not None:
                load_optimizer_state(self._adam, self._saved["tensors"], self._saved["values"])
        return self._adam

    def state_dict(self) -> dict[str, Any]:
        """Return the state of Adam; the logits themselves are buffers of the network."""
        if self._adam is None:
            return self._saved or {"tensors": {}, "values": {}}
        tensors, values = optimizer_state(self._adam)
        return {"tensors": tensors, "values": values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the state of Adam back when the network is next seen."""
        self._adam, self._saved = None, state if state["values"] else None


def _search_net(model: nn.Module) -> SearchNet:
    net = unwrap(model)
    assert isinstance(net, SearchNet)
    return net
