"""What every golden check shares: weights drawn again from a seed, the error measure, the tolerance of outputs."""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ravar_jax.conversion.mapping import Row, from_torch, to_torch

Arrays = Mapping[str, np.ndarray]
# Name, largest absolute error, tolerance.
Result = tuple[str, float, float]

OUTPUT_TOLERANCE = 1e-4


def seeded_weight(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the float32 weight that a golden file's seed gives to a PyTorch parameter."""
    x = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)
    x = x.astype(np.float32)
    if name.endswith("running_var"):
        x = 1 + 0.1 * np.abs(x)
    elif name.endswith("running_mean"):
        x = 0.02 * x
    elif len(shape) >= 2:
        x = x / math.sqrt(math.prod(shape[1:]))
    elif name.endswith("weight"):
        x = 1 + 0.1 * x
    else:
        x = 0.02 * x
    return x.astype(np.float32)


def seeded_params(seed: int, table: tuple[Row, ...], shapes: Any) -> Any:
    """Returns a model's parameters as a golden file's seed gives them, by the PyTorch names of its table."""
    empty = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), shapes)
    weights = {
        name: seeded_weight(seed, name, array.shape)
        for name, array in to_torch(empty, table).items()
    }
    return from_torch(weights, table, model="golden file", shapes=shapes)


def max_error(ours: object, golden: np.ndarray) -> float:
    """Returns the largest absolute difference; infinite where shapes differ or ours is undefined."""
    if ours is None:
        return math.inf
    array = np.asarray(ours, np.float64)
    if array.shape != golden.shape:
        return math.inf
    error = np.abs(array - golden.astype(np.float64))
    return float(error.max()) if error.size else 0.0
