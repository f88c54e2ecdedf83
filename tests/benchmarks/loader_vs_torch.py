"""Times our training input against a PyTorch loader that does what the release's does, from the same disk.

    python -m tests.benchmarks.loader_vs_torch [--rounds 7] [--windows 32] [--batch 8] [--movie FILE]

One movie of extracted frames (640x360 JPEG of quality 95, 30 a second; drawn from noise with the spectrum of natural
pictures, or taken from --movie) is the release's input, and what `launch/prepare_refava.py` makes of it with its
default flags (all 90 positions, short side 256, quality 90) is ours. An example is one of two people of a window:
8 frames at 224x224, the detector's key frame at 340x465, box and labels, normalised and batched.

The release's way, per example: OpenCV reads the 90 files of the window, 9 of them are resized by Pillow and normalised
(spec 2.3, 2.4; sentences are left out), in a DataLoader with 0, 1 and 2 workers, of which the fastest counts. Ours is
`input_pipeline.train_batches` and the normalisation, which in training runs on the device, here on the CPU. First the
two are compared on one window. Each side has a process of its own; rounds alternate, and two batches are read before a
round's are timed. Prints one JSON object; `ratio` is our median of clips/s over the release's. CPU seconds are those of
all threads, the release's without workers, and hardly depend on what else the machine does.
"""

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).resolve().parents[2]
WIDTH, HEIGHT = 640, 360
FIRST_SECOND = 902  # of the key frames: the first that AVA annotates
PEOPLE = 2  # of a window
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Mean absolute difference in normalised pixels: ours went through a JPEG more, at 256 pixels.
TOLERANCE = 0.1


def noise_frames(count: int) -> Iterator[np.ndarray]:
    """Yields frames uint8 (H, W, 3) that pan over one large picture whose spectrum falls as 1/f."""
    generator = np.random.default_rng(0)
    height, width = 2 * HEIGHT, 2 * WIDTH
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    planes = []
    for _ in range(3):
        spectrum = np.fft.rfft2(generator.standard_normal((height, width))) / frequency**1.6
        planes.append(np.fft.irfft2(spectrum, (height, width)))
    grey, *colours = [plane / plane.std() for plane in planes]
    picture = np.stack([grey, grey + 0.3 * colours[0], grey + 0.3 * colours[1]], axis=-1)
    picture = np.clip(128 + 50 * picture, 0, 255).astype(np.uint8)
    for number in range(count):
        x = int((1 + np.sin(number / 70)) / 2 * (width - WIDTH))
        y = int((1 + np.cos(number / 50)) / 2 * (height - HEIGHT))
        yield picture[y : y + HEIGHT, x : x + WIDTH]


def movie_frames(movie: str, count: int) -> Iterator[np.ndarray]:
    """Yields frames of a video file, over and over."""
    import av

    while True:
        with av.open(movie) as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(
                    format="rgb24", width=WIDTH, height=HEIGHT, interpolation="BICUBIC"
                )
                count -= 1
                if not count:
                    return


def write_input(folder: Path, windows: int, movie: str) -> None:
    """Writes frames and annotations, and builds the dataset from them."""
    frames = folder / "frames" / "movie"
    frames.mkdir(parents=True)
    count = 30 * (windows + FIRST_SECOND - 900 + 2)
    images = movie_frames(movie, count) if movie else noise_frames(count)
    for number, image in enumerate(images):
        Image.fromarray(image).save(frames / f"image_{number:06d}.jpg", quality=95)
    annotations = folder / "annotations"
    annotations.mkdir()
    rows = ["split,video,second,person,x1,y1,x2,y2,labels,sentence"]
    for second in range(FIRST_SECOND, FIRST_SECOND + windows):
        for person in range(PEOPLE):
            rows.append(
                f"train,movie,{second},{person},0.1,0.1,0.{person + 4},0.9,12 80,the person {person} at {second}"
            )
    (annotations / "annotations.csv").write_text("\n".join(rows) + "\n")
    command = [sys.executable, "launch/prepare_refava.py", "--annotations", str(annotations)]
    command += ["--frames", str(folder / "frames"), "--data_dir", str(folder / "data")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


class ReleasedExamples:
    """The release's training examples, as its data set file makes them (spec 2.3, 2.4)."""

    def __init__(self, frames: str, windows: int):
        self.frames = frames
        self.seconds = np.repeat(np.arange(FIRST_SECOND, FIRST_SECOND + windows), PEOPLE)

    def __len__(self) -> int:
        return len(self.seconds)

    def __getitem__(self, number: int) -> tuple[Any, ...]:
        import cv2
        import torch

        first = (int(self.seconds[number]) - 900) * 30 - 45
        # The release reads the first file 90 times over, by mistake; these are the 90 that it means.
        images = [cv2.imread(f"{self.frames}/image_{first + i:06d}.jpg") for i in range(90)]
        planes = [np.transpose(image, (2, 0, 1)) for image in images]
        key = self._tensor(np.transpose(planes[45], (1, 2, 0)) * np.uint8(255), 465, 340)
        video = np.zeros((8, 3, *planes[0].shape[1:]))
        video[:] = np.stack(planes)[:8]
        clip = []
        for frame in video:
            scaled = (np.transpose(frame, (1, 2, 0)) * 255).astype(np.int32).astype(np.uint8)
            pixels = self._tensor(scaled, 224, 224)
            pixels.sub_(torch.tensor(MEAN).view(3, 1, 1)).div_(torch.tensor(STD).view(3, 1, 1))
            clip.append(pixels)
        labels = np.zeros(80, np.int64)
        labels[[11, 79]] = 1
        box = np.array([0.1, 0.1, 0.4, 0.9])
        return key.unsqueeze(0), torch.tensor(np.stack(clip)), box, labels

    def _tensor(self, image: np.ndarray, width: int, height: int) -> Any:
        import torch

        resized = Image.fromarray(image).convert("RGB")
        resized = resized.resize((width, height), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(resized, np.uint8)).permute(2, 0, 1).contiguous()
        return pixels.to(torch.float32).div(255)


def steady(batches: Iterator[Any], count: int) -> tuple[float, float]:
    """Takes two batches, so that reading ahead has begun, and `count` more; returns their seconds and CPU seconds."""
    for _ in range(2):
        next(batches)
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        next(batches)
    return time.perf_counter() - start, time.process_time() - cpu


def released_round(
    folder: str, windows: int, batch: int, count: int, workers: int
) -> tuple[float, float]:
    """Reads `count` batches as the release does; returns what `steady` does, without the CPU time of workers."""
    import torch
    from torch.utils.data import DataLoader, RandomSampler

    torch.set_num_threads(1)  # as in a worker; more only spin for such small pictures
    examples = ReleasedExamples(f"{folder}/frames/movie", windows)
    drawn = RandomSampler(examples, replacement=True, num_samples=batch * (count + 10))
    loader = DataLoader(
        examples, batch_size=batch, sampler=drawn, drop_last=True, num_workers=workers
    )
    return steady(iter(loader), count)


@functools.lru_cache
def our_pipeline(folder: str, batch: int) -> tuple[Any, ...]:
    """Returns the config, the tokenizer, and the normalisation of a batch."""
    import jax
    import jax.numpy as jnp

    from configs import base
    from ravar_jax.backbone import load_backbone, normalize

    config = base.get_config()
    config.data.dataset = "refava"
    config.data.data_dir = f"{folder}/data"
    config.data.pixels = "released"
    config.data.train_frames = "head"
    config.model.detections = "detr"  # for the key frame
    config.train.batch_size = batch

    @jax.jit
    def normalise(frames: jax.Array, key_frame: jax.Array) -> tuple[jax.Array, jax.Array]:
        return normalize(frames), key_frame.astype(jnp.float32) / 255

    return config, load_backbone("").tokenizer, normalise


def our_round(folder: str, batch: int, count: int) -> tuple[float, float]:
    """Reads `count` batches as training does, and normalises them; returns what `steady` does."""
    import jax

    from data_pipelines import input_pipeline

    config, tokenizer, normalise = our_pipeline(folder, batch)
    batches = input_pipeline.train_batches(config, tokenizer, 0)
    normalised = (
        jax.block_until_ready(normalise(one["frames"], one["key_frame"])) for one in batches
    )
    return steady(normalised, count)


def our_example(folder: str, batch: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Returns second, clip (8, 3, 224, 224) and key frame (3, 340, 465) of the first example that we read."""
    from data_pipelines import input_pipeline

    config, tokenizer, normalise = our_pipeline(folder, batch)
    one = next(input_pipeline.train_batches(config, tokenizer, 0))
    clips, keys = normalise(one["frames"], one["key_frame"])
    clip, key = np.asarray(clips[0]), np.asarray(keys[0])
    (name,) = input_pipeline.describe_examples(config, "train", one["example_id"][:1])
    second = int(name.partition("/")[0].rpartition("___")[2])
    return second, np.moveaxis(clip, -1, 1), np.moveaxis(key, -1, 0)


def released_example(folder: str, windows: int, second: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns clip and key frame of a window as the release reads it."""
    number = PEOPLE * (second - FIRST_SECOND)
    key, clip, *_ = ReleasedExamples(f"{folder}/frames/movie", windows)[number]
    return clip.numpy(), key[0].numpy()


def compare(folder: Path, rounds: int, windows: int, batch: int, count: int) -> dict[str, Any]:
    """Returns what `main` prints."""
    context = multiprocessing.get_context(
        "spawn"
    )  # JAX's and TensorFlow's threads and fork do not mix
    with (
        concurrent.futures.ProcessPoolExecutor(1, context) as ours,
        concurrent.futures.ProcessPoolExecutor(1, context) as released,
    ):
        second, clip, key = ours.submit(our_example, str(folder), batch).result()
        their_clip, their_key = released.submit(
            released_example, str(folder), windows, second
        ).result()
        differences = [
            float(np.abs(a - b).mean()) for a, b in ((clip, their_clip), (key, their_key))
        ]
        if max(differences) > TOLERANCE:
            sys.exit(f"error: pixels differ by {differences}: not the same window")
        kinds = {f"{workers} workers": workers for workers in (0, 1, 2)}
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in (*kinds, "ours")}
        for round_number in range(rounds + 1):
            for name in measured:
                if name == "ours":
                    found = ours.submit(our_round, str(folder), batch, count).result()
                else:
                    arguments = (str(folder), windows, batch, count, kinds[name])
                    found = released.submit(released_round, *arguments).result()
                if round_number:  # the first one warms the file cache and compiles
                    measured[name].append(found)
    clips = count * batch
    rates = {name: [clips / seconds for seconds, _ in m] for name, m in measured.items()}
    cpu = {
        name: statistics.median(used / clips for _, used in measured[name])
        for name in ("0 workers", "ours")
    }
    medians = {name: statistics.median(values) for name, values in rates.items()}
    best = max(kinds, key=lambda name: medians[name])
    files = list((folder / "frames" / "movie").iterdir())
    records = list((folder / "data").rglob("*.tfrecord-*"))
    return {
        "mean_difference_clip_and_key_frame": [round(d, 4) for d in differences],
        "cores": os.cpu_count(),
        "batch_size": batch,
        "clips_a_round": clips,
        "bytes_a_frame_file": sum(f.stat().st_size for f in files) // len(files),
        "bytes_a_record": sum(f.stat().st_size for f in records) // windows,
        "clips_per_second": {n: [round(v, 2) for v in values] for n, values in rates.items()},
        "medians": {name: round(value, 2) for name, value in medians.items()},
        "cpu_seconds_per_clip": {name: round(value, 4) for name, value in cpu.items()},
        "released_best": best,
        "ratio": round(medians["ours"] / medians[best], 2),
        "cpu_ratio": round(cpu["0 workers"] / cpu["ours"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="alternated rounds")
    parser.add_argument("--batches", type=int, default=4, help="timed in a round")
    parser.add_argument("--windows", type=int, default=32, help="an example each of two people")
    parser.add_argument("--batch", type=int, default=8, help="examples in a batch")
    parser.add_argument("--movie", default="", help="a video file whose pictures are used")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_input(Path(folder), arguments.windows, arguments.movie)
        found = compare(
            Path(folder), arguments.rounds, arguments.windows, arguments.batch, arguments.batches
        )
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
