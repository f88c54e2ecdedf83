"""The steps of `launch/cache_features.py`, traced over the devices of a slice from sizes alone."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from data_pipelines.frame_sampling import cached_positions
from data_pipelines.frozen_encoder import (
    encoder_functions,
    encoder_shardings,
    round_up,
    windows_a_batch,
)
from ravar_jax.backbone import Backbone
from ravar_jax.detector import Detector
from ravar_jax.sharding import with_sharding


def trace_cache_steps(
    config: ConfigDict,
    backbone: Backbone,
    detector: Detector | None,
    devices: Sequence[jax.Device],
    batch_size: int,
) -> dict[str, tuple[jax.stages.Traced, int, str]]:
    """Returns step -> (what is compiled, rows, what a row is).

    Each host runs them on its own devices; here they span all, every device with as many rows as on its host.

    Args:
        config: one that can be cached.
        backbone: with arrays or shapes for weights.
        detector: likewise; None without.
        devices: of all hosts.
        batch_size: `--batch_size` of a host.
    """
    data, model = config.data, config.model
    hosts = len({device.process_index for device in devices})
    own = len(devices) // hosts
    read = len(cached_positions(config))
    windows = hosts * windows_a_batch(batch_size, read, own)
    sentences = hosts * round_up(batch_size, own)
    split, whole = encoder_shardings(devices)
    functions = encoder_functions(config, backbone.config, detector)

    def rows(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=split)

    params = with_sharding(backbone.params, whole)
    frames = rows((windows, read, data.image_size, data.image_size, 3), jnp.uint8)
    clips = jax.ShapeDtypeStruct((1 + data.eval_clips, data.num_frames), jnp.int32)
    ids = rows((sentences, data.text_length), jnp.int32)
    steps = {
        "cache frames": (functions.time_means.trace(params, frames, clips), windows, "windows"),
        "cache sentences": (functions.text.trace(params, ids, ids), sentences, "sentences"),
    }
    if detector is not None:
        size = (model.detector_height, model.detector_width, 3)
        found = functions.detect.trace(
            with_sharding(detector.params, whole), rows((windows, *size), jnp.uint8)
        )
        steps["cache detections"] = (found, windows, "key frames")
    return steps
