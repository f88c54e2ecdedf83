"""cuDNN's attention against the products in float32; needs an NVIDIA GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from ravar_jax.models.attention import attend, portable

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")


def inputs() -> tuple[jax.Array, ...]:
    """ViT-g's sizes: 257 tokens, heads of 88."""
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (4, 257, 16, 88), jnp.bfloat16) for key in keys)


def wide(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(array.astype(jnp.float32) for array in arrays)


def test_fused_attention_is_that_of_the_products():
    program = jax.jit(attend).lower(*inputs()).compile()
    assert "cudnn$fmha" in program.as_text()
    expected = np.asarray(attend(*wide(inputs())))
    found = np.asarray(program(*inputs()), np.float32)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-2 * np.abs(expected).max())


def test_gradients_of_fused_attention_are_those_of_the_products():
    ahead = jax.random.normal(jax.random.key(1), inputs()[0].shape)

    def total(*arrays: jax.Array) -> jax.Array:
        return jnp.sum(attend(*arrays).astype(jnp.float32) * ahead)

    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    for found, expected in zip(gradient(*inputs()), gradient(*wide(inputs())), strict=True):
        error = jnp.linalg.norm(found.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
        assert error < 2e-2


def test_what_is_exported_has_no_kernel_of_one_platform():
    # A function of its own: JAX remembers what it traced, and `attend` may have been traced outside.
    answer = jax.jit(lambda *arrays: attend(*arrays))
    with portable():
        exported = export.export(answer, platforms=("cpu", "cuda", "tpu"))(*inputs())
    assert "fmha" not in exported.mlir_module()
