"""Which processes of a job are there: asked first, as JAX ends one that waits in vain without saying for whom.

Process 0 listens at the coordinator's address and every other process reports there; then all are told who is absent.
"""

import json
import socket
import time

from ravar_jax.errors import UserError

_RETRY_SECONDS = 0.2
_REPORT_SECONDS = 10.0  # for a process that has connected to say who it is


def meet(address: str, index: int, count: int, seconds: float) -> None:
    """Returns once all processes of a job are there.

    Args:
        address: host:port, where process 0 can be reached and nothing listens yet.
        index: number of this process.
        count: of processes.
        seconds: to wait at most.

    Raises:
        UserError: in every process that came, if some did not; they are named. Or process 0 could not listen at the
            address, could not be reached there, or two processes have one number.
    """
    host, _, port = address.rpartition(":")
    wrong = (
        _wait_for_others(int(port), count, seconds)
        if index == 0
        else _report(host, int(port), index, seconds)
    )
    if wrong:
        raise UserError(wrong)


def _wait_for_others(port: int, count: int, seconds: float) -> str:
    """Does process 0's part; returns what is wrong, "" if nothing is, which those who came are told too."""
    deadline = time.monotonic() + seconds
    came: set[int] = set()
    connections: list[socket.socket] = []
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        listener = socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        return f"process 0 cannot listen at port {port}: {error.strerror or error}"
    twice = None
    with listener:
        while len(came) < count - 1 and twice is None:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                break
            number = _read_number(connection, count)
            if number is None:  # a stranger, or one that went away
                connection.close()
            else:
                twice = number if number in came else None
                came.add(number)
                connections.append(connection)
    absent = [str(number) for number in range(1, count) if number not in came]
    wrong = ""
    if twice is not None:
        wrong = f"two processes have JAX_PROCESS_ID={twice}"
    elif absent:
        named = f"process{'es' * (len(absent) > 1)} {', '.join(absent)}"
        wrong = f"{named} of {count} did not come within {seconds:g} s"
    for connection in connections:
        with connection:
            connection.sendall(json.dumps(wrong).encode() + b"\n")
    return wrong


def _read_number(connection: socket.socket, count: int) -> int | None:
    connection.settimeout(_REPORT_SECONDS)
    try:
        line = connection.makefile("r").readline().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(line) if line.isdecimal() and 0 < int(line) < count else None


def _report(host: str, port: int, index: int, seconds: float) -> str:
    """Does the part of any other process; returns what process 0 says is wrong."""
    deadline = time.monotonic() + seconds
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                connection.sendall(f"{index}\n".encode())
                # Process 0 answers when its own time is over.
                connection.settimeout(left + seconds)
                return json.loads(connection.makefile("r").readline())
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            time.sleep(min(_RETRY_SECONDS, max(left, 0)))
    return f"process 0 was not reached at {host}:{port} within {seconds:g} s ({reason})"
