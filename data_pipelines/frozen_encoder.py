"""The frozen models as the feature cache runs them: compiled, every batch spread over all devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ravar_jax.backbone import Backbone, encode_frames, encode_text
from ravar_jax.detector import Detector, detect


class FrozenEncoder:
    """The two halves of a backbone, and a detector, compiled, with the rows of a batch spread over all devices."""

    def __init__(self, backbone: Backbone, detector: Detector | None, *, pixels: str, dtype: str):
        """Args: detector: None where nothing is detected. pixels, dtype: `data.pixels` and `model.dtype`."""
        self.backbone = backbone
        self.num_devices = jax.local_device_count()
        mesh = Mesh(np.asarray(jax.local_devices()), ("data",))
        self._split = NamedSharding(mesh, PartitionSpec("data"))
        replicated = NamedSharding(mesh, PartitionSpec())
        self._params = jax.device_put(backbone.params, replicated)
        config, compute = backbone.config, jnp.dtype(dtype)
        self._text = jax.jit(
            lambda params, ids, mask: encode_text(config, params, ids, mask, dtype=compute)
        )

        def time_means(params: Any, frames: jax.Array, clips: jax.Array) -> jax.Array:
            """Frames (W, U, S, S, 3) and clips (C, T) -> (W, C, N, D)."""
            windows, read = frames.shape[:2]
            tokens = encode_frames(
                config, params, frames.reshape(-1, *frames.shape[2:]), dtype=compute
            )
            tokens = tokens.reshape(windows, read, *tokens.shape[1:])
            return jnp.stack([tokens[:, clip].mean(axis=1) for clip in clips], axis=1)

        self._time_means = jax.jit(time_means)
        if detector is not None:
            sizes = detector.sizes
            self._detector_params = jax.device_put(detector.params, replicated)
            self._detect = jax.jit(
                lambda params, frames: detect(sizes, params, frames, pixels=pixels, dtype=compute)
            )

    def time_means(self, frames: np.ndarray, clips: np.ndarray) -> np.ndarray:
        """Returns the time mean of the tokens of every clip, float32 (W, C, N, D)."""
        return np.asarray(
            self._time_means(self._params, jax.device_put(frames, self._split), clips)
        )

    def text(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Returns text tokens, float32 (n, L, D)."""
        return np.asarray(self._text(self._params, *jax.device_put((ids, mask), self._split)))

    def detections(self, key_frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns boxes float32 (W, K, 4) and class ids int32 (W, K) of key frames; needs the detector."""
        found = self._detect(self._detector_params, jax.device_put(key_frames, self._split))
        return np.asarray(found.boxes), np.asarray(found.class_ids)
