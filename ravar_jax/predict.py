"""One clip and one sentence to a prediction.

frames (E, T, S, S, 3), key frame, token ids (1, L) --model--> action logits (80,), box (4,)
action logits, box, frame size --> the dictionary that `prediction.json` holds
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ravar_jax.class_names import AVA_ACTIONS
from ravar_jax.models.refatomnet import NO_OBJECT_CLASS
from ravar_jax.tasks.task import Task
from ravar_jax.tokenizer import Tokenizer

NUM_LISTED = 10
NO_DETECTOR = "none: this run uses no detector; its location-semantic stream saw no objects"


def detections_source(config: ConfigDict) -> str:
    """Returns in words where a run's detections come from when it predicts on a video file."""
    if config.model.detections != "detr" or config.data.video == "blank":
        return NO_DETECTOR
    return f"detr: {config.model.detector} on the key frame"


def single_batch(
    config: ConfigDict,
    tokenizer: Tokenizer,
    clips: np.ndarray,
    sentence: str,
    key_frame: np.ndarray | None = None,
) -> tuple[dict[str, np.ndarray], bool]:
    """Returns an evaluation batch of one example, and whether its sentence was too long and cut.

    The example has no truth, and no detections but those that the detector finds in its key frame. A run without
    sentences (`data.sentences` is `blank`) is given none.

    Args:
        config: of the run.
        tokenizer: of its backbone.
        clips: (E, T, S, S, 3) uint8 RGB 0..255, the evaluation clips of the window, resized, not normalised.
        sentence: describes one person.
        key_frame: (H, W, 3) uint8, what the detector takes, not normalised; None where there is no detector.
    """
    given = "" if config.data.sentences == "blank" else sentence
    token_ids, attention_mask, num_truncated = tokenizer.encode([given], config.data.text_length)
    num_detections = config.model.num_detections
    batch = {
        "frames": clips[None],
        "token_ids": token_ids,
        "attention_mask": attention_mask,
        "boxes": np.zeros((1, num_detections, 4), np.float32),
        "class_ids": np.full((1, num_detections), NO_OBJECT_CLASS, np.int32),
        "target_box": np.zeros((1, 4), np.float32),
        "action_labels": np.zeros((1, len(AVA_ACTIONS)), np.float32),
        "mask": np.ones((1,), np.float32),
        "example_id": np.zeros((1,), np.int32),
    }
    if key_frame is not None:
        batch["key_frame"] = key_frame[None]
    return batch, num_truncated > 0


def predict(
    task: Task, params: Any, frozen: Any, batch: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Runs the model on a batch of one.

    Returns:
        Action logits (80,) float32 and box (4,) float32 x1, y1, x2, y2 as fractions, not clipped.

    Raises:
        ValueError: a value is not finite, which a trained checkpoint never gives.
    """
    output = jax.device_get(jax.jit(task.predict)(params, frozen, dict(batch)))
    logits, box = np.asarray(output["action_logits"][0]), np.asarray(output["box"][0])
    if not (np.isfinite(logits).all() and np.isfinite(box).all()):
        raise ValueError("the model's action logits or box are not finite")
    return logits, box


def prediction(
    *,
    video: str,
    sentence: str,
    time_seconds: float,
    action_logits: np.ndarray,
    box: np.ndarray,
    frame_size: tuple[int, int],
    detections_source: str,
    frames_repeated: int,
) -> dict[str, Any]:
    """Returns what `prediction.json` holds.

    Args:
        video: the file as the user named it.
        sentence: as given.
        time_seconds: of the key frame, from the start of the video.
        action_logits: (80,).
        box: (4,) x1, y1, x2, y2 as fractions of the frame, possibly outside it.
        frame_size: width and height of the video in pixels.
        detections_source: where the location-semantic stream's detections came from, in words.
        frames_repeated: how many of the window's 90 positions lie outside the video and repeat its nearest frame.

    Returns:
        `video`, `sentence`, `time_seconds`, `actions` (10 of `{id, name, probability}`, descending), `box` (fractions)
        and `box_pixels`, both x1, y1, x2, y2 clipped to the frame, `detections_source`, `frames_repeated`.
    """
    probabilities = 1.0 / (1.0 + np.exp(-np.clip(action_logits.astype(np.float64), -60.0, 60.0)))
    columns = np.argsort(-probabilities, kind="stable")[:NUM_LISTED]
    clipped = np.clip(box.astype(np.float64), 0.0, 1.0)
    return {
        "video": video,
        "sentence": sentence,
        "time_seconds": round(float(time_seconds), 3),
        "actions": [
            {
                "id": int(column) + 1,
                "name": AVA_ACTIONS[int(column) + 1],
                "probability": round(float(probabilities[column]), 6),
            }
            for column in columns
        ],
        "box": [round(float(value), 6) for value in clipped],
        "box_pixels": [round(float(value), 1) for value in clipped * [*frame_size, *frame_size]],
        "detections_source": detections_source,
        "frames_repeated": int(frames_repeated),
    }
