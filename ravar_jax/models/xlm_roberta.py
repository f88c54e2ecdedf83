"""XLM-R's encoder, a post-norm BERT, from which the release's label table was made (spec 3.3).

    token ids --word + position + type, norm--> layers (self-attention, MLP) --> tokens

It runs once, on the names of classes, so it has neither dropout nor a scanned stack. LayerNorm epsilon is 1e-5.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ravar_jax.models.layers import layer_norm
from ravar_jax.models.qformer import Layer, masking_bias

EPSILON = 1e-5
BEGIN, PAD, END, UNKNOWN = 0, 1, 2, 3


class XlmRoberta(nn.Module):
    """The encoder; XLM-R base is width 768, depth 12, 12 heads, MLP 3072, vocabulary 250002, 514 positions.

    Attributes:
        width, depth, num_heads, mlp_width: of the transformer.
        vocab_size, max_positions: of the embeddings; the first two positions are never read.
        dtype: of the matrix products; norms and softmaxes are float32.
    """

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    vocab_size: int
    max_positions: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, token_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """Returns tokens (B, L, D) float32, at padded positions too, from ids and mask (B, L).

        Raises:
            ValueError: if the ids are longer than the positions reach.
        """
        length = token_ids.shape[1]
        if length + PAD + 1 > self.max_positions:
            raise ValueError(f"{length} tokens, but {self.max_positions - PAD - 1} positions")
        normal = nn.initializers.normal(0.02)
        # Positions count the tokens of the sentence from PAD + 1 on; padding has position PAD, as in fairseq.
        positions = jnp.cumsum(attention_mask, axis=1) * attention_mask + PAD
        x = nn.Embed(self.vocab_size, self.width, embedding_init=normal, name="word_embedding")(
            token_ids
        )
        x = x + nn.Embed(
            self.max_positions, self.width, embedding_init=normal, name="position_embedding"
        )(positions)
        x = x + nn.Embed(1, self.width, embedding_init=normal, name="token_type_embedding")(
            jnp.zeros_like(token_ids)
        )
        x = layer_norm(EPSILON, name="embedding_norm")(x).astype(self.dtype)
        bias = masking_bias(attention_mask)
        for i in range(self.depth):
            layer = Layer(
                self.num_heads, self.mlp_width, False, 0.0, self.dtype, EPSILON, name=f"layer{i}"
            )
            x = layer(x, bias, None, 0, True)
        return x.astype(jnp.float32)
