"""The frozen detector as a folder, and the function that detects with it.

folder/config.json   the sizes of a `models.detr.Detr`
folder/params/       its parameters, an orbax checkpoint

key frames, uint8 --normalised--> DETR --most likely class of each query--> boxes, class ids
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from ravar_jax.errors import UserError
from ravar_jax.models.detr import Detections, Detr, detections
from ravar_jax.models.refatomnet import NO_OBJECT_CLASS
from ravar_jax.weights import hash_weights, load_params

# ImageNet's statistics, RGB, with which DETR was trained.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Detector:
    """A loaded detector.

    Attributes:
        sizes: attributes of its `models.detr.Detr`.
        params: nested dict of float32 arrays.
    """

    sizes: dict[str, Any]
    params: Any

    @property
    def num_queries(self) -> int:
        """K, detections a frame."""
        return self.sizes["num_queries"]

    @functools.cached_property
    def weight_hashes(self) -> dict[str, str]:
        """SHA-256 of every parameter, by its path."""
        return hash_weights(self.params)


def param_shapes(sizes: dict[str, Any]) -> Any:
    """Returns the parameters of a `models.detr.Detr` as `ShapeDtypeStruct`s."""
    pixels = jnp.zeros((1, 64, 64, 3))  # of any size
    return jax.eval_shape(Detr(**sizes).init, jax.random.key(0), pixels)["params"]


def load_shapes(folder: str) -> tuple[dict[str, Any], Any]:
    """Reads a detector's sizes from its folder; returns them and its parameters as `ShapeDtypeStruct`s.

    Raises:
        UserError: the file is missing, or not of a detector of COCO's classes.
    """
    file = pathlib.Path(folder) / "config.json"
    try:
        sizes = json.loads(file.read_text())
        shapes = param_shapes(sizes)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"model.detector={folder}: {file.name} is not of a detector ({reason}); write the folder with "
            "launch/convert_weights.py --source detr"
        ) from error
    if sizes["num_classes"] != NO_OBJECT_CLASS + 1:
        raise UserError(
            f"model.detector={folder}: {sizes['num_classes']} classes, expected {NO_OBJECT_CLASS + 1}, COCO's"
        )
    return sizes, shapes


def load_detector(folder: str) -> Detector:
    """Loads a detector from its folder, as `launch/convert_weights.py --source detr` writes it.

    Raises:
        UserError: as `load_shapes`, or the parameters are missing, unreadable or not those of the sizes.
    """
    sizes, shapes = load_shapes(folder)
    return Detector(sizes, load_params(folder, shapes))


def configured_detector(model_config: Any) -> Detector | None:
    """Returns the detector that the `model` section of a config names; None unless `model.detections` is `detr`.

    Raises:
        UserError: as `load_detector`, or the detector has other than `model.num_detections` queries.
    """
    if model_config.detections != "detr":
        return None
    detector = load_detector(model_config.detector)
    check_queries(model_config, detector.num_queries)
    return detector


def check_queries(model_config: Any, num_queries: int) -> None:
    """Refuses a detector that has other than `model.num_detections` queries.

    Raises:
        UserError: naming the key.
    """
    if num_queries != model_config.num_detections:
        raise UserError(
            f"model.num_detections={model_config.num_detections}, but the detector has {num_queries} queries"
        )


def normalize(key_frames: jax.Array, pixels: str) -> jax.Array:
    """Maps uint8 key frames (..., H, W, 3) to what the detector takes, float32.

    With `pixels` `rgb` ImageNet's mean and standard deviation are taken out of fractions of 255; with `released` the
    fractions are the result, as the release forgets the rest (spec 2.4, Q2).
    """
    fractions = key_frames.astype(jnp.float32) / 255
    if pixels == "released":
        return fractions
    channels = (1,) * (key_frames.ndim - 1) + (3,)
    mean, std = (jnp.asarray(values, jnp.float32).reshape(channels) for values in (MEAN, STD))
    return (fractions - mean) / std


def detect(
    sizes: dict[str, Any],
    params: Any,
    key_frames: jax.Array,
    *,
    pixels: str,
    dtype: jnp.dtype = jnp.float32,
    dropout_rng: jax.Array | None = None,
) -> Detections:
    """Detects objects; jittable, and no gradient goes back through it.

    All K queries are detections, in query order: the fusion's dense layer over detections has weights for each query
    of its own, so the release neither sorts nor drops any. A query's class is the most likely of all 92, "no object"
    and the unused 0 included; what becomes of them is the fusion's business (`model.detections_kept`, Q16).

    Args:
        sizes: of a `Detector`.
        params: of a `Detector`.
        key_frames: uint8 (B, H, W, 3) in the chain of `pixels`, not normalised.
        pixels: `rgb` or `released`, `data.pixels`.
        dtype: of the computation.
        dropout_rng: turns DETR's dropout on, as the release leaves it while it trains (Q13).

    Returns:
        Class ids int32 (B, K), 0..91, and boxes float32 (B, K, 4), cx, cy, w, h in [0, 1].

    Source: the released model's detection branch (spec 3.2, 3.3).
    """
    output: Any = Detr(**sizes, dtype=dtype).apply(
        {"params": params},
        normalize(key_frames, pixels),
        dropout_rng is None,
        rngs={} if dropout_rng is None else {"dropout": dropout_rng},
    )
    return jax.lax.stop_gradient(detections(output))
