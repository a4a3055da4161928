"""How alike two networks are: in what they answer (CKA) and in the landscape between them (mode connectivity).

Source: Zhou, Yang, Chang and Mahoney, "A three-regime model of network pruning", ICML 2023; linear CKA after
Kornblith, Norouzi, Lee and Hinton, ICML 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from prunus.errors import InvalidValue, MaskMismatch, NonFinite

Regime = Literal["I", "II-A", "II-B"]


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Return the linear centred kernel alignment of two representations of the same examples, between 0 and 1.

    CKA = ||Xc^T Yc||^2 / (||Xc^T Xc|| ||Yc^T Yc||) in Frobenius norms, where Xc is X with its column means removed
    (Kornblith et al., ICML 2019, eq. 5). It is 1 for equal representations, symmetric, and blind to orthogonal maps
    and to one common scale, but not to general linear maps. Computed in float64; the cheaper of the feature form and
    the Gram form, which are equal, is taken.

    Args:
        x: shape (n, ...), flattened to (n, features); same examples in the same order as `y`.
        y: shape (n, ...); the number of features may differ from `x`.

    Raises:
        InvalidValue: different numbers of examples, fewer than two, or a representation that is constant.
        NonFinite: a value is NaN or infinite.
    """
    x, y = _centred(x, "first"), _centred(y, "second")
    if len(x) != len(y):
        raise InvalidValue(f"CKA compares the same examples, got {len(x)} and {len(y)} rows.")
    if x.shape[1] + y.shape[1] > 2 * len(x):
        return _alignment(x @ x.T, y @ y.T)
    cross = torch.linalg.matrix_norm(x.T @ y).square()
    return float(cross / (torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)))


def cka_from_grams(k: Tensor, l: Tensor) -> float:
    """Return the centred kernel alignment of two Gram matrices of the same n examples, each of shape (n, n).

    With linear Gram matrices (X X^T and Y Y^T) it equals `linear_cka(X, Y)`; any positive semi-definite kernel is
    allowed. Needs n x n memory, so prefer `linear_cka` when features are few.

    Raises:
        InvalidValue: not two square matrices of the same size, or one is constant after centring.
        NonFinite: a value is NaN or infinite.
    """
    if k.ndim != 2 or k.shape[0] != k.shape[1] or k.shape != l.shape or len(k) < 2:
        raise InvalidValue(f"expected two square Gram matrices of one size, got {tuple(k.shape)} and {tuple(l.shape)}.")
    k, l = _finite(k, "first"), _finite(l, "second")

    def centre(gram: Tensor) -> Tensor:
        return gram - gram.mean(dim=0, keepdim=True) - gram.mean(dim=1, keepdim=True) + gram.mean()

    return _alignment(centre(k), centre(l))


def _alignment(k: Tensor, l: Tensor) -> float:
    scale = torch.linalg.matrix_norm(k) * torch.linalg.matrix_norm(l)
    if float(scale) == 0.0:
        raise InvalidValue("CKA is undefined: one representation is the same for all examples.")
    return float((k * l).sum() / scale)


def _finite(value: Tensor, which: str) -> Tensor:
    if not bool(torch.isfinite(value).all()):
        raise NonFinite(f"the {which} representation contains NaN or infinity.")
    return value.detach().to(torch.float64)


def _centred(value: Tensor, which: str) -> Tensor:
    if value.ndim < 1 or len(value) < 2:
        raise InvalidValue(f"CKA needs at least two examples, the {which} representation is {tuple(value.shape)}.")
    flat = _finite(value, which).reshape(len(value), -1)
    # Differences to the first row are exactly zero for a constant column, the mean of equal numbers need not be exact.
    flat = flat - flat[:1]
    flat = flat - flat.mean(dim=0, keepdim=True)
    if float(flat.abs().amax()) == 0.0:
        raise InvalidValue(f"CKA is undefined: the {which} representation is the same for all examples.")
    return flat


def effective_state(state: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return `state` with pruned entries at exactly zero; tensors without a mask pass through unchanged.

    Raises:
        MaskMismatch: a mask has no tensor of its name and shape.
    """
    for name, mask in (masks or {}).items():
        if name not in state or state[name].shape != mask.shape:
            found = tuple(state[name].shape) if name in state else "nothing"
            raise MaskMismatch(f"mask {name!r} of shape {tuple(mask.shape)} meets {found} in the state.")
    if not masks:
        return dict(state)
    return {
        name: torch.where(masks[name].to(value.device), value, torch.zeros_like(value)) if name in masks else value
        for name, value in state.items()
    }


def interpolate(
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    t: float,
    *,
    masks_a: Mapping[str, Tensor] | None = None,
    masks_b: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the state (1 - t) a + t b between two networks, of effective (masked) weights.

    t = 0 and t = 1 return the ends exactly. Entries that are not floating point (step counters) cannot be mixed and
    come from the nearer end. BatchNorm statistics are mixed like weights and must be re-estimated before use.

    Args:
        state_a: state dict of the first network.
        state_b: state dict of the second network, same names, shapes and dtypes.
        t: position on the segment, between 0 and 1.
        masks_a: name -> bool tensor, True = kept, applied to `state_a`; None when its pruned weights are zero already.
        masks_b: the same for `state_b`.

    Raises:
        InvalidValue: t outside [0, 1], or states that do not fit each other.
        MaskMismatch: masks that do not fit their state.
    """
    if not 0.0 <= t <= 1.0:
        raise InvalidValue(f"t must lie between 0 and 1, got {t!r}.")
    if set(state_a) != set(state_b):
        odd = sorted(set(state_a) ^ set(state_b))
        raise InvalidValue(f"only one of the two states has {', '.join(odd[:5])}; they must be of one architecture.")
    a, b = effective_state(state_a, masks_a), effective_state(state_b, masks_b)
    mixed: dict[str, Tensor] = {}
    for name, left in a.items():
        right = b[name]
        if left.shape != right.shape or left.dtype != right.dtype:
            raise InvalidValue(
                f"{name!r} is {left.dtype} {tuple(left.shape)} in one state and {right.dtype} {tuple(right.shape)} "
                "in the other; they must be of one architecture."
            )
        if left.is_floating_point() or left.is_complex():
            mixed[name] = torch.lerp(left.detach(), right.detach(), t)
        else:
            mixed[name] = (left if t < 0.5 else right).clone()
    return mixed


def linear_mode_connectivity(errors: Sequence[float]) -> float:
    """Return the linear mode connectivity of the errors along a segment, ends included.

    h = (e(0) + e(1)) / 2, t* = argmax |h - e(t)|, LMC = h - e(t*). Negative: a barrier. Near zero: well connected.
    Positive: the segment is better than its ends. The ends take part, so |LMC| >= |e(0) - e(1)| / 2; of equal
    deviations the first along the path counts.

    Args:
        errors: at least two finite numbers (training errors as shares) at evenly spaced positions from 0 to 1.

    Raises:
        InvalidValue: fewer than two numbers.
        NonFinite: a number is NaN or infinite.
    """
    path = torch.tensor([float(e) for e in errors], dtype=torch.float64)
    if len(path) < 2:
        raise InvalidValue(f"connectivity needs the errors at both ends at least, got {len(path)} number(s).")
    if not bool(torch.isfinite(path).all()):
        raise NonFinite(f"the errors along the path contain NaN or infinity: {list(errors)}.")
    deviation = (path[0] + path[-1]) / 2 - path
    size = deviation.abs().tolist()
    return float(deviation[size.index(max(size))])


@dataclass(frozen=True)
class ConnectivityPath:
    """Errors along the segment between two networks.

    Attributes:
        positions: t from 0 to 1, evenly spaced.
        errors: what `evaluate` returned at each position.
        connectivity: `linear_mode_connectivity(errors)`.
    """

    positions: tuple[float, ...]
    errors: tuple[float, ...]
    connectivity: float


def connectivity_path(
    model: nn.Module,
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    evaluate: Callable[[nn.Module], float],
    points: int = 11,
    recalibrate: Callable[[nn.Module], object] | None = None,
    *,
    masks_a: Mapping[str, Tensor] | None = None,
    masks_b: Mapping[str, Tensor] | None = None,
) -> ConnectivityPath:
    """Walk from one network to the other in a straight line and record the error at every point.

    Args:
        model: a module whose state dict fits both states; it serves as the workbench and gets its own state back.
        state_a: state at position 0.
        state_b: state at position 1.
        evaluate: returns the error of the module it is given, as a share; use training data, so that no test label
            enters a decision.
        points: how many positions, both ends included (default 11).
        recalibrate: re-estimates BatchNorm statistics in place at every point, ends included, for example
            `lambda m: prunus.measure.recalibrate.recalibrate(m, batches)`. Without it networks with BatchNorm look
            disconnected. None for networks without BatchNorm.
        masks_a: masks of the first network, as in `interpolate`.
        masks_b: masks of the second network.

    Raises:
        InvalidValue: fewer than two points, or states that do not fit.
        NonFinite: an error is NaN or infinite.
    """
    if points < 2:
        raise InvalidValue(f"a path has two ends at least, got points={points}.")
    own = {name: value.clone() for name, value in model.state_dict().items()}
    positions = tuple(i / (points - 1) for i in range(points))
    errors = []
    try:
        for t in positions:
            model.load_state_dict(interpolate(state_a, state_b, t, masks_a=masks_a, masks_b=masks_b))
            if recalibrate is not None:
                recalibrate(model)
            errors.append(float(evaluate(model)))
    finally:
        model.load_state_dict(own)
    return ConnectivityPath(positions, tuple(errors), linear_mode_connectivity(errors))


def regime(lmc: float, cka: float, *, cka_threshold: float, lmc_threshold: float = -0.05) -> Regime:
    """Return the regime of a pruned and retrained network: "I", "II-A" or "II-B".

    I: a barrier (lmc below its threshold). II-A: well connected, unlike in function (cka below its threshold).
    II-B: well connected and alike. The boundaries are phenomenological and differ between tasks; a usual choice for
    `cka_threshold` is the median CKA of the well-connected networks of the same task.

    Args:
        lmc: linear mode connectivity of two retrainings of the same pruned weights.
        cka: linear CKA of the softmax outputs of the two.
        cka_threshold: at or above it the two count as alike.
        lmc_threshold: below it the two count as poorly connected (default -0.05).

    Raises:
        NonFinite: a measurement is NaN or infinite.
    """
    for name, value in (("lmc", lmc), ("cka", cka)):
        if not -float("inf") < value < float("inf"):
            raise NonFinite(f"{name} is {value}; a network that cannot be measured has no regime.")
    if lmc < lmc_threshold:
        return "I"
    return "II-B" if cka >= cka_threshold else "II-A"


@dataclass(frozen=True)
class Advice:
    """What to do with the training that precedes pruning.

    Attributes:
        direction: "hotter" (fewer epochs, smaller batches, larger SAM radius), "colder" (the opposite) or "stay".
        reason: one sentence for a report.
    """

    direction: Literal["hotter", "colder", "stay"]
    reason: str


def advice(where: Regime, density: float, *, enough: float = 0.2) -> Advice:
    """Return how to change the temperature of the dense training, given the regime it leads to.

    Regime I asks for a hotter training. Regime II-A asks for a colder one when enough weights remain; with few
    weights the best networks are the well-connected hot ones. Regime II-B is where to stay.

    Args:
        where: result of `regime`.
        density: share of weights kept, in (0, 1].
        enough: density from which colder training pays in II-A (default 0.2: on CIFAR-10 with PreResNet-20, Zhou et
            al. find the fully trained networks best from 20 % on, and hotter ones best at 5-8 %).

    Raises:
        InvalidValue: a density outside (0, 1], or a regime that does not exist.
    """
    if not 0.0 < density <= 1.0:
        raise InvalidValue(f"density must lie in (0, 1], got {density!r}.")
    if where == "I":
        return Advice(
            "hotter",
            "Two retrainings are separated by a barrier: train the dense network hotter (stop earlier, smaller "
            "batches, larger SAM radius) before pruning.",
        )
    if where == "II-B":
        return Advice("stay", "Retrainings are connected and alike: keep the training as it is.")
    if where != "II-A":
        raise InvalidValue(f"unknown regime {where!r}; known: 'I', 'II-A', 'II-B'.")
    if density >= enough:
        return Advice(
            "colder",
            f"Retrainings are connected but unlike, and {density:.1%} of the weights remain: train the dense network "
            "colder (longer, larger batches, smaller SAM radius).",
        )
    return Advice(
        "stay",
        f"Retrainings are connected but unlike, with only {density:.1%} of the weights left: colder training would "
        "risk a barrier; keep the training, or keep more weights.",
    )


def choose_checkpoint(measurements: Mapping[str, tuple[float, float]], *, lmc_threshold: float = -0.05) -> str:
    """Return which dense checkpoint to prune, by measurements that use no test label.

    Well-connected checkpoints (lmc at or above the threshold) come first, the most similar one among them wins; when
    none is well connected, the one with the smallest barrier wins. Equal ones: the first given.

    Args:
        measurements: checkpoint name -> (lmc, cka) of its pruned and retrained pairs.
        lmc_threshold: as in `regime`.

    Raises:
        InvalidValue: nothing to choose from.
    """
    if not measurements:
        raise InvalidValue("there is no checkpoint to choose from.")
    connected = [name for name, (lmc, _) in measurements.items() if lmc >= lmc_threshold]
    if connected:
        return max(connected, key=lambda name: measurements[name][1])
    return max(measurements, key=lambda name: measurements[name][0])
