"""The decoder that pre-trains MiniBLIP: every image token tells of the person at its place.

    image token --> action logits, box          of the person it belongs to
    sentence . image token --> match logits     which tokens the sentence means
    a person's tokens, a word's two neighbours --> the word      in that person's sentence

A token belongs to the person whose box covers its place (`token_owners`). Words are guessed from both neighbours, so
that "a [?] shirt" asks for one colour; this teaches the image tokens what sentences speak of before any sentence is
understood, and matching ties whole sentences to them. The decoder is thrown away afterwards; only the backbone it
taught is kept.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ravar_jax.models.layers import Dense, gelu
from ravar_jax.models.refatomnet import NUM_ACTIONS, pool_text

TEMPERATURE = 0.1  # of the softmax over the cosines of a sentence and the tokens


def token_owners(boxes: jax.Array, person_mask: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Returns which image tokens belong to which person, bool (B, P, N).

    Tokens stand at the middles of a grid's cells. A token belongs to the person whose box covers it, of several to the
    one to whose middle it is closer in widths and heights of the box; and to a person whose middle it is closest to.

    Args:
        boxes: (B, P, 4), x1, y1, x2, y2 in fractions of the frame.
        person_mask: (B, P), 1 for a person, 0 for padding, which owns nothing.
        grid: rows and columns, N together.
    """
    rows, columns = grid
    y, x = jnp.meshgrid(
        (jnp.arange(rows) + 0.5) / rows, (jnp.arange(columns) + 0.5) / columns, indexing="ij"
    )
    places = jnp.stack([x.reshape(-1), y.reshape(-1)], axis=-1)[None, None]
    offset = places - (boxes[..., None, :2] + boxes[..., None, 2:]) / 2
    half = jnp.maximum((boxes[..., None, 2:] - boxes[..., None, :2]) / 2, 1e-6)
    real = (person_mask > 0)[..., None]
    reach = jnp.where(real, jnp.max(jnp.abs(offset) / half, axis=-1), jnp.inf)
    covered = (reach <= 1.0) & (reach == jnp.min(reach, axis=1, keepdims=True))
    distance = jnp.sum(jnp.square(offset), axis=-1)
    closest = distance == jnp.min(distance, axis=-1, keepdims=True)
    return (covered | closest) & real


class GroundingOutput(NamedTuple):
    """The decoder's answers.

    Attributes:
        action_logits: (B, N, 80), of the person each token belongs to.
        box: (B, N, 4), that person's x1, y1, x2, y2 in fractions of the frame.
        match_logits: (B, P, N), sentences against tokens.
        word_logits: (B, P, L, V), each word of a sentence from its neighbours and the person's tokens.
    """

    action_logits: jax.Array
    box: jax.Array
    match_logits: jax.Array
    word_logits: jax.Array


def _unit(x: jax.Array) -> jax.Array:
    """Returns float32 vectors of length one."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


class GroundingDecoder(nn.Module):
    """The decoder.

    Attributes:
        mlp_width: of the layer that guesses words.
        vocab_size: V, of the tokenizer.
        dtype: of the computation; outputs are float32.
    """

    mlp_width: int
    vocab_size: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        image_tokens: jax.Array,
        text_tokens: jax.Array,
        token_ids: jax.Array,
        attention_mask: jax.Array,
        owners: jax.Array,
    ) -> GroundingOutput:
        """Answers for every image token and every sentence.

        Args:
            image_tokens: (B, N, D).
            text_tokens: (B, P, L, D), one sentence a person.
            token_ids: (B, P, L) int, what `text_tokens` encode.
            attention_mask: (B, P, L) int.
            owners: (B, P, N) bool, of `token_owners`.
        """
        batch, people, length, width = text_tokens.shape
        rows = (batch * people, length)
        text = pool_text(text_tokens.reshape(*rows, width), attention_mask.reshape(rows), "masked")
        text = text.reshape(batch, people, width)
        image_tokens = image_tokens.astype(self.dtype)
        match_logits = jnp.einsum(
            "bpd,bnd->bpn",
            _unit(self._dense(width, "match_sentence")(text)),
            _unit(self._dense(width, "match_image")(image_tokens)),
        )

        share = owners / jnp.maximum(jnp.sum(owners, axis=-1, keepdims=True), 1)
        person = jnp.einsum("bpn,bnd->bpd", share.astype(self.dtype), image_tokens)
        person = gelu(self._dense(self.mlp_width, "person")(person))[:, :, None]
        before, after = (
            nn.Embed(
                self.vocab_size,
                self.mlp_width,
                embedding_init=nn.initializers.normal(1.0),
                dtype=self.dtype,
                name=name,
            )(jnp.roll(token_ids, shift, axis=-1))
            for name, shift in (("word_before", 1), ("word_after", -1))
        )
        context = before + after
        hidden = gelu(self._dense(self.mlp_width, "token")(image_tokens))
        return GroundingOutput(
            self._dense(NUM_ACTIONS, "action")(hidden).astype(jnp.float32),
            self._dense(4, "box")(hidden).astype(jnp.float32),
            match_logits / TEMPERATURE,
            self._dense(self.vocab_size, "word")(context * (1 + person)).astype(jnp.float32),
        )

    def _dense(self, features: int, name: str) -> Dense:
        return Dense(features, dtype=self.dtype, name=name)
