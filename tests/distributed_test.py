"""Several processes: how they meet and what they refuse; what they train is in same_losses_test.py."""

import concurrent.futures
import socket
import sys
import time

import pytest

from ravar_jax import distributed, rendezvous
from ravar_jax.errors import UserError
from tests.together import free_address, run_together

# A file is there for those who come after process 0. Process 1 has another config the second time.
PROGRAM = """
import sys
import jax
from launch import command_line
from ravar_jax import distributed

def main():
    distributed.initialize()
    first = jax.process_index() == 0
    with distributed.first_process_first("the file"):
        open(file, "x" if first else "r").close()
    distributed.check_same("x")
    print("all have the same")
    distributed.check_same("x" if first else "y")
    print("went on")

file = sys.argv.pop()
command_line.run(main)
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
    assert meet_all([0, 2], 4, 2) == ["processes 1, 3 of 4 did not come within 2 s"] * 2


def test_number_that_two_processes_have_is_named():
    start = time.monotonic()
    assert meet_all([0, 1, 1], 3, 60) == ["two processes have JAX_PROCESS_ID=1"] * 3
    assert time.monotonic() - start < 30


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


def test_other_config_stops_every_process(tmp_path, repository):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "file")]
    for output in run_together(command, 2, repository, codes=[1, 1]):
        assert "all have the same\n" in output
        assert "error: process 1 has another config than process 0\n" in output
        assert "went on" not in output
