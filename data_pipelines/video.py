"""Reading windows of video files, decoded in a child process with limits on time, memory, pixels and frames.

A window is the 30-per-second grid of positions 0..89 around a key time: position p is key time + (p - 45)/30 s, and is
shown by the frame nearest to that time, whatever the file's own frame rate. Times are seconds from the file's first
frame. Positions before the first or after the last frame repeat the nearest one and are counted.
"""

import dataclasses
import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ravar_jax.errors import UserError

# The same numbers as in `schema.py`, which needs TensorFlow Datasets; a test holds them together.
NUM_POSITIONS = 90
KEY_POSITION = 45
FRAMES_PER_SECOND = 30.0

_MAX_PIXELS = 8192 * 4320  # of one frame
_MAX_FRAMES = 1_000_000  # decoded for one request
_MAX_MEMORY = 8 << 30  # bytes of address space of the child
_TIMEOUT_SECONDS = 120.0  # for one answer of the child: one window, or the facts
_WORKER = Path(__file__).with_name("video_worker.py")


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """Facts about a file, and about one window of it."""

    frame_rate: float  # average frames per second, 0.0 where the header does not say
    duration: float  # seconds, 0.0 where the header does not say (`probe` then measures it)
    size: tuple[int, int]  # width and height in pixels, upright, before any scaling down
    frames_repeated: int = (
        0  # positions of the window that lie before the first or after the last frame
    )


@dataclasses.dataclass(frozen=True)
class VideoWindow:
    """One window, or why it could not be read."""

    key_time: float  # seconds from the first frame
    frames: list[np.ndarray]  # uint8 (H, W, 3) RGB, one a position; empty if there is a problem
    info: VideoInfo
    problem: str = ""  # goes on after the file's name; "" for a window that was read


def probe(path: str | os.PathLike, *, timeout_seconds: float = _TIMEOUT_SECONDS) -> VideoInfo:
    """Returns the facts about a video after decoding its first frame.

    Raises:
        UserError: If the file is missing, empty, not a video, audio only, damaged, or over a limit.
    """
    with _Worker(path, [], [], None, timeout_seconds) as worker:
        return _info(worker.receive())


def read_window(
    path: str | os.PathLike,
    key_time: float,
    positions: Sequence[int] = range(NUM_POSITIONS),
    *,
    short_side: int | None = None,
    timeout_seconds: float = _TIMEOUT_SECONDS,
) -> tuple[list[np.ndarray], VideoInfo]:
    """Reads one window; arguments, frames and errors as in `read_windows`.

    Raises:
        UserError: Also if this window is unreadable: the key time is beyond the end, or the file breaks off before it.
    """
    (window,) = read_windows(
        path, [key_time], positions, short_side=short_side, timeout_seconds=timeout_seconds
    )
    if window.problem:
        raise UserError(f"{path} {window.problem}")
    return window.frames, window.info


def read_windows(
    path: str | os.PathLike,
    key_times: Sequence[float],
    positions: Sequence[int] = range(NUM_POSITIONS),
    *,
    short_side: int | None = None,
    timeout_seconds: float = _TIMEOUT_SECONDS,
) -> Iterator[VideoWindow]:
    """Reads many windows of one file in one pass of one child process.

    Args:
        path: The video file.
        key_times: Ascending seconds from the first frame.
        positions: Ascending positions 0..89 that are wanted of each window.
        short_side: Frames whose shorter side is longer are scaled down to it (bicubic), keeping their shape.
        timeout_seconds: Longest wait for one window.

    Yields:
        One `VideoWindow` for each key time, in order. A frame that is shown at several positions, or in a window and in
        the next one too, is the same array.

    Raises:
        UserError: If the file as a whole cannot be read: one line that names it.
    """
    if list(key_times) != sorted(key_times) or list(positions) != sorted(positions):
        raise ValueError("key_times and positions must ascend")
    offsets = [(position - KEY_POSITION) / FRAMES_PER_SECOND for position in positions]
    times = [[key_time + offset for offset in offsets] for key_time in key_times]
    with _Worker(path, list(key_times), times, short_side, timeout_seconds) as worker:
        distinct: list[np.ndarray] = []
        for key_time in key_times:
            header = worker.receive()
            distinct = [
                worker.receive_frame(header["shape"]) if place is None else distinct[place]
                for place in header["frames"]
            ]
            problem = header["problem"]
            if key_time < 0.0 and not problem:
                problem = f"starts after the wanted time {key_time:.2f} s"
            frames = [] if problem else [distinct[shown] for shown in header["shown"]]
            yield VideoWindow(key_time, frames, _info(header), problem)


def _info(header: dict[str, Any]) -> VideoInfo:
    width, height = header["size"]
    return VideoInfo(
        header["frame_rate"], header["duration"], (width, height), header.get("frames_repeated", 0)
    )


class _Worker:
    """A child process decoding one request; leaving the `with` block ends it."""

    def __init__(
        self,
        path: str | os.PathLike,
        key_times: list[float],
        times: list[list[float]],
        short_side: int | None,
        timeout_seconds: float,
    ):
        self._path = path
        if not os.path.exists(path):
            raise UserError(f"{path}: no such video file")
        if not os.path.isfile(path):
            raise UserError(f"{path} is not a file; expected a video file")
        if os.path.getsize(path) == 0:
            raise UserError(f"{path} is empty (0 bytes); expected a video file")
        self._request = {
            "path": os.path.abspath(path),
            "key_times": key_times,
            "times": times,
            "short_side": short_side,
            "max_pixels": _MAX_PIXELS,
            "max_frames": _MAX_FRAMES,
            "max_memory": _MAX_MEMORY,
        }
        self._timeout_seconds = timeout_seconds
        self._timed_out = False

    def __enter__(self) -> "_Worker":
        # -P: the worker's own folder stays off the import path, where its neighbours would hide other modules.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._answers = self._process.stdout
        try:
            with self._process.stdin as stdin:
                stdin.write(json.dumps(self._request).encode() + b"\n")
        except BrokenPipeError:
            pass  # the child is gone; `receive` tells how
        return self

    def __exit__(self, *exception) -> None:
        self._process.kill()
        self._process.wait()
        self._answers.close()

    def receive(self) -> dict[str, Any]:
        """Returns the next answer's header.

        Raises:
            UserError: If the child reports that the file cannot be read, crashed, or took too long.
        """
        (length,) = struct.unpack("<Q", self._read(8))
        header = json.loads(self._read(length))
        if "error" in header:
            raise UserError(f"{self._path} {header['error']}")
        return header

    def receive_frame(self, shape: Sequence[int]) -> np.ndarray:
        """Returns the next frame of the answer, uint8 (H, W, 3)."""
        height, width, channels = shape
        frame = np.frombuffer(self._read(height * width * channels), np.uint8)
        return frame.reshape(height, width, channels)

    def _read(self, num_bytes: int) -> bytes:
        timer = threading.Timer(self._timeout_seconds, self._stop)
        timer.start()
        try:
            received = self._answers.read(num_bytes)
        finally:
            timer.cancel()
        if len(received) == num_bytes:
            return received
        if self._timed_out:
            raise UserError(
                f"{self._path} took longer than {self._timeout_seconds:g} s to decode; gave up"
            )
        code = self._process.wait()
        raise UserError(
            f"{self._path} cannot be decoded: the decoder process ended with code {code}"
        )

    def _stop(self) -> None:
        self._timed_out = True
        self._process.kill()
