"""Watches the memory of the training input over five epochs of 2,000 clips.

    python -m tests.benchmarks.loader_memory [--epochs 5] [--windows 500]

Writes records as `launch/prepare_refava.py` does with its default flags (90 JPEG frames of 455x256, quality 90), each
of its own pictures, 4 people a window, and reads batches of 32 at 224x224, 8 frames a clip. Prints one JSON object: the
resident memory at the end of each epoch and its peak, and `growth`, the last epoch's over the first's. Takes a few
minutes and 2.2 MB of disk a window. Exit code 1 where memory grows by more than 5 % or exceeds 2 GB.
"""

import argparse
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import psutil
from PIL import Image

from configs import base
from data_pipelines import input_pipeline
from ravar_jax.backbone import load_backbone
from tests import tiny_dataset
from tests.benchmarks.loader_vs_torch import noise_frames

PEOPLE = 4
BATCH = 32
LIMIT, GROWTH = 2_000_000_000, 1.05


def resident_bytes() -> int:
    """Returns what this process holds in memory."""
    return psutil.Process().memory_info().rss


def write_dataset(data_dir: Path, windows: int) -> None:
    """Writes the dataset, a few windows at a time."""
    pictures = list(noise_frames(400))[::2]
    jpegs = []
    for picture in pictures:
        buffer = io.BytesIO()
        small = Image.fromarray(picture).resize((455, 256), Image.Resampling.BICUBIC)
        small.save(buffer, "JPEG", quality=90)
        jpegs.append(buffer.getvalue())
    folder = data_dir / "refava" / "ava_style" / "1.0.0"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    shards = -(-windows // 50)
    for shard in range(shards):
        records = []
        for number in range(shard * 50, min(windows, shard * 50 + 50)):
            record = tiny_dataset.record(f"clip{number}", PEOPLE, tuple(range(90)))
            record["frames"] = [jpegs[i] for i in generator.permutation(len(jpegs))[:90]]
            records.append(record)
        name = f"refava-train.tfrecord-{shard:05}-of-{shards:05}"
        tiny_dataset.write_records(folder / name, records)
    (folder / "dataset_info.json").write_text(json.dumps({"splits": []}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=5, help="passes over the examples")
    parser.add_argument("--windows", type=int, default=500, help="an example each of four people")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), arguments.windows)
        config = base.get_config()
        config.data.dataset = "refava"
        config.data.data_dir = folder
        config.train.batch_size = BATCH
        batches = input_pipeline.train_batches(config, load_backbone("").tokenizer, 0)
        ends, peak, start = [], 0, time.perf_counter()
        clips = PEOPLE * arguments.windows
        for _ in range(arguments.epochs):
            for _ in range(clips // BATCH):
                next(batches)
                peak = max(peak, resident_bytes())
            ends.append(resident_bytes())
        seconds = time.perf_counter() - start
        del batches  # its threads read ahead
    growth = ends[-1] / ends[0]
    found = {
        "clips_an_epoch": clips // BATCH * BATCH,
        "clips_per_second": round(len(ends) * (clips // BATCH * BATCH) / seconds, 1),
        "megabytes_after_each_epoch": [round(end / 1e6) for end in ends],
        "peak_megabytes": round(peak / 1e6),
        "growth": round(growth, 4),
    }
    print(json.dumps(found, indent=2))
    sys.exit(growth > GROWTH or peak > LIMIT)


if __name__ == "__main__":
    main()
