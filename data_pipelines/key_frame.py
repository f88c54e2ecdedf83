"""The key frame as the detector takes it: its place in the window, its size and its pixels (spec 2.4)."""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.frame_sampling import FrameSampler, key_frame_sampler
from data_pipelines.preprocess import WHOLE, Crop, show_frames


@dataclasses.dataclass(frozen=True)
class KeyFrame:
    """How the detector's frame is made.

    Attributes:
        sampler: of its one position.
        height: of the result, pixels.
        width: of the result, pixels; the aspect ratio is not kept.
        pixels: `rgb` or `released`.
    """

    sampler: FrameSampler
    height: int
    width: int
    pixels: str

    def show(self, frame: np.ndarray, crop: Crop = WHOLE) -> np.ndarray:
        """Returns (a crop of) a frame uint8 (H, W, 3) RGB, not normalised, as uint8 (height, width, 3)."""
        return show_frames(frame[np.newaxis], self.pixels, self.height, self.width, crop)[0]

    def empty(self) -> np.ndarray:
        """Returns zeros in place of a frame."""
        return np.zeros((self.height, self.width, 3), np.uint8)


def key_frame(config: ConfigDict) -> KeyFrame | None:
    """Returns the key frame of a config; None unless `model.detections` is `detr`."""
    model = config.model
    if model.detections != "detr":
        return None
    return KeyFrame(
        sampler=key_frame_sampler(config),
        height=model.detector_height,
        width=model.detector_width,
        pixels=config.data.pixels,
    )
