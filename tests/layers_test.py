"""bfloat16 layers keep their parameters' gradients in float32."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ravar_jax.models.layers import Conv, Dense, gelu, project
from ravar_jax.models.vision_transformer import PatchEmbedding


def rounded(x: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float64)


def test_gradients_of_bfloat16_products_are_not_rounded() -> None:
    rng = np.random.default_rng(0)
    x, ahead = (rng.normal(size=(4, 500, width)).astype(np.float32) for width in (8, 6))
    layer = Dense(6, dtype=jnp.bfloat16)
    params = layer.init(jax.random.key(0), x)["params"]

    def loss(params: dict, x: jax.Array) -> jax.Array:
        y = layer.apply({"params": params}, x)
        assert isinstance(y, jax.Array)
        assert y.dtype == jnp.bfloat16
        return jnp.sum(y.astype(jnp.float32) * ahead)

    of_params, of_x = jax.grad(loss, argnums=(0, 1))(params, x)
    # Exact sums of bfloat16's products; rounded, they would be off by 4e-3.
    expected = np.einsum("bnd,bne->de", rounded(x), rounded(ahead))
    np.testing.assert_allclose(of_params["kernel"], expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(of_params["bias"], rounded(ahead).sum((0, 1)), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(of_x, ahead @ params["kernel"].T, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_kernel_s_gradient_has_its_axes(axis: int) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 5, 8)), jnp.bfloat16)
    kernel = rng.normal(size=(8, 6) if axis == 0 else (6, 8)).astype(np.float32)
    mixed = jax.grad(lambda kernel: jnp.sum(project(x, kernel, axis).astype(jnp.float32) ** 2))(
        kernel
    )
    plain = jax.grad(lambda kernel: jnp.sum(project(x.astype(jnp.float32), kernel, axis) ** 2))(
        kernel
    )
    assert mixed.dtype == jnp.float32
    np.testing.assert_allclose(mixed, plain, rtol=0.05, atol=0.5)


def test_in_float32_it_is_flax_s() -> None:
    x = np.random.default_rng(0).normal(size=(7, 8)).astype(np.float32)
    ours, theirs = Dense(6), nn.Dense(6)
    params = theirs.init(jax.random.key(3), x)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(3), x), params)
    np.testing.assert_array_equal(ours.apply(params, x), theirs.apply(params, x))


# Ours, and Flax's with the same parameters.
CONVOLUTIONS = {
    "stem": (
        lambda dtype: Conv(6, side=3, stride=2, dtype=dtype),
        nn.Conv(6, (3, 3), strides=2),
    ),
    "patches": (
        lambda dtype: PatchEmbedding(6, side=3, dtype=dtype),
        nn.Conv(6, (3, 3), strides=3, padding="VALID"),
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_flax_s_and_their_bfloat16_gradients_are_not_rounded(name: str) -> None:
    ours, theirs = CONVOLUTIONS[name]
    rng = np.random.default_rng(0)
    x = rounded(rng.normal(size=(8, 30, 42, 5))).astype(np.float32)
    params = theirs.init(jax.random.key(3), x)
    jax.tree.map(
        np.testing.assert_array_equal, ours(jnp.float32).init(jax.random.key(3), x), params
    )
    ahead = rounded(rng.normal(size=theirs.apply(params, x).shape)).astype(np.float32)

    def gradients(layer: nn.Module) -> tuple[dict, jax.Array]:
        def loss(params: dict, x: jax.Array) -> jax.Array:
            y = layer.apply(params, x)
            assert isinstance(y, jax.Array)
            return jnp.sum(y.astype(jnp.float32).reshape(ahead.shape) * ahead)

        of_params, of_x = jax.grad(loss, argnums=(0, 1))(params, x)
        return of_params["params"], of_x

    expected, expected_of_x = gradients(theirs)
    found, of_x = gradients(ours(jnp.bfloat16))
    # Of inputs that bfloat16 holds; rounded, they would be off by 0.1 and more.
    for key in ("kernel", "bias"):
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(of_x, expected_of_x, rtol=0.05, atol=0.05)
    output = ours(jnp.float32).apply(params, x).reshape(ahead.shape)
    np.testing.assert_allclose(output, theirs.apply(params, x), atol=1e-5)


def test_gelu_of_bfloat16_is_rounded_once() -> None:
    x = jnp.linspace(-6, 6, 2001).astype(jnp.bfloat16)
    exact = np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in np.asarray(x, float)])
    found = np.asarray(gelu(x), float)
    np.testing.assert_allclose(found, exact, rtol=2**-8, atol=1e-6)
