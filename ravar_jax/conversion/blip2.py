"""BLIP-2's first stage as LAVIS and as Hugging Face name it (spec section 8), and `models.blip2.Blip2`'s parameters.

    LAVIS         visual_encoder.*, ln_vision.*, query_tokens, Qformer.bert.*; q_bias and v_bias are two tensors
    Hugging Face  `Blip2ForImageTextRetrieval`: vision_model.*, query_tokens, embeddings.*, qformer.*; one fused bias,
                  whose key part must be zero, since the model has no bias on keys

Hugging Face's other BLIP-2 classes (`Blip2Model`, `Blip2ForConditionalGeneration`) leave out the text half of the
Q-Former, which the text stream needs: `from_torch` refuses them, naming what is missing.

The released sizes are a depth of 39 and of 12.
"""

import re
from collections.abc import Callable

from ravar_jax.conversion.bert import attention_rows, mlp_rows
from ravar_jax.conversion.mapping import Row, dense_rows, norm_rows
from ravar_jax.conversion.weight_files import LazyTensors

# What a checkpoint may hold beside the extractor: patterns of whole names.
LAVIS_IGNORED = (
    r"Qformer\.bert\.embeddings\.position_ids",  # 0, 1, 2, ...
    r"Qformer\.cls\..*",  # language-model head
    r"(vision|text)_proj\.(weight|bias)",  # 256-d, of the contrastive loss
    r"itm_head\.(weight|bias)",
    r"temp",
)
HF_IGNORED = (
    r"(qformer\.)?embeddings\.position_ids",
    r"(vision|text)_projection\.(weight|bias)",
    r"itm_head\.(weight|bias)",
    r"language_(model|projection)\..*",
)


def whole_names(tensors: LazyTensors) -> LazyTensors:
    """Returns LAVIS's names of a whole model, where one of its two public files has the image encoder's bare names.

    `eva_vit_g` also holds a last block and a head that LAVIS leaves out of BLIP-2.
    """
    if "cls_token" not in tensors:
        return tensors
    blocks = (re.fullmatch(r"blocks\.(\d+)\..*", name) for name in tensors)
    last = max((int(match[1]) for match in blocks if match), default=-1)

    def rename(name: str) -> str | None:
        if re.match(rf"(blocks\.{last}|norm|fc_norm|head)\.", name):
            return None
        bare = re.fullmatch(r"cls_token|pos_embed|(patch_embed|blocks)\..*", name)
        return f"visual_encoder.{name}" if bare else name

    return tensors.renamed(rename)


def lavis_table(
    vision_depth: int, qformer_depth: int, cross_attention_every: int = 2
) -> tuple[Row, ...]:
    """Returns the table of LAVIS's names; a RAVAR checkpoint has them behind `model.`."""
    block = _Stack("visual_encoder.blocks.{}", vision_depth)
    embeddings = "Qformer.bert.embeddings"
    return (
        Row(("visual_encoder.cls_token",), "visual_encoder/cls_token"),
        Row(("visual_encoder.pos_embed",), "visual_encoder/position_embedding"),
        *_patch_rows("visual_encoder.patch_embed.proj"),
        *block.rows(norm_rows, "norm1", "norm1"),
        *block.rows(_separate_bias_rows, "attn", "attention"),
        *block.rows(dense_rows, "attn.proj", "attention/output"),
        *block.rows(norm_rows, "norm2", "norm2"),
        *block.rows(dense_rows, "mlp.fc1", "mlp_in"),
        *block.rows(dense_rows, "mlp.fc2", "mlp_out"),
        *norm_rows("ln_vision", "vision_norm"),
        Row(("query_tokens",), "query_tokens"),
        *_text_embedding_rows(embeddings),
        *norm_rows(f"{embeddings}.LayerNorm", "query_former/embedding_norm"),
        *_qformer_rows("Qformer.bert.encoder.layer", "self", qformer_depth, cross_attention_every),
    )


def hf_blip2_table(
    vision_depth: int, qformer_depth: int, cross_attention_every: int = 2
) -> tuple[Row, ...]:
    """Returns the table of the names of Hugging Face's `Blip2ForImageTextRetrieval`.

    Its `post_layernorm` is LAVIS's `ln_vision`.
    """
    block = _Stack("vision_model.encoder.layers.{}", vision_depth)
    embeddings = "vision_model.embeddings"
    return (
        Row((f"{embeddings}.class_embedding",), "visual_encoder/cls_token"),
        Row((f"{embeddings}.position_embedding",), "visual_encoder/position_embedding"),
        *_patch_rows(f"{embeddings}.patch_embedding"),
        *block.rows(norm_rows, "layer_norm1", "norm1"),
        *block.rows(_fused_bias_rows, "self_attn", "attention"),
        *block.rows(dense_rows, "self_attn.projection", "attention/output"),
        *block.rows(norm_rows, "layer_norm2", "norm2"),
        *block.rows(dense_rows, "mlp.fc1", "mlp_in"),
        *block.rows(dense_rows, "mlp.fc2", "mlp_out"),
        *norm_rows("vision_model.post_layernorm", "vision_norm"),
        Row(("query_tokens",), "query_tokens"),
        *_text_embedding_rows("embeddings"),
        *norm_rows("qformer.layernorm", "query_former/embedding_norm"),
        *_qformer_rows("qformer.encoder.layer", "attention", qformer_depth, cross_attention_every),
    )


class _Stack:
    """Blocks that are modules of their own in PyTorch and one scanned stack here."""

    def __init__(self, pattern: str, depth: int):
        self._names = [pattern.format(number) for number in range(depth)]

    def rows(
        self, make: Callable[[str, str], tuple[Row, ...]], torch_name: str, path: str
    ) -> list[Row]:
        """Returns rows as `make` does, each of them over all blocks."""
        blocks = [
            make(f"{name}.{torch_name}", f"visual_encoder/blocks/{path}") for name in self._names
        ]
        return [
            Row(tuple(row.torch_names[0] for row in same), same[0].path, same[0].layout, True)
            for same in zip(*blocks, strict=True)
        ]


def _separate_bias_rows(torch_name: str, path: str) -> tuple[Row, ...]:
    return (
        Row((f"{torch_name}.q_bias",), f"{path}/query/bias"),
        Row((f"{torch_name}.v_bias",), f"{path}/value/bias"),
        Row((f"{torch_name}.qkv.weight",), f"{path}/{{}}/kernel", "qkv"),
    )


def _fused_bias_rows(torch_name: str, path: str) -> tuple[Row, ...]:
    return (
        Row((f"{torch_name}.qkv.weight",), f"{path}/{{}}/kernel", "qkv"),
        Row((f"{torch_name}.qkv.bias",), f"{path}/{{}}/bias", "q0v_bias"),
    )


def _patch_rows(torch_name: str) -> tuple[Row, ...]:
    path = "visual_encoder/patch_embedding"
    return (
        Row((f"{torch_name}.weight",), f"{path}/kernel", "conv"),
        Row((f"{torch_name}.bias",), f"{path}/bias"),
    )


def _text_embedding_rows(torch_name: str) -> tuple[Row, ...]:
    return tuple(
        Row((f"{torch_name}.{kind}_embeddings.weight",), f"query_former/{kind}_embedding/embedding")
        for kind in ("word", "position")
    )


def _qformer_rows(layers: str, inner: str, depth: int, cross_attention_every: int) -> list[Row]:
    rows = []
    for number in range(depth):
        layer, path = f"{layers}.{number}", f"query_former/layer{number}"
        rows += attention_rows(f"{layer}.attention", inner, f"{path}/attention")
        if number % cross_attention_every == 0:
            rows += attention_rows(f"{layer}.crossattention", inner, f"{path}/cross_attention")
        rows += mlp_rows(layer, path)
        rows += mlp_rows(layer, path, suffix="_query", prefix="query_")
    return rows
