"""BatchNorm after surgery: running statistics measured anew for the weights as they are now."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunus.errors import InvalidValue, NonFinite
from prunus.measure.forwarding import batch_size, call, device_of, evaluating, inputs_of, to_device


def recalibrate(model: nn.Module, batches: Iterable[Any]) -> int:
    """Replace the running statistics of every BatchNorm layer by those of its inputs over `batches`.

    Pruning, averaging and interpolating weights all leave the running mean and variance of another network behind.
    The pass runs without gradients, BatchNorm layers normalise by the batch at hand, and everything else (dropout
    above all) is in eval mode. Old statistics have no influence. Means and variances are pooled over all examples, so
    a short last batch counts by its size, and the spread between batches is part of the variance; in the first
    BatchNorm layer the result is the mean and the unbiased variance of the whole data, however it is cut. Momentum,
    modes and all parameters are left as they were; `num_batches_tracked` becomes the number of batches used.

    Args:
        model: any module; without BatchNorm layers that track statistics nothing happens and `batches` is not read.
        batches: yields x, (x, y) or (x, y, ids); moved to the device of the model. Batches of a single example have
            no spread and are left out.

    Returns:
        How many examples were used; 0 when the model has no such layer.

    Raises:
        InvalidValue: no batch has two examples or more.
        NonFinite: the inputs of a BatchNorm layer contain NaN or infinity.

    After any error the old statistics are back. Source: Ioffe and Szegedy, ICML 2015 (population statistics,
    algorithm 2); pooling after Chan, Golub and LeVeque, The American Statistician, 1983.
    """
    layers = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, _BatchNorm) and m.running_mean is not None and m.running_var is not None
    }
    if not layers:
        return 0
    before = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in layers.items()}
    pools = {name: _Pool(name) for name in layers}
    hooks = [m.register_forward_pre_hook(pools[name].see) for name, m in layers.items()]
    device = device_of(model)
    used = tracked = 0
    try:
        with evaluating(model), torch.no_grad():
            for layer in layers.values():
                layer.training = True
            for batch in batches:
                x = to_device(inputs_of(batch), device)
                size = batch_size(x)
                if size < 2:
                    continue
                call(model, x)
                used += size
                tracked += 1
            if not used:
                raise InvalidValue(
                    "BatchNorm statistics need at least one batch with two examples; give more data or larger batches."
                )
            for name, layer in layers.items():
                pools[name].store(layer, before[name], tracked)
    except BaseException:
        for name, layer in layers.items():
            layer.load_state_dict(before[name])
        raise
    finally:
        for hook in hooks:
            hook.remove()
    return used


class _Pool:
    """Count, mean and sum of squared deviations per channel, merged batch by batch in float64."""

    def __init__(self, name: str):
        self.name = name
        self.count = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None

    def see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Merge one input of shape (batch, channels, ...) of the layer."""
        x = args[0].detach().to(torch.float64)
        axes = [0, *range(2, x.ndim)]
        count = x.numel() // x.shape[1]
        mean = x.mean(dim=axes)
        squares = (x - mean.view(1, -1, *[1] * (x.ndim - 2))).square().sum(dim=axes)
        if not bool(torch.isfinite(squares).all()):
            raise NonFinite(f"the inputs of BatchNorm layer {self.name!r} contain NaN or infinity.")
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + squares + delta.square() * (self.count * count / total)
        self.count = total

    def store(self, layer: _BatchNorm, before: dict[str, Tensor], tracked: int) -> None:
        """Write the pooled statistics; a layer that the forward pass never reached keeps what it had."""
        if self.mean is None or self.squares is None:
            layer.load_state_dict(before)
            return
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(self.mean)
        layer.running_var.copy_(self.squares / max(1, self.count - 1))
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(tracked)
