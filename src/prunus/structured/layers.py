"""Whole residual blocks as units: which ones can go, and how much each matters; `Plan.removed_modules` takes them out.

Source: "When Layers Play the Lottery, all Tickets Win at Initialization", Jordao, de Araujo, Maia and Pedrini, 2023
(arXiv 2301.10835); the authors' code is not published.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunus.budget.select import keep_best
from prunus.errors import Infeasible, InvalidValue, NothingPrunable, unknown
from prunus.evidence import Batch, Loss, preserved, read_batch
from prunus.graph.plan import Plan
from prunus.measure.cost import layer_costs
from prunus.measure.forwarding import call, device_of, evaluating, logits_of, to_device
from prunus.parameters import check_finite, copied, prunable, unwrap
from prunus.randomness import generator
from prunus.scores.registry import SCORES
from prunus.stats import gather

ACTIVITY = ("expect-abs", "hrank", "kl", "pls")
AGGREGATES = ("sum", "mean")


@dataclass(frozen=True)
class Block:
    """One residual block.

    Attributes:
        name: module path.
        stage: number of the stage it belongs to: a run of blocks with one output shape.
        shape: shape of its output without the batch axis.
        params: number of its parameters.
        macs: multiply-accumulates of one example in its weight tensors.
        reason: why it cannot be removed; "" when it can.
    """

    name: str
    stage: int
    shape: tuple[int, ...]
    params: int
    macs: int
    reason: str = ""


@dataclass(frozen=True)
class Blocks:
    """All residual blocks of a network, in the order in which they run.

    Attributes:
        every: removable ones and the others.
        macs: multiply-accumulates of one example in all weight tensors of the network.
    """

    every: tuple[Block, ...]
    macs: int

    @property
    def removable(self) -> dict[str, Block]:
        """Those that can be replaced by the identity, by name."""
        return {b.name: b for b in self.every if not b.reason}

    def emptied(self, removed: Iterable[str]) -> list[int]:
        """Return the stages that had removable blocks and have none left: allowed, but never to be done unnoticed."""
        gone = set(removed)
        had = {b.stage for b in self.removable.values()}
        return sorted(had - {b.stage for b in self.removable.values() if b.name not in gone})


@dataclass
class _Seen:
    """What one forward pass showed of a module."""

    calls: int = 0
    plain: bool = True
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    given: Tensor | None = None
    returned: Any = None
    order: int = 0


def residual_blocks(model: nn.Module, example: Any, *, spare_neighbours: bool = False) -> Blocks:
    """Find the residual blocks of a network and say which ones can be replaced by the identity.

    A block can go when it is called once, returns a tensor of the shape of its first argument, and returns just that
    once all its parameters are zero: then its branch ends in a linear map or a norm and its shortcut is the identity.
    A ReLU after the addition changes nothing because the input of such a block is the output of another ReLU; that
    this is so is measured on the example. It covers ResNets with the activation before or after the addition,
    bottlenecks, inverted residuals and pre-norm transformer blocks. A container of such blocks is a stage, not a
    block. Modules of the class of a removable block that cannot go (down-sampling) are listed with the reason.

    Args:
        model: the network; left as it is.
        example: one batch of inputs, drawn like real ones.
        spare_neighbours: keep also the blocks just before and after one that changes shapes, as the paper does; shapes
            alone do not ask for it.

    Raises:
        NothingPrunable: no block can go.
    """
    model = unwrap(model)
    bare = copied(model)
    found = _candidates(bare, example)
    if not found:
        raise NothingPrunable(
            f"{type(model).__name__} has no residual block whose shortcut is the identity; plain networks have no "
            "layer that can go without changing shapes or cutting the path."
        )
    modules = dict(bare.named_modules())
    kinds = {type(modules[name]) for name in found if not isinstance(modules[name], nn.Sequential)}
    seen = _observe(bare, example, [n for n, m in modules.items() if n in found or type(m) in kinds])
    order = sorted((s.order, name) for name, s in seen.items() if isinstance(s.returned, Tensor))
    costs = layer_costs(model, example)
    shapes = {name: tuple(seen[name].returned.shape[1:]) for _, name in order}
    reasons = {name: "" if name in found else _reason(seen[name]) for _, name in order}
    if spare_neighbours:
        names = [name for _, name in order]
        fixed = [i for i, n in enumerate(names) if reasons[n]]
        for i in fixed:
            for near in (i - 1, i + 1):
                if 0 <= near < len(names) and not reasons[names[near]]:
                    reasons[names[near]] = f"next to {names[i]}, which changes shapes"
    blocks, stage = [], -1
    for number, (_, name) in enumerate(order):
        if number == 0 or shapes[name] != shapes[order[number - 1][1]]:
            stage += 1
        inside = [cost.macs for tensor, cost in costs.items() if tensor.startswith(f"{name}.")]
        params = sum(p.numel() for p in modules[name].parameters())
        blocks.append(Block(name, stage, shapes[name], params, sum(inside), reasons[name]))
    return Blocks(tuple(blocks), sum(cost.macs for cost in costs.values()))


def _observe(model: nn.Module, example: Any, names: Sequence[str]) -> dict[str, _Seen]:
    """Run the example once and note what the named modules got and returned."""
    seen = {name: _Seen() for name in names}
    ticks = iter(range(1 << 30))

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            s = seen[name]
            s.calls += 1
            s.plain = s.plain and bool(args) and isinstance(args[0], Tensor)
            # Caches already hold what this call put in; without them the call can be repeated.
            s.args, s.kwargs = args[1:], {k: v for k, v in kwargs.items() if _repeatable(v)}
            s.given = args[0].clone() if args and isinstance(args[0], Tensor) else None
            s.returned = output
            s.order = next(ticks)

        return note

    modules = dict(model.named_modules())
    with ExitStack() as stack, evaluating(model), torch.no_grad():
        for name in names:
            stack.callback(modules[name].register_forward_hook(hook(name), with_kwargs=True).remove)
        call(model, to_device(example, device_of(model)))
    return {name: s for name, s in seen.items() if s.calls}


def _candidates(model: nn.Module, example: Any) -> set[str]:
    """Return the blocks that return their input when their own parameters are zero (parameters come back)."""
    modules = {n: m for n, m in model.named_modules() if n and any(True for _ in m.parameters())}
    branching = [n for n, m in modules.items() if any(True for _ in m.children())]
    seen = _observe(model, example, branching)
    good = set()
    for name, s in seen.items():
        if not _shaped(s):
            continue
        assert s.given is not None
        own = [p for p in modules[name].parameters() if p.is_floating_point()]
        values = [p.detach().clone() for p in own]
        with torch.no_grad(), evaluating(modules[name]):
            for p in own:
                p.zero_()
            try:
                returned = modules[name](s.given.clone(), *s.args, **s.kwargs)
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
                if not s.kwargs and not s.args:
                    raise
                returned = None  # it cannot be called without what was left out, so nothing is known about it
            for p, value in zip(own, values, strict=True):
                p.copy_(value)
        if isinstance(returned, Tensor) and torch.equal(returned, s.given):
            good.add(name)
    return good - _containers(modules, good)


def _containers(modules: Mapping[str, nn.Module], good: set[str]) -> set[str]:
    """Return the members of `good` that are not the blocks themselves: stages made of blocks, and parts of blocks."""
    out = set()
    for name in good:
        inner = {p for n in good if n.startswith(f"{name}.") for p in modules[n].parameters()}
        if inner == set(modules[name].parameters()):
            out.add(name)
    blocks = good - out
    return out | {n for n in blocks if any(n.startswith(f"{outer}.") for outer in blocks)}


def _shaped(s: _Seen) -> bool:
    fits = s.calls == 1 and s.plain and isinstance(s.returned, Tensor) and s.given is not None
    return fits and s.returned.shape == s.given.shape and s.returned.dtype == s.given.dtype  # type: ignore[union-attr]


def _repeatable(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_repeatable(v) for v in value)
    return value is None or isinstance(value, Tensor | int | float | str)


def _reason(s: _Seen) -> str:
    if not s.plain or s.given is None:
        return "its first argument is no tensor"
    if s.calls > 1:
        return f"called {s.calls} times"
    if s.returned.shape != s.given.shape:
        return f"changes shapes from {tuple(s.given.shape[1:])} to {tuple(s.returned.shape[1:])}"
    return "its shortcut is not the identity"


def reset_statistics(model: nn.Module) -> nn.Module:
    """Forget the running statistics of all norm layers, in place, and return the model."""
    for module in model.modules():
        forget = getattr(module, "reset_running_stats", None)
        if callable(forget):
            forget()
    return model


# -- scores ---------------------------------------------------------------------------------------------------------


def pooled_scores(elements: Mapping[str, Tensor], blocks: Iterable[str], how: str = "sum") -> dict[str, float]:
    """Return one score per block from element scores of its weights: their sum or their mean, in float64.

    The paper does not say which; within a stage, where blocks are equal in size, both rank alike.

    Args:
        elements: parameter name -> element scores.
        blocks: module paths.
        how: "sum" or "mean".

    Raises:
        UnknownName: neither.
        InvalidValue: a block without scored weights.
    """
    if how not in AGGREGATES:
        raise unknown("aggregate", how, AGGREGATES)
    result = {}
    for name in blocks:
        inside = [s.double() for tensor, s in elements.items() if tensor.startswith(f"{name}.")]
        if not inside:
            raise InvalidValue(f"block {name!r} has no weight with a score; do not exclude its tensors.")
        total = sum(float(s.sum()) for s in inside)
        result[name] = total if how == "sum" else total / sum(s.numel() for s in inside)
    return result


def mean_activity(feature: Tensor) -> float:
    """Return the mean |activation| of feature maps (expectABS)."""
    return float(feature.double().abs().mean())


def feature_rank(feature: Tensor) -> float:
    """Return the mean rank of the feature maps (HRank; Lin et al., CVPR 2020).

    Maps of (N, C, H, W) are N C matrices, tokens of (N, T, D) are N. Ranks are not normalised: they are at most
    min(H, W), so the last stages of a network rank lowest.

    Raises:
        InvalidValue: features without two axes per example.
    """
    if feature.ndim < 3:
        raise InvalidValue(f"ranks need feature maps, got features of shape {tuple(feature.shape)}.")
    return float(torch.linalg.matrix_rank(feature.float()).double().mean())


def divergence(reference: Tensor, changed: Tensor) -> float:
    """Return the mean KL(p || q) of the class distributions that two sets of logits (N, classes) stand for."""
    p, q = F.log_softmax(reference.double(), -1), F.log_softmax(changed.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def variable_importance(features: np.ndarray, labels: np.ndarray, components: int = 2) -> np.ndarray:
    """Return the importance of every feature in a partial-least-squares projection onto the classes (VIP).

    VIP_j = sqrt(m * sum_c s_c w_jc^2 / sum_c s_c), with unit weight vectors w_c, s_c = |t_c|^2 |q_c|^2 the sum of
    squares of the labels that component c explains, and m features; the mean of VIP^2 is 1. Wold et al., 1993. The
    paper names partial least squares only; VIP is what the authors' earlier work uses (not verified here).

    Args:
        features: (n, m).
        labels: (n,) class numbers.
        components: of the projection; limited by the rank of the features.

    Raises:
        InvalidValue: fewer than two classes or two examples, or constant features.
    """
    from sklearn.cross_decomposition import PLSRegression

    classes = np.unique(labels)
    varying = features.std(axis=0) > 0
    if len(classes) < 2 or not varying.any():
        raise InvalidValue("partial least squares needs two classes and features that vary.")
    one_hot = (labels[:, None] == classes[None, :]).astype(np.float64)
    most = min(len(features) - 1, int(varying.sum()), len(classes))
    fitted = PLSRegression(n_components=max(1, min(components, most))).fit(features[:, varying], one_hot)
    explained = (fitted.x_scores_**2).sum(axis=0) * (fitted.y_loadings_**2).sum(axis=0)
    unit = fitted.x_weights_ / np.linalg.norm(fitted.x_weights_, axis=0)
    importance = np.zeros(features.shape[1])
    importance[varying] = np.sqrt(features.shape[1] * (unit**2 @ explained) / explained.sum())
    return importance


def score_blocks(
    model: nn.Module,
    blocks: Sequence[str],
    score: str = "grasp",
    *,
    data: Iterable[Any] | None = None,
    aggregate: str = "sum",
    loss: Loss | None = None,
    components: int = 2,
    seed: int = 0,
) -> dict[str, float]:
    """Return one number per block; higher = keep.

    Args:
        model: the network; left as it is.
        blocks: module paths, see `residual_blocks`.
        score: any score of single weights ("snip", "grasp", "synflow"...), taken in train mode and pooled over the
            block; "expect-abs", "hrank" or "pls" of the block's output, in eval mode; "kl", how far the class
            distribution moves without the block; or "random". Magnitude is there for comparison: norms grow by stage,
            so it picks a stage instead of blocks.
        data: batches; for "snip", "grasp" and "pls" with labels, about ten of each class.
        aggregate: "sum" or "mean" of the element scores.
        loss: as in `prunus.prune`.
        components: of the projection of "pls".
        seed: of "random".

    Raises:
        UnknownName: no such score.
        InvalidValue: data is missing.
        NonFinite: a score is NaN or infinite.
    """
    if score == "random":
        noise = torch.rand(len(blocks), generator=generator(seed, "blocks"), dtype=torch.float64)
        return dict(zip(blocks, noise.tolist(), strict=True))
    if score in ACTIVITY:
        batches = [read_batch(b, device_of(model)) for b in data or ()]
        if not batches:
            raise InvalidValue(f"score {score!r} looks at activations; give data.")
        found = (
            _of_outputs(model, blocks, batches)
            if score == "kl"
            else _of_features(model, blocks, batches, score, components)
        )
    else:
        if score not in SCORES:
            raise unknown("score of blocks", score, [*ACTIVITY, "random", *(s.name for s in SCORES)])
        info = SCORES.entry(score)
        wanted = [n for n in prunable(model) if any(n.startswith(f"{b}.") for b in blocks)]
        # Evidence of the whole network: a Hessian-vector product restricted to the blocks would be another one.
        addresses = prunable(model)
        evidence = gather(model, addresses, info.needs, data=data, loss=loss, seed=seed, train=info.data == "labelled")
        function = info.load()
        elements = {n: function(**{need: evidence[n][need] for need in info.needs}) for n in wanted}
        found = pooled_scores(elements, blocks, aggregate)
    check_finite({name: torch.tensor(value) for name, value in found.items()}, "score of block")
    return found


def _of_outputs(model: nn.Module, blocks: Sequence[str], batches: Sequence[Batch]) -> dict[str, float]:
    """Return KL between the network's distribution and that without each block, averaged over examples."""

    def run(network: nn.Module) -> list[Tensor]:
        with preserved(network), torch.no_grad():
            return [logits_of(network(*b.args, **b.kwargs)) for b in batches]

    whole = torch.cat(run(unwrap(model)))
    return {name: divergence(whole, torch.cat(run(Plan(removed_modules=[name]).apply(model)))) for name in blocks}


def _of_features(
    model: nn.Module, blocks: Sequence[str], batches: Sequence[Batch], score: str, components: int
) -> dict[str, float]:
    """Return a score of every block's output over all batches."""
    model = unwrap(model)
    modules = dict(model.named_modules())
    features: dict[str, list[Tensor]] = {name: [] for name in blocks}
    with ExitStack() as stack, preserved(model), torch.no_grad():
        for name in blocks:
            kept = features[name]
            hook = modules[name].register_forward_hook(lambda m, args, output, kept=kept: kept.append(output.detach()))
            stack.callback(hook.remove)
        for batch in batches:
            model(*batch.args, **batch.kwargs)
    joined = {name: torch.cat(parts) for name, parts in features.items()}
    if score == "expect-abs":
        return {name: mean_activity(f) for name, f in joined.items()}
    if score == "hrank":
        return {name: feature_rank(f) for name, f in joined.items()}
    targets = [b.target for b in batches]
    if any(t is None for t in targets):
        raise InvalidValue("score 'pls' needs labels; give data as (inputs, labels) batches.")
    # One number per channel: the mean over positions of (N, C, H, W), over tokens of (N, T, D).
    means = {n: _per_channel(f.double()) for n, f in joined.items()}
    labels = torch.cat([t.reshape(-1) for t in targets if t is not None]).cpu().numpy()
    every = variable_importance(torch.cat(list(means.values()), 1).cpu().numpy(), labels, components)
    ends = np.cumsum([m.shape[1] for m in means.values()])[:-1]
    return {name: float(part.mean()) for name, part in zip(means, np.split(every, ends), strict=True)}


def _per_channel(feature: Tensor) -> Tensor:
    if feature.ndim == 3:
        return feature.mean(1)
    return feature.flatten(2).mean(2) if feature.ndim > 3 else feature


def number_for(blocks: Blocks, scores: Mapping[str, float], sparsity: float) -> int:
    """Return the fewest blocks, lowest score first, whose removal takes away this share of multiply-accumulates.

    Raises:
        Infeasible: all removable blocks together do less.
    """
    removable = blocks.removable
    for count in range(len(removable) + 1):
        gone = sum(removable[name].macs for name in worst_blocks(scores, count))
        if gone >= sparsity * blocks.macs * (1 - 1e-9):
            return count
    raise Infeasible(
        f"sparsity {sparsity:g} cannot be reached by blocks: all {len(removable)} that can go have "
        f"{gone / blocks.macs:.3f} of the multiply-accumulates."
    )


def worst_blocks(scores: Mapping[str, float], count: int) -> list[str]:
    """Return the `count` blocks of lowest score, in network order; of equal ones the later goes first.

    Raises:
        Infeasible: more blocks than there are.
        InvalidValue: `count` is no whole number from 0 up.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise InvalidValue(f"blocks={count!r} must be a whole number from 0 up.")
    if count > len(scores):
        raise Infeasible(f"{count} blocks cannot go: only {len(scores)} are removable.")
    keep = keep_best(torch.tensor(list(scores.values()), dtype=torch.float64), len(scores) - count)
    return [name for name, stays in zip(scores, keep.tolist(), strict=True) if not stays]
