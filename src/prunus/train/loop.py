"""The training loop. One step always runs in this order:

1. transform the batch (shuffle and augmentation of `Batches`, then callbacks' `batch`)
2. perturb weights (callbacks' `perturb`)
3. loss
4. backward
5. combine or penalise gradients (callbacks' `gradients`)
6. all-reduce (DistributedDataParallel does it inside backward)
7. mask gradients (sparsifier, before the optimizer step), then clip their norm
8. optimizer step
9. mask weights and optimizer state (sparsifier, after the optimizer step; its prune and grow events are here)
10. restore the perturbation (callbacks' `restore`)
11. events (callbacks' `event`, evaluation, checkpoint)

Every draw is keyed: batches by (seed, epoch, step), randomness inside the model (dropout) by (seed, "forward",
step), so that a training cut after any step and resumed gives the same bits as one that was never cut. The global
random state of the caller is as before when the loop ends.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prunus.data.batches import Batches
from prunus.data.examples import Examples, Splits
from prunus.errors import InvalidValue, NonFinite, RecipeChanged, Stopped, Unsupported
from prunus.files import canonical_json, sha256_bytes
from prunus.masks import Masks
from prunus.randomness import key
from prunus.schedule import Duration, steps_of
from prunus.train.callback import Callback, overriding
from prunus.train.checkpoint import Checkpoints, Snapshot, difference, load_optimizer_state, optimizer_state
from prunus.train.objectives import cross_entropy, distillation
from prunus.train.optim import build
from prunus.train.training import Training

__all__ = ["Callback", "Fitted", "Training", "fit"]

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
# On an accelerator reading a loss stalls the queue, so losses are read in groups; on the CPU it costs nothing.
_READ_EVERY = 50


class Sparsifier(Protocol):
    """What the loop asks of the handle that `prunus.sparsify` returns."""

    masks: Masks

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def apply(self) -> None: ...
    def detach(self) -> None: ...


@dataclass(frozen=True)
class Fitted:
    """What a training leaves behind, beside the model it trained in place.

    Attributes:
        step: optimizer steps done, counted from the start of the schedule.
        total: steps of the whole schedule.
        masks: the masks at the end, or None for a dense training.
        metrics: "train_loss" (mean over the last epoch), "selected" ("last" or "best"), "selected_step" and, with
            validation examples, "validation_..." of the weights handed back.
        history: one row per epoch, JSON values.
        optimizer: the optimizer's state as `prunus.train.checkpoint.optimizer_state` takes it apart.
    """

    step: int
    total: int
    masks: Masks | None
    metrics: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    optimizer: tuple[dict[str, Tensor], dict[str, Any]] = field(default_factory=lambda: ({}, {}))


def fit(
    model: nn.Module,
    data: Splits | Examples,
    training: Training,
    *,
    method: Any = None,
    masks: Masks | None = None,
    seed: int = 0,
    start_step: int = 0,
    until: Duration | None = None,
    rates: Sequence[float] | None = None,
    optimizer_start: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
    teacher: nn.Module | None = None,
    objective: Objective | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: Checkpoints | None = None,
    on_progress: Callable[[int, int, float | None], None] | None = None,
    on_metrics: Callable[[dict[str, Any]], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Fitted:
    """Train `model` in place, on the device it lies on, and leave it in the mode (train or eval) it came in.

    Args:
        model: gives (B, C) logits for a batch of inputs; all its modules are in training mode meanwhile.
        data: training examples, or splits whose validation examples are evaluated as `training` says.
        training: the choices.
        method: a method for `prunus.sparsify`, or None.
        masks: where the method starts; without a method they are held fixed.
        seed: key of data order, augmentation, dropout and the method's draws.
        start_step: the step of the schedule to begin at; rates and data order go on as at that step.
        until: stop after this step of the schedule (a duration from step 0); default: its end.
        rates: a learning rate for each step of the schedule, instead of the one in `training`.
        optimizer_start: an optimizer state to begin with (`Fitted.optimizer`) instead of a fresh one.
        teacher: gives (B, C) logits for distillation; put into eval mode.
        objective: (logits, y, ids) -> scalar, instead of cross-entropy.
        callbacks: additions to the step.
        checkpoint: where to save the state; the newest sound checkpoint there is continued.
        on_progress: called as (steps done, last step, loss or None if not read yet) after each step.
        on_metrics: called with each row of the history; after resuming, the rows so far come first.
        should_stop: asked after each step; True saves a checkpoint and raises `Stopped`.
        include, exclude: which tensors the method may prune, see `prunus.parameters.prunable`.

    Raises:
        NonFinite: the loss became NaN or infinite.
        Stopped: `should_stop` said so.
        InvalidValue: arguments that contradict each other.
        DamagedFile, RecipeChanged, StorageFailed: from the checkpoints.
    """
    was_training = model.training
    loop = _Loop(model, data, training, seed, teacher, objective, tuple(callbacks))
    loop.include, loop.exclude = tuple(include), tuple(exclude)
    loop.plan(start_step, until, rates)
    loop.attach(method, masks)
    try:
        if optimizer_start is not None:
            load_optimizer_state(loop.optimizer, *optimizer_start)
            if loop.sparsifier is not None:
                loop.sparsifier.apply()
        saved = checkpoint.newest() if checkpoint is not None else None
        if saved is not None:
            loop.load(saved)
        for row in loop.history:
            if on_metrics is not None:
                on_metrics(row)
        with _forked(loop.device):
            loop.run(checkpoint, on_progress, on_metrics, should_stop)
            return loop.finish(on_metrics)
    finally:
        loop.detach()
        model.train(was_training)


class _Loop:
    """The state of one training and the functions that move it."""

    def __init__(
        self,
        model: nn.Module,
        data: Splits | Examples,
        training: Training,
        seed: int,
        teacher: nn.Module | None,
        objective: Objective | None,
        callbacks: tuple[Callback, ...],
    ):
        self.model = model
        self.training = training
        self.seed = seed
        self.callbacks = callbacks
        self.include: tuple[str, ...] = ()
        self.exclude: tuple[str, ...] = ()
        first = next(iter(model.parameters()), None)
        if first is None:
            raise InvalidValue(f"{type(model).__name__} has no parameters, so there is nothing to train.")
        self.device = first.device
        examples = data.train if isinstance(data, Splits) else data
        self.validation = data.validation if isinstance(data, Splits) and len(data.validation) else None
        if training.checkpoint_best and self.validation is None:
            raise InvalidValue(
                "checkpoint_best=True chooses by validation accuracy, but there are no validation examples; "
                "set some aside (validation=0.1 when loading) or keep the last weights."
            )
        if not len(examples):
            raise InvalidValue(f"{examples.name} has no training examples.")
        self.batches = Batches(examples, training.batch_size, seed=seed, augment=training.augment, device=self.device)
        self.loss = _objective(training, teacher, objective)
        self.teacher = teacher
        self.optimizer = build(
            model,
            training.optimizer,
            lr=training.lr,
            weight_decay=training.weight_decay,
            decay_vectors=training.decay_vectors,
            **training.optimizer_options(),
        )
        self.sparsifier: Sparsifier | None = None
        self.step = 0
        self.loss_sum = 0.0
        self.loss_count = 0
        self.history: list[dict[str, Any]] = []
        self.best: Snapshot | None = None
        self._unread: list[Tensor] = []

    # -- before ---------------------------------------------------------------------------------------------

    def plan(self, start_step: int, until: Duration | None, rates: Sequence[float] | None) -> None:
        """Fix the steps to run and the learning rate of each."""
        per_epoch = self.batches.steps_per_epoch
        self.total = self.training.total_steps(per_epoch)
        self.rates = self.training.learning_rates(per_epoch) if rates is None else [float(r) for r in rates]
        if len(self.rates) != self.total:
            raise InvalidValue(f"{len(self.rates)} learning rates were given for a training of {self.total} steps.")
        self.end = self.total
        if until is not None:
            self.end = steps_of(until, total_steps=self.total, steps_per_epoch=per_epoch)
        if not 0 <= start_step <= self.end <= self.total:
            raise InvalidValue(
                f"steps {start_step} to {self.end} (start_step={start_step}, until={until!r}) do not lie in this "
                f"training of {self.total} steps ({per_epoch} per epoch)."
            )
        self.step = self.start = start_step

    def attach(self, method: Any, masks: Masks | None) -> None:
        """Attach the method or the fixed masks to the optimizer, and clipping behind them."""
        if method is not None or masks is not None:
            from prunus.sparsifier import sparsify

            self.sparsifier = sparsify(
                self.model,
                self.optimizer,
                method,
                steps=max(self.total - self.start, 1),
                steps_per_epoch=self.batches.steps_per_epoch,
                masks=masks,
                seed=self.seed,
                include=self.include,
                exclude=self.exclude,
            )
        if self.training.clip_norm is not None:
            # Hooks run in the order of registration: behind the sparsifier's, the norm is that of masked gradients.
            self.optimizer.register_step_pre_hook(self._clip)
        # Groups that the method added keep their own proportion to the peak rate.
        peak = self.training.lr
        self._scales = [group["lr"] / peak if peak else 1.0 for group in self.optimizer.param_groups]

    def _clip(self, *_: Any) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        limit = self.training.clip_norm
        assert limit is not None
        torch.nn.utils.clip_grad_norm_(parameters, limit)

    # -- the steps ------------------------------------------------------------------------------------------

    def run(
        self,
        checkpoint: Checkpoints | None,
        on_progress: Callable[[int, int, float | None], None] | None,
        on_metrics: Callable[[dict[str, Any]], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> None:
        """Run the steps that are left."""
        self.model.train()
        if self.teacher is not None:
            self.teacher.eval()
        per_epoch = self.batches.steps_per_epoch
        advance = self._stepper()
        read_every = 1 if self.device.type == "cpu" else _READ_EVERY
        while self.step < self.end:
            epoch, position = divmod(self.step, per_epoch)
            for x, y, ids in self.batches.epoch(epoch, position):
                self._unread.append(advance(x, y, ids))
                self.step += 1
                loss = self._read() if len(self._unread) >= read_every else None
                if self.step % per_epoch == 0 or self.step == self.end:
                    self._end_of_epoch(on_metrics)
                if on_progress is not None:
                    on_progress(self.step, self.end, loss)
                if self.step == self.end:
                    return
                stop = should_stop is not None and should_stop()
                if checkpoint is not None and (stop or checkpoint.due(self.step)):
                    self._read()
                    checkpoint.save(self.snapshot())
                if stop:
                    kept = (
                        "its state is saved; run it again to go on" if checkpoint is not None else "nothing was saved"
                    )
                    raise Stopped(f"training stopped as asked after step {self.step} of {self.end}; {kept}.")

    def _stepper(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Build the function that runs one step and returns its loss (a scalar tensor without graph)."""
        model, optimizer, objective, callbacks = self.model, self.optimizer, self.loss, self.callbacks
        on_batch, on_perturb, on_gradients, on_restore, on_event = (
            overriding(callbacks, name) for name in ("batch", "perturb", "gradients", "restore", "event")
        )
        groups, scales, rates, seed = optimizer.param_groups, self._scales, self.rates, self.seed
        reseed = _generator_of(self.device)
        autocast = self.training.bf16

        def advance(x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
            step = self.step
            # Seeding the generators directly: torch.manual_seed visits every backend and costs a hundred times more.
            for generator in reseed:
                generator.manual_seed(key(seed, "forward", step))
            for group, scale in zip(groups, scales):
                group["lr"] = rates[step] * scale
            for change in on_batch:
                x, y = change(step, model, x, y, ids)
            for perturb in on_perturb:
                perturb(step, model)
            with torch.autocast(self.device.type, torch.bfloat16) if autocast else _NOTHING:
                loss = objective(model(x), x, y, ids)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            for combine in on_gradients:
                combine(step, model)
            optimizer.step()
            for restore in on_restore:
                restore(step, model)
            for event in on_event:
                event(step + 1, model)
            return loss.detach()

        return advance

    def _read(self) -> float | None:
        """Read the losses that are still on the device, and refuse to go on after one that is not finite."""
        if not self._unread:
            return None
        values = [self._unread[0].item()] if len(self._unread) == 1 else torch.stack(self._unread).tolist()
        first = self.step - len(values)
        self._unread.clear()
        for offset, value in enumerate(values):
            if not math.isfinite(value):
                raise NonFinite(
                    f"the loss is {value} at step {first + offset} of {self.end} (learning rate "
                    f"{self.rates[first + offset]:.3g}); lower lr, add a warm-up or clip_norm, or check the inputs."
                )
            self.loss_sum += value
            self.loss_count += 1
        return values[-1]

    def _end_of_epoch(self, on_metrics: Callable[[dict[str, Any]], None] | None) -> None:
        self._read()
        per_epoch = self.batches.steps_per_epoch
        done = -(-self.step // per_epoch)
        row: dict[str, Any] = {"epoch": done, "step": self.step, "lr": self.rates[self.step - 1]}
        row["train_loss"] = self.loss_sum / self.loss_count
        self.loss_sum, self.loss_count = 0.0, 0
        if self.sparsifier is not None:
            masks = self.sparsifier.masks
            row.update(kept=masks.kept, total=masks.total)
        every = self.training.evaluate_every or (1 if self.training.checkpoint_best else None)
        last = self.step == self.end
        # The evaluation at the end belongs to the finished model, except that choosing the best needs this one too.
        due = every is not None and (done % every == 0 or (last and self.training.checkpoint_best))
        if due and self.validation is not None:
            row.update(self._validate())
            if self.training.checkpoint_best:
                self._keep_best(row)
        self.history.append(row)
        if on_metrics is not None:
            on_metrics(row)

    def _validate(self) -> dict[str, float]:
        assert self.validation is not None
        batches = Batches(self.validation, max(self.training.batch_size, 256), shuffle=False, device=self.device)
        return {f"validation_{name}": value for name, value in measured(self.model, batches).items()}

    def _keep_best(self, row: dict[str, Any]) -> None:
        held = self.best.values if self.best is not None else None
        if held is None or held["kept"] != row.get("kept") or row["validation_accuracy"] > held["accuracy"]:
            tensors = {f"model.{n}": t.clone() for n, t in model_tensors(self.model).items()}
            values: dict[str, Any] = {"accuracy": row["validation_accuracy"], "kept": row.get("kept")}
            if self.sparsifier is not None:
                state = self.sparsifier.state_dict()
                tensors |= {f"sparsifier.{n}": t.detach().clone() for n, t in state["tensors"].items()}
                values["sparsifier"] = state["values"]
            self.best = Snapshot(self.step, tensors, values)

    # -- saving and loading ---------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return the whole state after the steps done so far (tensors are not copied)."""
        tensors = {f"model.{n}": t for n, t in model_tensors(self.model).items()}
        parts, state = optimizer_state(self.optimizer)
        tensors |= {f"optimizer.{n}": t for n, t in parts.items()}
        values: dict[str, Any] = {
            "made_from": self.made_from(),
            "optimizer": state,
            "loss": [self.loss_sum, self.loss_count],
            "history": self.history,
            "callbacks": [],
        }
        if self.sparsifier is not None:
            saved = self.sparsifier.state_dict()
            tensors |= {f"sparsifier.{n}": t for n, t in saved["tensors"].items()}
            values["sparsifier"] = saved["values"]
        for number, callback in enumerate(self.callbacks):
            saved = callback.state_dict()
            tensors |= {f"callback-{number}.{n}": t for n, t in saved["tensors"].items()}
            values["callbacks"].append(saved["values"])
        if self.best is not None:
            tensors |= {f"best.{n}": t for n, t in self.best.tensors.items()}
            values["best"] = [self.best.step, self.best.values]
        return Snapshot(self.step, tensors, values)

    def made_from(self) -> dict[str, Any]:
        """Return what a checkpoint must agree on to be continued, as JSON values."""
        return {
            "training": self.training.describe(),
            "seed": self.seed,
            "start_step": self.start,
            "end": self.end,
            "steps_per_epoch": self.batches.steps_per_epoch,
            "examples": len(self.batches.examples),
            "rates": sha256_bytes(canonical_json(self.rates)),
            "sparsified": self.sparsifier is not None,
            "callbacks": [type(c).__name__ for c in self.callbacks],
        }

    def load(self, saved: Snapshot) -> None:
        """Put a snapshot back. Weights come first: attaching the method may have changed those of the start."""
        if saved.values["made_from"] != self.made_from():
            raise RecipeChanged(
                "the checkpoint belongs to another training: "
                f"{difference(saved.values['made_from'], self.made_from())}. "
                "Use the choices it was made with, or another folder."
            )
        load_model(self.model, saved.part("model"))
        if self.sparsifier is not None:
            self.sparsifier.load_state_dict({"tensors": saved.part("sparsifier"), "values": saved.values["sparsifier"]})
            # A method may touch weights when it takes its state back; the saved weights are the truth.
            load_model(self.model, saved.part("model"))
        load_optimizer_state(self.optimizer, saved.part("optimizer"), saved.values["optimizer"])
        for number, callback in enumerate(self.callbacks):
            part = {"tensors": saved.part(f"callback-{number}"), "values": saved.values["callbacks"][number]}
            callback.load_state_dict(part)
        self.step = saved.step
        self.loss_sum, self.loss_count = saved.values["loss"]
        self.history = list(saved.values["history"])
        if "best" in saved.values:
            step, values = saved.values["best"]
            self.best = Snapshot(step, saved.part("best"), values)

    # -- after ----------------------------------------------------------------------------------------------

    def finish(self, on_metrics: Callable[[dict[str, Any]], None] | None) -> Fitted:
        """Choose the weights to hand back, make them final, and measure them."""
        optimizer = optimizer_state(self.optimizer)
        selected = Snapshot(self.step, {}, {})
        if self.best is not None:
            selected = self.best
            load_model(self.model, selected.part("model"))
            if self.sparsifier is not None:
                state = {"tensors": selected.part("sparsifier"), "values": selected.values["sparsifier"]}
                self.sparsifier.load_state_dict(state)
        masks = None
        if self.sparsifier is not None:
            # Methods that train through a weight transform fold it here; plain masks have nothing to fold.
            getattr(self.sparsifier, "finish", bool)()
            masks = self.sparsifier.masks
        metrics: dict[str, Any] = {"train_loss": self.history[-1]["train_loss"] if self.history else None}
        metrics.update(selected="best" if self.best is not None else "last", selected_step=selected.step)
        if self.validation is not None:
            metrics.update(self._validate())
        if masks is not None:
            metrics.update(kept=masks.kept, total=masks.total)
        if on_metrics is not None:
            on_metrics({"step": self.step, **metrics})
        return Fitted(self.step, self.total, masks, metrics, self.history, optimizer)

    def detach(self) -> None:
        """Leave neither hooks nor gradients behind, whatever ended the training."""
        self.optimizer.zero_grad()
        if self.sparsifier is not None:
            self.sparsifier.detach()
            self.sparsifier = None


_NOTHING = contextlib.nullcontext()


def _objective(
    training: Training, teacher: nn.Module | None, objective: Objective | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return the loss as a function of (logits, x, y, ids)."""
    smoothing = training.label_smoothing
    if (teacher is not None) != (training.distill_weight > 0):
        raise InvalidValue(
            f"distill_weight={training.distill_weight} and teacher={type(teacher).__name__} do not go together: "
            "distillation needs both a teacher and a weight above 0."
        )
    if objective is not None:
        if teacher is not None or smoothing:
            raise InvalidValue("an objective of your own replaces label_smoothing and distillation; leave those out.")
        return lambda logits, x, y, ids: objective(logits, y, ids)
    if teacher is None:
        return lambda logits, x, y, ids: cross_entropy(logits, y, smoothing)
    weight = training.distill_weight
    temperature = 4.0 if training.distill_temperature is None else training.distill_temperature

    def distilled(logits: Tensor, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        with torch.no_grad():
            soft = teacher(x)
        return distillation(logits, soft, y, temperature, weight, smoothing)

    return distilled


@contextlib.contextmanager
def _forked(device: torch.device) -> Iterator[None]:
    """Put the caller's global random state (CPU, and the device in use) back at the end."""
    devices = [_index(device)] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def _generator_of(device: torch.device) -> list[torch.Generator]:
    generators = [torch.random.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[_index(device)])
    return generators


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and all buffers by name, buffers that are not persistent included.

    Raises:
        Unsupported: the model keeps extra state that is not a tensor.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise Unsupported(f"{name!r} in the model's state is a {type(value).__name__}; only tensors can be saved.")
        tensors[name] = value.detach()
    for name, buffer in model.named_buffers():
        tensors.setdefault(name, buffer)
    return tensors


@torch.no_grad()
def load_model(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors, as `model_tensors` names them, into a model of the same shape.

    Raises:
        InvalidValue: names or shapes differ.
    """
    own = model_tensors(model)
    if set(own) != set(tensors) or any(own[n].shape != tensors[n].shape for n in own):
        odd = sorted(
            n for n in {*own, *tensors} if n not in own or n not in tensors or own[n].shape != tensors[n].shape
        )
        raise InvalidValue(f"the weights do not fit the model: {len(odd)} tensors differ, such as {odd[0]!r}.")
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def measured(model: nn.Module, batches: Batches) -> dict[str, float]:
    """Return "accuracy", "loss", "ece" and "worst_class_accuracy" of a model (see `prunus.measure.accuracy`)."""
    from prunus.measure.accuracy import evaluate

    found = evaluate(model, batches)
    names = ("accuracy", "loss", "ece", "worst_class_accuracy")
    return {name: float(getattr(found, name)) for name in names}
