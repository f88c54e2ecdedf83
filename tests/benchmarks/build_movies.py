"""How fast a dataset is built from a movie, and in how much memory.

    python -m tests.benchmarks.build_movies --workdir /tmp/build_movies

Draws a movie (15 minutes, 30 frames a second, H.264), annotates a window in every second of it, and prints as JSON:

- `windows_per_second` of `launch/prepare_refava.py`, start-up and everything included;
- `peak_rss_gb`: of the command's own process, and of it and its decoders together (pages that they share counted for
  each), sampled every 0.1 s; `cpu_seconds_per_window` of all of them;
- `seek_speedup`: seconds to read a window by decoding the movie from its start, over seconds as the builder reads it,
  for windows spread over the movie, alternated.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil

from data_pipelines import video
from data_pipelines.refava.annotations import FIELDS

_REPOSITORY = Path(__file__).resolve().parents[2]
_RATE = 30
_NUM_SEEKS = 5  # windows that are read both ways


def _draw_movie(path: Path, seconds: int, width: int, height: int) -> None:
    """Writes textures that move with people's speed, cut every eight seconds."""
    random = np.random.default_rng(0)
    temporary = path.with_suffix(".part.mp4")
    with av.open(str(temporary), "w") as container:
        stream = container.add_stream("libx264", rate=_RATE, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(seconds * _RATE):
            if number % (8 * _RATE) == 0:
                coarse = random.integers(0, 256, (height // 8 + 40, width // 8 + 40, 3), np.uint8)
                scene = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
                scene += random.integers(0, 24, scene.shape, np.uint8)
            left, top = number % 300, number % 200 // 2
            picture = np.ascontiguousarray(scene[top : top + height, left : left + width])
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, _RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    temporary.rename(path)


def _annotate(folder: Path, seconds: int) -> None:
    folder.mkdir(exist_ok=True)
    rows = [
        f"train,movie,{900 + second},0,0.1,0.2,0.5,0.8,11,The person on the left."
        for second in range(seconds)
    ]
    (folder / "people.csv").write_text("\n".join([",".join(FIELDS), *rows]))


class _Memory:
    """Most memory of a process, and of it and all its children together, in bytes."""

    def __init__(self, pid: int):
        self.own = self.together = 0
        self._process = psutil.Process(pid)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            try:
                own = self._process.memory_info().rss
                children = self._process.children(recursive=True)
            except psutil.NoSuchProcess:
                return
            together = own
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    # Until it has its own program, a new process lies in its parent's memory.
                    if any(word.endswith("video_worker.py") for word in child.cmdline()):
                        together += child.memory_info().rss
            self.own, self.together = max(self.own, own), max(self.together, together)
            time.sleep(0.1)


def _build(folder: Path, seconds: int, beam: str) -> dict:
    data = folder / "data"
    shutil.rmtree(data, ignore_errors=True)
    command = [
        sys.executable,
        "launch/prepare_refava.py",
        f"--annotations={folder / 'annotations'}",
    ]
    command += [f"--videos={folder}", f"--data_dir={data}", "--movie_start_seconds=900"]
    if beam:
        command.append(f"--beam_pipeline_options={beam}")
    start, cpu_before = time.perf_counter(), os.times()
    process = subprocess.Popen(command, cwd=_REPOSITORY)
    memory = _Memory(process.pid)
    if process.wait():
        raise SystemExit("the build failed")
    taken, cpu = time.perf_counter() - start, os.times()
    cpu_seconds = cpu.children_user + cpu.children_system
    cpu_seconds -= cpu_before.children_user + cpu_before.children_system
    dataset = data / "refava" / "ava_style" / "1.0.0"
    report = json.loads((dataset / "report.json").read_text())
    kept = report["splits"]["train"]["windows_kept"]
    assert kept == seconds
    return {
        "windows": kept,
        "seconds": round(taken, 1),
        "windows_per_second": round(kept / taken, 2),
        "cpu_seconds_per_window": round(cpu_seconds / kept, 3),
        "dataset_gb": round(sum(p.stat().st_size for p in dataset.iterdir()) / 1e9, 2),
        "peak_rss_gb": {
            "command": round(memory.own / 1e9, 2),
            "command_and_decoders": round(memory.together / 1e9, 2),
        },
    }


def _decode_from_start(path: Path, key_time: float) -> None:
    """Reads a window without seeking: every frame before it is decoded too."""
    taken = 0
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            if frame.time > key_time - 1.5 - 1e-3:
                frame.to_ndarray(format="rgb24")
                taken += 1
            if taken == 90:
                return


def _timed(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def _seeking(path: Path, seconds: int) -> dict:
    spread = (np.arange(_NUM_SEEKS) + 0.5) / _NUM_SEEKS * seconds
    from_start, seeking = [], []
    for key_time in spread.tolist():
        seeking.append(_timed(video.read_window, path, key_time))
        from_start.append(_timed(_decode_from_start, path, key_time))
    return {
        "key_times": spread.tolist(),
        "seconds_from_start": [round(seconds, 2) for seconds in from_start],
        "seconds_seeking": [round(seconds, 2) for seconds in seeking],
        "seek_speedup": round(sum(from_start) / sum(seeking), 1),
    }


def main() -> None:
    """Draws, reads, builds and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--seconds", type=int, default=900)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=360)
    parser.add_argument("--beam_pipeline_options", default="")
    given = parser.parse_args()
    given.workdir.mkdir(parents=True, exist_ok=True)
    movie = given.workdir / "movie.mp4"
    if not movie.exists():
        _draw_movie(movie, given.seconds, given.width, given.height)
    _annotate(given.workdir / "annotations", given.seconds)
    result = _seeking(movie, given.seconds)
    result |= _build(given.workdir, given.seconds, given.beam_pipeline_options)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
