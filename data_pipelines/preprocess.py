"""From decoded frames and stored lists to the arrays of an example.

uint8 frames -> `released_pixels` (only where the release is reproduced) -> `resize_bicubic` -> uint8 frames;
                `show_frames` is both
detections   -> `pad_detections` -> 100 boxes and class ids
label ids    -> `multi_hot`      -> 80 zeros and ones
"""

import numpy as np
from PIL import Image

from data_pipelines.schema import NUM_ACTIONS
from ravar_jax.models.refatomnet import NO_OBJECT_CLASS

Crop = tuple[float, float, float, float]
WHOLE: Crop = (0.0, 0.0, 1.0, 1.0)


def resize_bicubic(images: np.ndarray, height: int, width: int, crop: Crop = WHOLE) -> np.ndarray:
    """Resizes with Pillow's antialiased bicubic filter; the aspect ratio is not kept.

    Pillow itself, for equal grey levels: as matrix products in TensorFlow the same two passes cost twice the time on
    a CPU, because the filter touches few pixels of a row.

    Args:
        images: uint8 (N, H, W, 3).
        height: of the result, pixels.
        width: of the result, pixels.
        crop: what of the images is resized, x1, y1, x2, y2 as fractions.

    Returns:
        uint8 (N, height, width, 3).
    """
    resized = np.empty((len(images), height, width, 3), np.uint8)
    rows, columns = images.shape[1:3]
    box = (crop[0] * columns, crop[1] * rows, crop[2] * columns, crop[3] * rows)
    for row, image in enumerate(np.asarray(images)):
        picture = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, box)
        resized[row] = np.asarray(picture)
    return resized


def released_pixels(frames: np.ndarray) -> np.ndarray:
    """Returns frames as the released loader hands them on: photographic negatives with red and blue exchanged.

    Args:
        frames: uint8 (..., 3) RGB.

    Returns:
        uint8 (..., 3), (256 - u) mod 256 of the channels in the order B, G, R.

    Source: the released data set file multiplies BGR bytes by 255 in uint8 and declares them RGB.
    """
    return np.negative(frames[..., ::-1])  # of uint8: modulo 256


def show_frames(
    frames: np.ndarray, pixels: str, height: int, width: int, crop: Crop = WHOLE
) -> np.ndarray:
    """Returns frames uint8 (N, H, W, 3) RGB as `data.pixels` wants them, resized: uint8 (N, height, width, 3)."""
    frames = released_pixels(frames) if pixels == "released" else frames
    return resize_bicubic(frames, height, width, crop)


def pad_detections(
    boxes: np.ndarray, class_ids: np.ndarray, scores: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the `count` highest scoring detections, padded with box 0 and class 91.

    Args:
        boxes: float32 (K, 4), cx, cy, w, h in [0, 1].
        class_ids: int (K,), COCO ids.
        scores: float32 (K,).
        count: rows of the result.

    Returns:
        boxes float32 (count, 4) and class ids int32 (count,), by descending score; ties keep their order.
    """
    kept = np.argsort(-scores, kind="stable")[:count]
    padded_boxes = np.zeros((count, 4), np.float32)
    padded_ids = np.full(count, NO_OBJECT_CLASS, np.int32)
    padded_boxes[: len(kept)] = boxes[kept]
    padded_ids[: len(kept)] = class_ids[kept]
    return padded_boxes, padded_ids


def multi_hot(labels: tuple[int, ...]) -> np.ndarray:
    """Returns float32 (80,) with a one in column k-1 for every AVA action id k of `labels` (1..80)."""
    columns = np.zeros(NUM_ACTIONS, np.float32)
    columns[np.asarray(labels, np.int64) - 1] = 1.0
    return columns
