"""Softmax attention of many heads: matrix products, or cuDNN's fused kernel where there is one."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from ravar_jax.gpu import has_cuda

_PORTABLE = contextvars.ContextVar("portable", default=False)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Within it functions are traced without kernels of one platform, to be exported."""
    token = _PORTABLE.set(True)
    try:
        yield
    finally:
        _PORTABLE.reset(token)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Returns softmax(q k^T / sqrt(d)) v, the softmax in float32.

    In bfloat16 on an NVIDIA GPU it is cuDNN's fused attention, which never writes the scores to memory; gradients are
    always those of the products.

    Args:
        q: (B, N, H, d).
        k: (B, M, H, d).
        v: (B, M, H, d).

    Returns:
        (B, N, H, d), in their dtype.
    """
    if q.dtype == jnp.bfloat16 and has_cuda() and not _PORTABLE.get():
        return _fused(q, k, v)
    return _products(q, k, v)


def _products(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
    weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


@jax.custom_vjp
def _fused(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _fused_forward(*inputs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _fused(*inputs), inputs


def _fused_backward(inputs: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, ...]:
    # cuDNN's own backward pass failed tests/attention_test.py on an H100 (jax 0.11.2).
    return jax.vjp(_products, *inputs)[1](gradient)


_fused.defvjp(_fused_forward, _fused_backward)
