"""A physical edit as data: which positions of which axes stay; applied, proved, saved, replayed on a fresh model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunus.errors import DamagedFile, InvalidValue, MaskMismatch
from prunus.files import write_atomic
from prunus.graph.edit import put, replace_by_identity, set_attribute, sliced, stored_tensors
from prunus.graph.record import arguments, plain_forward
from prunus.graph.routers import silence
from prunus.graph.sizes import spell_sizes
from prunus.parameters import copied, unwrap

if TYPE_CHECKING:
    from prunus.graph.couple import Coupling, Keep

FORMAT = "prunus-plan-1"


@dataclass(frozen=True)
class Plan:
    """Kept positions of every cut axis, and what else has to change for the module to run with them.

    Attributes:
        keep: "tensor:axis" -> sorted kept positions.
        shapes: full shape of every cut tensor, by which a wrong or already cut model is recognised.
        attributes: module path -> {where it remembers a number: the new number}.
        removed_modules: paths of modules replaced by identity.
        families: family name -> kept units; what was decided, for reports.
        blocked: family name -> why it was left whole although it was asked for.
        sizes: module path -> {"call.place.axis": the new size} for sizes fixed in code (see `prunus.graph.sizes`).
        routers: weights and biases whose rows send tokens to experts; a masked expert is one that is never chosen.
    """

    keep: dict[str, list[int]] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    attributes: dict[str, dict[str, int]] = field(default_factory=dict)
    removed_modules: list[str] = field(default_factory=list)
    families: dict[str, list[int]] = field(default_factory=dict)
    blocked: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    routers: list[str] = field(default_factory=list)

    @classmethod
    def from_keep(cls, coupling: Coupling, keep: Keep) -> Plan:
        """Return the plan that removes what `keep` marks False; what the module cannot do is left whole, and named.

        Args:
            coupling: from `couple(record(model, example))`.
            keep: family name -> bool array or tensor (family size,), True = stays; families left out stay whole.

        Raises:
            UnknownName, MaskMismatch, InvalidValue: see `Coupling.removed`.
        """
        from prunus.graph.fit import fit

        return fit(coupling, keep)

    def __bool__(self) -> bool:
        return bool(self.keep or self.removed_modules)

    def cut_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor after the cut."""
        shape = list(self.shapes[name])
        for axis in range(len(shape)):
            shape[axis] = len(self.keep.get(f"{name}:{axis}", range(shape[axis])))
        return tuple(shape)

    def check(self, model: nn.Module) -> None:
        """Raise `MaskMismatch` unless the model is the full one this plan was made for."""
        tensors = stored_tensors(model)
        missing = [n for n in self.shapes if n not in tensors]
        if missing:
            raise MaskMismatch(f"the plan belongs to another model: {type(model).__name__} has no {missing[0]!r}.")
        if self.shapes and all(tuple(tensors[n].shape) == self.cut_shape(n) for n in self.shapes):
            raise MaskMismatch("the plan was already applied to this model: its tensors have the cut shapes.")
        for name, shape in self.shapes.items():
            if list(tensors[name].shape) != list(shape):
                raise MaskMismatch(
                    f"the plan belongs to another model: {name!r} has shape {tuple(tensors[name].shape)}, "
                    f"the plan was made for {tuple(shape)}."
                )
        modules = dict(model.named_modules())
        for path in (*self.removed_modules, *self.attributes, *self.sizes):
            if path not in modules:
                raise MaskMismatch(f"the plan belongs to another model: {type(model).__name__} has no module {path!r}.")

    def apply(self, model: nn.Module, *, inplace: bool = False) -> nn.Module:
        """Return `model` really smaller: a copy, or the model itself with `inplace`.

        Optimizers made before hold the old tensors; make a new one.

        Raises:
            MaskMismatch: the plan belongs to another model, or was applied before. Nothing is changed then.
        """
        bare = unwrap(model)
        self.check(bare)
        made = sliced(bare, {k: np.asarray(v, dtype=np.int64) for k, v in self.keep.items()})
        small = bare if inplace else copied(bare, made)
        put(small, made)
        self.set_numbers(small)
        replace_by_identity(small, self.removed_modules)
        return small

    def set_numbers(self, model: nn.Module) -> None:
        """Set what modules remember, and the sizes their code spells, to what the cut needs; in place."""
        for path, numbers in self.attributes.items():
            module = model.get_submodule(path)
            for spelling, number in numbers.items():
                set_attribute(module, spelling, number)
        for path, numbers in self.sizes.items():
            spell_sizes(model.get_submodule(path), numbers)

    @torch.no_grad()
    def mask(self, model: nn.Module) -> nn.Module:
        """Return a copy of full size in which everything the plan removes is zero: weights, biases, norms, means.

        Removed experts have the router's logit minus infinity besides.
        """
        bare = unwrap(model)
        self.check(bare)
        masked = copied(bare)
        tensors = stored_tensors(masked)
        for key, kept in self.keep.items():
            name, _, axis = key.rpartition(":")
            tensor = tensors[name]
            if name.endswith("running_var") or not tensor.is_floating_point():
                continue
            gone = torch.ones(tensor.shape[int(axis)], dtype=torch.bool)
            gone[torch.tensor(kept, dtype=torch.int64)] = False
            never = name in self.routers and tensor.ndim == 1
            tensor.index_fill_(int(axis), gone.nonzero()[:, 0].to(tensor.device), float("-inf") if never else 0.0)
            if name in self.routers and tensor.ndim > 1:
                path, _, own = name.rpartition(".")
                silence(masked.get_submodule(path), own, gone.nonzero()[:, 0].tolist())
        replace_by_identity(masked, self.removed_modules)
        return masked

    def verify(self, model: nn.Module, example: Any) -> float:
        """Return how far the small model's outputs are from the masked big one's, relative to the largest output.

        Both run in eval mode on `example`. An exact cut gives rounding error only (below about 1e-5 in float32); NaN
        in one and not in the other gives infinity.

        Raises:
            InvalidValue: the outputs hold no finite number, so they prove nothing.
        """
        args, kwargs = arguments(example)
        small, masked = self.apply(model), self.mask(model)
        results = []
        for net in (masked, small):
            with plain_forward(net):
                results.append([t for t in tree_leaves(net(*args, **kwargs)) if isinstance(t, Tensor)])
        return difference(*results)

    def then(self, later: Plan) -> Plan:
        """Return one plan that does what this one and then `later` (made for the small model) does.

        Families are named after what they cut in their own model, so the joint plan lists none.

        Raises:
            MaskMismatch: `later` was made for another model than the one this plan leaves.
        """
        keep = {k: list(v) for k, v in self.keep.items()}
        shapes = {k: list(v) for k, v in self.shapes.items()}
        for name, shape in later.shapes.items():
            if name in shapes and list(self.cut_shape(name)) != list(shape):
                raise MaskMismatch(
                    f"the plans do not follow each other: {name!r} leaves one as {self.cut_shape(name)} "
                    f"and enters the other as {tuple(shape)}."
                )
            shapes.setdefault(name, list(shape))
        for key, kept in later.keep.items():
            keep[key] = [keep[key][i] for i in kept] if key in keep else list(kept)
        attributes = {p: dict(a) for p, a in self.attributes.items()}
        for path, numbers in later.attributes.items():
            attributes.setdefault(path, {}).update(numbers)
        removed = [*self.removed_modules, *later.removed_modules]
        sizes = {p: dict(s) for p, s in self.sizes.items()}
        for path, numbers in later.sizes.items():
            sizes.setdefault(path, {}).update(numbers)
        routers = list(dict.fromkeys([*self.routers, *later.routers]))
        return Plan(keep, shapes, attributes, removed, {}, self.blocked | later.blocked, sizes, routers)

    def without_modules(self, paths: list[str]) -> Plan:
        """Return the plan that also replaces modules by identity."""
        return replace(self, removed_modules=[*self.removed_modules, *paths])

    def with_blocked(self, blocked: Mapping[str, str]) -> Plan:
        """Return the plan with these families named as left whole, too."""
        return replace(self, blocked=dict(blocked) | self.blocked)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {"format": FORMAT} | asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Read what `to_dict` returned.

        Raises:
            DamagedFile: a part is missing or has another form.
        """
        try:
            if data["format"] != FORMAT:
                raise DamagedFile(f"the plan has format {data['format']!r}; this version reads {FORMAT!r}.")
            return cls(
                {str(k): [int(i) for i in v] for k, v in data["keep"].items()},
                {str(k): [int(i) for i in v] for k, v in data["shapes"].items()},
                {str(k): {str(a): int(n) for a, n in v.items()} for k, v in data["attributes"].items()},
                [str(p) for p in data["removed_modules"]],
                {str(k): [int(i) for i in v] for k, v in data["families"].items()},
                {str(k): str(v) for k, v in data["blocked"].items()},
                {str(k): {str(a): int(n) for a, n in v.items()} for k, v in data["sizes"].items()},
                [str(n) for n in data.get("routers", [])],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedFile(f"this is not a plan ({type(error).__name__}: {error}).") from error

    def save(self, path: Path | str) -> None:
        """Write the plan as JSON."""
        write_atomic(Path(path), json.dumps(self.to_dict(), indent=1).encode())

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Read a plan written by `save` (raises `DamagedFile`)."""
        try:
            return cls.from_dict(json.loads(Path(path).read_bytes()))
        except (OSError, ValueError) as error:
            if isinstance(error, DamagedFile):
                raise
            raise DamagedFile(f"plan file {path} cannot be read: {error}.") from error


def difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Return the largest |expected - found| over the largest |expected|; infinity for unlike shapes."""
    if len(expected) != len(found):
        return float("inf")
    worst, compared = 0.0, False
    for a, b in zip(expected, found, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if not a.numel() or not a.is_floating_point():
            continue
        # Infinities are legitimate outputs (masked logits); they must sit at the same places.
        finite = torch.isfinite(a)
        if not torch.equal(finite, torch.isfinite(b)):
            return float("inf")
        a, b = a[finite].double(), b[finite].double()
        if a.numel():
            compared = True
            worst = max(worst, float((a - b).abs().max()) / max(float(a.abs().max()), 1e-30))
    if not compared:
        raise InvalidValue("the outputs hold no finite number, so they prove nothing; give another example input.")
    return worst
