"""Many processes that run one command as one: found in the environment, started together, compared, kept in step.

Argument-free on Cloud TPU, Slurm and Open MPI. Anywhere else, GKE's JobSet and plain hosts among them, three variables
say it: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES, JAX_PROCESS_ID. All processes see the
same files. Without any of these a command is one process, and everything here does nothing.
"""

import contextlib
import hashlib
import importlib.util
import os
import pathlib
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from ravar_jax import rendezvous
from ravar_jax.errors import UserError
from ravar_jax.tpu.host import has_tpu

# Seconds. All processes of a job start within the first; a dataset may be rendered by process 0 within the second.
START_SECONDS = 300
WORK_SECONDS = 4 * 3600
_MANUAL = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_PACKAGES = ("ravar_jax", "data_pipelines", "configs", "launch")


def initialize(environment: Mapping[str, str] | None = None) -> None:
    """Joins the other processes of the job, if there are any, and says on stderr what this one sees.

    RAVAR_START_SECONDS changes how long it waits for them (300).

    Raises:
        UserError: a variable is missing or wrong, or other processes did not come in time; they are named.
    """
    environment = os.environ if environment is None else environment
    seconds = _number(environment, "RAVAR_START_SECONDS", START_SECONDS)
    if any(name in environment for name in _MANUAL):
        missing = [name for name in _MANUAL if name not in environment]
        if missing:
            raise UserError(f"{', '.join(missing)}: not set; {', '.join(_MANUAL)} belong together")
        address, index = environment[_MANUAL[0]], _number(environment, _MANUAL[2], None)
        count = _number(environment, _MANUAL[1], None)
        if not index < count:
            raise UserError(f"JAX_PROCESS_ID={index}, expected less than JAX_NUM_PROCESSES={count}")
        if not re.fullmatch(r".+:\d+", address):
            raise UserError(f"JAX_COORDINATOR_ADDRESS={address}, expected host:port")
        rendezvous.meet(address, index, count, seconds)
        arguments: dict[str, Any] = {
            "coordinator_address": address,
            "num_processes": count,
            "process_id": index,
            # What is not given would be looked for, in a cluster that is not there.
            "cluster_detection_method": "deactivate",
        }
    elif _is_cluster(environment):
        arguments = {}
    else:
        return
    try:
        jax.distributed.initialize(initialization_timeout=seconds, **arguments)
    except (RuntimeError, ValueError) as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"the processes of the job did not join: {first_line[:300]}") from error
    print(
        f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: "
        f"{jax.local_device_count()} of {jax.device_count()} {jax.devices()[0].device_kind} devices",
        file=sys.stderr,
        flush=True,
    )


def check_same(config_text: str) -> None:
    """Stops all processes if one of them has another config or another version of the code than process 0.

    Args:
        config_text: The config, in a form that equal configs share.

    Raises:
        UserError: in every process, naming those that differ and in what.
    """
    if jax.process_count() == 1:
        return
    hashes = {"config": hashlib.sha256(config_text.encode()).digest(), "code": _hash_of_code()}
    digits = np.stack([np.frombuffer(value, np.uint8) for value in hashes.values()])
    everyone = np.asarray(multihost_utils.process_allgather(digits))  # (processes, kinds, 32)
    differs = (everyone != everyone[:1]).any(axis=-1)
    phrases = [
        f"process {process} has another {kind} than process 0"
        for process, kinds in enumerate(differs)
        for kind, is_other in zip(hashes, kinds, strict=True)
        if is_other
    ]
    if phrases:
        raise UserError("; ".join(phrases))


@contextlib.contextmanager
def first_process_first(what: str) -> Iterator[None]:
    """Lets process 0 through the block before the others, which then find on disk what it has made there.

    Args:
        what: a name of the work, of its own in a run.

    Raises:
        UserError: process 0 did not come out of the block in time.
    """
    first = jax.process_index() == 0
    if not first:
        wait_for_all(what)
    yield
    if first:
        wait_for_all(what)


def wait_for_all(what: str, seconds: int = WORK_SECONDS) -> None:
    """Waits until every process has come here.

    Args:
        what: a name of the place, of its own in a run.
        seconds: to wait at most.

    Raises:
        UserError: some did not come in time; they are named where the coordinator names them.
    """
    try:
        ocp.multihost.get_barrier_sync_fn()(key=f"ravar_jax {what}", timeout_ms=seconds * 1000)
    except RuntimeError as error:
        raise UserError(
            f"{what}: {_absent(str(error)) or 'another process'} did not come within {seconds} s"
        ) from error


def _is_cluster(environment: Mapping[str, str]) -> bool:
    """Tells whether JAX finds the other processes by itself."""
    many = any(
        environment.get(name, "1") not in ("", "1")
        for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    )
    on_tpu = (
        importlib.util.find_spec("libtpu") is not None
        and "TPU_SKIP_MDS_QUERY" not in environment
        and environment.get("JAX_PLATFORMS", "tpu").startswith("tpu")
        and has_tpu()
    )
    return many or on_tpu


def _number(environment: Mapping[str, str], name: str, default: int | None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise UserError(f"{name}={text}, expected a whole number")
    return int(text)


def _absent(message: str) -> str:
    """Returns the processes that a coordinator's message names as late, "" where it names none."""
    listed = re.search(r"timed out task names:\s*((?:\S*?\d+\s+)+)", message + "\n")
    if not listed:
        return ""
    numbers = sorted(int(number) for number in re.findall(r"(\d+)\s", listed[1]))
    return f"process{'es' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _hash_of_code() -> bytes:
    """Returns SHA-256 of the names and bytes of all Python files that decide what a run does."""
    root = pathlib.Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for file in sorted(file for package in _PACKAGES for file in (root / package).rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode())
        digest.update(file.read_bytes())
    return digest.digest()
