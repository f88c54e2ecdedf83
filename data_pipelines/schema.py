"""The record: one window of video with its described people, one definition for writers and readers.

A builder yields `(clip_id, record)` with the fields of `record_features()`; TFDS serialises it into TFRecords; the
reader parses it with the same features and expands it to one example a (window, person).
"""

import numpy as np
import tensorflow_datasets as tfds

NUM_POSITIONS = 90  # frames of a window at 30 a second, positions 0..89
KEY_POSITION = 45  # the annotated frame, always stored
NUM_ACTIONS = 80  # AVA action ids are 1..80
FRAMES_PER_SECOND = 30.0


def record_features() -> tfds.features.FeaturesDict:
    """Returns the features of one window.

    `frames` are JPEG bytes (uint8 RGB once decoded, all of one size), `frame_indices` their positions 0..89,
    ascending. `people/box` is x1, y1, x2, y2 and `detections/box` is cx, cy, w, h, both fractions of width and height
    in [0, 1]; `people/labels` are AVA ids 1..80; `detections/class_id` is the COCO id 1..90, sorted by descending
    score. `key_time` is the key frame's time in seconds, on the clock of the annotations.
    """
    return tfds.features.FeaturesDict(
        {
            "clip_id": tfds.features.Text(),
            "video_id": tfds.features.Text(),
            "key_time": np.float32,
            "frames": tfds.features.Sequence(
                tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
            ),
            "frame_indices": tfds.features.Sequence(np.int32),
            "people": tfds.features.Sequence(
                {
                    "person_id": tfds.features.Text(),
                    "sentence": tfds.features.Text(),
                    "box": tfds.features.Tensor(shape=(4,), dtype=np.float32),
                    "labels": tfds.features.Sequence(np.int32),
                }
            ),
            "detections": tfds.features.Sequence(
                {
                    "box": tfds.features.Tensor(shape=(4,), dtype=np.float32),
                    "class_id": np.int32,
                    "score": np.float32,
                }
            ),
        }
    )
