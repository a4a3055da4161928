"""Channel scores from feature maps: how strongly a layer's output channels respond, and how much the loss feels them.

Source: the ablation of Chen et al., ICML 2022 (arXiv 2202.04736). Feature maps are reduced over batch and positions for
each channel; the released code mixes batch and channel there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from prunus.errors import InvalidValue, Unsupported, unknown
from prunus.evidence import Batch, Loss, default_loss, preserved
from prunus.keep import read_data
from prunus.parameters import Address, parameters_of

FEATURE_SCORES = ("feature-l1", "feature-l2", "saliency")


def per_channel(values: Tensor, axis: int) -> Tensor:
    """Return the sums over all axes but one, float64, shape (values.shape[axis],)."""
    return values.double().movedim(axis, 0).flatten(1).sum(1)


def feature_scores(
    model: nn.Module,
    addresses: Mapping[str, Address],
    data: Any,
    score: str = "feature-l1",
    *,
    loss: Loss | None = None,
) -> dict[str, Tensor]:
    """Return one score per output channel of linear and convolution layers, measured on data in eval mode.

    The model comes back as it was.

    Args:
        model: apply the masks first to see the network as pruned.
        addresses: the tensors to score, see `prunus.parameters.prunable`.
        data: batches as in `prunus.prune`; "saliency" needs labels.
        score: for outputs a of the layer, over examples and positions of a channel: "feature-l1" mean |a|,
            "feature-l2" root of mean a^2, "saliency" mean |a dL/da| with L the mean loss of a batch times its size.
        loss: a function of (output, target); default the model's own or cross-entropy.

    Raises:
        UnknownName: no such score.
        Unsupported: a tensor of another kind of layer.
        InvalidValue: no data, or a layer that the data never reaches.
    """
    if score not in FEATURE_SCORES:
        raise unknown("channel score from feature maps", score, FEATURE_SCORES)
    for name, address in addresses.items():
        if address.kind not in ("linear", "conv", "conv-transpose"):
            raise Unsupported(f"{name!r} ({address.kind}) has no feature maps; linear and convolution layers have.")
    parameters = parameters_of(model, addresses)
    device = next(iter(parameters.values())).device
    batches = read_data([] if data is None else data, None, None, device)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    with ExitStack() as stack, preserved(model):
        size = [1]
        for name, address in addresses.items():
            for module in model.modules():
                if any(p is parameters[name] for p in module.parameters(recurse=False)):
                    hook = _watching(name, address, score, sums, counts, size)
                    stack.callback(module.register_forward_hook(hook).remove)
        for batch in batches:
            size[0] = batch.size
            _run(model, batch, list(parameters.values()), score, default_loss if loss is None else loss)
    unseen = [n for n in addresses if n not in sums]
    if unseen:
        raise InvalidValue(f"the layer of {unseen[0]!r} was never run on the data; exclude it or use other data.")
    means = {n: sums[n] / counts[n] for n in addresses}
    return {n: m.sqrt() for n, m in means.items()} if score == "feature-l2" else means


def _run(model: nn.Module, batch: Batch, parameters: Sequence[Tensor], score: str, loss: Loss) -> None:
    if score == "saliency":
        value = loss(model(*batch.args, **batch.kwargs), batch.target)
        torch.autograd.grad(value, parameters, allow_unused=True)  # hooks on feature maps see their gradients
        return
    with torch.no_grad():
        model(*batch.args, **batch.kwargs)


def _watching(
    name: str, address: Address, score: str, sums: dict[str, Tensor], counts: dict[str, int], size: Sequence[int]
) -> Callable[[nn.Module, Any, Tensor], None]:
    """Return a forward hook that adds what a layer's output says about its channels."""
    axis = -1 if address.kind == "linear" else 1 - len(address.shape)

    def add(values: Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + per_channel(values, axis)
        counts[name] = counts.get(name, 0) + values.numel() // values.shape[axis]

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        feature = output.detach().clone()  # an in-place activation may write into the output next
        if score == "saliency":
            output.register_hook(lambda gradient: add((feature * gradient * size[0]).abs()))
        else:
            add(feature.abs() if score == "feature-l1" else feature.double().square())

    return hook
