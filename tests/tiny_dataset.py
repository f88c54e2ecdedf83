"""A RefAVA folder of a few flat-coloured windows, for tests of the pipeline: grey level 16 + 2p at position p."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from configs import base
from data_pipelines import schema
from data_pipelines.quiet_tensorflow import tf

UNIFORM = (0, 12, 25, 38, 50, 63, 76, 89)
POSITIONS = (0, 12, 25, 38, 45, 50, 63, 76, 89)
PEOPLE = (2, 1, 3, 2, 4)  # of each window of the train split: 12 examples
SPLITS = {"train": PEOPLE, "val": (1, 2), "test": (2, 1, 3)}


class WordTokenizer:
    """Ids by spelling: begin 2, one id a word, end 3."""

    sha256 = "words"

    def encode(self, sentences: list[str], text_length: int) -> tuple[np.ndarray, np.ndarray, int]:
        ids = np.zeros((len(sentences), text_length), np.int32)
        mask, cut = np.zeros_like(ids), 0
        for row, sentence in enumerate(sentences):
            words = [4 + sum(word.encode()) % 400 for word in sentence.split()]
            cut += len(words) > text_length - 2
            pieces = [2, *words[: text_length - 2], 3]
            ids[row, : len(pieces)], mask[row, : len(pieces)] = pieces, 1
        return ids, mask, cut


def jpeg(level: int) -> bytes:
    """A flat grey 24x18 picture, which JPEG keeps exactly."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((18, 24, 3), level, np.uint8)).save(buffer, "JPEG", quality=100)
    return buffer.getvalue()


def record(
    clip_id: str, people: int, positions: tuple[int, ...] = POSITIONS, **first: Any
) -> dict[str, Any]:
    """A window; `first` overrides fields of its first person."""
    described = [
        {
            "person_id": str(9 + person),  # as text "10" comes before "9", as a number after it
            "sentence": f"person {9 + person} of {clip_id}",
            "box": np.array([0.1, 0.1, 0.2 + 0.1 * person, 0.5], np.float32),
            "labels": [1 + person, 80][: 1 + person % 2],
        }
        for person in range(people)
    ]
    described[0].update(first)
    return {
        "clip_id": clip_id,
        "video_id": "v",
        "key_time": 902.0,
        "frames": [io.BytesIO(jpeg(16 + 2 * position)) for position in positions],
        "frame_indices": list(positions),
        "people": described,
        "detections": [
            {"box": np.array([0.5, 0.5, 0.1 * k, 0.1], np.float32), "class_id": k, "score": 0.1 * k}
            for k in (1, 2, 3)
        ],
    }


def write_records(file: Path, records: list[dict[str, Any]]) -> None:
    """Serialises through the schema's features, as TFDS does."""
    features = schema.record_features()
    with tf.io.TFRecordWriter(str(file)) as writer:
        for each in records:
            writer.write(features.serialize_example(features.encode_example(each)))


def write_split(folder: Path, split: str, records: list[dict[str, Any]], shards: int = 2) -> None:
    """Writes a split in contiguous shards."""
    per_shard = -(-len(records) // shards)
    for shard in range(shards):
        name = f"refava-{split}.tfrecord-{shard:05}-of-{shards:05}"
        write_records(folder / name, records[shard * per_shard : (shard + 1) * per_shard])


def write_dataset(data_dir: Path) -> Path:
    """Writes all splits under `data_dir` and returns the dataset folder."""
    folder = data_dir / "refava" / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    for split, people in SPLITS.items():
        write_split(folder, split, [record(f"{split}{i}", n) for i, n in enumerate(people)])
    (folder / "dataset_info.json").write_text(json.dumps({"splits": []}))
    return folder


def make_config(data_dir: Path) -> ConfigDict:
    """A config that reads it: 8x8 pixels, one evaluation clip."""
    config = base.get_config()
    config.data.dataset = "refava"
    config.data.data_dir = str(data_dir)
    config.data.image_size = 8
    config.data.text_length = 8
    config.data.eval_clips = 1
    config.train.batch_size = 4
    config.evaluation.batch_size = 4
    return config
