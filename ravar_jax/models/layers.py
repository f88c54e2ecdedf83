"""Layers that several models share: released initialisation, norms, exact GELU, and codes of places."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

# Uniform in +-1/sqrt(fan_in): what the release's linear layers start from (spec 3.9).
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias(fan_in: int) -> Callable[..., jax.Array]:
    """Returns a bias initializer uniform in +-1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def dense(features: int, fan_in: int, *, dtype: jnp.dtype, name: str) -> nn.Dense:
    """Returns a dense layer that maps `fan_in` to `features` and starts as the release's does."""
    return nn.Dense(
        features,
        kernel_init=torch_uniform,
        bias_init=torch_bias(fan_in),
        dtype=dtype,
        name=name,
    )


def layer_norm(epsilon: float, *, name: str) -> nn.LayerNorm:
    """Returns a LayerNorm computed in float32 whatever its input's dtype."""
    return nn.LayerNorm(epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, name=name)


def gelu(x: jax.Array) -> jax.Array:
    """Returns the exact (erf) GELU of x; the tanh form is off by up to 5e-4."""
    return jax.nn.gelu(x, approximate=False)


def sines(coordinates: jax.Array, num_frequencies: int) -> jax.Array:
    """Returns sines and cosines (..., 2 * num_frequencies) of coordinates (...) in [0, 1], from 1/2 to 16 waves."""
    frequencies = jnp.pi * 32.0 ** jnp.linspace(0.0, 1.0, num_frequencies)
    angles = coordinates[..., None] * frequencies.reshape((1,) * coordinates.ndim + (-1,))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def query_grid(num_query_tokens: int) -> tuple[int, int]:
    """Returns rows and columns of the grid of places that the query tokens start from: 4 x 8 for 32."""
    rows = math.gcd(num_query_tokens, 4)
    return rows, num_query_tokens // rows


def sine_grid(rows: int, columns: int, width: int) -> jax.Array:
    """Returns position codes (rows * columns, width) of a grid: places are learnt sooner from them than from noise."""
    y, x = jnp.meshgrid(*((jnp.arange(n) + 0.5) / n for n in (rows, columns)), indexing="ij")
    codes = jnp.concatenate([sines(axis.reshape(-1), width // 4) for axis in (y, x)], axis=-1)
    return jnp.pad(codes, ((0, 0), (0, width - codes.shape[-1])))
