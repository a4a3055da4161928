"""Evidence for scores, gathered only when asked for, streaming over batches.

A score names what it needs by its parameter names; `gather` collects exactly that. The model leaves as it came:
weights, buffers, modes, `requires_grad` and `.grad` are untouched.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunus.errors import InvalidValue, Unsupported
from prunus.evidence import Batch, Loss, Source, default_loss, preserved, read_batch
from prunus.input_norms import input_norm
from prunus.parameters import Address, check_finite, copied, parameters_of, unwrap
from prunus.randomness import generator, key

Evidence = dict[str, dict[str, Tensor]]  # parameter name -> evidence name -> tensor of the parameter's shape

GRASP_TEMPERATURE = 200.0


def _weight(source: Source) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in source.parameters.items()}


def _noise(source: Source) -> dict[str, Tensor]:
    return {
        n: torch.rand(a.shape, generator=generator(source.seed, "score noise", n), dtype=torch.float32)
        for n, a in source.addresses.items()
    }


def _mean_over_examples(source: Source, what: str, of_batch: Callable[[Batch], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Average a per-batch mean over batches, weighted by batch size."""
    total: dict[str, Tensor] = {}
    examples = 0
    for batch in source.need_batches(what):
        examples += batch.size
        for name, value in of_batch(batch).items():
            value = value.detach().to(torch.promote_types(value.dtype, torch.float32)) * batch.size
            total[name] = total[name] + value if name in total else value
    return {n: t / examples for n, t in total.items()}


def _gradient(source: Source) -> dict[str, Tensor]:
    """Mean-loss gradient over all examples."""
    with preserved(source.model, train=source.train):
        return _mean_over_examples(
            source, "a gradient", lambda b: source.gradients(source.loss(source.run(b), b.target))
        )


def _movement(source: Source) -> dict[str, Tensor]:
    """-sum over batches of w * dL/dw, with the weights standing still; in training the sum runs over real steps."""
    with preserved(source.model, train=source.train):
        total = {n: torch.zeros(a.shape) for n, a in source.addresses.items()}
        for batch in source.need_batches("movement"):
            grads = source.gradients(source.loss(source.run(batch), batch.target))
            for name, parameter in source.parameters.items():
                total[name] = total[name].to(parameter.device) - (parameter.detach() * grads[name].detach()).float()
    return total


def _squared_gradient(source: Source) -> dict[str, Tensor]:
    """Mean over examples of the squared gradient of each single example's loss."""

    def of_batch(batch: Batch) -> dict[str, Tensor]:
        if batch.kwargs:
            raise Unsupported("per-example gradients need (inputs, labels) batches, not dicts of keywords.")
        total = {n: torch.zeros(a.shape) for n, a in source.addresses.items()}
        for i in range(batch.size):
            target = None if batch.target is None else batch.target[i : i + 1]
            one = Batch(tuple(a[i : i + 1] for a in batch.args), {}, target)
            for name, grad in source.gradients(source.loss(source.run(one), one.target)).items():
                total[name] = total[name].to(grad.device) + grad.detach().float().square()
        return {n: t / batch.size for n, t in total.items()}

    # Eval mode always: batch statistics of a single example mean nothing.
    with preserved(source.model, train=False):
        return _mean_over_examples(source, "a Fisher diagonal", of_batch)


def _hessian_gradient(source: Source) -> dict[str, Tensor]:
    """H g of the mean loss with logits divided by 200; g is the mean gradient over all batches, held constant.

    The loss of a model that computes its own (an output with `.loss`) is taken as it is.
    """
    batches = source.need_batches("a Hessian-gradient product")
    examples = sum(b.size for b in batches)

    def loss_of(batch: Batch) -> Tensor:
        output = source.run(batch)
        own = getattr(output, "loss", None)
        logits = getattr(output, "logits", output)
        # A model that computes its own loss (shifted labels, several heads) cannot be given scaled logits.
        value = own if isinstance(own, Tensor) else source.loss(logits / GRASP_TEMPERATURE, batch.target)
        return value * (batch.size / examples)

    # Fused attention has no second derivative.
    with preserved(source.model, train=source.train), sdpa_kernel(SDPBackend.MATH):
        held: dict[str, Tensor] = {}
        for batch in batches:
            for name, grad in source.gradients(loss_of(batch)).items():
                held[name] = held[name] + grad.detach() if name in held else grad.detach()
        product: dict[str, Tensor] = {}
        for batch in batches:
            live = source.gradients(loss_of(batch), create_graph=True)
            inner = sum((held[n] * live[n]).sum() for n in live)
            assert isinstance(inner, Tensor)
            for name, part in source.gradients(inner).items():
                product[name] = product[name] + part.detach() if name in product else part.detach()
    return product


def _flow_gradient(source: Source) -> dict[str, Tensor]:
    """dR/d|w| for an all-ones input; float64, because products of absolute weights overflow float32 in deep nets."""
    if not source.batches or not source.batches[0].args:
        raise InvalidValue("synaptic flow needs the shape of one input; pass example= or data=.")
    shape = source.batches[0].args[0]
    if not shape.is_floating_point():
        raise Unsupported("synaptic flow needs floating-point inputs; token ids have no all-ones input.")
    positive = copied(source.model).double().eval()
    with torch.no_grad():
        for parameter in positive.parameters():
            if parameter.is_floating_point():
                parameter.abs_()
                parameter.requires_grad_(True)
    parameters = parameters_of(positive, source.addresses)
    ones = torch.ones(1, *shape.shape[1:], dtype=torch.float64, device=shape.device)
    output = positive(ones)
    total = getattr(output, "logits", output).sum()
    grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {
        n: g.detach() if g is not None else torch.zeros_like(p)
        for (n, p), g in zip(parameters.items(), grads, strict=True)
    }


@contextlib.contextmanager
def _keyed_dropout(seed: int, round: int, device: torch.device) -> Iterator[None]:
    """Let dropout and the like draw from a state that depends on seed and round only, and put the old one back."""
    chosen = key(seed, "scoring", round)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(chosen)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(chosen)
        yield


GATHERERS: dict[str, Callable[[Source], dict[str, Tensor]]] = {
    "weight": _weight,
    "noise": _noise,
    "gradient": _gradient,
    "squared_gradient": _squared_gradient,
    "hessian_gradient": _hessian_gradient,
    "flow_gradient": _flow_gradient,
    "input_norm": input_norm,
    "movement": _movement,
}


def gather(
    model: nn.Module,
    addresses: Mapping[str, Address],
    needs: Iterable[str],
    *,
    data: Iterable[Any] | None = None,
    batches: int | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    round: int = 0,
    train: bool = False,
) -> Evidence:
    """Gather the evidence called `needs` for every tensor of `addresses`.

    Args:
        model: the model; left exactly as it was.
        addresses: prunable tensors (see `prunus.parameters.prunable`).
        needs: names from `GATHERERS`.
        data: iterable of batches (see `read_batch`).
        batches: use at most this many batches (None: all).
        loss: function of (output, target) giving a scalar; default `default_loss`.
        seed: for random evidence.
        round: scoring round, when scores are taken repeatedly.
        train: score in train mode (batch statistics, dropout); default eval.

    Returns:
        {parameter name: {evidence name: tensor of the parameter's shape, at least float32}}.

    Raises:
        InvalidValue: unknown evidence, or data is missing.
        NonFinite: evidence has NaN or infinity.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    read = [read_batch(b, device) for b in itertools.islice(data, batches)] if data is not None else []
    # Wrappers are left out: compiled graphs refuse second derivatives, DistributedDataParallel refuses autograd.grad.
    source = Source(unwrap(model), addresses, read, loss or default_loss, seed, round, train)
    evidence: Evidence = {n: {} for n in addresses}
    for need in dict.fromkeys(needs):
        if need not in GATHERERS:
            raise InvalidValue(f"evidence {need!r} is not known; known: {', '.join(GATHERERS)}.")
        with _keyed_dropout(seed, round, device):
            gathered = GATHERERS[need](source)
        check_finite(gathered, need)
        for name, tensor in gathered.items():
            widest = torch.promote_types(tensor.dtype, torch.float32)
            evidence[name][need] = tensor.to(widest)
    return evidence
