"""`Training`: the choices of one training, checked when they are made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from prunus.errors import InvalidValue, unknown
from prunus.schedule import Duration, steps_of
from prunus.train.rates import SCHEDULES, constant, cosine, linear, milestones, warmup

_DEFAULT_EPOCHS = 20


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train. Options that belong to one optimizer or schedule are None unless given, and refused elsewhere.

    Attributes:
        epochs: length in passes over the training examples; 20 when neither `epochs` nor `steps` is given.
        steps: length in optimizer steps, instead of `epochs`.
        batch_size: examples per step.
        optimizer: "sgd", "adam" or "adamw".
        lr: peak learning rate. The default 0.1 is for SGD; Adam wants about 0.001.
        momentum: of "sgd", default 0.9 there.
        nesterov: of "sgd", default False there.
        weight_decay: L2 penalty (decoupled for "adamw").
        decay_vectors: False spares parameters with one axis (biases, norm layers) the decay.
        schedule: "cosine", "linear", "constant" or "step", see `prunus.train.rates`.
        milestones: shares of the training after which "step" divides the rate by ten, default (0.5, 0.75).
        warmup: duration of a linear rise before the schedule ("1ep", "100ba", steps).
        label_smoothing: in [0, 1).
        augment: names as `prunus.data.augment.parse` takes them, such as "crop4,flip".
        clip_norm: largest L2 norm of the gradients of one step (after masking), or None.
        bf16: run forward and loss under bfloat16 autocast.
        distill_weight: share of a teacher in the objective, in [0, 1]; above 0 a teacher must be given.
        distill_temperature: softmax temperature of the distillation, default 4.
        evaluate_every: evaluate on the validation examples every so many epochs; None: only at the end (every
            epoch with `checkpoint_best`).
        checkpoint_best: hand back the weights of the evaluation with the highest validation accuracy (the first
            on ties) among those with as many kept weights as the end of the training has, instead of the last
            weights. Needs validation examples; never looks at the test set.

    Raises:
        InvalidValue: a value out of range, or an option that does not belong to the optimizer or schedule.
        UnknownName: no such schedule or optimizer.
    """

    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 64
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float | None = None
    nesterov: bool | None = None
    weight_decay: float = 5e-4
    decay_vectors: bool = True
    schedule: str = "cosine"
    milestones: tuple[float, ...] | None = None
    warmup: Duration = 0
    label_smoothing: float = 0.0
    augment: str = ""
    clip_norm: float | None = None
    bf16: bool = False
    distill_weight: float = 0.0
    distill_temperature: float | None = None
    evaluate_every: int | None = None
    checkpoint_best: bool = False

    def __post_init__(self) -> None:
        if self.epochs is not None and self.steps is not None:
            raise InvalidValue(f"epochs={self.epochs} and steps={self.steps} both set the length; give one of them.")
        for name, least in (("epochs", 0), ("steps", 0), ("evaluate_every", 1)):
            if getattr(self, name) is not None:
                _check(name, _whole(name, getattr(self, name)), lambda v, m=least: v >= m, f"{least} or more")
        _check("batch_size", _whole("batch_size", self.batch_size), lambda v: v >= 1, "1 or more")
        _check("lr", self.lr, lambda v: 0 <= v < float("inf"), "a finite number from 0 up")
        _check("weight_decay", self.weight_decay, lambda v: 0 <= v < float("inf"), "a finite number from 0 up")
        _check("label_smoothing", self.label_smoothing, lambda v: 0 <= v < 1, "in [0, 1)")
        _check("distill_weight", self.distill_weight, lambda v: 0 <= v <= 1, "in [0, 1]")
        _check("distill_temperature", self.distill_temperature, lambda v: v is None or v > 0, "above 0")
        _check("clip_norm", self.clip_norm, lambda v: v is None or v > 0, "above 0")
        if self.optimizer not in ("sgd", "adam", "adamw"):
            raise unknown("optimizer", self.optimizer, ("sgd", "adam", "adamw"))
        if self.schedule not in SCHEDULES:
            raise unknown("learning-rate schedule", self.schedule, SCHEDULES)
        self._belongs("momentum", self.optimizer == "sgd", "optimizer 'sgd'")
        self._belongs("nesterov", self.optimizer == "sgd", "optimizer 'sgd'")
        self._belongs("milestones", self.schedule == "step", "schedule 'step'")
        self._belongs("distill_temperature", self.distill_weight > 0, "distillation; set distill_weight above 0")
        if self.milestones is not None:
            # A list (as YAML gives it) would make the choices unhashable and unequal to the same tuple.
            object.__setattr__(self, "milestones", tuple(self.milestones))

    def _belongs(self, name: str, fits: bool, owner: str) -> None:
        if getattr(self, name) is not None and not fits:
            raise InvalidValue(f"{name}={getattr(self, name)!r} belongs to {owner}; leave it out here.")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the length in optimizer steps."""
        if self.steps is not None:
            return self.steps
        return (_DEFAULT_EPOCHS if self.epochs is None else self.epochs) * steps_per_epoch

    def learning_rates(self, steps_per_epoch: int) -> list[float]:
        """Return the learning rate of every optimizer step.

        Raises:
            InvalidValue: the warm-up does not fit in the training.
        """
        total = self.total_steps(steps_per_epoch)
        rise = steps_of(self.warmup, total_steps=total, steps_per_epoch=steps_per_epoch)
        if rise > total:
            raise InvalidValue(f"the warm-up {self.warmup!r} has {rise} steps, the whole training only {total}.")
        curves = {"constant": constant, "cosine": cosine, "linear": linear, "step": self._step}
        factor = warmup(curves[self.schedule], rise) if rise else curves[self.schedule]
        return [self.lr * factor(step, total) for step in range(total)]

    def _step(self, step: int, total: int) -> float:
        return milestones(step, total) if self.milestones is None else milestones(step, total, self.milestones)

    def optimizer_options(self) -> dict[str, Any]:
        """Return the options of this optimizer that were given."""
        named = {"momentum": self.momentum, "nesterov": self.nesterov}
        return {name: value for name, value in named.items() if value is not None}

    def describe(self) -> dict[str, Any]:
        """Return the choices as JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidValue(f"{name}={value!r} must be a whole number.")
    return value


def _check(name: str, value: Any, fits: Any, what: str) -> None:
    try:
        fine = bool(fits(value))
    except TypeError:
        fine = False
    if not fine:
        raise InvalidValue(f"{name}={value!r} must be {what}.")
