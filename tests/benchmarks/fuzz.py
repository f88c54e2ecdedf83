"""Feeds damaged files to every reader of data and counts what comes of it.

    python -m tests.benchmarks.fuzz [--inputs 1000] [--seed 0]

Files of each kind are written, damaged (cut, bits flipped, edited, made to carry code, given another schema) and read
as training, `launch/prepare_refava.py` and `launch/predict.py` read them. What is served is compared with what the
intact file serves. Prints a table, kinds by outcomes:

    refused     one line that names the file
    identical   all that is served equals the original
    masked      examples are masked out within `data.max_bad_records` (windows of a video: left out with a reason), and
                the rest equals the original
    as edited   annotations, which have no checksum: still valid, every line is one person, and some value differs
    altered     a video's pixels differ from the original's: its codec has no checksum either
    WRONG       anything else that is served
    CRASHED     anything raised but a one-line `UserError`
    SLOW        more than 30 seconds

Exit code 1 where the last three are not zero.
"""

import argparse
import collections
import dataclasses
import faulthandler
import functools
import itertools
import json
import logging
import os
import pickle
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from ml_collections import ConfigDict

from data_pipelines import input_pipeline, record_index, video
from data_pipelines.feature_cache_writer import write_cache
from data_pipelines.quiet_tensorflow import tf
from data_pipelines.refava.annotations import FIELDS, SPLITS, Annotations, read_annotations
from ravar_jax.errors import UserError
from tests import tiny_dataset
from tests.numbered_video import write_video
from tests.tiny_cache import pixel_config, write_backbone

OUTCOMES = (
    "refused",
    "identical",
    "masked",
    "as edited",
    "altered",
    "WRONG",
    "CRASHED",
    "SLOW",
)
FAILURES = OUTCOMES[-3:]
SECONDS = 30
BUDGET = 5  # bad records, where there is a budget
KEY_TIMES = (1.5, 16.0, 30.0)
POSITIONS = (0, 12, 25, 38, 45, 50, 63, 76, 89)
NUM_EXAMPLES = sum(tiny_dataset.PEOPLE)
TOKENIZER = tiny_dataset.WordTokenizer()
Rng = np.random.Generator


def cut(rng: Rng, data: bytes) -> bytes:
    """Returns the beginning of `data`."""
    return data[: int(rng.integers(len(data)))]


def flip(rng: Rng, data: bytes) -> bytes:
    """Returns `data` with one to eight bits flipped."""
    flipped = bytearray(data)
    for bit in rng.choice(8 * len(data), int(rng.integers(1, 9)), replace=False):
        flipped[bit // 8] ^= 1 << (bit % 8)
    return bytes(flipped)


def damage(file: Path, how: Callable[[Rng, bytes], bytes], rng: Rng) -> None:
    file.write_bytes(how(rng, file.read_bytes()))


# --- what training reads ------------------------------------------------------------------------------------------


def rows_of(config: ConfigDict) -> tuple[dict[int, dict[str, np.ndarray]], int]:
    """Returns one epoch of training, example by number, and the unreadable records."""
    batches = input_pipeline.train_batches(config, TOKENIZER, 0)
    count = -(-input_pipeline.split_size(config, "train") // config.train.batch_size)
    rows = {}
    for batch in itertools.islice(batches, count):
        for row, number in enumerate(batch["example_id"]):
            rows[int(number)] = {key: value[row] for key, value in batch.items()}
    return rows, batches.num_bad_records


def compare_rows(config: ConfigDict, original: dict[int, dict[str, np.ndarray]]) -> str:
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

    def trial(made: "Made", folder: Path, rng: Rng, number: int) -> str:
        del number
        config = copied_config(made.folder, folder, rng, cached=cached)
        files = sorted(folder.rglob(pattern))
        if not indexed:
            for index in folder.rglob("index_*.json"):
                index.unlink()
        damage(files[rng.integers(len(files))], how, rng)
        return compare_rows(config, made.cached_rows if cached else made.rows)

    return trial


def other_schema(made: "Made", folder: Path, rng: Rng, number: int) -> str:
    """The last record of the split is intact as a TFRecord, but not what the schema says."""
    del number
    config = copied_config(made.folder, folder, rng, cached=False)
    file = max(folder.rglob("refava-train.tfrecord-*"))
    payloads = list(tf.data.TFRecordDataset(str(file)).as_numpy_iterator())
    payloads[-1] = changed_schema(rng, payloads[-1])
    with tf.io.TFRecordWriter(str(file)) as writer:
        for payload in payloads:
            writer.write(payload)
    for index in folder.rglob("index_*.json"):
        index.unlink()
    return compare_rows(config, made.rows)


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


# --- videos -------------------------------------------------------------------------------------------------------


def read_video(path: Path) -> list[np.ndarray | str]:
    """Returns the frames of each window, or why there are none."""
    windows = video.read_windows(path, KEY_TIMES, POSITIONS)
    return [window.problem or np.stack(window.frames) for window in windows]


def damaged_video(suffix: str, how: str) -> Callable[..., str]:
    """Returns a trial that cuts a video at the `number`-th kilobyte, or flips bits in it."""

    def trial(made: "Made", folder: Path, rng: Rng, number: int) -> str:
        data = (made.folder / f"video{suffix}").read_bytes()
        path = folder / f"video{suffix}"
        path.write_bytes(data[: 1024 * number % len(data)] if how == "cut" else flip(rng, data))
        found = read_video(path)
        different = False
        for ours, theirs in zip(found, made.windows[suffix], strict=True):
            if isinstance(ours, str):
                check_line(f"{path} {ours}", folder)
            else:
                different |= not np.array_equal(ours, theirs)
        if different:
            return "WRONG" if how == "cut" else "altered"
        problems = [isinstance(window, str) for window in found]
        return "refused" if all(problems) else "masked" if any(problems) else "identical"

    return trial


# --- annotations --------------------------------------------------------------------------------------------------

ROWS = [
    {
        "split": SPLITS[number % 3],
        "video": f"film{number % 4}",
        "second": 902 + number // 2,
        "person": str(number),
        "x1": 0.125,
        "y1": 0.25,
        "x2": 0.5 + number / 64,
        "y2": 0.75,
        "labels": [12, 1 + number],
        "sentence": f"The woman with the café’s tray, number {number}",
    }
    for number in range(16)
]


def write_pickles(folder: Path, protocol: int) -> None:
    parts: dict[str, dict[str, dict[str, Any]]] = {}
    for row in ROWS:
        key = f"{row['video']}___{row['second']:04d}___{row['person']}"
        box = np.array([row[name] for name in ("x1", "y1", "x2", "y2")])
        values = {"label": row["labels"], "keyframe": [box], "description": [row["sentence"]]}
        for part, value in values.items():
            parts.setdefault(row["split"], {}).setdefault(part, {})[key] = value
    for split, of_split in parts.items():
        for part, value in of_split.items():
            file = folder / f"{split}_set_{part}_crr_final.pkl"
            file.write_bytes(pickle.dumps(value, protocol=protocol))


def write_csv(folder: Path) -> None:
    lines = [",".join(FIELDS)]
    for row in ROWS:
        cells = {
            **row,
            "labels": "12 {}".format(row["labels"][1]),
            "sentence": f'"{row["sentence"]}"',
        }
        lines.append(",".join(str(cells[name]) for name in FIELDS))
    (folder / "annotations.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_jsonl(folder: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    (folder / "annotations.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def people_of(annotations: Annotations) -> list[Any]:
    return [
        (split, window.video_id, window.key_second, person)
        for split, windows in annotations.splits.items()
        for window in windows
        for person in window.people
    ]


def compare_people(found: Annotations, original: list[Any], count: int) -> str:
    """Returns the outcome of annotations of which `count` people are expected."""
    people = people_of(found)
    if people == original:
        return "identical"
    for *_, person in people:
        x1, y1, x2, y2 = person.box
        if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 and person.sentence.strip()):
            return "WRONG"
        if not all(1 <= label <= 80 for label in person.labels):
            return "WRONG"
        person.sentence.encode()
    return "as edited" if len(people) == count else "WRONG"


class Code:
    """Pickled, it runs a function when it is read."""

    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def damaged_pickle(how: Callable[[Rng, bytes], bytes] | None) -> Callable[..., str]:
    """Returns a trial that damages one of the released pickles, or lets it carry code."""

    def trial(made: "Made", folder: Path, rng: Rng, number: int) -> str:
        del number
        protocol = int(rng.integers(6))
        write_pickles(folder, protocol)
        files = sorted(folder.glob("*.pkl"))
        file = files[rng.integers(len(files))]
        if how is not None:
            damage(file, how, rng)
            return compare_people(read_annotations(folder), made.pickled_people, len(ROWS))
        trace = folder / "ran"
        calls = (
            (os.system, f"touch {trace}"),
            (open, str(trace), "w"),
            (exec, f"open({str(trace)!r}, 'w')"),
            (os.mkdir, str(trace)),
        )
        value = pickle.loads(file.read_bytes())  # as written above
        value[f"code{rng.integers(3)}"] = Code(*calls[rng.integers(len(calls))])
        file.write_bytes(pickle.dumps(value, protocol=protocol))
        try:
            read_annotations(folder)
        finally:
            if trace.exists():
                raise AssertionError("the pickle's code ran")
        return "WRONG"

    return trial


def edited_table(suffix: str) -> Callable[..., str]:
    """Returns a trial that edits a CSV or JSONL file."""

    def trial(made: "Made", folder: Path, rng: Rng, number: int) -> str:
        del number
        (write_csv if suffix == ".csv" else write_jsonl)(folder)
        file = folder / f"annotations{suffix}"
        damage(file, edit, rng)
        found = read_annotations(folder)
        lines = re.split(r"\r\n|\r|\n", file.read_bytes().decode("utf-8-sig"))
        count = sum(bool(line.strip()) for line in lines) - (suffix == ".csv")
        return compare_people(found, made.people, count)

    return trial


def edit(rng: Rng, data: bytes) -> bytes:
    """Returns a text file as a slip of the hand, an editor or a bad disk might leave it."""
    text = data.decode()
    lines = text.splitlines(keepends=True)
    place, line = int(rng.integers(len(text))), int(rng.integers(len(lines)))
    match rng.integers(12):
        case 0:
            return cut(rng, data)
        case 1:
            return flip(rng, data)
        case 2:
            return (text[:place] + "\0" * int(rng.integers(1, 9)) + text[place:]).encode()
        case 3:
            return text.encode(("utf-16", "utf-32", "cp1252", "utf-8-sig")[rng.integers(4)])
        case 4:
            return (text[:place] + "9" * 200_000 + text[place:]).encode()
        case 5:  # a field less
            names = [name for name in FIELDS if name in lines[line]] or ["sentence"]
            return text.replace(names[rng.integers(len(names))], "other").encode()
        case 6:
            return (text[:place] + "\",'{}[];\t\r\n"[rng.integers(11)] + text[place:]).encode()
        case 7:
            return "".join([*lines, lines[line]]).encode()
        case 8:
            return "".join(lines[:line] + lines[line + 1 :]).encode()
        case 9:
            return text.replace(",", ";").encode()
        case 10:
            number = ("nan", "1e999", "-1", "true", "null", '"x"', "[]", "{}", "9" * 5000)
            return re.sub(
                r"0\.\d+", number[rng.integers(len(number))], text, count=int(rng.integers(1, 4))
            ).encode()
        case _:
            return text.replace("café", "\\ud800" if rng.integers(2) else "\N{NULL}é").encode()


# --- the run ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Made:
    """The intact files, and what they serve."""

    folder: Path
    rows: dict[int, dict[str, np.ndarray]]
    cached_rows: dict[int, dict[str, np.ndarray]]
    windows: dict[str, list[Any]]
    people: list[Any]
    pickled_people: list[Any]


def make(folder: Path) -> Made:
    """Writes the intact files and reads them."""
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
    windows = {}
    for suffix in (".mp4", ".mkv", ".avi"):
        path = write_video(folder / f"video{suffix}", [number / 25 for number in range(800)])
        windows[suffix] = read_video(path)
    (folder / "table").mkdir()
    write_csv(folder / "table")
    (folder / "pickles").mkdir()
    write_pickles(folder / "pickles", 4)
    return Made(
        folder,
        rows_of(tiny_dataset.make_config(folder))[0],
        rows_of(cached)[0],
        windows,
        people_of(read_annotations(folder / "table")),
        people_of(read_annotations(folder / "pickles")),
    )


# Kind, its share of the inputs, and a trial (made, empty folder, generator, number within the kind) -> outcome.
KINDS: dict[str, tuple[int, Callable[..., str]]] = {
    "TFRecord, cut": (6, damaged_files("refava-train.tfrecord-*", cut)),
    "TFRecord, bits flipped": (8, damaged_files("refava-train.tfrecord-*", flip)),
    "TFRecord, cut, no index": (4, damaged_files("refava-*.tfrecord-*", cut, indexed=False)),
    "TFRecord, flipped, no index": (4, damaged_files("refava-*.tfrecord-*", flip, indexed=False)),
    "TFRecord, another schema": (8, other_schema),
    "index, cut": (3, damaged_files("index_train.json", cut)),
    "index, bits flipped": (6, damaged_files("index_train.json", flip)),
    "dataset_info.json, cut": (1, damaged_files("dataset_info.json", cut, indexed=False)),
    "dataset_info.json, flipped": (2, damaged_files("dataset_info.json", flip, indexed=False)),
    "cache shard, cut": (4, damaged_files("features-*", cut, cached=True)),
    "cache shard, bits flipped": (6, damaged_files("features-*", flip, cached=True)),
    "cache index or cache.json": (4, damaged_files("*.json", flip, cached=True)),
    "mp4, cut at each kilobyte": (5, damaged_video(".mp4", "cut")),
    "mkv, cut at each kilobyte": (5, damaged_video(".mkv", "cut")),
    "avi, cut at each kilobyte": (8, damaged_video(".avi", "cut")),
    **{
        f"{name}, bits flipped": (3, damaged_video(f".{name}", "flip"))
        for name in ("mp4", "mkv", "avi")
    },
    "pickle, cut": (4, damaged_pickle(cut)),
    "pickle, bits flipped": (8, damaged_pickle(flip)),
    "pickle with code": (4, damaged_pickle(None)),
    "CSV, edited": (6, edited_table(".csv")),
    "JSONL, edited": (6, edited_table(".jsonl")),
}


def check_line(message: str, folder: Path) -> None:
    """Raises AssertionError where an error is not one line that names a file in `folder`."""
    if "\n" in message or str(folder) not in message or len(message) > 2000:
        raise AssertionError(f"not one clear line: {message[:3000]!r}")


def outcome_of(trial: Callable[[], str], folder: Path) -> str:
    """Runs a trial; a failure is told on stderr."""
    try:
        return trial()
    except UserError as error:
        try:
            check_line(str(error), folder)
        except AssertionError:
            traceback.print_exc()
            return "CRASHED"
        return "refused"
    except Exception:
        traceback.print_exc()
        return "CRASHED"


def schedule() -> Iterator[tuple[str, int]]:
    """Yields (kind, number within the kind) for ever, each kind as often as its share says."""
    numbers: collections.Counter[str] = collections.Counter()
    largest = max(share for share, _ in KINDS.values())
    while True:
        for turn in range(largest):
            for kind, (share, _) in KINDS.items():
                if turn < share:
                    yield kind, numbers[kind]
                    numbers[kind] += 1


def fuzz(inputs: int, seed: int) -> dict[str, collections.Counter[str]]:
    """Returns kind -> outcome -> count."""
    table = {kind: collections.Counter() for kind in KINDS}
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "made").mkdir()
        made = make(Path(root) / "made")
        for step, (kind, number) in enumerate(itertools.islice(schedule(), inputs)):
            folder = Path(root) / f"input{step}"
            folder.mkdir()
            rng = np.random.default_rng([seed, step])
            faulthandler.dump_traceback_later(4 * SECONDS, exit=True)  # hangs in a library too
            start = time.monotonic()
            trial = functools.partial(KINDS[kind][1], made, folder, rng, number)
            outcome = outcome_of(trial, folder)
            seconds = time.monotonic() - start
            faulthandler.cancel_dump_traceback_later()
            outcome = "SLOW" if seconds > SECONDS else outcome
            table[kind][outcome] += 1
            if outcome in FAILURES:
                print(f"input {step} ({kind}, number {number}): {outcome}", file=sys.stderr)
            shutil.rmtree(folder)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=1000, help="damaged files")
    parser.add_argument("--seed", type=int, default=0, help="of the damage")
    arguments = parser.parse_args()
    logging.getLogger("data_pipelines").setLevel(logging.ERROR)  # one line a masked record
    table = fuzz(arguments.inputs, arguments.seed)
    table["all"] = sum(table.values(), collections.Counter())
    width = max(map(len, table))
    print(" " * width, *(f"{name:>9}" for name in OUTCOMES))
    for kind, counts in table.items():
        print(f"{kind:<{width}}", *(f"{counts[name]:>9}" for name in OUTCOMES))
    sys.exit(any(table["all"][name] for name in FAILURES))


if __name__ == "__main__":
    main()
