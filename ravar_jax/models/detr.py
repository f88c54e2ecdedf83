"""DETR: objects of a frame, for the location-semantic stream (spec 3.2; arXiv 2005.12872).

    pixels --ResNet--> feature map --1x1 convolution--> tokens --encoder, sine positions--> memory
    zeros --decoder, query embedding, memory--> queries --class head, box head--> class logits, boxes

Positions are added to queries and keys of every attention, never to values. Norms stand behind the residual sums.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ravar_jax.models.layers import layer_norm
from ravar_jax.models.resnet import ResNet
from ravar_jax.sharding import constrain

EPSILON = 1e-5
TEMPERATURE = 10000.0

# DETR-R50 for COCO, as attributes of `Detr`: 100 detections of 92 classes; 41.5 million parameters.
DETR_R50: dict[str, Any] = {
    "resnet": {"stem_width": 64, "widths": (256, 512, 1024, 2048), "depths": (3, 4, 6, 3)},
    "width": 256,
    "encoder_depth": 6,
    "decoder_depth": 6,
    "num_heads": 8,
    "mlp_width": 2048,
    "num_queries": 100,
    "num_classes": 92,
}


class DetrOutput(NamedTuple):
    """What the detector says of a frame.

    Attributes:
        class_logits: (B, K, classes) float32; for COCO class ids 0..90, of which 0 is never used, and 91 for no object.
        boxes: (B, K, 4) float32, cx, cy, w, h in [0, 1] of the frame.
        feature_map: (B, h, w, C) float32, the backbone's last one.
    """

    class_logits: jax.Array
    boxes: jax.Array
    feature_map: jax.Array


class Detections(NamedTuple):
    """What the location-semantic stream takes.

    Attributes:
        class_ids: (B, K) int32.
        boxes: (B, K, 4) float32, cx, cy, w, h in [0, 1] of the frame.
    """

    class_ids: jax.Array
    boxes: jax.Array


def detections(output: DetrOutput) -> Detections:
    """Returns each query's most likely class, no object and the unused 0 included, and its box, in query order.

    The order is kept because the fusion's dense layer over detections has weights for each query of its own.
    """
    return Detections(jnp.argmax(output.class_logits, axis=-1).astype(jnp.int32), output.boxes)


def sine_positions(rows: int, columns: int, width: int) -> np.ndarray:
    """Returns position codes (rows * columns, width) float32 of a feature map, row by row.

    Per axis the index 1..n over n + 1e-6, times 2 pi, over 10000^(2 floor(i / 2) / (width / 2)), sine at even and
    cosine at odd i; the vertical axis fills the first half. Source: DETR's `PositionEmbeddingSine`, without padding.

    Raises:
        ValueError: the width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width={width} is not a multiple of 4: two axes of sines and cosines")
    half = width // 2
    periods = TEMPERATURE ** (2 * (np.arange(half) // 2) / half)

    def codes(n: int) -> np.ndarray:
        angles = (np.arange(1, n + 1) / (n + 1e-6) * 2 * math.pi)[:, None] / periods[None]
        return np.where(np.arange(half) % 2 == 0, np.sin(angles), np.cos(angles))

    y = np.broadcast_to(codes(rows)[:, None], (rows, columns, half))
    x = np.broadcast_to(codes(columns)[None], (rows, columns, half))
    return np.concatenate([y, x], axis=-1).reshape(rows * columns, width).astype(np.float32)


class Attention(nn.Module):
    """Multi-head attention with positions on queries and keys, output projection, dropout, residual and norm."""

    num_heads: int
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        position: jax.Array,
        source: jax.Array,
        source_position: jax.Array,
        deterministic: bool,
    ) -> jax.Array:
        """Attends from x (B, N, D) to source (B, M, D); positions are (1, N, D) and (1, M, D)."""
        width = x.shape[-1]
        heads = (self.num_heads, width // self.num_heads)
        q = nn.Dense(width, dtype=self.dtype, name="query")(x + position)
        k = nn.Dense(width, dtype=self.dtype, name="key")(source + source_position)
        v = nn.Dense(width, dtype=self.dtype, name="value")(source)
        q, k, v = (a.reshape(*a.shape[:2], *heads) for a in (q, k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q * heads[1] ** -0.5, k)
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
        weights = nn.Dropout(self.dropout, deterministic=deterministic)(weights).astype(self.dtype)
        attended = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        out = nn.Dense(width, dtype=self.dtype, name="output")(attended)
        out = nn.Dropout(self.dropout, deterministic=deterministic)(out)
        return layer_norm(EPSILON, name="norm")(x + out).astype(self.dtype)


class Layer(nn.Module):
    """Self-attention, cross-attention if there is a memory, then a ReLU MLP."""

    num_heads: int
    mlp_width: int
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        position: jax.Array,
        memory: tuple[jax.Array, jax.Array] | None,
        deterministic: bool,
    ) -> jax.Array:
        """Maps (B, N, D) at positions (1, N, D) to (B, N, D); a memory is (B, M, D) and its positions (1, M, D)."""
        attention = Attention(self.num_heads, self.dropout, self.dtype, name="attention")
        x = attention(x, position, x, position, deterministic)
        if memory is not None:
            cross = Attention(self.num_heads, self.dropout, self.dtype, name="cross_attention")
            x = cross(x, position, *memory, deterministic)
        h = nn.relu(nn.Dense(self.mlp_width, dtype=self.dtype, name="mlp_in")(x))
        h = nn.Dropout(self.dropout, deterministic=deterministic)(h)
        h = nn.Dense(x.shape[-1], dtype=self.dtype, name="mlp_out")(h)
        h = nn.Dropout(self.dropout, deterministic=deterministic)(h)
        return constrain(layer_norm(EPSILON, name="mlp_norm")(x + h).astype(self.dtype))


class Encoder(nn.Module):
    """Layers of self-attention, without a norm behind the last."""

    depth: int
    num_heads: int
    mlp_width: int
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, position: jax.Array, deterministic: bool) -> jax.Array:
        """Maps tokens (B, M, D) at positions (1, M, D) to (B, M, D)."""
        for i in range(self.depth):
            layer = Layer(
                self.num_heads, self.mlp_width, self.dropout, self.dtype, name=f"layer{i}"
            )
            x = layer(x, position, None, deterministic)
        return x


class Decoder(nn.Module):
    """Layers of self-attention and cross-attention on queries that start at zero, and a last norm."""

    depth: int
    num_heads: int
    mlp_width: int
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, position: jax.Array, memory: tuple[jax.Array, jax.Array], deterministic: bool
    ) -> jax.Array:
        """Returns queries (B, K, D) from their positions (1, K, D), a memory (B, M, D) and its positions (1, M, D)."""
        x = jnp.zeros((memory[0].shape[0], *position.shape[1:]), self.dtype)
        for i in range(self.depth):
            layer = Layer(
                self.num_heads, self.mlp_width, self.dropout, self.dtype, name=f"layer{i}"
            )
            x = layer(x, position, memory, deterministic)
        return layer_norm(EPSILON, name="norm")(x).astype(self.dtype)


class BoxHead(nn.Module):
    """Three dense layers with ReLU, and a sigmoid."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps queries (B, K, D) to boxes (B, K, 4) float32, cx, cy, w, h in [0, 1]."""
        h = nn.relu(nn.Dense(x.shape[-1], dtype=self.dtype, name="layer1")(x))
        h = nn.relu(nn.Dense(x.shape[-1], dtype=self.dtype, name="layer2")(h))
        h = nn.Dense(4, dtype=self.dtype, name="layer3")(h)
        return nn.sigmoid(h.astype(jnp.float32))


class Detr(nn.Module):
    """The detector; `DETR_R50` are the released sizes.

    Attributes:
        resnet: the backbone's attributes.
        width: D of the transformer, a multiple of 4 and of the heads.
        encoder_depth, decoder_depth, num_heads, mlp_width: of the transformer.
        num_queries: K, detections a frame.
        num_classes: logits a detection, no object included.
        dropout: in the transformer when not deterministic.
        dtype: of the computation; norms, softmaxes and outputs are float32.
    """

    resnet: dict
    width: int
    encoder_depth: int
    decoder_depth: int
    num_heads: int
    mlp_width: int
    num_queries: int
    num_classes: int
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array, deterministic: bool = True) -> DetrOutput:
        """Detects objects.

        Args:
            pixels: (B, H, W, 3) RGB, normalised as DETR was trained (ImageNet's mean and std); the release feeds
                fractions of 255 as they are (spec 2.4).
            deterministic: False drops out (needs the rng "dropout"), as the release does while it trains (Q13).
        """
        features = ResNet(**self.resnet, dtype=self.dtype, name="resnet")(pixels)
        x = nn.Conv(self.width, (1, 1), dtype=self.dtype, name="input_projection")(features)
        batch, rows, columns, width = x.shape
        position = jnp.asarray(sine_positions(rows, columns, width))[None]
        sizes = self.num_heads, self.mlp_width, self.dropout, self.dtype
        memory = Encoder(self.encoder_depth, *sizes, name="encoder")(
            x.reshape(batch, rows * columns, width), position, deterministic
        )
        query_embedding = self.param(
            "query_embedding", nn.initializers.normal(1.0), (self.num_queries, width)
        )
        queries = Decoder(self.decoder_depth, *sizes, name="decoder")(
            query_embedding[None], (memory, position), deterministic
        )
        class_logits = nn.Dense(self.num_classes, dtype=self.dtype, name="class_head")(queries)
        boxes = BoxHead(self.dtype, name="box_head")(queries)
        return DetrOutput(class_logits.astype(jnp.float32), boxes, features.astype(jnp.float32))
