"""The golden checks of the frozen backbones: BLIP-2's first stage and DETR."""

import ast
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ravar_jax import backbone
from ravar_jax.conversion.blip2 import lavis_table
from ravar_jax.conversion.detr import detr_table
from ravar_jax.models.blip2 import Blip2
from ravar_jax.models.detr import DETR_R50, Detr
from tests.golden_values import OUTPUT_TOLERANCE, Arrays, Result, max_error, seeded_params


def check_detr(golden: Arrays) -> Iterator[Result]:
    """DETR-R50 at its full size, on images that only went through a division by 255."""
    model = Detr(**DETR_R50)
    image = jnp.asarray(golden["image"], jnp.float32) / 255
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image)["params"])
    depths = model.resnet["depths"]
    table = detr_table(depths, model.encoder_depth, model.decoder_depth)
    params = seeded_params(int(golden["seed"]), table, shapes)
    with jax.default_matmul_precision("highest"):
        output: Any = jax.jit(model.apply)({"params": params}, image)
    feature_map = np.asarray(output.feature_map)
    # The file has channels before rows and columns, as PyTorch does, and the mean over images too.
    c5_slice = feature_map[..., : golden["c5_slice"].shape[1]].transpose(0, 3, 1, 2)
    yield "c5_mean", max_error(feature_map.mean((0, 1, 2)), golden["c5_mean"]), OUTPUT_TOLERANCE
    yield "c5_slice", max_error(c5_slice, golden["c5_slice"]), OUTPUT_TOLERANCE
    for name, ours in (("pred_logits", output.class_logits), ("pred_boxes", output.boxes)):
        yield name, max_error(ours, golden[name]), OUTPUT_TOLERANCE


def check_blip2(golden: Arrays) -> Iterator[Result]:
    """BLIP-2's image encoder, its norm, and the Q-Former's image and text modes."""
    sizes = ast.literal_eval(str(golden["config"]))
    seed, text_ids = int(golden["seed"]), golden["text_ids"].astype(np.int32)
    config = backbone.BackboneConfig(
        image_size=sizes["img"],
        text_length=text_ids.shape[1],
        num_query_tokens=sizes["nq"],
        vision={
            "width": sizes["dim"],
            "depth": sizes["depth"],
            "num_heads": sizes["heads"],
            "mlp_width": int(sizes["dim"] * sizes["mlp"]),
            "patch_size": 14,
        },
        qformer={
            "width": sizes["qdim"],
            "depth": sizes["qlayers"],
            "num_heads": sizes["qheads"],
            "mlp_width": 4 * sizes["qdim"],
            "vocab_size": sizes["vocab"],
            "max_positions": 64,  # as the file was made with; not in its config
        },
    )
    table = lavis_table(sizes["depth"], sizes["qlayers"])
    params = seeded_params(seed, table, jax.eval_shape(config.init, jax.random.key(0)))

    with jax.default_matmul_precision("highest"):
        pixels = backbone.normalize(jnp.asarray(golden["image"]))
        vit, normed = config.module().apply({"params": params}, pixels, method=_vision_features)
        image_tokens = backbone.encode_frames(config, params, jnp.asarray(golden["image"]))
        text_tokens = backbone.encode_text(config, params, text_ids, golden["text_mask"])

    yield "vit", max_error(vit, golden["vit"]), OUTPUT_TOLERANCE
    normed = normed[:, : golden["ln_vision"].shape[1]]
    yield "ln_vision", max_error(normed, golden["ln_vision"]), OUTPUT_TOLERANCE
    yield "query_output", max_error(image_tokens, golden["query_output"]), OUTPUT_TOLERANCE
    yield "text_output", max_error(text_tokens, golden["text_output"]), OUTPUT_TOLERANCE


def _vision_features(model: Blip2, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    features = model.visual_encoder(pixels)
    return features, model.vision_norm(features)
