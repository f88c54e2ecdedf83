"""The Q-Former: a post-norm BERT whose learned queries cross-attend to image features (spec 3.1).

    image mode: query tokens --norm--> layers (self-attention, every second cross-attention, query MLP) --> image tokens
    text mode:  token ids --word + position, norm--> layers (self-attention, text MLP) --> text tokens

Both modes share the self-attention weights; LayerNorm epsilon is 1e-12 and GELU exact, as in BERT.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ravar_jax.models.layers import gelu, layer_norm
from ravar_jax.sharding import constrain

EPSILON = 1e-12
MASKED = -10000.0  # added to the scores of padded keys, as BERT does


class Attention(nn.Module):
    """Multi-head attention, output projection, dropout, residual and LayerNorm (BERT's post-norm order)."""

    num_heads: int
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, source: jax.Array, bias: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        """Attends from x (B, N, D) to source (B, M, F); bias (B, 1, 1, M) is added to the scores."""
        width = x.shape[-1]
        heads = (self.num_heads, width // self.num_heads)
        q = nn.Dense(width, dtype=self.dtype, name="query")(x).reshape(*x.shape[:2], *heads)
        k = nn.Dense(width, dtype=self.dtype, name="key")(source).reshape(*source.shape[:2], *heads)
        v = nn.Dense(width, dtype=self.dtype, name="value")(source)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) * heads[1] ** -0.5
        if bias is not None:
            scores = scores + bias
        weights = jax.nn.softmax(scores, axis=-1)
        weights = nn.Dropout(self.dropout, deterministic=deterministic)(weights).astype(self.dtype)
        attended = jnp.einsum("bhqk,bkhd->bqhd", weights, v.reshape(*source.shape[:2], *heads))
        out = nn.Dense(width, dtype=self.dtype, name="output")(attended.reshape(x.shape))
        out = nn.Dropout(self.dropout, deterministic=deterministic)(out)
        return layer_norm(EPSILON, name="norm")(out + x).astype(self.dtype)


class Layer(nn.Module):
    """Self-attention, cross-attention if image features are given and this layer has it, then the mode's own MLP."""

    num_heads: int
    mlp_width: int
    cross_attention: bool
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array | None,
        image_features: jax.Array | None,
        deterministic: bool,
    ) -> jax.Array:
        """Maps (B, N, D) to (B, N, D); image_features (B, M, F) select the image mode."""
        attention = Attention(self.num_heads, self.dropout, self.dtype, name="attention")
        x = attention(x, x, bias, deterministic)
        prefix = ""
        if image_features is not None:
            prefix = "query_"
            if self.cross_attention:
                cross = Attention(self.num_heads, self.dropout, self.dtype, name="cross_attention")
                x = cross(x, image_features, None, deterministic)
        h = gelu(nn.Dense(self.mlp_width, dtype=self.dtype, name=f"{prefix}mlp_in")(x))
        h = nn.Dense(x.shape[-1], dtype=self.dtype, name=f"{prefix}mlp_out")(h)
        h = nn.Dropout(self.dropout, deterministic=deterministic)(h)
        x = layer_norm(EPSILON, name=f"{prefix}mlp_norm")(h + x).astype(self.dtype)
        return constrain(x)


class QFormer(nn.Module):
    """The Q-Former; BLIP-2's is width 768, depth 12, 12 heads, MLP 3072, vocabulary 30523, 512 positions.

    Attributes:
        width, depth, num_heads, mlp_width: of the transformer.
        vocab_size, max_positions: of the text embeddings.
        cross_attention_every: layers 0, n, 2 n, ... cross-attend (2).
        dropout: of hidden states and attention weights when not deterministic (0.1 in BLIP-2).
        dtype: of the computation; norms and softmaxes are float32.
    """

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    vocab_size: int
    max_positions: int
    cross_attention_every: int = 2
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the layers, which the two modes share."""
        normal = nn.initializers.normal(0.02)
        self.word_embedding = nn.Embed(self.vocab_size, self.width, embedding_init=normal)
        self.position_embedding = nn.Embed(self.max_positions, self.width, embedding_init=normal)
        self.embedding_norm = nn.LayerNorm(epsilon=EPSILON, use_fast_variance=False)
        self.embedding_dropout = nn.Dropout(self.dropout)
        self.layers = [
            Layer(
                self.num_heads,
                self.mlp_width,
                i % self.cross_attention_every == 0,
                self.dropout,
                self.dtype,
                name=f"layer{i}",
            )
            for i in range(self.depth)
        ]

    def encode_image(
        self, query_tokens: jax.Array, image_features: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Returns image tokens (B, N, D) from query tokens (1, N, D) and image features (B, M, F)."""
        x = jnp.broadcast_to(query_tokens, (image_features.shape[0], *query_tokens.shape[1:]))
        x = self._embed(x, deterministic)
        image_features = image_features.astype(self.dtype)
        for layer in self.layers:
            x = layer(x, None, image_features, deterministic)
        return x.astype(jnp.float32)

    def encode_text(
        self, token_ids: jax.Array, attention_mask: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Returns text tokens (B, L, D), at padded positions too, from ids and mask (B, L)."""
        positions = jnp.arange(token_ids.shape[1])[None]
        x = self.word_embedding(token_ids) + self.position_embedding(positions)
        x = self._embed(x, deterministic)
        bias = (1.0 - attention_mask[:, None, None, :].astype(jnp.float32)) * MASKED
        for layer in self.layers:
            x = layer(x, bias, None, deterministic)
        return x.astype(jnp.float32)

    def _embed(self, x: jax.Array, deterministic: bool) -> jax.Array:
        x = self.embedding_dropout(self.embedding_norm(x), deterministic=deterministic)
        return x.astype(self.dtype)
