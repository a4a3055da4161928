"""Progress of a run: a live bar with rates and remaining time on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

_LINE_EVERY_SECONDS = 5.0
_DRAW_EVERY_SECONDS = 0.1


def clock(seconds: float) -> str:
    """Return 75 as "1:15" and 3700 as "1:01:40"."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


class Progress:
    """Shows how far a run is, from the hooks of `prunus.run.driver.execute`.

    Args:
        stream: where to show it; a terminal gets one live line, anything else a plain line every few seconds and one
            per result.
        quiet: show nothing.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False):
        self.stream = stream if stream is not None else sys.stderr
        self.quiet = quiet
        self.live = self.stream.isatty()
        self.total = 0
        self.done = 0
        self.planned: dict[str, int] = {}
        self._stage = ""
        self._stage_done = 0
        self._started = time.monotonic()
        self._shown = 0.0
        self._width = 0

    def plan(self, steps: Mapping[str, int]) -> None:
        """Learn the steps of every stage that is left."""
        self.planned = dict(steps)
        self.total = sum(steps.values())
        self._started = time.monotonic()
        if not self.quiet and not self.live:
            self._print(f"{len(steps)} trainings, {self.total:,} optimizer steps to go")

    def step(self, stage: str, done: int, last: int, loss: float | None) -> None:
        """Note one step of a stage."""
        if stage != self._stage:
            self._stage = stage
            # A stage that goes on from a checkpoint begins with steps that another process did.
            self._stage_done = done - 1
            self.total -= min(self._stage_done, self.planned.get(stage, 0))
        self.done += done - self._stage_done
        self._stage_done = done
        now = time.monotonic()
        every = _DRAW_EVERY_SECONDS if self.live else _LINE_EVERY_SECONDS
        if self.quiet or now - self._shown < every:
            return
        self._shown = now
        spent = now - self._started
        rate = self.done / spent if spent > 0 else 0.0
        left = clock((self.total - self.done) / rate) if rate and self.total > self.done else "0:00"
        share = min(1.0, self.done / self.total) if self.total else 0.0
        text = f"{share:6.1%}  {rate:,.0f} steps/s  left {left}  {stage} {done}/{last}"
        if loss is not None:
            text += f"  loss {loss:.3f}"
        if self.live:
            self._overwrite(text)
        else:
            self._print(text)

    def cell(self, row: Mapping[str, Any], number: int, of: int) -> None:
        """Show one finished result."""
        if self.quiet:
            return
        name = row["method"] if row["sparsity"] == 0 else f"{row['method']} at {row['sparsity']:.4g}"
        text = f"[{number}/{of}] seed {row['seed']}  {name}: accuracy {row['accuracy']:.2%}"
        if self.live:
            self._overwrite(text)
        else:
            self._print(text)

    def close(self) -> None:
        """Leave the live line."""
        if self.live and not self.quiet:
            self._overwrite("")

    def _overwrite(self, text: str) -> None:
        text = text[:118]
        self.stream.write("\r" + text.ljust(self._width))
        if not text:
            self.stream.write("\r")
        self._width = len(text)
        self.stream.flush()

    def _print(self, text: str) -> None:
        self.stream.write(text + "\n")
        self.stream.flush()
