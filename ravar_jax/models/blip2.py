"""BLIP-2's first stage: image encoder, its final norm and the Q-Former; MiniBLIP is a small one (spec 3.1)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ravar_jax.models.layers import layer_norm, query_grid, sine_grid
from ravar_jax.models.qformer import QFormer
from ravar_jax.models.vision_transformer import VisionTransformer


class Blip2(nn.Module):
    """Encodes frames and sentences into the tokens that RefAtomNet takes.

    Attributes:
        vision: the image encoder's attributes.
        qformer: the Q-Former's attributes.
        num_query_tokens: N, image tokens a frame.
        dtype: of the computation.
    """

    vision: dict
    qformer: dict
    num_query_tokens: int
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the three parts and the learned query tokens."""
        self.visual_encoder = VisionTransformer(**self.vision, dtype=self.dtype)
        self.vision_norm = layer_norm(1e-5, name="vision_norm")
        # Each query starts with a place of its own to look at; released weights replace this.
        grid = query_grid(self.num_query_tokens)
        self.query_tokens = self.param(
            "query_tokens",
            lambda _: sine_grid(*grid, self.qformer["width"])[None],
        )
        self.query_former = QFormer(**self.qformer, dtype=self.dtype)

    def __call__(
        self, pixels: jax.Array, token_ids: jax.Array, attention_mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns image tokens (B, N, D) and text tokens (B, L, D); touches every parameter."""
        return self.encode_image(pixels), self.encode_text(token_ids, attention_mask)

    def encode_image(self, pixels: jax.Array, deterministic: bool = True) -> jax.Array:
        """Maps normalised pixels (B, H, W, 3) to image tokens (B, N, D) float32."""
        return self.query_image(self.encode_patches(pixels), deterministic)

    def encode_patches(self, pixels: jax.Array) -> jax.Array:
        """Maps normalised pixels (B, H, W, 3) to image features (B, 1 + patches, F) float32, CLS first."""
        return self.vision_norm(self.visual_encoder(pixels))

    def query_image(self, image_features: jax.Array, deterministic: bool = True) -> jax.Array:
        """Maps image features (B, 1 + patches, F) to image tokens (B, N, D) float32."""
        return self.query_former.encode_image(self.query_tokens, image_features, deterministic)

    def encode_text(
        self, token_ids: jax.Array, attention_mask: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Maps token ids and mask (B, L) to text tokens (B, L, D) float32, at padded positions too."""
        return self.query_former.encode_text(token_ids, attention_mask, deterministic)

    def encode_multimodal(
        self,
        pixels: jax.Array,
        token_ids: jax.Array,
        attention_mask: jax.Array,
        deterministic: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        """Maps pixels (B, H, W, 3) and a sentence each (B, L) to image and text tokens that have seen each other."""
        features = self.vision_norm(self.visual_encoder(pixels))
        return self.query_former.encode_multimodal(
            self.query_tokens, features, token_ids, attention_mask, deterministic
        )
