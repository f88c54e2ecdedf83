"""RefAtomNet's fusion: three streams of tokens in, action logits and a box out (spec 3.3 to 3.8).

    boxes, class ids --label table, projection--> detection tokens --100 to 32--> agent_box ------+
    text tokens --pooled, 1 to 32--> agent_semantic ----------------------------------------+     |
    image tokens --mean over frames--> agent_temporal <--agent attention and agent tokens---+-----+
    detection tokens + semantic tokens + temporal tokens, each averaged --> action head, box head

The frozen encoders that make the inputs are separate modules, so this one trains from pixels or from cached features.

Shape letters, here and everywhere: B batch, E evaluation clips, T frames, S image side, N tokens, Q query tokens,
A agent tokens, K detections, L text length, D width, P people of a window.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ravar_jax.models.agent_attention import AgentBlock, AgentStream
from ravar_jax.models.layers import dense

PERSON_CLASS = 1  # COCO
NO_OBJECT_CLASS = 91
NUM_LABELS = 91  # rows of the label table: COCO ids 1..90 and "None"
NUM_ACTIONS = 80


class RefAtomNetOutput(NamedTuple):
    """What the model says of a clip and a sentence.

    Attributes:
        action_logits: (B, 80) float32.
        box: (B, 4) float32, x1, y1, x2, y2 in fractions of the frame, neither clipped nor ordered.
        blocks: each stream's `AgentStream` by the block's name.
    """

    action_logits: jax.Array
    box: jax.Array
    blocks: dict[str, AgentStream]


def corner_boxes(boxes: jax.Array, box_conversion: str) -> jax.Array:
    """Converts boxes (..., 4) from cx, cy, w, h to x1, y1, x2, y2, with w and h swapped as released if asked (Q6)."""
    center, size = boxes[..., :2], boxes[..., 2:]
    half = size / 2 if box_conversion == "correct" else size[..., ::-1] / 2
    return jnp.concatenate([center - half, center + half], axis=-1)


def pool_text(text_tokens: jax.Array, attention_mask: jax.Array, text_pooling: str) -> jax.Array:
    """Averages text tokens (B, L, D) over positions to (B, D) (Q5).

    `masked` counts valid positions only. `all_positions` counts padding too, up to the longest sentence of the global
    batch, as the release does when it pads to that length.
    """
    mask = attention_mask.astype(text_tokens.dtype)
    if text_pooling == "all_positions":
        longest = jnp.max(jnp.sum(attention_mask, axis=-1))
        positions = jnp.arange(text_tokens.shape[1])
        mask = jnp.broadcast_to((positions < longest).astype(mask.dtype)[None], mask.shape)
    total = jnp.einsum("bld,bl->bd", text_tokens, mask)
    return total / jnp.maximum(jnp.sum(mask, axis=1), 1.0)[:, None]


class _Head(nn.Module):
    """Three dense layers with ReLU; dropout, if any, stands before the first ReLU as released."""

    widths: tuple[int, int, int]
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = dense(self.widths[0], x.shape[-1], dtype=self.dtype, name="layer1")(x)
        x = nn.relu(nn.Dropout(self.dropout, deterministic=not train)(x))
        x = nn.relu(dense(self.widths[1], self.widths[0], dtype=self.dtype, name="layer2")(x))
        return dense(self.widths[2], self.widths[1], dtype=self.dtype, name="layer3")(x)


class RefAtomNet(nn.Module):
    """The three streams, their agent fusion and the two heads.

    Attributes:
        width: D of image and text tokens, of the label table and of the fusion (768 in the release).
        num_agent_tokens: A (4).
        mlp_ratio: hidden width of each block's MLP over D (4).
        num_query_tokens: N, image tokens a frame; text and boxes are expanded to as many (32).
        num_detections: K (100).
        action_dropout: in the action head, while training (0.2).
        text_pooling, box_conversion, detections_kept, cross_softmax, aggregation: the switches Q5 to Q10 of
            `configs/base.py`.
        dtype: of the computation; parameters, norms, softmaxes and outputs are float32.
    """

    width: int
    num_agent_tokens: int
    mlp_ratio: int
    num_query_tokens: int
    num_detections: int
    action_dropout: float
    text_pooling: str
    box_conversion: str
    detections_kept: str
    cross_softmax: str
    aggregation: str
    dtype: jnp.dtype = jnp.float32

    def _block(self, name: str) -> AgentBlock:
        return AgentBlock(
            self.width,
            self.num_agent_tokens,
            self.mlp_ratio,
            self.cross_softmax,
            self.dtype,
            name=name,
        )

    @nn.compact
    def __call__(
        self,
        image_tokens: jax.Array,
        text_tokens: jax.Array,
        attention_mask: jax.Array,
        boxes: jax.Array,
        class_ids: jax.Array,
        label_table: jax.Array,
        *,
        train: bool = False,
    ) -> RefAtomNetOutput:
        """Runs the fusion.

        Args:
            image_tokens: (B, T, N, D), or their mean over frames (B, N, D).
            text_tokens: (B, L, D).
            attention_mask: (B, L) int, 1 at valid positions.
            boxes: (B, K, 4), cx, cy, w, h as fractions of the frame.
            class_ids: (B, K) int, COCO ids 1..90 or 91 for no object; 0 counts as no object (Q16).
            label_table: (91, D), row r the embedding of COCO id r + 1, row 90 that of "None".
            train: whether dropout is on (needs the rng "dropout").
        """
        if image_tokens.ndim == 4:
            image_tokens = jnp.mean(image_tokens, axis=1)
        image_tokens, text_tokens = (x.astype(self.dtype) for x in (image_tokens, text_tokens))

        detection_tokens, box_mean = self._location_semantic_stream(boxes, class_ids, label_table)
        box_tokens = dense(
            self.num_query_tokens, self.num_detections, dtype=self.dtype, name="expand_boxes"
        )(detection_tokens.swapaxes(1, 2)).swapaxes(1, 2)
        box_stream = self._block("agent_box")(box_tokens)

        text = pool_text(text_tokens, attention_mask, self.text_pooling)
        semantic_tokens = dense(self.num_query_tokens, 1, dtype=self.dtype, name="expand_text")(
            text[:, :, None]
        ).swapaxes(1, 2)
        semantic_stream = self._block("agent_semantic")(semantic_tokens)

        temporal_stream = self._block("agent_temporal")(image_tokens, (semantic_stream, box_stream))

        semantic_mean, temporal_mean = semantic_stream.token_mean, temporal_stream.token_mean
        if self.aggregation == "sum":  # the detections skip their block, as released (Q10)
            fused = box_mean + semantic_mean + temporal_mean
        else:
            fused = (box_stream.token_mean + semantic_mean + temporal_mean) / 3.0

        box = _Head((512, 128, 4), 0.0, self.dtype, name="box_head")(fused, train)
        logits = _Head(
            (512, 256, NUM_ACTIONS), self.action_dropout, self.dtype, name="action_head"
        )(fused, train)
        blocks = {
            "agent_box": box_stream,
            "agent_semantic": semantic_stream,
            "agent_temporal": temporal_stream,
        }
        return RefAtomNetOutput(logits.astype(jnp.float32), box.astype(jnp.float32), blocks)

    def _location_semantic_stream(
        self, boxes: jax.Array, class_ids: jax.Array, label_table: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns detection tokens (B, K, D) and their mean (B, D) as `detections_kept` counts it (spec 3.3, Q7)."""
        rows = jnp.where(class_ids == 0, NO_OBJECT_CLASS, class_ids) - 1
        labels = jnp.take(label_table, rows, axis=0, mode="clip")
        inputs = jnp.concatenate([corner_boxes(boxes, self.box_conversion), labels], axis=-1)
        tokens = dense(
            self.width, 4 + label_table.shape[-1], dtype=self.dtype, name="project_detections"
        )(inputs.astype(self.dtype))
        count = jnp.asarray(self.num_detections, self.dtype)
        if self.detections_kept != "all_over_100":
            person = (class_ids == PERSON_CLASS)[..., None]
            tokens = jnp.where(person, tokens, 0)
            if self.detections_kept == "person_masked_mean":
                count = jnp.maximum(jnp.sum(person, axis=1), 1).astype(self.dtype)
        return tokens, jnp.sum(tokens, axis=1) / count
