"""Whether this machine is a TPU's host, and what libtpu is told of one that is not.

libtpu may be installed where no TPU is, to compile for those that are elsewhere.
"""

import os
import pathlib

# Environment variables; without them libtpu asks the network, and complains on standard error.
NO_HOST = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


def has_tpu() -> bool:
    """Tells by the device files that libtpu opens; nothing is loaded."""
    return any(any(pathlib.Path("/dev").glob(name)) for name in ("accel*", "vfio/[0-9]*"))


def quiet_libtpu() -> None:
    """Tells libtpu, before JAX starts, of a host without a TPU what else it would ask for and complain of."""
    if not has_tpu():
        for key, value in NO_HOST.items():
            os.environ.setdefault(key, value)
