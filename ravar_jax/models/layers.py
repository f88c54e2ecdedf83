"""Layers that several models share: dense and convolutional, released initialisation, norms, GELU, codes of places."""

import functools
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


def project(x: jax.Array, kernel: jax.Array, axis: int = 0) -> jax.Array:
    """Returns the product of x (..., D) and a kernel whose axis `axis` is D and the other E: (..., E), in x's dtype.

    A float32 kernel of a bfloat16 product gets its gradient in float32: rounded first, as a cast does, it would
    be summed over the devices in bfloat16.
    """
    return (
        _product(x, kernel, axis) if x.dtype == kernel.dtype else _rounded_product(x, kernel, axis)
    )


def _product(x: jax.Array, kernel: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (axis,)), ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rounded_product(x: jax.Array, kernel: jax.Array, axis: int) -> jax.Array:
    return _product(x, kernel.astype(x.dtype), axis)


def _rounded_product_forward(
    x: jax.Array, kernel: jax.Array, axis: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, kernel.astype(x.dtype), axis), (x, kernel)


def _rounded_product_backward(
    axis: int, inputs: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = inputs
    rows = tuple(range(x.ndim - 1))
    pair = (x, gradient) if axis == 0 else (gradient, x)
    of_kernel = jax.lax.dot_general(
        *pair, ((rows, rows), ((), ())), preferred_element_type=kernel.dtype
    )
    return _product(gradient, kernel.astype(gradient.dtype), 1 - axis), of_kernel


_rounded_product.defvjp(_rounded_product_forward, _rounded_product_backward)


def convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Returns the zero-padded convolution of x (B, H, W, C) and a kernel (h, w, C, E), in x's dtype.

    The result is (B, ceil(H / stride), ceil(W / stride), E); a float32 kernel gets its gradient as in `project`.
    """
    of_one_dtype = x.dtype == kernel.dtype
    return (_convolution if of_one_dtype else _rounded_convolution)(x, kernel, stride)


def _convolution(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=layout
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rounded_convolution(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return _convolution(x, kernel.astype(x.dtype), stride)


def _rounded_convolution_forward(
    x: jax.Array, kernel: jax.Array, stride: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rounded_convolution(x, kernel, stride), (x, kernel)


def _rounded_convolution_backward(
    stride: int, inputs: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = inputs
    rounded = kernel.astype(x.dtype)
    (of_x,) = jax.linear_transpose(lambda x: _convolution(x, rounded, stride), x)(gradient)
    # A transposed convolution of bfloat16 is rounded to it; in float32 its products are exact.
    exact, ahead = x.astype(kernel.dtype), gradient.astype(kernel.dtype)
    (of_kernel,) = jax.linear_transpose(lambda k: _convolution(exact, k, stride), kernel)(ahead)
    return of_x, of_kernel


_rounded_convolution.defvjp(_rounded_convolution_forward, _rounded_convolution_backward)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns x (..., E) + bias (E,) in x's dtype; a float32 bias gets its gradient in float32, as in `project`."""
    bias = bias.reshape((1,) * (x.ndim - 1) + (-1,))
    return x + bias if x.dtype == bias.dtype else _add_rounded(x, bias)


@jax.custom_vjp
def _add_rounded(x: jax.Array, bias: jax.Array) -> jax.Array:
    return x + bias.astype(x.dtype)


def _add_rounded_forward(x: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _add_rounded(x, bias), bias


def _add_rounded_backward(bias: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = tuple(range(gradient.ndim - 1))
    return gradient, jnp.sum(gradient, axis=rows, dtype=bias.dtype, keepdims=True)


_add_rounded.defvjp(_add_rounded_forward, _add_rounded_backward)


class Dense(nn.Module):
    """Flax's dense layer, but that its parameters' gradients are float32 whatever the dtype of the computation.

    Attributes:
        features: of the output.
        use_bias: whether a bias is added.
        dtype: of the computation; parameters are float32.
        kernel_init, bias_init: what they start from.
    """

    features: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (..., D) to (..., features)."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = project(x.astype(self.dtype), kernel)
        if self.use_bias:
            y = add_bias(y, self.param("bias", self.bias_init, (self.features,)))
        return y


class Conv(nn.Module):
    """Flax's zero-padded convolution, but that its parameters' gradients are float32, as in `Dense`.

    Attributes:
        features: of the output.
        side: of the kernel.
        stride: of the output's places.
        dtype: of the computation; parameters are float32.
    """

    features: int
    side: int
    stride: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (B, H, W, C) to (B, ceil(H / stride), ceil(W / stride), features)."""
        shape = (self.side, self.side, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        y = convolve(x.astype(self.dtype), kernel, self.stride)
        return add_bias(y, self.param("bias", nn.initializers.zeros_init(), (self.features,)))


def dense(features: int, fan_in: int, *, dtype: jnp.dtype, name: str) -> Dense:
    """Returns a dense layer that maps `fan_in` to `features` and starts as the release's does."""
    return Dense(
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
    """Returns the exact (erf) GELU of x; the tanh form is off by up to 5e-4.

    In bfloat16 it is computed in float32 and rounded once, which is more exact than `jax.nn.gelu` and, on a GPU, a
    third of its time: that rounds between its operations and calls erfc.
    """
    if x.dtype == jnp.float32:
        return jax.nn.gelu(x, approximate=False)
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


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
