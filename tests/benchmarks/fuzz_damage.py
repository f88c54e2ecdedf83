"""How files are damaged for `fuzz.py`, and what an error line must look like."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

Rng = np.random.Generator
Trial = Callable[
    [Path, Rng, int], str
]  # empty folder, generator, number within the kind -> outcome


def cut(rng: Rng, data: bytes) -> bytes:
    """Returns the beginning of `data`."""
    return data[: int(rng.integers(len(data)))]


def flip(rng: Rng, data: bytes) -> bytes:
    """Returns `data` with one to eight bits flipped."""
    flipped = bytearray(data)
    for bit in rng.choice(8 * len(data), int(rng.integers(1, 9)), replace=False):
        flipped[bit // 8] ^= 1 << (bit % 8)
    return bytes(flipped)


def damage(file: Path, how: Callable[[Rng, bytes], bytes], rng: Rng) -> None:
    file.write_bytes(how(rng, file.read_bytes()))


def check_line(message: str, folder: Path) -> None:
    """Raises AssertionError where an error is not one line that names a file in `folder`."""
    if "\n" in message or str(folder) not in message or len(message) > 2000:
        raise AssertionError(f"not one clear line: {message[:3000]!r}")
