"""BLIP-2's image encoder: a pre-norm vision transformer whose blocks are one scanned stack (spec 3.1).

pixels --stem (small models only), patches--> tokens --CLS, positions--> blocks --> tokens (no final norm)
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ravar_jax.models.attention import attend
from ravar_jax.models.layers import (
    Conv,
    Dense,
    add_bias,
    gelu,
    layer_norm,
    project,
    sine_grid,
)
from ravar_jax.sharding import constrain

# What the backward pass finds of a block beside its input; the rest it computes again.
_KEPT = {
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases on queries, values and output but not on keys (EVA)."""

    num_heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens (B, N, D) to (B, N, D)."""
        batch, length, width = x.shape
        split = (batch, length, self.num_heads, width // self.num_heads)
        q = Dense(width, dtype=self.dtype, name="query")(x).reshape(split)
        k = Dense(width, use_bias=False, dtype=self.dtype, name="key")(x).reshape(split)
        v = Dense(width, dtype=self.dtype, name="value")(x).reshape(split)
        attended = attend(q, k, v).reshape(batch, length, width)
        return Dense(width, dtype=self.dtype, name="output")(attended)


class Block(nn.Module):
    """x += attention(norm1(x)); x += MLP(norm2(x)). LayerNorm epsilon 1e-6, erf GELU."""

    num_heads: int
    mlp_width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Maps tokens (B, N, D) to (B, N, D), in the form that `nn.scan` asks for."""
        h = layer_norm(1e-6, name="norm1")(x).astype(self.dtype)
        x = x + SelfAttention(self.num_heads, self.dtype, name="attention")(h)
        h = layer_norm(1e-6, name="norm2")(x).astype(self.dtype)
        h = gelu(Dense(self.mlp_width, dtype=self.dtype, name="mlp_in")(h))
        x = x + Dense(x.shape[-1], dtype=self.dtype, name="mlp_out")(h)
        return constrain(x), None


class PatchEmbedding(nn.Module):
    """The convolution whose stride is its kernel's side, as the matrix product that it is."""

    width: int
    side: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C), whose H and W are multiples of the side, to (B, patches, width)."""
        batch, height, width, channels = x.shape
        side = self.side
        x = x.astype(self.dtype)
        x = x.reshape(batch, height // side, side, width // side, side, channels)
        x = x.swapaxes(2, 3).reshape(batch, -1, side * side * channels)
        shape = (side, side, channels, self.width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.width,))
        return add_bias(project(x, kernel.reshape(-1, self.width)), bias)


class VisionTransformer(nn.Module):
    """The image encoder; ViT-g of BLIP-2 is width 1408, depth 39, 16 heads, MLP 6144, patch 14, no stem.

    Attributes:
        width, depth, num_heads, mlp_width: of the transformer.
        patch_size: side in pixels of the square that one token covers.
        stem_widths: channels of stride-2 3x3 convolutions before the patches; each halves the image, so the patch
            convolution is patch_size / 2**len(stem_widths) wide.
        scan: False unrolls the stack of blocks in the compiled program; the parameters are the same.
        remat: what the backward pass computes again: "none"; "minimal", all of a block but the outputs of its dense
            layers; "full", all of it. Nothing where there is no gradient.
        dtype: of the matrix products; the residual stream is float32.
    """

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    patch_size: int
    stem_widths: tuple[int, ...] = ()
    scan: bool = True
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Maps normalised pixels (B, H, W, 3) to tokens (B, 1 + patches, D) float32, the CLS token first.

        Raises:
            ValueError: if the image is not a whole number of patches.
        """
        height, width = pixels.shape[1:3]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"{height}x{width} pixels is not a multiple of {self.patch_size}")
        x = pixels
        for i, channels in enumerate(self.stem_widths):
            x = Conv(channels, side=3, stride=2, dtype=self.dtype, name=f"stem_conv{i}")(x)
            x = gelu(layer_norm(1e-6, name=f"stem_norm{i}")(x))
        patch = self.patch_size // 2 ** len(self.stem_widths)
        x = PatchEmbedding(self.width, patch, self.dtype, name="patch_embedding")(x)
        rows, columns = height // self.patch_size, width // self.patch_size
        normal = nn.initializers.truncated_normal(0.02)
        cls_token = self.param("cls_token", normal, (1, 1, self.width))
        position_embedding = self.param(
            "position_embedding",
            lambda _: jnp.pad(sine_grid(rows, columns, self.width), ((1, 0), (0, 0)))[None],
        )
        cls_tokens = jnp.broadcast_to(cls_token, (x.shape[0], 1, self.width))
        x = jnp.concatenate([cls_tokens, x.astype(jnp.float32)], axis=1)
        x = constrain(x + position_embedding)
        block = Block
        if self.remat != "none":
            # Only a loop keeps the compiler from merging what is computed again with the first time.
            block = nn.remat(Block, prevent_cse=not self.scan, policy=_KEPT[self.remat])
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
            unroll=1 if self.scan else self.depth,
        )
        x, _ = stack(self.num_heads, self.mlp_width, self.dtype, name="blocks")(x, None)
        return x


def resize_position_embedding(table: jax.Array, rows: int, columns: int) -> jax.Array:
    """Resizes the position embedding to images of another size.

    Args:
        table: (1, 1 + g * g, D), the CLS token's position first.
        rows: patches of an image from top to bottom.
        columns: patches from left to right.

    Returns:
        (1, 1 + rows * columns, D): CLS as it was, the grid resized as PyTorch's bicubic `interpolate` does, which LAVIS
        and transformers use; the table itself where the grid is the same.

    Raises:
        ValueError: if the table is not of a square grid.
    """
    side, width = math.isqrt(table.shape[1] - 1), table.shape[2]
    if side * side != table.shape[1] - 1:
        raise ValueError(f"{table.shape[1] - 1} patch positions are not a square grid")
    if (rows, columns) == (side, side):
        return table
    grid = table[:, 1:].reshape(1, side, side, width)
    # Without antialiasing, also to fewer patches, as PyTorch by default.
    grid = jax.image.resize(grid, (1, rows, columns, width), "cubic-pytorch", antialias=False)
    return jnp.concatenate([table[:, :1], grid.reshape(1, -1, width)], axis=1)
