"""What ends a run before its time: notice that it must stop (SIGTERM, as a preemption gives), and a hang.

One process keeps the notice itself. Several hear of it from JAX, which catches the signal and agrees with them on the
step to stop at; they need the data of that step.
"""

import faulthandler
import queue
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, Protocol

import jax

_LISTEN_SECONDS = 0.1  # between two looks at whether a run that waits for data was told to stop


class Stopped(Exception):
    """The run was told to stop while it waited for a batch."""


class PreemptionManager(Protocol):
    """What is asked of an `orbax.checkpoint.CheckpointManager`."""

    def reached_preemption(self, step: int) -> bool:
        """Tells, in all processes alike, whether this is the step to stop at."""


class Interruptions:
    """Listens while its `with` block runs."""

    def __init__(self, hang_seconds: int):
        """Args: hang_seconds: without a sign of life for so long, the process shows its stacks and ends; 0 never."""
        self._hang_seconds = hang_seconds
        self._told = False
        self._alone = jax.process_count() == 1
        self._previous: Any = None

    def __enter__(self) -> "Interruptions":
        # Only the main thread may set a handler; elsewhere a run cannot be told.
        if self._alone and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._hear)
        self.alive()
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def alive(self) -> None:
        """Is called at every step; the hang's clock starts anew."""
        if self._hang_seconds:
            # Python's own: it needs no lock that a hanging call may hold.
            faulthandler.dump_traceback_later(self._hang_seconds, exit=True, file=2)

    def stop_at(self, manager: PreemptionManager, step: int) -> bool:
        """Tells whether the run is to be saved after this step and to end; is called at every step."""
        return self._told if self._alone else manager.reached_preemption(step)

    def watched(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yields batches, each a sign of life.

        Raises:
            Stopped: one process was told to stop; it does not wait for a batch that may never come. Several finish
                what they read together.
        """
        for batch in self._interruptible(iter(batches)) if self._alone else batches:
            self.alive()
            yield batch

    def _interruptible(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Reads in a thread: Python runs no signal handler while its main thread is in TensorFlow's reader."""
        wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def read() -> None:
            while wanted.get():
                try:
                    answers.put((next(batches), None))
                except BaseException as error:
                    answers.put((None, error))

        threading.Thread(target=read, name="batches", daemon=True).start()
        try:
            while True:
                wanted.put(True)
                batch, error = self._wait_for(answers)
                if isinstance(error, StopIteration):
                    return
                if error is not None:
                    raise error
                yield batch
        finally:
            wanted.put(False)

    def _wait_for(self, answers: "queue.SimpleQueue[Any]") -> Any:
        while not self._told:
            try:
                return answers.get(timeout=_LISTEN_SECONDS)
            except queue.Empty:
                continue
        raise Stopped
