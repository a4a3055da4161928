"""Evidence for scores, gathered only when asked for, streaming over batches.

A score names what it needs by its parameter names; `gather` collects exactly that. The model leaves as it came:
weights, buffers, modes, `requires_grad` and `.grad` are untouched.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import ParametrizationList

from prunus.errors import InvalidValue, Unsupported
from prunus.parameters import Address, check_finite, copied, parameters_of, unwrap
from prunus.randomness import generator, key

Loss = Callable[[Any, Any], Tensor]
Evidence = dict[str, dict[str, Tensor]]  # parameter name -> evidence name -> tensor of the parameter's shape

GRASP_TEMPERATURE = 200.0


@dataclass(frozen=True)
class Batch:
    """One batch in the form every gatherer reads: how to call the model, and the target if there is one."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any

    @property
    def size(self) -> int:
        """Number of examples."""
        first = self.args[0] if self.args else next(iter(self.kwargs.values()))
        return int(first.shape[0])


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def read_batch(batch: Any, device: torch.device) -> Batch:
    """Read (x, y), (x, y, ids), x alone, or a dict of model keywords (with "labels") as a `Batch`.

    Raises:
        InvalidValue: none of these, or a batch without examples.
    """
    if isinstance(batch, Batch):
        return batch
    if isinstance(batch, Tensor):
        read = Batch((batch.to(device),), {}, None)
    elif isinstance(batch, Mapping) and batch:
        moved = {k: _to(v, device) for k, v in batch.items()}
        read = Batch((), moved, moved.get("labels"))
    elif isinstance(batch, Sequence) and not isinstance(batch, str) and 1 <= len(batch) <= 3:
        target = batch[1] if len(batch) > 1 else None
        read = Batch((_to(batch[0], device),), {}, _to(target, device))
    else:
        raise InvalidValue(
            f"a batch must be x, (x, y), (x, y, ids) or a dict of model keywords, not {type(batch).__name__}."
        )
    first = next(iter((*read.args, *read.kwargs.values())))
    if isinstance(first, Tensor) and first.ndim and first.shape[0] == 0:
        raise InvalidValue(f"a batch has no examples (shape {tuple(first.shape)}); leave empty batches out.")
    return read


def default_loss(output: Any, target: Any) -> Tensor:
    """Return the model's own `.loss` when it computed one, else mean cross-entropy of logits (last axis or axis 1).

    Raises:
        InvalidValue: there is neither a loss nor a target.
    """
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    logits = getattr(output, "logits", output)
    if target is None:
        raise InvalidValue("this score needs labels; give data as (inputs, labels) batches, or pass loss=.")
    if logits.ndim == 3 and target.ndim == 2 and logits.shape[:2] == target.shape:
        logits = logits.flatten(0, 1)
        target = target.flatten()
    return F.cross_entropy(logits, target)


@contextlib.contextmanager
def preserved(model: nn.Module, *, train: bool = False) -> Iterator[None]:
    """Put the model in eval (or train) mode with all floating parameters differentiable; restore everything after."""
    modes = {m: m.training for m in model.modules()}
    flags = {p: p.requires_grad for p in model.parameters()}
    buffers = {b: b.clone() for b in model.buffers()} if train else {}
    model.train(train)
    try:
        for parameter in flags:
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(True)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)


@dataclass
class Source:
    """Where evidence comes from: the model, its prunable tensors, batches, and how loss is computed."""

    model: nn.Module
    addresses: Mapping[str, Address]
    batches: list[Batch]
    loss: Loss
    seed: int
    round: int
    train: bool

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The prunable parameters by name."""
        return parameters_of(self.model, self.addresses)

    def need_batches(self, what: str) -> list[Batch]:
        """Return the batches, or raise `InvalidValue` saying that `what` needs data."""
        if not self.batches:
            raise InvalidValue(
                f"{what} is computed from data; pass data= (batches of inputs, or of inputs and labels)."
            )
        return self.batches

    def run(self, batch: Batch) -> Any:
        """Return the model's output for a batch."""
        return self.model(*batch.args, **batch.kwargs)

    def gradients(self, loss: Tensor, *, create_graph: bool = False) -> dict[str, Tensor]:
        """Return dLoss/dw for every prunable tensor; zeros where the loss does not depend on it."""
        parameters = self.parameters
        grads = torch.autograd.grad(loss, list(parameters.values()), create_graph=create_graph, allow_unused=True)
        return {
            n: g if g is not None else torch.zeros_like(p) for (n, p), g in zip(parameters.items(), grads, strict=True)
        }


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


def _input_norm(source: Source) -> dict[str, Tensor]:
    """Root mean square of every input feature over examples and positions, spread to the weight's shape."""
    batches = source.need_batches("an input norm")
    owners: dict[str, list[nn.Module]] = {n: [] for n in source.addresses}
    ids = {id(p): n for n, p in source.parameters.items()}
    for module in source.model.modules():
        chains = getattr(module, "parametrizations", {}).values()  # spectral norm keeps the weight one level down
        own = [p for holder in (module, *chains) for p in holder.parameters(recurse=False)]
        for parameter in own:
            if id(parameter) in ids and not isinstance(module, ParametrizationList):
                owners[ids[id(parameter)]].append(module)
    squares: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    attention: dict[str, Tensor | None] = {"mask": None}

    def watch(name: str, address: Address) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().double()
            if address.kind.startswith("conv"):
                spatial = len(address.shape) - 2
                x = x.movedim(-1 - spatial, -1).flatten(0, -2)
            else:
                valid = attention["mask"]
                if valid is not None and x.ndim == 3 and x.shape[:2] == valid.shape:
                    x = x[valid.bool()]  # padding tokens say nothing about the text
                x = x.reshape(-1, x.shape[-1])
            squares[name] = squares.get(name, torch.zeros((), dtype=x.dtype)) + x.square().sum(0)
            counts[name] = counts.get(name, 0) + x.shape[0]

        return hook

    for name, address in source.addresses.items():
        if address.kind not in ("linear", "conv", "conv-transpose"):
            raise Unsupported(
                f"input norms are defined for linear and convolution layers; exclude {name!r} ({address.kind}) or use "
                "another score."
            )
        if any(isinstance(m, nn.Embedding | nn.EmbeddingBag) for m in owners[name]):
            raise Unsupported(f"{name!r} is tied to an embedding, whose inputs are token ids; exclude it.")
    # A tensor that several layers share sees the inputs of all of them.
    handles = [
        owner.register_forward_pre_hook(watch(name, address))
        for name, address in source.addresses.items()
        for owner in owners[name]
    ]
    try:
        with preserved(source.model), torch.no_grad():
            for batch in batches:
                attention["mask"] = batch.kwargs.get("attention_mask")
                source.run(batch)
    finally:
        for handle in handles:
            handle.remove()
    unseen = [n for n in source.addresses if n not in squares]
    if unseen:
        raise InvalidValue(
            f"the layer of {unseen[0]!r} was never run on the data; exclude it or use data that reaches it."
        )
    return {n: a.broadcast_inputs((squares[n] / counts[n]).sqrt().float()) for n, a in source.addresses.items()}


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
    "input_norm": _input_norm,
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
