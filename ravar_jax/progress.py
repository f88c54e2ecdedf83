"""What a training run says of how it gets on."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax

from ravar_jax.errors import UserError


def say(line: str) -> None:
    """Prints a progress line, on process 0 only."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


class Progress:
    """The clock of the loop: speed, share of time spent waiting for data, time left, and the line that tells them.

    Attributes:
        start: Step the run started from.
        total: Step it ends at.
        batch_size: Global.
    """

    def __init__(self, start: int, total: int, batch_size: int):
        self.start, self.total, self.batch_size = start, total, batch_size
        self._last_step = start
        self._last_time = time.perf_counter()
        self._waited = 0.0

    def next_batch(self, batches: Iterator[Any], step: int) -> Any:
        """Returns the next batch, its time counted as waiting."""
        begin = time.perf_counter()
        batch = next(batches, None)
        self._waited += time.perf_counter() - begin
        if batch is None:
            raise UserError(f"the training data ended before step {step} of {self.total}")
        return batch

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Is a context whose time does not count."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._last_time += time.perf_counter() - begin

    def measure(self, step: int, loss: float) -> tuple[float, float]:
        """Prints the progress line; returns clips per second and the share of waiting since the last call."""
        now = time.perf_counter()
        elapsed = max(now - self._last_time, 1e-9)
        steps = step - self._last_step
        speed, waited = steps * self.batch_size / elapsed, min(self._waited / elapsed, 1.0)
        left = (self.total - step) * elapsed / max(steps, 1)
        self._last_step, self._last_time, self._waited = step, now, 0.0
        say(
            f"step {step}/{self.total}  loss {loss:.4f}  {speed:.1f} clips/s  {_clock(left)} left  "
            f"waiting for data {waited:.0%}"
        )
        return speed, waited


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
