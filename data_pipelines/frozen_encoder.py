"""The frozen models as the feature cache runs them: compiled, every batch spread over all devices."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from ravar_jax.backbone import Backbone, BackboneConfig, encode_frames, encode_text
from ravar_jax.detector import Detector, detect
from ravar_jax.gpu import compiler_options
from ravar_jax.models.detr import Detections


class EncoderFunctions(NamedTuple):
    """The compiled functions of the feature cache.

    Attributes:
        time_means: (backbone's parameters, frames (W, U, S, S, 3), clips (C, T)) -> (W, C, N, D).
        text: (backbone's parameters, ids (n, L), mask (n, L)) -> (n, L, D).
        detect: (detector's parameters, key frames (W, H, W, 3)) -> `Detections`; None without a detector.
    """

    time_means: Any
    text: Any
    detect: Any


def encoder_functions(
    config: ConfigDict, sizes: BackboneConfig, detector: Detector | None
) -> EncoderFunctions:
    """Returns the jitted functions of a backbone of these sizes and a detector, of which only the sizes are read."""
    sizes, dtype = sizes.compiled_as(config.model), jnp.dtype(config.model.dtype)

    def time_means(params: Any, frames: jax.Array, clips: jax.Array) -> jax.Array:
        windows, read = frames.shape[:2]
        tokens = encode_frames(sizes, params, frames.reshape(-1, *frames.shape[2:]), dtype=dtype)
        tokens = tokens.reshape(windows, read, *tokens.shape[1:])
        return jnp.stack([tokens[:, clip].mean(axis=1) for clip in clips], axis=1)

    def text(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return encode_text(sizes, params, ids, mask, dtype=dtype)

    def detected(params: Any, frames: jax.Array) -> Detections:
        assert detector is not None
        return detect(detector.sizes, params, frames, pixels=config.data.pixels, dtype=dtype)

    return EncoderFunctions(
        jax.jit(time_means, compiler_options=compiler_options()),
        jax.jit(text),
        None if detector is None else jax.jit(detected),
    )


def windows_a_batch(batch_size: int, frames: int, devices: int) -> int:
    """Returns how many windows of so many frames are encoded together: about `batch_size` frames, equally a device."""
    return round_up(math.ceil(batch_size / frames), devices)


def round_up(value: int, multiple: int) -> int:
    """Returns the smallest multiple that is not less than `value`."""
    return -(-value // multiple) * multiple


def encoder_shardings(devices: Sequence[jax.Device]) -> tuple[NamedSharding, NamedSharding]:
    """Returns how a batch (its rows split over all devices) and the weights (whole on each) lie."""
    mesh = Mesh(np.asarray(devices), ("data",))
    return NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())


class FrozenEncoder:
    """The two halves of a backbone, and a detector, compiled, with the rows of a batch spread over all devices."""

    def __init__(self, config: ConfigDict, backbone: Backbone, detector: Detector | None):
        """Places the weights; without a detector nothing is detected."""
        self.backbone = backbone
        self.num_devices = jax.local_device_count()
        self._split, replicated = encoder_shardings(jax.local_devices())
        self._params = jax.device_put(backbone.params, replicated)
        if detector is not None:
            self._detector_params = jax.device_put(detector.params, replicated)
        self._functions = encoder_functions(config, backbone.config, detector)

    def time_means(self, frames: np.ndarray, clips: np.ndarray) -> np.ndarray:
        """Returns the time mean of the tokens of every clip, float32 (W, C, N, D)."""
        return np.asarray(
            self._functions.time_means(self._params, jax.device_put(frames, self._split), clips)
        )

    def text(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Returns text tokens, float32 (n, L, D)."""
        return np.asarray(
            self._functions.text(self._params, *jax.device_put((ids, mask), self._split))
        )

    def detections(self, key_frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns boxes float32 (W, K, 4) and class ids int32 (W, K) of key frames; needs the detector."""
        found = self._functions.detect(
            self._detector_params, jax.device_put(key_frames, self._split)
        )
        return np.asarray(found.boxes), np.asarray(found.class_ids)
