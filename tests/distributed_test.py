"""Several processes: how they meet, what they refuse, and that their number changes neither losses nor checkpoints."""

import concurrent.futures
import json
import socket
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from ravar_jax import distributed, rendezvous, sharding
from ravar_jax.errors import UserError
from ravar_jax.train import train_and_evaluate
from tests import tiny_run
from tests.together import free_address, run_together

# Each process feeds its share of every batch.
PROGRAM = """
import sys
import jax
import tests.conftest
from ravar_jax import distributed
from ravar_jax.errors import UserError
from ravar_jax.train import train_and_evaluate
from tests import tiny_run

workdir, config_of_1, devices, fsdp = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", int(devices))
distributed.initialize()
first = jax.process_index() == 0
rows = 16 // jax.process_count()
share = slice(rows * jax.process_index(), rows * (jax.process_index() + 1))

def own(batches):
    for batch in batches:
        yield {key: value[share] for key, value in batch.items()}

try:
    distributed.check_same("x" if first else config_of_1)
    with distributed.first_process_first("the file"):
        if first:
            open(workdir + ".made", "x").close()
        else:
            open(workdir + ".made").close()
    train_and_evaluate(
        tiny_run.make_long_config(mesh__fsdp=int(fsdp)),
        workdir,
        lambda start: own(tiny_run.train_batches(start)),
        lambda: own(tiny_run.eval_batches()),
        tiny_run.make_task(),
    )
except UserError as error:
    sys.exit(f"error: {error}")
"""


def meet_all(numbers: list[int], count: int, seconds: float) -> list[str]:
    """Lets processes of these numbers meet, in threads; returns what each is told, "" where nothing is wrong."""
    address = free_address()

    def one(index: int) -> str:
        try:
            rendezvous.meet(address, index, count, seconds)
        except UserError as error:
            return str(error)
        return ""

    with concurrent.futures.ThreadPoolExecutor(len(numbers)) as pool:
        return list(pool.map(one, numbers))


def test_all_who_come_meet():
    start = time.monotonic()
    assert meet_all([2, 0, 1], 3, 60) == ["", "", ""]
    assert time.monotonic() - start < 30


def test_absent_processes_are_named_to_all_who_came():
    assert meet_all([0, 2], 4, 4) == ["processes 1, 3 of 4 did not come within 4 s"] * 2


def test_number_that_two_processes_have_is_named():
    told = meet_all([0, 1, 1], 3, 20)
    assert told[0] == "two processes have JAX_PROCESS_ID=1"
    assert told.count(told[0]) >= 2


def test_absent_process_0_is_named():
    with pytest.raises(UserError, match="process 0 was not reached at localhost:.* within 1 s"):
        rendezvous.meet(free_address(), 1, 2, 1)


def test_port_in_use_is_named():
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"process 0 cannot listen at port {port}"):
            rendezvous.meet(f"localhost:{port}", 0, 2, 1)


def test_stranger_is_not_taken_for_a_process():
    address = free_address()
    port = int(address.rpartition(":")[2])

    def stranger() -> None:
        for _ in range(100):
            try:
                with socket.create_connection(("localhost", port), timeout=1) as connection:
                    connection.sendall(b"GET / HTTP/1.1\n")
                    return
            except OSError:
                time.sleep(0.02)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(stranger)
        with pytest.raises(UserError, match="process 1 of 2 did not come"):
            rendezvous.meet(address, 0, 2, 2)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"JAX_PROCESS_ID": None}, "JAX_PROCESS_ID: not set"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2, expected less than JAX_NUM_PROCESSES=2"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two, expected a whole number"),
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "JAX_COORDINATOR_ADDRESS=host, expected host:port"),
        ({"RAVAR_START_SECONDS": "-1"}, "RAVAR_START_SECONDS=-1, expected a whole number"),
    ],
)
def test_wrong_variable_is_named(changes, told):
    right = {
        "JAX_COORDINATOR_ADDRESS": "host:1",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "0",
    }
    environment = {key: value for key, value in (right | changes).items() if value is not None}
    with pytest.raises(UserError, match=told):
        distributed.initialize(environment)


def test_one_process_needs_nothing():
    distributed.initialize({})
    distributed.check_same("anything")
    with distributed.first_process_first("work"):
        pass
    distributed.wait_for_all("there", 1)


def losses(workdir: Path) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row]


ARGUMENTS = (tiny_run.train_batches, tiny_run.eval_batches, tiny_run.make_task())


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[float]:
    """Losses of 22 steps of one process, split over data."""
    workdir = tmp_path_factory.mktemp("alone")
    train_and_evaluate(tiny_run.make_long_config(), workdir, *ARGUMENTS)
    return next_losses(workdir)


def next_losses(workdir: Path, **mesh: int) -> list[float]:
    """Does two more steps in one process on eight devices; returns all losses. Every parameter must be in shards."""
    file = workdir / "config.json"
    file.write_text(file.read_text().replace('"steps": 20', '"steps": 22'))
    config = tiny_run.make_long_config(train__steps=22, **mesh)
    state = train_and_evaluate(config, workdir, *ARGUMENTS)
    wanted = sharding.infer_shardings(state, sharding.make_mesh(config.mesh))
    for leaf, where in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
    return losses(workdir)


def test_the_mesh_does_not_change_the_losses(tmp_path, alone):
    config = tiny_run.make_long_config(mesh__data=1, mesh__fsdp=8)
    train_and_evaluate(config, tmp_path, *ARGUMENTS)
    assert len(losses(tmp_path)) == 20
    found = next_losses(tmp_path, mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("count", "devices", "fsdp"), [(2, 4, 1), (4, 1, 2)])
def test_processes_train_as_one_and_one_goes_on(tmp_path, repository, alone, count, devices, fsdp):
    workdir = tmp_path / "run"
    command = [sys.executable, "-c", PROGRAM, workdir, "x", devices, fsdp]
    outputs = run_together([*map(str, command)], count, repository)
    assert f"process 0 of {count}" in outputs[0]
    assert f"{devices} of {count * devices} cpu devices" in outputs[1]
    np.testing.assert_allclose(losses(workdir), alone[:20], rtol=0, atol=1e-5)
    # The checkpoint is one like any other: here on another number of processes and devices, and another mesh.
    found = next_losses(workdir, mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5)


def test_other_config_stops_every_process(tmp_path, repository):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "run"), "y", "4", "1"]
    for output in run_together(command, 2, repository, codes=[1, 1]):
        assert "error: process 1 has another config than process 0" in output
    assert not (tmp_path / "run").exists()
