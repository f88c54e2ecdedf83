"""Starts one command as several processes of a job on this machine."""

import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path


def free_address() -> str:
    """Returns host:port at which nothing listens."""
    with socket.create_server(("localhost", 0)) as listener:
        return f"localhost:{listener.getsockname()[1]}"


def run_together(
    command: Sequence[str], count: int, cwd: Path, codes: Sequence[int] | None = None
) -> list[str]:
    """Runs `count` processes to their end; returns what each printed.

    Args:
        command: the same for all.
        count: of processes.
        cwd: where they run.
        codes: the exit codes expected of them; None expects 0 of all.
    """
    job = {"JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": str(count)}
    processes = [
        subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **job, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    found = [process.returncode for process in processes]
    assert found == list(codes or [0] * count), "\n".join(outputs)
    return outputs
