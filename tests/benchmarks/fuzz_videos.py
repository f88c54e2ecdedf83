"""Damaged videos, read as the builder reads them: trials of `fuzz.py`."""

from pathlib import Path

import numpy as np

from data_pipelines import video
from tests.benchmarks.fuzz_damage import Rng, Trial, check_line, flip
from tests.numbered_video import write_video

KEY_TIMES = (1.5, 16.0, 30.0)
POSITIONS = (0, 12, 25, 38, 45, 50, 63, 76, 89)


def read_video(path: Path) -> list[np.ndarray | str]:
    """Returns the frames of each window, or why there are none."""
    windows = video.read_windows(path, KEY_TIMES, POSITIONS)
    return [window.problem or np.stack(window.frames) for window in windows]


def damaged_video(intact: Path, how: str) -> Trial:
    """Returns a trial that cuts a video at the `number`-th kilobyte, or flips bits in it."""
    data, original = intact.read_bytes(), read_video(intact)

    def trial(folder: Path, rng: Rng, number: int) -> str:
        path = folder / intact.name
        path.write_bytes(data[: 1024 * number % len(data)] if how == "cut" else flip(rng, data))
        found = read_video(path)
        different = False
        for ours, theirs in zip(found, original, strict=True):
            if isinstance(ours, str):
                check_line(f"{path} {ours}", folder)
            else:
                different |= not np.array_equal(ours, theirs)
        if different:
            return "WRONG" if how == "cut" else "altered"
        problems = [isinstance(window, str) for window in found]
        return "refused" if all(problems) else "masked" if any(problems) else "identical"

    return trial


def make(folder: Path) -> dict[str, tuple[int, Trial]]:
    """Writes the intact files into `folder`; returns kind -> its share of the inputs, and its trial."""
    kinds = {}
    for name, share in (("mp4", 5), ("mkv", 5), ("avi", 8)):  # 1,000 inputs reach every kilobyte
        path = write_video(folder / f"video.{name}", [number / 25 for number in range(800)])
        kinds[f"{name}, cut at each kilobyte"] = share, damaged_video(path, "cut")
        kinds[f"{name}, bits flipped"] = 3, damaged_video(path, "flip")
    return kinds
