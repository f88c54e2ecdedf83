"""The clips of one window of a video file, as evaluation would read them from a dataset."""

import os
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.frame_sampling import evaluation_sampler
from data_pipelines.key_frame import key_frame
from data_pipelines.preprocess import show_frames
from data_pipelines.video import KEY_POSITION, read_window


class EvaluationFrames(NamedTuple):
    """What is read of a window of a video file, all uint8 0..255; negatives where `data.pixels` is `released`.

    Attributes:
        clips: (E, T, S, S, 3).
        key_frame: (H, W, 3), what the detector takes; None where there is no detector.
        picture: the key frame in the video's own size and colours, always RGB.
    """

    clips: np.ndarray
    key_frame: np.ndarray | None
    picture: np.ndarray


def read_evaluation_frames(
    config: ConfigDict, video: str | os.PathLike, key_time: float
) -> EvaluationFrames:
    """Decodes a window at the positions, sizes and pixel chain of the config's evaluation.

    Args:
        config: decides all of it.
        video: the file.
        key_time: seconds from the first frame.

    Raises:
        UserError: the window cannot be read; names the file.
    """
    sampler, key = evaluation_sampler(config), key_frame(config)
    detected = [KEY_POSITION] if key is None else key.sampler.positions.tolist()
    wanted = np.union1d(sampler.positions, [KEY_POSITION, *detected]).tolist()
    frames = dict(zip(wanted, read_window(video, key_time, wanted)[0], strict=True))
    side = config.data.image_size
    kept = np.stack([frames[position] for position in sampler.positions])
    return EvaluationFrames(
        clips=show_frames(kept, config.data.pixels, side, side)[sampler.rows],
        key_frame=None if key is None else key.show(frames[int(key.sampler.positions[0])]),
        picture=frames[KEY_POSITION],
    )
