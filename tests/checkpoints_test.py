"""Checkpoints: what is kept, what a damaged one says, that nothing falls back in silence."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from ravar_jax import checkpoints, sharding
from ravar_jax.errors import UserError


def _state(value):
    mesh = sharding.make_mesh(ConfigDict({"data": -1, "fsdp": 1, "tensor": 1}))
    where = NamedSharding(mesh, PartitionSpec("data"))
    state = {
        "kernel": jax.device_put(
            np.random.default_rng(value).normal(size=(64, 800)).astype(np.float32), where
        )
    }
    return state, jax.eval_shape(lambda: state), where


def _write(workdir, steps, keep_last=2, keep_every_steps=0):
    config = ConfigDict({"keep_last": keep_last, "keep_every_steps": keep_every_steps})
    with checkpoints.open_manager(workdir, config) as manager:
        for step in steps:
            checkpoints.save(manager, step, _state(step)[0], {"note": step})


def _read(workdir):
    _, shapes, where = _state(0)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes
    )
    with checkpoints.open_reader(workdir) as manager:
        return checkpoints.restore(manager, abstract)


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


@pytest.mark.parametrize(
    "damage", ["truncate", "flip_byte", "remove_state", "remove_meta", "empty"]
)
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
    else:
        part = {"remove_state": "state", "remove_meta": "meta", "empty": ""}[damage]
        for file in files:
            if file.is_relative_to(folder / part):
                file.unlink()
    with pytest.raises(UserError, match=r"(?s)checkpoints/2 cannot be read .*delete that folder"):
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
