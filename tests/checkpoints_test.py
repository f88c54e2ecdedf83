"""Checkpoints: what is kept, what a damaged one says, that nothing falls back in silence."""

import json
import resource
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from ravar_jax import checkpoints, sharding
from ravar_jax.errors import UserError
from tests.together import run_together


def _state(value):
    mesh = sharding.make_mesh(ConfigDict({"data": -1, "fsdp": 1, "tensor": 1}))
    where = NamedSharding(mesh, PartitionSpec("data"))
    state = {
        "kernel": jax.device_put(
            np.random.default_rng(value).normal(size=(64, 800)).astype(np.float32), where
        )
    }
    return state, jax.eval_shape(lambda: state), where


def _write(workdir, steps, scores=(), **keep):
    config = ConfigDict(
        {"keep_last": 2, "keep_every_steps": 0, "keep_best": 0, "best_metric": "mIoU"} | keep
    )
    with checkpoints.open_manager(workdir, config) as manager:
        for step in steps:
            scored = dict(scores).get(step)
            checkpoints.save(manager, step, _state(step)[0], {"note": step}, scored)


def _read(workdir):
    _, shapes, where = _state(0)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes
    )
    with checkpoints.open_reader(workdir) as manager:
        return checkpoints.restore(manager, manager.latest_step(), abstract)


def _kept(workdir):
    return sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir())


def test_latest_is_restored_with_its_meta(tmp_path):
    _write(tmp_path, [1, 2, 3])
    state, meta = _read(tmp_path)
    assert np.array_equal(state["kernel"], _state(3)[0]["kernel"])
    assert state["kernel"].sharding.spec == PartitionSpec("data")
    assert meta == {"note": 3}


@pytest.mark.parametrize(("keep_every_steps", "expected"), [(0, [5, 6]), (3, [3, 5, 6])])
def test_what_is_kept(tmp_path, keep_every_steps, expected):
    _write(tmp_path, [1, 2, 3, 4, 5, 6], keep_every_steps=keep_every_steps)
    assert _kept(tmp_path) == expected


def test_half_written_checkpoint_is_ignored_and_removed(tmp_path):
    _write(tmp_path, [1])
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
    assert _read(tmp_path)[1] == {"note": 1}
    _write(tmp_path, [3])
    assert _kept(tmp_path) == [1, 3]


def test_the_best_are_kept_beside_the_latest(tmp_path):
    scores = {1: {"mIoU": 0.5}, 2: {"mIoU": 0.9}, 3: {"mIoU": None}, 4: {"mIoU": 0.7}, 5: None}
    _write(tmp_path, [1, 2, 3, 4, 5, 6], scores, keep_last=1, keep_best=2)
    assert _kept(tmp_path) == [2, 4, 6]
    with checkpoints.open_reader(tmp_path, "mIoU") as manager:
        assert manager.best_step() == 2
    # Scores are read again when a run goes on.
    _write(tmp_path, [7], {7: {"mIoU": 0.8}}, keep_last=1, keep_best=2)
    assert _kept(tmp_path) == [2, 7]


def test_full_disk_is_one_line_and_keeps_the_last_whole_checkpoint(tmp_path, capfd):
    message = r"could not be written in .*checkpoints \(File too large\); the last .* of step 1"
    with pytest.raises(UserError, match=message):
        _fill_disk_after(tmp_path, 1)
    assert "Traceback" not in capfd.readouterr().err
    assert _read(tmp_path)[1] == {"note": 1}
    _write(tmp_path, [2])
    assert _kept(tmp_path) == [1, 2]


def _fill_disk_after(workdir, step):
    """Writes checkpoints until no file may grow beyond 50 kB, for which Linux fails as for a full disk."""
    config = ConfigDict({"keep_last": 1, "keep_every_steps": 0, "keep_best": 0, "best_metric": ""})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with checkpoints.open_manager(workdir, config) as manager:
            checkpoints.save(manager, step, _state(step)[0], {"note": step})
            checkpoints.finish(manager)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
            checkpoints.save(manager, step + 1, _state(step + 1)[0], {"note": step + 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# What is done to a checkpoint, and what then must be named.
DAMAGE = {
    "truncate": r"Error reading \"kernel/",
    "flip_byte": r"checkpoints/2 .*kernel",
    "remove_state": r"state/kernel",
    "remove_meta": r"meta/metadata",
    "break_meta": r"meta/metadata: Expecting",
    "empty": r"meta/metadata",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_named(tmp_path, damage):
    _write(tmp_path, [1, 2])
    folder = tmp_path / "checkpoints" / "2"
    files = [file for file in folder.rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    content, half = largest.read_bytes(), largest.stat().st_size // 2
    if damage == "truncate":
        largest.write_bytes(content[:half])
    elif damage == "flip_byte":
        largest.write_bytes(content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :])
    elif damage == "break_meta":
        (folder / "meta" / "metadata").write_text("{")
    else:
        part = {"remove_state": "state", "remove_meta": "meta", "empty": ""}[damage]
        for file in files:
            if file.is_relative_to(folder / part):
                file.unlink()
    with pytest.raises(checkpoints.DamagedCheckpoint, match=DAMAGE[damage]) as raised:
        _read(tmp_path)
    assert "checkpoints/2 " in str(raised.value)
    with checkpoints.open_reader(tmp_path) as manager:
        checkpoints.set_aside(manager, 2)
        assert manager.all_steps() == [1]
    assert (tmp_path / "damaged_checkpoints" / "2").is_dir()
    assert _read(tmp_path)[1] == {"note": 1}


def test_damaged_scores_are_named(tmp_path):
    _write(tmp_path, [1], {1: {"mIoU": 0.5}})
    (tmp_path / "checkpoints" / "1" / "metrics" / "metrics").write_text("{")
    with pytest.raises(UserError, match="checkpoints cannot be read: Expecting"):
        _read(tmp_path)


def test_run_without_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoints.open_reader(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint in"):
        checkpoints.open_reader(tmp_path)
    assert _kept(tmp_path) == []


def test_checksum_depends_on_every_bit_and_place_but_not_on_sharding():
    state, _, _ = _state(1)
    host = np.asarray(state["kernel"])
    flipped, exchanged = host.copy(), host.copy()
    flipped.view(np.uint32)[63, 799] ^= 1 << 31
    exchanged[0, [0, 1]] = exchanged[0, [1, 0]]
    expected = checkpoints.checksums(state)["kernel"]
    assert checkpoints.checksums({"kernel": host})["kernel"] == expected
    assert checkpoints.checksums({"kernel": flipped})["kernel"] != expected
    assert checkpoints.checksums({"kernel": exchanged})["kernel"] != expected


# Trains to step 8 with a checkpoint of step 4 before it, and then meets damage in three ways.
TWO_PROCESSES = """
import pathlib, shutil, sys
import jax
import tests.conftest
from launch import command_line
from ravar_jax import distributed
from ravar_jax.errors import UserError
from ravar_jax.train import train_and_evaluate
from tests import tiny_run

workdir = pathlib.Path(sys.argv.pop())
mirror = workdir.with_name("mirror")


def train(workdir, **changes):
    config = tiny_run.make_config(mesh__data=1, mesh__fsdp=4, **changes)
    rows = slice(8 * jax.process_index(), 8 * jax.process_index() + 8)

    def own(batches):
        return ({key: value[rows] for key, value in batch.items()} for batch in batches)

    batches = lambda start: own(tiny_run.train_batches(start)), lambda: own(tiny_run.eval_batches())
    train_and_evaluate(config, workdir, *batches, tiny_run.make_task())


def cut_in_half(checkpoint):
    file = max(checkpoint.rglob("*"), key=lambda file: file.stat().st_size * file.is_file())
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def main():
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_disable_most_optimizations", True)  # much is compiled, little computed
    distributed.initialize()
    train(workdir)
    if jax.process_index() == 0:
        shutil.copytree(workdir, mirror)
        cut_in_half(mirror / "checkpoints" / "8")
        cut_in_half(workdir / "checkpoints" / "8")
    distributed.wait_for_all("damage")
    try:
        train(workdir)
    except UserError as error:
        print("refused:", error)
    train(workdir, checkpoint__fall_back=True)
    train(mirror if jax.process_index() == 1 else workdir)


command_line.run(main)
"""


def test_two_processes_agree_on_a_damaged_checkpoint(tmp_path, repository):
    workdir = tmp_path / "run"
    command = [sys.executable, "-c", TWO_PROCESSES, str(workdir)]
    outputs = run_together(command, 2, repository, codes=[1, 1])
    damaged = "checkpoints/8 cannot be read (OUT_OF_RANGE: Error reading"
    for output in outputs:
        (refused,) = (line for line in output.splitlines() if line.startswith("refused: "))
        assert f"{workdir}/{damaged}" in refused
        assert "from step 4" in refused
    # Falling back, both go on from the one before, and the damaged one is moved once.
    assert (
        outputs[0].count("it is now in damaged_checkpoints/, and the run goes on from step 4") == 1
    )
    assert [folder.name for folder in (workdir / "damaged_checkpoints").iterdir()] == ["8"]
    assert _kept(workdir) == [4, 8]
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    straight = map(json.loads, (tmp_path / "mirror" / "metrics.jsonl").read_text().splitlines())
    assert [row.get("train/loss") for row in rows] == [row.get("train/loss") for row in straight]
    # The files of process 1 alone are damaged: both end, and do not wait for each other.
    last = [output.strip().splitlines()[-1] for output in outputs]
    assert last[0].startswith(
        f"error: checkpoint {workdir}/checkpoints/8 cannot be read (in process 1)"
    )
    assert last[1].startswith(f"error: checkpoint {tmp_path}/mirror/{damaged}")
