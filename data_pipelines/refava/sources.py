"""Where the frames of windows come from: a folder of movies, or a folder of extracted frames.

Both sources answer the same questions: `check` says beforehand what cannot be read, `fingerprint` which files windows
come from, `read` reads. Windows that cannot be read are not errors; they come back with a reason, for the report.
"""

import contextlib
import dataclasses
import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from data_pipelines import video
from data_pipelines.refava.annotations import Window
from ravar_jax.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".mkv", ".avi", ".webm", ".mov")
FRAMES_START_SECOND = 900  # extracted frame number n shows second 900 + n/30 of the movie
_MAX_IMAGE_PIXELS = 8192 * 4320


@dataclasses.dataclass(frozen=True)
class Problem:
    """Why a window is skipped: a reason to count by, and the details."""

    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class ReadWindow:
    """A window with its frames, or with the reason why there are none."""

    window: Window
    frames: list[np.ndarray]  # uint8 (H, W, 3) RGB, one a position; one array a distinct frame
    frames_repeated: int
    problem: Problem | None = None


@dataclasses.dataclass(frozen=True)
class VideoFolder:
    """Movies `<folder>/<video>.mp4` (or .mkv, .avi, .webm, .mov).

    Attributes:
        folder: The folder.
        movie_start_seconds: Second of the annotations' clock at which the files start.
        positions: Ascending positions 0..89 to read.
        short_side: Longer short sides are scaled down to it.
    """

    folder: str
    movie_start_seconds: float
    positions: tuple[int, ...]
    short_side: int

    def check(self, video_id: str, windows: Sequence[Window]) -> dict[str, Problem]:
        """Opens the file of `windows`, all of one video; returns {clip id: problem}."""
        try:
            path = self._file(video_id)
            if isinstance(path, Problem):
                return {window.clip_id: path for window in windows}
            with _local_file(path) as local:
                duration = video.probe(local).duration
        except UserError as error:
            problem = Problem("video file cannot be read", _named(error, local, path))
            return {window.clip_id: problem for window in windows}
        problems = {}
        for window in windows:
            time = window.key_second - self.movie_start_seconds
            if not 0.0 <= time <= (duration or math.inf):
                detail = f"{path}: key time {time:g} s is outside the file's {duration:.2f} s"
                problems[window.clip_id] = Problem("key time outside the video", detail)
        return problems

    def fingerprint(self, video_id: str, windows: Sequence[Window]) -> list[Any]:
        """Returns name, size and time of change of the file, all that `windows` come from; JSON."""
        path = self._file(video_id)
        return [] if isinstance(path, Problem) else _fingerprint(path)

    def read(self, video_id: str, windows: Sequence[Window]) -> Iterator[ReadWindow]:
        """Reads `windows`, all of one video, in order of time."""
        path = self._file(video_id)
        waiting = sorted(windows, key=lambda window: window.key_second)
        if isinstance(path, Problem):
            yield from (ReadWindow(window, [], 0, path) for window in waiting)
            return
        times = [window.key_second - self.movie_start_seconds for window in waiting]
        with _local_file(path) as local:
            try:
                for found in video.read_windows(
                    local, times, self.positions, short_side=self.short_side
                ):
                    problem = (
                        Problem("window cannot be read", f"{path} {found.problem}")
                        if found.problem
                        else None
                    )
                    yield ReadWindow(
                        waiting.pop(0), found.frames, found.info.frames_repeated, problem
                    )
            except UserError as error:
                problem = Problem("video file cannot be read", _named(error, local, path))
                yield from (ReadWindow(window, [], 0, problem) for window in waiting)

    def _file(self, video_id: str) -> epath.Path | Problem:
        files = [epath.Path(self.folder) / (video_id + suffix) for suffix in VIDEO_SUFFIXES]
        expected = f"{epath.Path(self.folder) / video_id}{{{','.join(VIDEO_SUFFIXES)}}}"
        return next(
            (path for path in files if path.exists()),
            Problem("no video file", f"expected {expected}"),
        )


@dataclasses.dataclass(frozen=True)
class FrameFolder:
    """Extracted frames `<folder>/<video>/image_<6-digit number>.jpg`, 30 a second; fields as in `VideoFolder`.

    Numbers before the first or after the last file of a video repeat the nearest one; a gap between skips the window.
    """

    folder: str
    positions: tuple[int, ...]
    short_side: int

    def check(self, video_id: str, windows: Sequence[Window]) -> dict[str, Problem]:
        """Looks for the files of `windows`, all of one video; returns {clip id: problem}."""
        numbers = self._numbers(video_id)
        plans = {window.clip_id: self._plan(video_id, window, numbers) for window in windows}
        return {clip_id: plan for clip_id, plan in plans.items() if isinstance(plan, Problem)}

    def fingerprint(self, video_id: str, windows: Sequence[Window]) -> list[Any]:
        """Returns name, size and time of change of the files that `windows` come from; JSON."""
        numbers = self._numbers(video_id)
        plans = [self._plan(video_id, window, numbers) for window in windows]
        shown = {number for plan in plans if not isinstance(plan, Problem) for number in plan[0]}
        return [_fingerprint(self._path(video_id, number)) for number in sorted(shown)]

    def read(self, video_id: str, windows: Sequence[Window]) -> Iterator[ReadWindow]:
        """Reads `windows`, all of one video, in order of time."""
        numbers = self._numbers(video_id)
        images: dict[int, np.ndarray] = {}
        for window in sorted(windows, key=lambda window: window.key_second):
            plan = self._plan(video_id, window, numbers)
            if isinstance(plan, Problem):
                yield ReadWindow(window, [], 0, plan)
                continue
            shown, repeated = plan
            images = {number: images[number] for number in shown if number in images}
            problem = None
            for number in shown:
                if number not in images:
                    image = self._image(video_id, number, next(iter(images.values()), None))
                    if isinstance(image, Problem):
                        problem = image
                        break
                    images[number] = image
            frames = [] if problem else [images[number] for number in shown]
            yield ReadWindow(window, frames, repeated, problem)

    def _path(self, video_id: str, number: int) -> epath.Path:
        return epath.Path(self.folder) / video_id / f"image_{number:06d}.jpg"

    def _numbers(self, video_id: str) -> set[int]:
        folder = epath.Path(self.folder) / video_id
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return {int(name[6:12]) for name in names if re.fullmatch(r"image_\d{6}\.jpg", name)}

    def _plan(
        self, video_id: str, window: Window, numbers: set[int]
    ) -> tuple[list[int], int] | Problem:
        """Returns the number shown at each position and how many are repeats, or what is missing."""
        if not numbers:
            return Problem("no extracted frames", f"expected {self._path(video_id, 0)} and on")
        first, last = min(numbers), max(numbers)
        key = round((window.key_second - FRAMES_START_SECOND) * video.FRAMES_PER_SECOND)
        if not first <= key <= last:
            detail = f"{self._path(video_id, max(key, 0))} is outside the numbers {first}..{last}"
            return Problem("key time outside the extracted frames", detail)
        wanted = [key + position - video.KEY_POSITION for position in self.positions]
        shown = [min(max(number, first), last) for number in wanted]
        for number in shown:
            if number not in numbers:
                return Problem("extracted frame missing", f"{self._path(video_id, number)}")
        return shown, sum(a != b for a, b in zip(wanted, shown, strict=True))

    def _image(self, video_id: str, number: int, like: np.ndarray | None) -> np.ndarray | Problem:
        """Returns one frame, of the size of `like` if given."""
        path = self._path(video_id, number)
        try:
            with path.open("rb") as file, Image.open(file, formats=("JPEG",)) as image:
                if image.width * image.height > _MAX_IMAGE_PIXELS:
                    return Problem(
                        "extracted frame cannot be read",
                        f"{path}: {image.width}x{image.height} pixels",
                    )
                size = image.size if like is None else (like.shape[1], like.shape[0])
                if like is None and min(size) > self.short_side:
                    scale = self.short_side / min(size)
                    size = round(size[0] * scale), round(size[1] * scale)
                rgb = image.convert("RGB")
                return np.asarray(
                    rgb if rgb.size == size else rgb.resize(size, Image.Resampling.BICUBIC)
                )
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return Problem("extracted frame cannot be read", f"{path}: {error}")


@contextlib.contextmanager
def _local_file(path: epath.Path) -> Iterator[str]:
    """Yields a name that FFmpeg can open: for a file in a bucket, a copy that lasts as long."""
    if "://" not in os.fspath(path):
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, path.name)
        path.copy(copy)
        yield copy


def _named(error: UserError, local: str, path: epath.Path) -> str:
    """Returns the text of an error about the local copy of `path`."""
    return str(error).replace(local, os.fspath(path))


def _fingerprint(path: epath.Path) -> list[Any]:
    stat = path.stat()
    return [path.name, stat.length, stat.mtime]
