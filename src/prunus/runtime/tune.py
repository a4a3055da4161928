"""Pick kernels by timing them on this machine, and remember what was found. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from prunus.runtime.library import Program, engine
from prunus.runtime.records import Record

Candidate = TypeVar("Candidate", bound=tuple[object, ...])


class Tuner:
    """Picks one of several ways to carry a layer out.

    Attributes:
        threads: that the program will run on.
        instruction_set: name, or None for the best.
        timing: whether candidates are timed; otherwise the first is taken.
        found: key -> candidate, of this machine; may be given to skip timing.
        rounds: how often each candidate is timed, in turns.
    """

    def __init__(
        self,
        threads: int = 1,
        *,
        instruction_set: str | None = None,
        timing: bool = False,
        found: dict[str, list[object]] | None = None,
        rounds: int = 4,
        on_stage: Callable[[str], None] | None = None,
    ) -> None:
        self.threads, self.instruction_set, self.timing, self.rounds = threads, instruction_set, timing, rounds
        self.found: dict[str, list[object]] = {} if found is None else found
        self.tell = on_stage or (lambda text: None)

    @property
    def set_name(self) -> str:
        """Name of the instruction set that programs will use."""
        return self.instruction_set or engine().sets[0]

    def pick(
        self, key: str, candidates: Sequence[Candidate], make: Callable[[Candidate], list[Record]]
    ) -> tuple[Candidate, list[Record]]:
        """Return the best candidate and its records.

        Args:
            key: what decides which is best: sizes, density, machine.
            candidates: best guess first.
            make: the steps of a candidate, ready to run.
        """
        known = self.found.get(key)
        for candidate in candidates:
            if known is not None and list(candidate) == list(known):
                return candidate, make(candidate)
        if not self.timing or len(candidates) == 1:
            return candidates[0], make(candidates[0])
        self.tell(f"timing {len(candidates)} kernels for {key}")
        made = [make(candidate) for candidate in candidates]
        programs = [Program(records, instruction_set=self.instruction_set) for records in made]
        times = np.full(len(programs), np.inf)
        for _ in range(self.rounds):
            for number, program in enumerate(programs):
                if times[number] > 3 * times.min():
                    continue  # hopeless after its first run
                program.run(self.threads)
                times[number] = min(times[number], *(program.timed(self.threads).sum() for _ in range(2)))
        best = int(times.argmin())
        self.found[key] = list(candidates[best])
        return candidates[best], made[best]
