"""The Q-Former: a post-norm BERT whose learned queries cross-attend to image features (spec 3.1).

    image mode: query tokens --norm--> layers (self-attention, every second cross-attention, query MLP) --> image tokens
    text mode:  token ids --word + position, norm--> layers (self-attention, text MLP) --> text tokens
    multimodal: query tokens and, behind them, words attend to each other; then each goes the way of its own mode

All modes share the self-attention weights; LayerNorm epsilon is 1e-12 and GELU exact, as in BERT.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ravar_jax.models.layers import Dense, gelu, layer_norm
from ravar_jax.sharding import constrain

EPSILON = 1e-12
MASKED = -10000.0  # added to the scores of padded keys, as BERT does


class Attention(nn.Module):
    """Multi-head attention, output projection, dropout, residual and LayerNorm (BERT's post-norm order)."""

    num_heads: int
    dropout: float
    dtype: jnp.dtype
    epsilon: float = EPSILON

    @nn.compact
    def __call__(
        self, x: jax.Array, source: jax.Array, bias: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        """Attends from x (B, N, D) to source (B, M, F); bias (B, 1, 1, M) is added to the scores."""
        width = x.shape[-1]
        heads = (self.num_heads, width // self.num_heads)
        q = Dense(width, dtype=self.dtype, name="query")(x).reshape(*x.shape[:2], *heads)
        k = Dense(width, dtype=self.dtype, name="key")(source).reshape(*source.shape[:2], *heads)
        v = Dense(width, dtype=self.dtype, name="value")(source)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) * heads[1] ** -0.5
        if bias is not None:
            scores = scores + bias
        weights = jax.nn.softmax(scores, axis=-1)
        weights = nn.Dropout(self.dropout, deterministic=deterministic)(weights).astype(self.dtype)
        attended = jnp.einsum("bhqk,bkhd->bqhd", weights, v.reshape(*source.shape[:2], *heads))
        out = Dense(width, dtype=self.dtype, name="output")(attended.reshape(x.shape))
        out = nn.Dropout(self.dropout, deterministic=deterministic)(out)
        return layer_norm(self.epsilon, name="norm")(out + x).astype(self.dtype)


class Layer(nn.Module):
    """Self-attention of all positions; then queries take cross-attention, if the layer has it, and their own MLP."""

    num_heads: int
    mlp_width: int
    cross_attention: bool
    dropout: float
    dtype: jnp.dtype
    epsilon: float = EPSILON

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array | None,
        image_features: jax.Array | None,
        num_queries: int,
        deterministic: bool,
    ) -> jax.Array:
        """Maps (B, N, D) to (B, N, D); the first num_queries positions are queries of image features (B, M, F)."""
        attend = functools.partial(
            Attention, self.num_heads, self.dropout, self.dtype, self.epsilon
        )
        x = attend(name="attention")(x, x, bias, deterministic)
        if image_features is None:
            return constrain(self._mlp("", x, deterministic))
        queries, words = x[:, :num_queries], x[:, num_queries:]
        if self.cross_attention:
            cross = attend(name="cross_attention")
            queries = cross(queries, image_features, None, deterministic)
        queries = self._mlp("query_", queries, deterministic)
        if words.shape[1]:
            words = self._mlp("", words, deterministic)
        return constrain(jnp.concatenate([queries, words], axis=1))

    def _mlp(self, prefix: str, x: jax.Array, deterministic: bool) -> jax.Array:
        h = gelu(Dense(self.mlp_width, dtype=self.dtype, name=f"{prefix}mlp_in")(x))
        h = Dense(x.shape[-1], dtype=self.dtype, name=f"{prefix}mlp_out")(h)
        h = nn.Dropout(self.dropout, deterministic=deterministic)(h)
        return layer_norm(self.epsilon, name=f"{prefix}mlp_norm")(h + x).astype(self.dtype)


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
        """Creates the layers, which the modes share."""
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
        x = self._embed(_repeat(query_tokens, image_features), deterministic)
        return self._encode(x, None, image_features, query_tokens.shape[1], deterministic)

    def encode_text(
        self, token_ids: jax.Array, attention_mask: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Returns text tokens (B, L, D), at padded positions too, from ids and mask (B, L)."""
        x = self._embed(self._words(token_ids), deterministic)
        return self._encode(x, masking_bias(attention_mask), None, 0, deterministic)

    def encode_multimodal(
        self,
        query_tokens: jax.Array,
        image_features: jax.Array,
        token_ids: jax.Array,
        attention_mask: jax.Array,
        deterministic: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes an image and a sentence that see each other, as BLIP-2 does to match them.

        Args:
            query_tokens: (1, N, D).
            image_features: (B, M, F), one row a sentence.
            token_ids: (B, L).
            attention_mask: (B, L), 1 at words and 0 at padding.
            deterministic: no dropout.

        Returns:
            Image tokens (B, N, D) and text tokens (B, L, D), at padded positions too.
        """
        queries = _repeat(query_tokens, image_features)
        x = jnp.concatenate([queries, self._words(token_ids)], axis=1)
        seen = jnp.ones(queries.shape[:2], attention_mask.dtype)
        bias = masking_bias(jnp.concatenate([seen, attention_mask], axis=1))
        num_queries = queries.shape[1]
        x = self._embed(x, deterministic)
        x = self._encode(x, bias, image_features, num_queries, deterministic)
        return x[:, :num_queries], x[:, num_queries:]

    def _words(self, token_ids: jax.Array) -> jax.Array:
        positions = jnp.arange(token_ids.shape[1])[None]
        return self.word_embedding(token_ids) + self.position_embedding(positions)

    def _embed(self, x: jax.Array, deterministic: bool) -> jax.Array:
        x = self.embedding_dropout(self.embedding_norm(x), deterministic=deterministic)
        return x.astype(self.dtype)

    def _encode(
        self,
        x: jax.Array,
        bias: jax.Array | None,
        image_features: jax.Array | None,
        num_queries: int,
        deterministic: bool,
    ) -> jax.Array:
        if image_features is not None:
            image_features = image_features.astype(self.dtype)
        for layer in self.layers:
            x = layer(x, bias, image_features, num_queries, deterministic)
        return x.astype(jnp.float32)


def _repeat(query_tokens: jax.Array, image_features: jax.Array) -> jax.Array:
    """Returns the query tokens (1, N, D) once for each image: (B, N, D)."""
    return jnp.broadcast_to(query_tokens, (image_features.shape[0], *query_tokens.shape[1:]))


def masking_bias(attention_mask: jax.Array) -> jax.Array:
    """Returns what is added to the scores (B, 1, 1, L), from a mask (B, L)."""
    return (1.0 - attention_mask[:, None, None, :].astype(jnp.float32)) * MASKED
