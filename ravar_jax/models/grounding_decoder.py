"""The decoder that pre-trains MiniBLIP: queries ask the image tokens what a person does and where that person is.

    sentence: text tokens --masked mean--> query --+
    region:   box --MLP--> query ------------------+--> cross-attention to image tokens, MLP --> action logits, box
    matching: sentence . region's output, between all people of a frame
    words:    region's output --> the tokens of that person's sentence
    pixels:   each image token --> a small picture of its place in the frame

Region queries teach the image tokens what is where, and what it is called, long before the sentences can point;
matching ties the sentences to the regions. Actions are told by shape alone, so without the pixels the colours that
sentences speak of are forgotten before the first sentence is understood. The decoder is thrown away afterwards; only
the backbone it taught is kept.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ravar_jax.models.layers import gelu, sines
from ravar_jax.models.qformer import Attention
from ravar_jax.models.refatomnet import NUM_ACTIONS, pool_text


class GroundingOutput(NamedTuple):
    """The decoder's answers.

    Attributes:
        action_logits: (B, P, 80), asked by sentence.
        box: (B, P, 4), x1, y1, x2, y2 in fractions of the frame, asked by sentence.
        region_logits: (B, P, 80), action logits asked by box.
        match_logits: (B, P, P), sentences against regions.
        word_logits: (B, P, V), of the tokens that describe the region.
        pixels: (B, N, C), each image token's picture of its own place.
    """

    action_logits: jax.Array
    box: jax.Array
    region_logits: jax.Array
    match_logits: jax.Array
    word_logits: jax.Array
    pixels: jax.Array


class GroundingDecoder(nn.Module):
    """The decoder.

    Attributes:
        depth, num_heads, mlp_width: of the cross-attending layers.
        vocab_size: V, of the tokenizer.
        num_pixel_values: C, values of the picture that each image token shows.
        dtype: of the computation; outputs are float32.
    """

    depth: int
    num_heads: int
    mlp_width: int
    vocab_size: int
    num_pixel_values: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        image_tokens: jax.Array,
        text_tokens: jax.Array,
        attention_mask: jax.Array,
        regions: jax.Array,
    ) -> GroundingOutput:
        """Answers every person's sentence and every person's region.

        Args:
            image_tokens: (B, N, D).
            text_tokens: (B, P, L, D), one sentence a person.
            attention_mask: (B, P, L) int.
            regions: (B, P, 4) boxes, x1, y1, x2, y2 in fractions of the frame.
        """
        batch, people, length, width = text_tokens.shape
        rows = (batch * people, length)
        text = pool_text(text_tokens.reshape(*rows, width), attention_mask.reshape(rows), "masked")
        text = text.reshape(batch, people, width)
        sentence_query = self._dense(width, "sentence_query")(text)
        region_codes = sines(regions, 8).reshape(batch, people, -1)
        region = gelu(self._dense(self.mlp_width, "region_in")(region_codes.astype(self.dtype)))
        region_query = self._dense(width, "region_query")(region)

        x = jnp.concatenate([sentence_query, region_query], axis=1)
        image_tokens = image_tokens.astype(self.dtype)
        for i in range(self.depth):
            attention = Attention(self.num_heads, 0.0, self.dtype, name=f"layer{i}_attention")
            x = attention(x, image_tokens, None, deterministic=True)
            h = gelu(self._dense(self.mlp_width, f"layer{i}_mlp_in")(x))
            x = x + self._dense(width, f"layer{i}_mlp_out")(h)
        action_logits = self._dense(NUM_ACTIONS, "action")(x).astype(jnp.float32)
        box = self._dense(4, "box")(x[:, :people]).astype(jnp.float32)
        match_logits = jnp.einsum(
            "bpd,bqd->bpq",
            self._dense(width, "match_sentence")(text),
            self._dense(width, "match_region")(x[:, people:]),
        ).astype(jnp.float32)
        return GroundingOutput(
            action_logits[:, :people],
            box,
            action_logits[:, people:],
            match_logits * width**-0.5,
            self._dense(self.vocab_size, "word")(x[:, people:]).astype(jnp.float32),
            self._dense(self.num_pixel_values, "pixel")(image_tokens).astype(jnp.float32),
        )

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, dtype=self.dtype, name=name)
