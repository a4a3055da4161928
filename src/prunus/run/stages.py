"""`Run`: what a procedure is handed. Its `train` and `compute` are stages: done once, then loaded.

A stage is known by its name and by a description of everything it is made from. Finished with the same
description, it is loaded; killed, it goes on from its newest sound checkpoint, bit for bit; with another
description under the same name, it is refused. Without a store everything stays in memory, with the same results.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prunus.data.batches import Batches
from prunus.data.examples import Examples, Splits
from prunus.errors import InvalidValue, RecipeChanged, unknown
from prunus.files import canonical_json, sha256_bytes
from prunus.masks import Masks
from prunus.parameters import load_exact
from prunus.randomness import key
from prunus.run.store import Store
from prunus.schedule import Duration
from prunus.train.callback import Callback
from prunus.train.checkpoint import Checkpoints, difference
from prunus.train.loop import Objective, fit, measured
from prunus.train.tensors import digest, from_bytes, settled, to_bytes
from prunus.train.training import Training

FORMAT = 1
WEIGHTS = "weights.safetensors"
MASKS = "masks.safetensors"
OPTIMIZER = "optimizer.safetensors"
RESULT = "result.safetensors"

OptimizerState = tuple[dict[str, Tensor], dict[str, Any]]


class Shape(Protocol):
    """How a network of another architecture is made from the run's own; a function of the model and its own data."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Return a network of the other architecture; `model` stays as it is."""
        ...

    def describe(self) -> Any:
        """Return JSON values that tell this architecture from every other."""
        ...


@dataclass(frozen=True, eq=False)
class State:
    """A network at one moment of a run.

    Attributes:
        weights: the full state dict, on the CPU. Do not write into the tensors.
        masks: the masks in force, or None for a dense network.
        step: the step of the learning-rate schedule it is at.
        metrics: what training measured ("train_loss", "validation_accuracy", "selected"...).
        digest: SHA-256 (hex) of weights, masks, step, optimizer state and shape.
        optimizer: the optimizer's state, of trainings that were stopped before their end (`until`).
        shape: what makes the network of these weights from the run's own; None: it is the run's own. A training
            that starts here ends in the same shape.
    """

    weights: dict[str, Tensor]
    masks: Masks | None
    step: int
    metrics: dict[str, Any]
    digest: str
    optimizer: OptimizerState | None = field(default=None, repr=False)
    shape: Shape | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        weights: Mapping[str, Tensor],
        masks: Masks | None = None,
        step: int = 0,
        metrics: Mapping[str, Any] | None = None,
        optimizer: OptimizerState | None = None,
        shape: Shape | None = None,
    ) -> State:
        """Make a state from weights (copied to the CPU), such as rewound or averaged ones; its digest is computed."""
        copied = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
        held = None if masks is None else masks.to("cpu")
        parts: list[Any] = [digest(copied), None if held is None else held.digest(), step]
        if optimizer is not None:
            optimizer = ({n: t.detach().cpu().clone() for n, t in optimizer[0].items()}, optimizer[1])
            parts += [digest(optimizer[0]), optimizer[1]]
        if shape is not None:
            parts.append({"shape": shape.describe()})
        return cls(copied, held, step, dict(metrics or {}), sha256_bytes(canonical_json(parts)), optimizer, shape)

    def model(self, run: Run) -> nn.Module:
        """Return a fresh model of the run, in this shape, with these weights, on its device, in training mode."""
        model = run.model if self.shape is None else self.shape.apply(run.model).to(run.device).train()
        load_exact(model, self.weights)
        return model


class Run:
    """Everything a procedure needs, for one seed.

    Args:
        store: where stages are kept, or None for memory.
        splits: the data.
        make_model: a function from a seed to a network; random numbers it draws from torch's global generator
            are keyed by the seed as well.
        training: the choices of a stage that does not say otherwise.
        seed: of initial weights, data order, augmentation, dropout and methods.
        name_prefix: put before the names of stages ("seed-1/").
        device: where networks are trained.
        on_progress: called as (stage, steps done, last step, loss or None) after each step.
        should_stop: asked after each step, see `prunus.train.loop.fit`.
        checkpoint_seconds, checkpoint_steps: how often a training saves its state inside a stage.
        include, exclude: which tensors methods may prune, see `prunus.parameters.prunable`.

    Attributes:
        root: the run that `within` was called on: stages that several methods share (dense training) belong to it.
    """

    def __init__(
        self,
        store: Store | None = None,
        *,
        splits: Splits,
        make_model: Callable[[int], nn.Module],
        training: Training | None = None,
        seed: int = 0,
        name_prefix: str = "",
        device: torch.device | str = "cpu",
        on_progress: Callable[[str, int, int, float | None], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        checkpoint_seconds: float | None = 10.0,
        checkpoint_steps: int | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ):
        self.store = store
        self.splits = splits
        self.make_model = make_model
        self.training = Training() if training is None else training
        self.seed = seed
        self.name_prefix = name_prefix
        self.root: Run = self
        self.device = torch.device(device)
        self.on_progress = on_progress
        self.should_stop = should_stop
        self.checkpoint_seconds = checkpoint_seconds
        self.checkpoint_steps = checkpoint_steps
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self._initial: State | None = None
        self._memory: dict[str, tuple[dict[str, Any], Any]] = {}
        self._hashes: dict[int, tuple[Examples, str]] = {}

    @property
    def model(self) -> nn.Module:
        """A fresh network with the initial weights of this seed; each access makes a new one."""
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(key(self.seed, "model"))
            return self.make_model(self.seed).to(self.device)

    @property
    def initial(self) -> State:
        """The dense network at step 0."""
        if self._initial is None:
            self._initial = State.of(self.model.state_dict())
        return self._initial

    def within(self, name: str) -> Run:
        """Return this run for the stages of one method: their names start with "name/", all else is shared."""
        inner = copy.copy(self)
        inner.name_prefix = f"{self.name_prefix}{name}/"
        inner.root = self.root
        return inner

    def steps_per_epoch(self, training: Training | None = None, data: Examples | None = None) -> int:
        """Return how many optimizer steps an epoch of `train` takes with these choices and examples."""
        choices = self.training if training is None else training
        return Batches(self.splits.train if data is None else data, choices.batch_size).steps_per_epoch

    def learning_rates(self, training: Training | None = None, data: Examples | None = None) -> list[float]:
        """Return the learning rate of every step of `train` with these choices: the original of a retraining."""
        choices = self.training if training is None else training
        return choices.learning_rates(self.steps_per_epoch(choices, data))

    # -- stages ---------------------------------------------------------------------------------------------

    def train(
        self,
        name: str,
        *,
        start: State | None = None,
        masks: Masks | None = None,
        method: Any = None,
        until: Duration | None = None,
        training: Training | None = None,
        start_step: int = 0,
        data: Examples | Splits | None = None,
        seed: int | None = None,
        rates: Sequence[float] | None = None,
        teacher: State | None = None,
        objective: Objective | None = None,
        callbacks: Sequence[Callback] = (),
        continue_optimizer: bool = False,
    ) -> State:
        """Train a network, or load it if this was done before.

        Args:
            name: of the stage.
            start: weights to begin with, and their shape; default `initial`. Its masks are not taken over: pass
                `masks`.
            masks: held fixed, or where `method` starts.
            method: a step method; its `describe()` is part of the description of the stage.
            until: stop at this moment of the schedule ("2ep", "0.1dur", steps); the state then also holds the
                optimizer's state.
            training: choices for this stage instead of the run's.
            start_step: the step of the schedule to begin at; pass `start.step` to go on where `start` was.
            data: training examples for this stage (validation stays), or whole splits.
            seed: of data order, augmentation, dropout and method, instead of the run's.
            rates: a learning rate per step of the schedule, see `prunus.train.rates.retraining`.
            teacher: for distillation.
            objective, callbacks: see `prunus.train.loop.fit`; they must have a `describe()`.
            continue_optimizer: begin with the optimizer state of `start` instead of a fresh one.

        Raises:
            RecipeChanged: a stage of this name was made from something else.
            Stopped, NonFinite, StorageFailed, DamagedFile, InvalidValue.
        """
        begin_from = self.initial if start is None else start
        choices = self.training if training is None else training
        splits = data if isinstance(data, Splits) else self.splits if data is None else replace(self.splits, train=data)
        used_seed = self.seed if seed is None else seed
        optimizer_start = begin_from.optimizer if continue_optimizer else None
        if continue_optimizer and optimizer_start is None:
            raise InvalidValue(
                f"stage {name!r}: the start has no optimizer state; only trainings stopped with until=... keep it."
            )
        inputs = {
            "format": FORMAT,
            "kind": "train",
            "training": choices.describe(),
            "start": begin_from.digest,
            "masks": self._describe(masks),
            "method": self._describe(method),
            "until": until,
            "start_step": start_step,
            "seed": used_seed,
            "data": {"train": self._hash(splits.train), "validation": self._hash(splits.validation)},
            "rates": None if rates is None else sha256_bytes(canonical_json([float(r) for r in rates])),
            "teacher": self._describe(teacher),
            "objective": self._describe(objective),
            "callbacks": [self._describe(c) for c in callbacks],
            "continue_optimizer": continue_optimizer,
            "prunable": {"include": list(self.include), "exclude": list(self.exclude)},
        }

        def work(checkpoints: Checkpoints | None, on_metrics: Callable[[dict[str, Any]], None] | None) -> State:
            model = begin_from.model(self)
            report, full = self.on_progress, f"{self.name_prefix}{name}"
            fitted = fit(
                model,
                splits,
                choices,
                method=method,
                masks=masks,
                seed=used_seed,
                start_step=start_step,
                until=until,
                rates=rates,
                optimizer_start=optimizer_start,
                teacher=None if teacher is None else teacher.model(self),
                objective=objective,
                callbacks=callbacks,
                checkpoint=checkpoints,
                on_progress=None if report is None else lambda done, last, loss: report(full, done, last, loss),
                on_metrics=on_metrics,
                should_stop=self.should_stop,
                include=self.include,
                exclude=self.exclude,
            )
            kept = fitted.optimizer if fitted.step < fitted.total else None
            return State.of(model.state_dict(), fitted.masks, fitted.step, fitted.metrics, kept, shape=begin_from.shape)

        state = self._stage(name, inputs, work, _pack_state, _unpack_state)
        # Files hold no shape: it is that of the start, whose digest is among the inputs of the stage.
        return state if begin_from.shape is None else replace(state, shape=begin_from.shape)

    def compute(self, name: str, inputs: Mapping[str, Any], function: Callable[[], Any]) -> Any:
        """Compute something once and load it ever after.

        Args:
            name: of the stage.
            inputs: everything the result depends on: JSON values, states, masks, examples, tensors by name, and
                objects with a `describe()`.
            function: returns `Masks`, a dict of tensors by name, or JSON values (which come back as JSON gives
                them: tuples as lists).

        Raises:
            RecipeChanged: a stage of this name was made from something else.
            InvalidValue: an input cannot be described, or the result is of another type.
        """
        described = {"format": FORMAT, "kind": "compute", "inputs": self._describe(inputs)}
        return self._stage(name, described, lambda checkpoints, on_metrics: function(), _pack_result, _unpack_result)

    def evaluate(self, state: State, split: str = "test") -> dict[str, float]:
        """Return "accuracy", "loss", "ece" and "worst_class_accuracy" on "test", "validation" or "train".

        Raises:
            UnknownName: no such split.
            InvalidValue: the split is empty.
        """
        splits = {"test": self.splits.test, "validation": self.splits.validation, "train": self.splits.train}
        if split not in splits:
            raise unknown("split", split, splits)
        if not len(splits[split]):
            raise InvalidValue(f"the {split} split of {self.splits.name!r} is empty, so there is nothing to evaluate.")
        batches = Batches(splits[split], 256, shuffle=False, device=self.device)
        return measured(state.model(self), batches)

    # -- one stage ------------------------------------------------------------------------------------------

    def _stage(
        self,
        name: str,
        inputs: dict[str, Any],
        work: Callable[[Checkpoints | None, Callable[[dict[str, Any]], None] | None], Any],
        pack: Callable[[Any], tuple[dict[str, bytes], dict[str, Any]]],
        unpack: Callable[[dict[str, bytes], dict[str, Any]], Any],
    ) -> Any:
        full = f"{self.name_prefix}{name}"
        inputs = json.loads(canonical_json(inputs))
        if self.store is None:
            return self._in_memory(full, inputs, work, pack, unpack)
        store = self.store
        checkpoints = Checkpoints(
            store.checkpoints_folder(full),
            every_seconds=self.checkpoint_seconds,
            every_steps=self.checkpoint_steps,
            identity=inputs,
        )
        done = store.load_stage(full, inputs)
        if done is not None:
            # Left there by a process that was killed just after it had finished the stage.
            checkpoints.clear()
            return unpack(done[1], done[0]["result"])
        started = time.perf_counter()
        begin = store.begin_stage(full)
        result = work(checkpoints, lambda row: store.append_metrics({"stage": full, **row}))
        files, facts = pack(result)
        store.finish_stage(full, inputs, files, {"result": facts}, begin, time.perf_counter() - started)
        checkpoints.clear()
        return unpack(files, facts) if not isinstance(result, State) else result

    def _in_memory(self, full: str, inputs: dict[str, Any], work: Any, pack: Any, unpack: Any) -> Any:
        if full in self._memory:
            old, result = self._memory[full]
            if old != inputs:
                raise RecipeChanged(
                    f"stage {full!r} of this run was made from other inputs: {difference(old, inputs)}. "
                    "Give the new stage another name."
                )
            return result
        result = work(None, None)
        if not isinstance(result, State):
            result = unpack(*pack(result))
        self._memory[full] = (inputs, result)
        return result

    # -- descriptions ---------------------------------------------------------------------------------------

    def _hash(self, examples: Examples) -> str:
        """Return the content hash of examples with their statistics, computed once per object."""
        known = self._hashes.get(id(examples))
        if known is None or known[0] is not examples:
            statistics = digest({"mean": examples.mean, "std": examples.std})
            value = sha256_bytes(canonical_json([examples.content_hash(), statistics, list(examples.classes)]))
            # Holding the object keeps its id from being given to another one.
            known = self._hashes[id(examples)] = (examples, value)
        return known[1]

    def _describe(self, value: Any) -> Any:
        """Return JSON values that stand for `value`."""
        if value is None or isinstance(value, str | int | float | bool):
            return value
        if isinstance(value, State):
            return value.digest
        if isinstance(value, Masks):
            return value.digest()
        if isinstance(value, Examples):
            return self._hash(value)
        if isinstance(value, Tensor):
            return digest({"": value})
        if hasattr(value, "describe"):
            return value.describe()
        if isinstance(value, Mapping):
            return {str(name): self._describe(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._describe(item) for item in value]
        raise InvalidValue(
            f"{value!r} cannot be part of a stage: give it a describe() method that returns what it is made of as "
            "JSON values, so that a changed one is noticed."
        )


def _pack_state(state: State) -> tuple[dict[str, bytes], dict[str, Any]]:
    files = {WEIGHTS: to_bytes(state.weights)}
    facts: dict[str, Any] = {"step": state.step, "metrics": state.metrics, "digest": state.digest}
    if state.masks is not None:
        files[MASKS] = settled(state.masks.to_bytes())
    if state.optimizer is not None:
        files[OPTIMIZER] = to_bytes(state.optimizer[0])
        facts["optimizer"] = state.optimizer[1]
    return files, facts


def _unpack_state(files: dict[str, bytes], facts: dict[str, Any]) -> State:
    masks = Masks.from_bytes(files[MASKS], source=MASKS) if MASKS in files else None
    optimizer = None
    if OPTIMIZER in files:
        optimizer = (from_bytes(files[OPTIMIZER], OPTIMIZER), facts["optimizer"])
    weights = from_bytes(files[WEIGHTS], WEIGHTS)
    return State(weights, masks, facts["step"], facts["metrics"], facts["digest"], optimizer)


def _pack_result(result: Any) -> tuple[dict[str, bytes], dict[str, Any]]:
    if isinstance(result, Masks):
        return {MASKS: settled(result.to_bytes())}, {}
    if isinstance(result, dict) and result and all(isinstance(v, Tensor) for v in result.values()):
        return {RESULT: to_bytes(result)}, {}
    return {}, {"json": json.loads(canonical_json(result))}


def _unpack_result(files: dict[str, bytes], facts: dict[str, Any]) -> Any:
    if MASKS in files:
        return Masks.from_bytes(files[MASKS], source=MASKS)
    if RESULT in files:
        return from_bytes(files[RESULT], RESULT)
    return facts["json"]
