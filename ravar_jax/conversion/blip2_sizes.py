"""The sizes of a BLIP-2 first stage, read off a checkpoint's tensors.

A tensor's shape does not tell the heads; they are 88 wide in the image encoder and 64 in the Q-Former, as released.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ravar_jax.errors import UserError

VISION_HEAD_WIDTH = 88
QFORMER_HEAD_WIDTH = 64
TEXT_LENGTH = 32  # ids a sentence; the released extractor has no limit of its own

# What the sizes are read off: LAVIS's and Hugging Face's names. `blocks` and `layers` are patterns with a number.
NAMES = {
    "lavis": {
        "cls_token": "visual_encoder.cls_token",
        "positions": "visual_encoder.pos_embed",
        "patches": "visual_encoder.patch_embed.proj.weight",
        "vision_mlp": "visual_encoder.blocks.0.mlp.fc1.weight",
        "query_tokens": "query_tokens",
        "words": "Qformer.bert.embeddings.word_embeddings.weight",
        "text_positions": "Qformer.bert.embeddings.position_embeddings.weight",
        "qformer_mlp": "Qformer.bert.encoder.layer.0.intermediate.dense.weight",
        "blocks": r"visual_encoder\.blocks\.(\d+)\..*",
        "layers": r"Qformer\.bert\.encoder\.layer\.(\d+)\..*",
    },
    "hf": {
        "cls_token": "vision_model.embeddings.class_embedding",
        "positions": "vision_model.embeddings.position_embedding",
        "patches": "vision_model.embeddings.patch_embedding.weight",
        "vision_mlp": "vision_model.encoder.layers.0.mlp.fc1.weight",
        "query_tokens": "query_tokens",
        "words": "embeddings.word_embeddings.weight",
        "text_positions": "embeddings.position_embeddings.weight",
        "qformer_mlp": "qformer.encoder.layer.0.intermediate.dense.weight",
        "blocks": r"vision_model\.encoder\.layers\.(\d+)\..*",
        "layers": r"qformer\.encoder\.layer\.(\d+)\..*",
    },
}


def naming_of(names: Iterable[str]) -> str:
    """Returns "lavis" or "hf", whichever a checkpoint's names are.

    Raises:
        UserError: they are neither.
    """
    present = set(names)
    for naming, known in NAMES.items():
        if known["cls_token"] in present:
            return naming
    wanted = " or ".join(known["cls_token"] for known in NAMES.values())
    raise UserError(f"not a BLIP-2 first stage: no {wanted} among its {len(present)} tensors")


def sizes_of(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the attributes of a `backbone.BackboneConfig`.

    Args:
        tensors: PyTorch name -> array; only those that tell a size are read, so it may be lazy.

    Raises:
        UserError: a tensor that tells a size is missing or of an unexpected rank, or a width is not whole heads.
    """
    names = NAMES[naming_of(tensors)]

    def shape(part: str, rank: int) -> tuple[int, ...]:
        name = names[part]
        found = tuple(tensors[name].shape) if name in tensors else None
        if found is None or len(found) != rank:
            told = "missing" if found is None else found
            raise UserError(f"not a BLIP-2 first stage: {name} is {told}, expected {rank} axes")
        return found

    def depth(part: str) -> int:
        matches = (re.fullmatch(names[part], name) for name in tensors)
        return 1 + max((int(match[1]) for match in matches if match), default=-1)

    def heads(width: int, head_width: int, part: str) -> int:
        if width % head_width:
            raise UserError(f"the {part} is {width} wide, expected a multiple of {head_width}")
        return width // head_width

    vision_width, patch = shape("cls_token", 3)[-1], shape("patches", 4)[-1]
    grid = round((shape("positions", 3)[1] - 1) ** 0.5)
    num_query_tokens, width = shape("query_tokens", 3)[1:]
    vocab_size, max_positions = shape("words", 2)[0], shape("text_positions", 2)[0]
    return {
        "image_size": grid * patch,
        "text_length": min(TEXT_LENGTH, max_positions),
        "num_query_tokens": num_query_tokens,
        "vision": {
            "width": vision_width,
            "depth": depth("blocks"),
            "num_heads": heads(vision_width, VISION_HEAD_WIDTH, "image encoder"),
            "mlp_width": shape("vision_mlp", 2)[0],
            "patch_size": patch,
        },
        "qformer": {
            "width": width,
            "depth": depth("layers"),
            "num_heads": heads(width, QFORMER_HEAD_WIDTH, "Q-Former"),
            "mlp_width": shape("qformer_mlp", 2)[0],
            "vocab_size": vocab_size,
            "max_positions": max_positions,
        },
    }
