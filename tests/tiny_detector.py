"""A detector of a few thousand random weights, for tests of what runs one."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ravar_jax.conversion.convert import write_model
from ravar_jax.models.detr import Detr

HEIGHT, WIDTH, QUERIES = 21, 30, 7
SIZES: dict[str, Any] = {
    "resnet": {"stem_width": 6, "widths": (8, 12), "depths": (1, 2)},
    "width": 20,
    "encoder_depth": 1,
    "decoder_depth": 2,
    "num_heads": 5,
    "mlp_width": 28,
    "num_queries": QUERIES,
    "num_classes": 92,
}


def write_detector(folder: Path, seed: int = 7, **changed: Any) -> None:
    """Writes a detector; that of seed 7 finds people, other things and nothing, which depend on frame and query."""
    sizes = SIZES | changed
    pixels = jnp.zeros((1, 64, 64, 3))
    shapes = jax.eval_shape(Detr(**sizes).init, jax.random.key(0), pixels)["params"]
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape)
        if path[-1].key == "var":
            noise = np.exp(0.5 * noise)
        elif leaf.ndim >= 2:
            # Attention is far from uniform, and the residual sums of the ResNet do not grow.
            gain = 1 if path[0].key == "resnet" else 3
            noise *= gain / np.sqrt(np.prod(leaf.shape[:-1]))
        else:
            noise = 1 + 0.3 * noise if path[-1].key == "scale" else 0.2 * noise
        return noise.astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    params["class_head"]["bias"][[1, -1]] += 9
    folder.mkdir(parents=True)
    write_model(folder, params, sizes)


def settings(folder: Path) -> dict[str, Any]:
    """Returns the config keys of a run with the detector in `folder`."""
    return {
        "model.detections": "detr",
        "model.detector": str(folder),
        "model.detector_height": HEIGHT,
        "model.detector_width": WIDTH,
        "model.num_detections": QUERIES,
    }
