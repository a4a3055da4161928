"""A method in any training loop: one added line, through optimizer step hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunus.distributed import agree, agree_tensors
from prunus.errors import DamagedFile, InvalidValue, MaskMismatch, Unsupported
from prunus.hold import Hold, bare_optimizer
from prunus.masks import Masks
from prunus.methods.base import Method
from prunus.parameters import check_finite, parameters_of, prunable
from prunus.randomness import generator
from prunus.schedule import Duration, steps_of
from prunus.scores.registry import SCORES


class Sparsifier(Hold):
    """A method attached to a model and its optimizer; made by `sparsify`.

    Attributes:
        model, optimizer, method: what was given.
        addresses: the prunable tensors and their layouts.
        masks: the masks in force.
        step: optimizer steps done since attaching.
        steps: length of the whole training in optimizer steps.
        explored: union of all masks so far; `explored.density` is the exploration rate R_s of Liu et al., ICML 2021.
        memory: tensors a method keeps between steps, by "kind/parameter name"; part of the saved state.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: Method | None,
        *,
        steps: int,
        steps_per_epoch: int | None = None,
        masks: Masks | None = None,
        seed: int = 0,
        include: Sequence[str] | str = (),
        exclude: Sequence[str] | str = (),
    ):
        if method is None and masks is None:
            raise InvalidValue("give a method, or masks to hold.")
        acts = method is not None and (type(method).before, type(method).after) != (Method.before, Method.after)
        if acts and isinstance(bare_optimizer(optimizer), torch.optim.LBFGS):
            raise Unsupported(
                f"LBFGS remembers past gradients of all weights at once, so masks must not move under it as "
                f"{type(method).__name__} moves them; use a first-order optimizer, or hold fixed masks."
            )
        self.method = method
        self.steps = steps
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed
        self.step = 0
        self.memory: dict[str, Tensor] = {}
        self._dense: dict[str, Tensor] = {}
        self.addresses = prunable(model, include=include, exclude=exclude)
        if masks is not None:
            masks.parameters(model)
            self.addresses = _restrict(self.addresses, masks, model, include)
        self.parameters = parameters_of(model, self.addresses)
        self.model = model
        check_finite({n: p.detach() for n, p in self.parameters.items()}, "weight")
        if method is not None:
            method.check(steps, steps_per_epoch)
        self._given = masks
        first = method.start(self) if method is not None else masks
        assert first is not None
        first = agree(first)
        # What a method remembers of the weights must be rank 0's, too: DistributedDataParallel may yet be put around
        # a model whose ranks were initialised differently.
        self.memory = agree_tensors(self.memory)
        self.explored = first
        super().__init__(model, optimizer, first)

    # -- what methods use -----------------------------------------------------------------------------------

    @property
    def given(self) -> Masks | None:
        """The masks handed to `sparsify`, if any: where the method starts from."""
        return self._given

    def in_steps(self, duration: Duration) -> int:
        """Return a duration in optimizer steps of this training."""
        return steps_of(duration, total_steps=self.steps, steps_per_epoch=self.steps_per_epoch)

    def gradients(self) -> dict[str, Tensor]:
        """Return the last gradient of every prunable tensor (zeros where there is none), float32 or wider.

        Gradients of pruned weights are there when the method asked for dense ones for this step.
        """
        found = {}
        for name, parameter in self.parameters.items():
            gradient = self._dense.get(name, parameter.grad)
            found[name] = torch.zeros_like(parameter) if gradient is None else gradient.detach()
        return {n: g.to(torch.promote_types(g.dtype, torch.float32)) for n, g in found.items()}

    def weights(self) -> dict[str, Tensor]:
        """Return the prunable weights, detached, float32 or wider."""
        return {n: p.detach().to(torch.promote_types(p.dtype, torch.float32)) for n, p in self.parameters.items()}

    def noise(self, purpose: str = "noise") -> dict[str, Tensor]:
        """Return uniform noise for every prunable tensor, keyed by seed, purpose and step."""
        return {
            n: torch.rand(p.shape, generator=generator(self.seed, purpose, self.step, n)).to(p.device)
            for n, p in self.parameters.items()
        }

    def scores(self, name: str) -> dict[str, Tensor]:
        """Return the score called `name` from what a training step has: weights, gradients, noise, movement.

        Raises:
            UnknownName: no such score.
            InvalidValue: the score needs evidence that a training hook cannot gather.
        """
        info = SCORES.entry(name)
        available: dict[str, Any] = {"weight": self.weights, "gradient": self.gradients, "noise": self.noise}
        if "movement" in info.needs:
            kept = {n: self.memory.get(f"movement/{n}") for n in self.parameters}
            if all(v is not None for v in kept.values()):
                available["movement"] = lambda: kept
        missing = [need for need in info.needs if need not in available]
        if missing:
            raise InvalidValue(
                f"score {info.name!r} needs {', '.join(missing)}, which a training hook cannot gather; prune with "
                "prunus.prune(..., data=...) and pass its masks to sparsify."
            )
        evidence = {need: available[need]() for need in info.needs}
        function = info.load()
        return {n: function(**{need: evidence[need][n] for need in info.needs}) for n in self.parameters}

    def update(self, masks: Masks) -> None:
        """Put new masks in force (rank 0's, when several processes train together)."""
        self.masks = agree(masks)
        self.explored = self.explored | self.masks

    def masks_state(self) -> bool:
        """See `Hold.masks_state`."""
        return self.method is None or not self.method.trains_dense(self)

    # -- hooks ----------------------------------------------------------------------------------------------

    def _before_step(self) -> None:
        self._dense = {}
        if self.method is None or not self.method.wants_dense_gradients(self):
            self._mask_gradients()
        elif not self.method.trains_dense(self):
            # Kept aside, because what is left in .grad after the step need not be the gradient (Nesterov momentum
            # adds to it in place) and because pruned entries must not reach optimizers that mix entries.
            self._dense = {n: p.grad.detach().clone() for n, p in self.parameters.items() if p.grad is not None}
            self._mask_gradients()
        if self.method is not None:
            self.method.before(self)

    def _after_step(self) -> None:
        dense = self.method is not None and self.method.trains_dense(self)
        self.step += 1
        if not dense:
            self.apply()
        if self.method is not None:
            self.method.after(self)
        self._dense = {}

    # -- saving ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to continue: {"tensors": {name: Tensor}, "values": JSON-ready dict}."""
        tensors: dict[str, Tensor] = {}
        for kind, masks in (("masks", self.masks), ("explored", self.explored)):
            tensors |= {f"{kind}/{n}": t for n, t in masks.packed().items()}
        tensors |= {f"memory/{k}": v.detach().clone() for k, v in self.memory.items()}
        shapes = {n: list(m.shape) for n, m in self.masks.items()}
        description = self.method.describe() if self.method is not None else None
        return {
            "tensors": tensors,
            "values": {
                "step": self.step,
                "steps": self.steps,
                "steps_per_epoch": self.steps_per_epoch,
                "seed": self.seed,
                "method": description,
                "shapes": shapes,
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Attach first (`sparsify` on the fresh model chooses and applies masks of its own), then load the states of
        model, optimizer and sparsifier.

        Raises:
            InvalidValue: the state belongs to another method, seed, or training of another length.
            MaskMismatch: it belongs to another model.
            DamagedFile: tensors are missing.
        """
        values, tensors = state["values"], state["tensors"]
        description = self.method.describe() if self.method is not None else None
        own = {"method": description, "steps": self.steps, "steps_per_epoch": self.steps_per_epoch, "seed": self.seed}
        for name, mine in own.items():
            if values[name] != mine:
                raise InvalidValue(
                    f"the saved state has {name} {values[name]!r}, this run {mine!r}; resume with the same."
                )
        try:
            packed = {k: {n: tensors[f"{k}/{n}"] for n in values["shapes"]} for k in ("masks", "explored")}
        except KeyError as error:
            raise DamagedFile(f"the saved state lacks {error}; use an older checkpoint.") from error
        # Saved values may come back in another order; that of the model is what files are written in.
        shapes = {n: values["shapes"][n] for n in self.masks if n in values["shapes"]}
        if len(shapes) != len(values["shapes"]) or len(shapes) != len(self.masks):
            raise InvalidValue("the saved state has masks for other tensors than this model; resume with the same.")
        masks, explored = (Masks.unpacked(packed[k], shapes) for k in ("masks", "explored"))
        masks.check_same(self.masks)
        explored.check_same(self.masks)
        self.step = int(values["step"])
        device = next(iter(self.parameters.values())).device
        self.memory = {
            k.removeprefix("memory/"): v.to(device).clone() for k, v in tensors.items() if k.startswith("memory/")
        }
        self.explored = explored
        self.masks = masks


def _restrict(addresses: Any, masks: Masks, model: nn.Module, include: Sequence[str] | str) -> Any:
    """Limit the prunable tensors to those the given masks name."""
    missing = [n for n in masks if n not in addresses]
    if missing:
        addresses = prunable(
            model, include=[*([include] if isinstance(include, str) and include else include), *missing]
        )
    for name in masks:
        if name not in addresses:
            first = next((a.name for a in addresses.values() if name in a.aliases), None)
            why = f"it is another name of {first!r}; call it so" if first else addresses.skipped[name]
            raise MaskMismatch(f"mask {name!r} cannot be held: {why}.")
    return type(addresses)({n: addresses[n] for n in masks}, addresses.skipped)


def sparsify(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: Method | str | None = None,
    *,
    steps: int,
    steps_per_epoch: int | None = None,
    masks: Masks | None = None,
    seed: int = 0,
    include: Sequence[str] | str = (),
    exclude: Sequence[str] | str = (),
) -> Sparsifier:
    """Prune `model` while your own loop trains it: this one line is all the loop needs.

    The method acts inside `optimizer.step()`, so gradient accumulation, autocast, torch.compile,
    DistributedDataParallel, Lightning and Accelerate work unchanged. Pruned weights and their optimizer state
    are exactly zero after every step.

    Args:
        model: any module; wrappers are looked through.
        optimizer: the torch optimizer that trains it (or Accelerate's or Lightning's wrapper around it).
        method: a step method such as `prunus.RigL(sparsity=0.9)`, its name, or None to hold `masks` fixed.
        steps: how many optimizer steps the training will take.
        steps_per_epoch: optimizer steps per epoch; needed when the method has durations in "ep".
        masks: masks to start from (from `prunus.prune`, or an earlier run).
        seed: for random positions and ties of random growth.
        include, exclude: shell patterns of parameter names (see `prunus.parameters.prunable`).

    Returns:
        The handle: `.masks`, `.step`, `.explored`, `.state_dict()`, `.load_state_dict()`, `.detach()`.

    Raises:
        NothingPrunable, NonFinite, InvalidValue, UnknownName, MaskMismatch, ScheduleTooShort, Unsupported.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InvalidValue(f"steps {steps!r} must be the whole number of optimizer steps of the training, at least 1.")
    if isinstance(method, str):
        from prunus.methods.registry import METHODS

        entry = METHODS.entry(method)
        if entry.kind != "step":
            steps_only = ", ".join(e.name for e in METHODS if e.kind == "step")
            raise InvalidValue(
                f"{entry.name!r} is a procedure over whole trainings and cannot act inside one; use `prunus run "
                f"--method {entry.name}`, or one of {steps_only} here."
            )
        method = METHODS.build(method)
    if method is not None and not isinstance(method, Method):
        raise InvalidValue(
            f"{method!r} is not a step method; step methods are listed by `prunus ls methods`. Procedures such as IMP "
            "run whole trainings and are used through `prunus run`."
        )
    return Sparsifier(
        model,
        optimizer,
        method,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        masks=masks,
        seed=seed,
        include=include,
        exclude=exclude,
    )
