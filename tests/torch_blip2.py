"""BLIP-2's first stage as Hugging Face `transformers` has it, of the sizes of ours."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers


def make_blip2(
    vision: Mapping[str, Any],
    qformer: Mapping[str, Any],
    num_query_tokens: int,
    image_size: int,
    **others: Any,
) -> torch.nn.Module:
    """Returns the model, not training, with new weights.

    Args:
        vision: attributes of `models.vision_transformer.VisionTransformer`.
        qformer: attributes of `models.qformer.QFormer`.
        num_query_tokens: image tokens a frame.
        image_size: side of a frame in pixels.
        others: of `transformers.Blip2Config`.
    """
    config = transformers.Blip2Config(
        num_query_tokens=num_query_tokens,
        vision_config={
            "hidden_size": vision["width"],
            "intermediate_size": vision["mlp_width"],
            "num_hidden_layers": vision["depth"],
            "num_attention_heads": vision["num_heads"],
            "image_size": image_size,
            "patch_size": vision["patch_size"],
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu",
        },
        qformer_config={
            "vocab_size": qformer["vocab_size"],
            "hidden_size": qformer["width"],
            "num_hidden_layers": qformer["depth"],
            "num_attention_heads": qformer["num_heads"],
            "intermediate_size": qformer["mlp_width"],
            "max_position_embeddings": qformer["max_positions"],
            "cross_attention_frequency": 2,
            "encoder_hidden_size": vision["width"],
            "layer_norm_eps": 1e-12,
            "use_qformer_text_input": True,
        },
        **others,
    )
    model = transformers.Blip2ForImageTextRetrieval(config).eval()
    model.vision_model.post_layernorm.eps = 1e-5  # LAVIS's; transformers has one epsilon for all
    return model
