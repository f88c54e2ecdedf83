"""Damaged TFRecords, indices and feature caches, read as training reads them: trials of `fuzz.py`."""

import dataclasses
import functools
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from data_pipelines import input_pipeline, record_index
from data_pipelines.feature_cache_writer import write_cache
from data_pipelines.quiet_tensorflow import tf
from tests import tiny_dataset
from tests.benchmarks.fuzz_damage import Rng, Trial, cut, damage, flip
from tests.tiny_cache import pixel_config, write_backbone

BUDGET = 5  # bad records, where there is a budget
TOKENIZER = tiny_dataset.WordTokenizer()
Rows = dict[int, dict[str, np.ndarray]]  # an epoch, by number of the example


@dataclasses.dataclass(frozen=True)
class Intact:
    """The intact dataset and cache, and what they serve."""

    folder: Path
    rows: Rows
    cached_rows: Rows


def rows_of(config: ConfigDict) -> tuple[Rows, int]:
    """Returns one epoch of training, example by number, and the unreadable records."""
    batches = input_pipeline.train_batches(config, TOKENIZER, 0)
    count = -(-input_pipeline.split_size(config, "train") // config.train.batch_size)
    rows = {}
    for batch in itertools.islice(batches, count):
        for row, number in enumerate(batch["example_id"]):
            rows[int(number)] = {key: value[row] for key, value in batch.items()}
    return rows, batches.num_bad_records


def compare_rows(config: ConfigDict, original: Rows) -> str:
    """Reads an epoch and returns the outcome; raises what reading raises."""
    rows, bad = rows_of(config)
    masked = [number for number, row in rows.items() if row["mask"] == 0]
    for number, row in rows.items():
        if number in masked:
            continue
        if number not in original:
            return "WRONG"
        if any((row[key] != original[number][key]).any() for key in original[number]):
            return "WRONG"
    if not masked:
        return "identical" if rows.keys() == original.keys() else "WRONG"
    return "masked" if 0 < bad <= config.data.max_bad_records else "WRONG"


def copied_config(made: Path, folder: Path, rng: Rng, *, cached: bool) -> ConfigDict:
    """Returns a config that reads a copy, in `folder`, of the dataset or the cache."""
    if cached:
        shutil.copytree(made / "cache", folder / "cache")
        config = pixel_config(made)
        config.data.feature_cache = str(folder / "cache")
    else:
        shutil.copytree(made / "refava", folder / "refava")
        config = tiny_dataset.make_config(folder)
    config.data.max_bad_records = int(rng.choice([0, BUDGET]))
    return config


def damaged_files(
    pattern: str, how: Callable[[Rng, bytes], bytes], *, cached: bool = False, indexed: bool = True
) -> Callable[..., str]:
    """Returns a trial that damages one of the files that match a pattern."""

    def trial(intact: Intact, folder: Path, rng: Rng, number: int) -> str:
        del number
        config = copied_config(intact.folder, folder, rng, cached=cached)
        files = sorted(folder.rglob(pattern))
        if not indexed:
            for index in folder.rglob("index_*.json"):
                index.unlink()
        damage(files[rng.integers(len(files))], how, rng)
        return compare_rows(config, intact.cached_rows if cached else intact.rows)

    return trial


def other_schema(intact: Intact, folder: Path, rng: Rng, number: int) -> str:
    """The last record of the split is intact as a TFRecord, but not what the schema says."""
    del number
    config = copied_config(intact.folder, folder, rng, cached=False)
    file = max(folder.rglob("refava-train.tfrecord-*"))
    payloads = list(tf.data.TFRecordDataset(str(file)).as_numpy_iterator())
    payloads[-1] = changed_schema(rng, payloads[-1])
    with tf.io.TFRecordWriter(str(file)) as writer:
        for payload in payloads:
            writer.write(payload)
    for index in folder.rglob("index_*.json"):
        index.unlink()
    return compare_rows(config, intact.rows)


def changed_schema(rng: Rng, payload: bytes) -> bytes:
    """Returns a serialised example with a field gone, of another kind, too short or unreadable; or no example."""
    example = tf.train.Example.FromString(payload)
    fields = example.features.feature
    names = sorted(name for name in fields if name not in ("video_id", "key_time"))  # never read
    field = fields[names[rng.integers(len(names))]]
    kind = field.WhichOneof("kind")
    values = getattr(field, kind).value
    match rng.integers(5):
        case 0:
            return bytes(rng.integers(0, 256, 50, np.uint8))
        case 1:
            field.Clear()
        case 2:
            count = len(values)
            field.Clear()
            if kind == "int64_list":
                field.bytes_list.value.extend([b"x"] * count)
            else:
                field.int64_list.value.extend([1] * count)
        case 3:
            del values[rng.integers(len(values))]
        case 4:
            values[:] = [
                b"\xff\xfe" if kind == "bytes_list" else 1000 if kind == "int64_list" else 1e9
            ] * len(values)
            if field == fields["detections/score"]:
                field.Clear()  # any number is a score
    return example.SerializeToString()


def make(folder: Path) -> dict[str, tuple[int, Trial]]:
    """Writes the intact files into `folder`; returns kind -> its share of the inputs, and its trial."""
    dataset = tiny_dataset.write_dataset(folder)
    counts = {split: [-(-len(people) // 2)] for split, people in tiny_dataset.SPLITS.items()}
    lengths = [
        {"name": split, "shardLengths": [str(n), str(len(tiny_dataset.SPLITS[split]) - n)]}
        for split, (n,) in counts.items()
    ]
    (dataset / "dataset_info.json").write_text(json.dumps({"splits": lengths}))
    record_index.write_index(dataset)
    write_backbone(folder / "backbone", seed=0)
    write_cache(pixel_config(folder), folder / "cache", batch_size=24, report=lambda line: None)
    cached = pixel_config(folder)
    cached.data.feature_cache = str(folder / "cache")
    rows, cached_rows = rows_of(tiny_dataset.make_config(folder))[0], rows_of(cached)[0]
    intact = Intact(folder, rows, cached_rows)
    kinds = {
        "TFRecord, cut": (6, damaged_files("refava-train.tfrecord-*", cut)),
        "TFRecord, bits flipped": (8, damaged_files("refava-train.tfrecord-*", flip)),
        "TFRecord, cut, no index": (4, damaged_files("refava-*.tfrecord-*", cut, indexed=False)),
        "TFRecord, flipped, no index": (
            4,
            damaged_files("refava-*.tfrecord-*", flip, indexed=False),
        ),
        "TFRecord, another schema": (8, other_schema),
        "index, cut": (3, damaged_files("index_train.json", cut)),
        "index, bits flipped": (6, damaged_files("index_train.json", flip)),
        "dataset_info.json, cut": (1, damaged_files("dataset_info.json", cut, indexed=False)),
        "dataset_info.json, flipped": (2, damaged_files("dataset_info.json", flip, indexed=False)),
        "cache shard, cut": (4, damaged_files("features-*", cut, cached=True)),
        "cache shard, bits flipped": (6, damaged_files("features-*", flip, cached=True)),
        "cache index or cache.json": (4, damaged_files("*.json", flip, cached=True)),
    }
    return {
        kind: (share, functools.partial(trial, intact)) for kind, (share, trial) in kinds.items()
    }
