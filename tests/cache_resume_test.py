"""A cache whose writer was killed: what is kept, what goes on, what is refused."""

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from data_pipelines import cache_shards
from data_pipelines.feature_cache_writer import write_cache
from data_pipelines.frozen_encoder import FrozenEncoder
from data_pipelines.record_index import load_index
from ravar_jax.errors import UserError
from tests import tiny_dataset
from tests.tiny_cache import pixel_config, write_backbone
from tests.together import run_together

BATCH = 24
# Eight devices encode eight windows at a time: test 1 batch, train 3, val 1.
WINDOWS = {"test": 3, "train": 20, "val": 2}
# A process that kills itself in its third batch of windows: one shard of train is complete then.
KILLED = """
import os, signal, sys
from pathlib import Path
import tests.conftest
from data_pipelines import cache_shards
from data_pipelines.feature_cache_writer import write_cache
from data_pipelines.frozen_encoder import FrozenEncoder
from tests.tiny_cache import pixel_config

cache_shards.SHARD_BYTES = 1
encode, calls = FrozenEncoder.time_means, []
def time_means(*arguments):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(*arguments)
FrozenEncoder.time_means = time_means
write_cache(pixel_config(Path(sys.argv[1])), sys.argv[2], batch_size=24)
"""

TOGETHER = """
import sys
from pathlib import Path
import tests.conftest
from data_pipelines import cache_shards
from data_pipelines.feature_cache_writer import write_cache
from ravar_jax import distributed
from tests.tiny_cache import pixel_config

cache_shards.SHARD_BYTES = 1
distributed.initialize()
write_cache(pixel_config(Path(sys.argv[1])), sys.argv[2], batch_size=24)
"""


def window(split, number):
    """Frames of its own; every third window's first person has the same sentence."""
    sentence = {} if number % 3 else {"sentence": "the same person"}
    record = tiny_dataset.record(f"{split}{number}", 1 + number % 3, **sentence)
    levels = [16 + 2 * position + 2 * number for position in tiny_dataset.POSITIONS]
    record["frames"] = [io.BytesIO(tiny_dataset.jpeg(level)) for level in levels]
    return record


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with a dataset and a backbone."""
    folder = tmp_path_factory.mktemp("made")
    dataset = folder / "refava" / "tiny" / "1.0.0"
    dataset.mkdir(parents=True)
    for split, count in WINDOWS.items():
        tiny_dataset.write_split(dataset, split, [window(split, i) for i in range(count)])
    (dataset / "dataset_info.json").write_text(json.dumps({"splits": []}))
    write_backbone(folder / "backbone", seed=0)
    return folder


@pytest.fixture(scope="module")
def killed(made, tmp_path_factory, repository):
    """Folder with what the killed process left of the output `cache`."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", KILLED, str(made), str(folder / "cache")]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return folder


@pytest.fixture
def output(killed, tmp_path):
    """The path of an output whose writer was killed."""
    shutil.copytree(killed, tmp_path / "copy")
    return tmp_path / "copy" / "cache"


@pytest.fixture
def encoded(monkeypatch):
    """Small shards, and a list that grows by one with every batch of windows that is encoded."""
    monkeypatch.setattr(cache_shards, "SHARD_BYTES", 1)
    calls = []
    time_means = FrozenEncoder.time_means

    def counted(*arguments):
        calls.append(1)
        return time_means(*arguments)

    monkeypatch.setattr(FrozenEncoder, "time_means", counted)
    return calls


def write(config, output, **changes):
    lines = []
    write_cache(config, output, **{"batch_size": BATCH, "report": lines.append, **changes})
    return lines


def test_killed_writer_leaves_whole_shards_and_no_cache(output):
    assert not output.exists()
    shards = sorted(file.name for file in output.with_name(".cache.partial").glob("features-*"))
    assert shards == [
        "features-test.tfrecord-00000-of-00001",
        "features-train.tfrecord-00000-of-00003",
    ]


def test_resumed_cache_equals_one_written_at_once(made, output, encoded, tmp_path):
    config = pixel_config(made)
    lines = write(config, output)
    assert len(encoded) == 3  # two batches of train and one of val
    assert "cache: train 8/20 windows were written before" in lines
    straight = tmp_path / "straight"
    write(config, straight)
    assert len(encoded) == 3 + 5
    names = sorted(file.name for file in straight.iterdir())
    assert sorted(file.name for file in output.iterdir()) == names
    assert sum(name.startswith("features-text") for name in names) > 1
    for name in names:
        assert (output / name).read_bytes() == (straight / name).read_bytes(), name
    assert not output.with_name(".cache.partial").exists()


def test_two_processes_share_the_work_and_write_the_same_files(
    made, output, encoded, tmp_path, repository
):
    arguments = [sys.executable, "-c", TOGETHER, str(made), str(output)]
    outputs = run_together(arguments, 2, repository)
    # Of train's three shards the first was complete; the others are 8 windows of process 1 and 4 of process 0.
    assert "cache: train 4/4 windows" in outputs[0]
    assert "cache: train 8/8 windows" in outputs[1]
    straight = tmp_path / "straight"
    write(pixel_config(made), straight)
    names = sorted(file.name for file in straight.iterdir())
    assert sorted(file.name for file in output.iterdir()) == names
    for name in names:
        assert (output / name).read_bytes() == (straight / name).read_bytes(), name


def test_part_of_another_cache_is_refused_and_kept(made, output, encoded):
    config = pixel_config(made)
    partial = output.with_name(".cache.partial")
    before = {file.name: file.read_bytes() for file in partial.iterdir()}
    with pytest.raises(UserError, match=r"--batch_size \(24 in the cache, now 80\)"):
        write(config, output, batch_size=80)
    config.data.pixels = "released"
    with pytest.raises(UserError, match=r"cache.partial holds part of another cache: data\.pixels"):
        write(config, output)
    assert {file.name: file.read_bytes() for file in partial.iterdir()} == before
    assert not encoded


def test_nothing_is_kept_of_another_cache_without_a_complete_shard(made, output, encoded):
    partial = output.with_name(".cache.partial")
    for shard in partial.glob("features-*"):
        shard.rename(shard.with_name(f".{shard.name}.of-another.tmp"))
    config = pixel_config(made)
    config.data.pixels = "released"
    write(config, output)
    assert not [file.name for file in output.iterdir() if file.name.startswith(".")]


def test_second_writer_is_refused_while_the_first_lives(made, output, encoded):
    descriptor = os.open(output.with_name(".cache.partial"), os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing --output"):
            write(pixel_config(made), output)
    finally:
        os.close(descriptor)
    assert not encoded
    write(pixel_config(made), output)
    assert (output / "cache.json").exists()


def test_damaged_shard_is_named(made, output, encoded):
    shard = next(output.with_name(".cache.partial").glob("features-train*"))
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=rf"{shard.name} is damaged; delete it"):
        write(pixel_config(made), output)
    shard.unlink()
    write(pixel_config(made), output)
    assert len(encoded) == 4


def test_unreadable_records_of_both_runs_count(made, tmp_path, encoded, monkeypatch):
    shutil.copytree(made, tmp_path / "made")
    index = load_index(tmp_path / "made" / "refava" / "tiny" / "1.0.0", "train")
    for number in (1, 19):  # in the first and in the last batch
        path = index.folder / index.files[index.file_numbers[number]]
        data = bytearray(path.read_bytes())
        data[index.offsets[number] + 5] ^= 4
        path.write_bytes(data)
    config = pixel_config(tmp_path / "made")
    config.data.max_bad_records = 1
    for _ in range(2):
        with pytest.raises(UserError, match=r"clip train19.*2 unreadable"):
            write(config, tmp_path / "cache")
    config.data.max_bad_records = 2
    lines = write(config, tmp_path / "cache")
    assert "cache: train 2 unreadable record(s) were masked out" in lines
