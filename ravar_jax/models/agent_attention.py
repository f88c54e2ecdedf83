"""Agent attention with cross-stream fusion (spec 3.6, 3.7; the release's AgentAttention and AgentBlock).

    x --query--> q --pool, mean over tokens--> agent tokens A
    A, x --> agent attention M (agents over tokens)      M, x --> agent values V
    q, A --> query attention G (tokens over agents)      G, V --> tokens

A block may receive the maps and agent tokens of two other streams, which rescale its own. The release projects every
token to queries, keys and values and every output token through `output`; here those matrices meet the few agent rows
first, the query matrix also the pool's first one, and the pool's second matrix and the last of the MLP the token mean.
The products are the same, associated differently.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ravar_jax.models.layers import (
    add_bias,
    dense,
    gelu,
    layer_norm,
    project,
    torch_bias,
    torch_uniform,
)
from ravar_jax.sharding import constrain


class AgentStream(NamedTuple):
    """What one stream's block gives.

    Attributes:
        tokens: (B, N, D), in the compute dtype.
        agent_attention: (B, 1, A, N) float32, each row a distribution over tokens, before any fusion.
        agent_tokens: (B, 1, A, D) float32, after fusion if there was any.
        token_mean: (B, D), the mean of the tokens.
    """

    tokens: jax.Array
    agent_attention: jax.Array
    agent_tokens: jax.Array
    token_mean: jax.Array


def _fuse(own: jax.Array, first: jax.Array, second: jax.Array, cross_softmax: str) -> jax.Array:
    """Returns `own` rescaled by the softmaxes of the two other streams' sum; all (B, 1, A, X).

    Source: spec 3.6 steps 4 and 6. The second softmax runs over the head axis, of size one, in the release (Q8,
    `singleton`: all ones) and over the agents otherwise.
    """
    total = first + second
    axis = {"singleton": 1, "agents": 2}[cross_softmax]
    return own * (jax.nn.softmax(total, axis=-1) + jax.nn.softmax(total, axis=axis) + 1.0) / 3.0


class _ComposedDense(nn.Module):
    """A dense layer behind another matrix: both are multiplied first, as there are more tokens than rows in either.

    Attributes:
        features: of the output.
        dtype: of the products.
    """

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, first: jax.Array) -> jax.Array:
        """Maps x (B, N, D) through `first` (D, E), then this layer, to (B, N, features)."""
        fan_in = first.shape[1]
        kernel = self.param("kernel", torch_uniform, (fan_in, self.features))
        bias = self.param("bias", torch_bias(fan_in), (self.features,))
        return add_bias(project(x.astype(self.dtype), first @ kernel), bias)


class AgentAttention(nn.Module):
    """Single-head attention through a few agent tokens (spec 3.6).

    Attributes:
        width: D.
        num_agent_tokens: A.
        cross_softmax: `singleton` or `agents` (Q8).
        dtype: of the matrix products; softmaxes are float32.
    """

    width: int
    num_agent_tokens: int
    cross_softmax: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, cross_streams: tuple[AgentStream, AgentStream] | None = None
    ) -> AgentStream:
        """Maps tokens (B, N, D) to an `AgentStream`; `cross_streams` are the two streams to fuse."""
        width, scale = self.width, self.width**-0.5
        shape = (width, width)
        w_query = self.param("query_kernel", torch_uniform, shape)
        w_key = self.param("key_kernel", torch_uniform, shape)
        w_value = self.param("value_kernel", torch_uniform, shape)

        hidden = gelu(_ComposedDense(width // 2, self.dtype, name="pool_in")(x, w_query))
        pooled = dense(
            self.num_agent_tokens * width, width // 2, dtype=self.dtype, name="pool_out"
        )(jnp.mean(hidden, axis=1))
        agents = pooled.reshape(-1, self.num_agent_tokens, width)

        agent_keys = project(agents, w_key, axis=1)
        attention = jax.nn.softmax(
            scale * jnp.einsum("bad,bnd->ban", agent_keys, x).astype(jnp.float32), axis=-1
        )[:, None]
        # Without it libtpu (0.0.42) fuses the three streams' products in one another until its stack overflows.
        attention = jax.lax.optimization_barrier(attention)
        agent_tokens = agents.astype(jnp.float32)[:, None]
        fused_attention = attention
        if cross_streams is not None:
            first, second = cross_streams
            fused_attention = _fuse(
                attention, first.agent_attention, second.agent_attention, self.cross_softmax
            )
            agent_tokens = _fuse(
                agent_tokens, first.agent_tokens, second.agent_tokens, self.cross_softmax
            )

        values = jnp.einsum("ban,bnd->bad", fused_attention[:, 0].astype(self.dtype), x)
        values = project(values, w_value)
        # `output` is affine and each row of the query attention sums to one, so it may act on the agents' values.
        values = dense(width, width, dtype=self.dtype, name="output")(values)
        agent_queries = project(agent_tokens[:, 0].astype(self.dtype), w_query, axis=1)
        query_attention = jax.nn.softmax(
            scale * jnp.einsum("bnd,bad->bna", x, agent_queries).astype(jnp.float32), axis=-1
        )
        tokens = jnp.einsum("bna,bad->bnd", query_attention.astype(self.dtype), values)
        return AgentStream(tokens, attention, agent_tokens, jnp.mean(tokens, axis=1))


class AgentBlock(nn.Module):
    """Pre-norm transformer block around `AgentAttention` (spec 3.7); LayerNorm epsilon 1e-5, erf GELU."""

    width: int
    num_agent_tokens: int
    mlp_ratio: int
    cross_softmax: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, cross_streams: tuple[AgentStream, AgentStream] | None = None
    ) -> AgentStream:
        """Maps tokens (B, N, D) to an `AgentStream` whose tokens include both residual branches."""
        attended = AgentAttention(
            self.width, self.num_agent_tokens, self.cross_softmax, self.dtype, name="attention"
        )(layer_norm(1e-5, name="norm1")(x).astype(self.dtype), cross_streams)
        x = x + attended.tokens
        hidden_width = self.mlp_ratio * self.width
        h = layer_norm(1e-5, name="norm2")(x).astype(self.dtype)
        h = gelu(dense(hidden_width, self.width, dtype=self.dtype, name="mlp_in")(h))
        # The layer is affine, so the mean commutes with it; where only the mean is read, as RefAtomNet does, the
        # compiler drops the product over all tokens.
        mlp_out = dense(self.width, hidden_width, dtype=self.dtype, name="mlp_out")
        token_mean = jnp.mean(x, axis=1) + mlp_out(jnp.mean(h, axis=1))
        return attended._replace(tokens=constrain(x + mlp_out(h)), token_mean=token_mean)
