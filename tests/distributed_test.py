"""Several processes: how they meet, what they refuse, and that their number changes neither losses nor checkpoints."""

import concurrent.futures
import json
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ravar_jax import distributed, rendezvous
from ravar_jax.errors import UserError
from ravar_jax.train import train_and_evaluate
from tests import tiny_run
from tests.together import free_address, run_together

# Eight devices in all, whatever the number of processes; each process feeds its share of every batch.
PROGRAM = """
import sys
import jax
import tests.conftest
from ravar_jax import distributed
from ravar_jax.errors import UserError
from ravar_jax.train import train_and_evaluate
from tests import tiny_run

workdir, config_of_1 = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 4)
distributed.initialize()
first = jax.process_index() == 0
share = slice(0, 8) if first else slice(8, 16)

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
        tiny_run.make_config(),
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


def test_two_processes_train_as_one_and_one_goes_on(tmp_path, repository):
    workdir = tmp_path / "two"
    outputs = run_together([sys.executable, "-c", PROGRAM, str(workdir), "x"], 2, repository)
    assert "process 0 of 2" in outputs[0]
    assert "4 of 8 cpu devices" in outputs[1]
    arguments = (tiny_run.train_batches, tiny_run.eval_batches, tiny_run.make_task())
    train_and_evaluate(tiny_run.make_config(), tmp_path / "one", *arguments)
    assert len(losses(workdir)) == 8
    np.testing.assert_allclose(losses(workdir), losses(tmp_path / "one"), rtol=0, atol=1e-5)
    # Two more steps of each, in one process: the checkpoint of two processes is one like any other.
    for folder in (workdir, tmp_path / "one"):
        file = folder / "config.json"
        file.write_text(file.read_text().replace('"steps": 8', '"steps": 10'))
        train_and_evaluate(tiny_run.make_config(train__steps=10), folder, *arguments)
    assert len(losses(workdir)) == 10
    np.testing.assert_allclose(losses(workdir), losses(tmp_path / "one"), rtol=0, atol=1e-5)


def test_other_config_stops_every_process(tmp_path, repository):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "run"), "y"]
    for output in run_together(command, 2, repository, codes=[1, 1]):
        assert "error: process 1 has another config than process 0" in output
    assert not (tmp_path / "run").exists()
