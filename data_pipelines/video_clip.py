"""The clips of one window of a video file, as evaluation would read them from a dataset."""

import os

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.frame_sampling import evaluation_sampler
from data_pipelines.preprocess import released_pixels, resize_bicubic
from data_pipelines.video import KEY_POSITION, read_window


def read_evaluation_clips(
    config: ConfigDict, video: str | os.PathLike, key_time: float
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a window at the positions, size and pixel chain of the config's evaluation.

    Args:
        config: its `data` section decides all of it.
        video: the file.
        key_time: seconds from the first frame.

    Returns:
        Clips (E, T, S, S, 3) and the key frame (H, W, 3) in the video's own size, both uint8 RGB 0..255; only the
        clips are negatives where `data.pixels` is `released`.

    Raises:
        UserError: the window cannot be read; names the file.
    """
    sampler = evaluation_sampler(config)
    wanted = np.union1d(sampler.positions, [KEY_POSITION])
    frames, _ = read_window(video, key_time, wanted.tolist())
    kept = np.stack([frames[row] for row in np.searchsorted(wanted, sampler.positions)])
    if config.data.pixels == "released":
        kept = released_pixels(kept)
    side = config.data.image_size
    resized = resize_bicubic(kept, side, side)
    return resized[sampler.rows], frames[int(np.searchsorted(wanted, KEY_POSITION))]
