"""One record read back: the bytes of a TFRecord -> `Window`, checked field by field.

The field names are those that `schema.record_features()` serialises to; parsing them from the protocol buffer takes
a twentieth of a millisecond and leaves the frames undecoded.
"""

import dataclasses
import io
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.quiet_tensorflow import tf
from data_pipelines.record_index import BadRecordError
from data_pipelines.schema import NUM_ACTIONS, NUM_POSITIONS
from ravar_jax.models.refatomnet import NO_OBJECT_CLASS


@dataclasses.dataclass(frozen=True)
class Person:
    """A described person.

    Attributes:
        person_id: unique in the window.
        sentence: not empty.
        box: float32 (4,), x1, y1, x2, y2 in [0, 1].
        labels: AVA ids 1..80.
    """

    person_id: str
    sentence: str
    box: np.ndarray
    labels: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Window:
    """A record.

    Attributes:
        where: names the record to a user.
        clip_id: unique in the dataset.
        people: in record order.
        frames: JPEG bytes; empty in a feature cache.
        frame_indices: the position of each frame.
        detection_boxes: float32 (K, 4), cx, cy, w, h in [0, 1].
        detection_class_ids: int (K,), COCO ids.
        detection_scores: float32 (K,).
    """

    where: str
    clip_id: str
    people: tuple[Person, ...]
    frames: tuple[bytes, ...]
    frame_indices: tuple[int, ...]
    detection_boxes: np.ndarray
    detection_class_ids: np.ndarray
    detection_scores: np.ndarray

    def next_person(self, person: int) -> int:
        """Returns the person after `person` in the cyclic order of person ids (as integers, where all are)."""
        ids = [each.person_id for each in self.people]
        all_integers = all(each.isdecimal() for each in ids)
        order = sorted(
            range(len(ids)), key=lambda i: (int(ids[i]), "") if all_integers else (0, ids[i])
        )
        return order[(order.index(person) + 1) % len(order)]


def parse_features(payload: bytes, where: str) -> dict[str, Any]:
    """Returns field name -> list of values of a serialised `tf.train.Example`.

    Raises:
        BadRecordError: the payload is no such message; names the record by `where`.
    """
    try:
        features = tf.train.Example.FromString(payload).features.feature
    except (
        Exception
    ) as error:  # protobuf's DecodeError, which its backends define in different places
        raise BadRecordError(f"{where}: is not a tf.train.Example") from error
    return {name: _values(feature) for name, feature in features.items()}


def window_from_features(features: dict[str, Any], where: str) -> Window:
    """Returns the window in `features`.

    Raises:
        BadRecordError: a field is missing, or its value is not what the schema promises; names record and field.
    """
    for name, kind in _FIELDS.items():
        if name not in features:
            raise BadRecordError(f"{where}: field {name!r} is missing")
        if features[name] and not isinstance(features[name][0], kind):
            raise BadRecordError(f"{where}: field {name!r} does not hold {_KIND_NAMES[kind]}")
    if not features["clip_id"]:
        raise BadRecordError(f"{where}: field 'clip_id' is empty")
    indices = features["frame_indices"]
    _expect_length(features, "frames", len(indices), where)
    if indices != sorted({*indices} & {*range(NUM_POSITIONS)}):
        raise BadRecordError(f"{where}: field 'frame_indices' is not ascending positions 0..89")
    detections = len(features["detections/score"])
    _expect_length(features, "detections/class_id", detections, where)
    _expect_length(features, "detections/box", 4 * detections, where)
    _check_detections(features, where)
    return Window(
        where=where,
        clip_id=_text(features, "clip_id", where)[0],
        people=_people(features, where),
        frames=tuple(features["frames"]),
        frame_indices=tuple(features["frame_indices"]),
        detection_boxes=np.asarray(features["detections/box"], np.float32).reshape(-1, 4),
        detection_class_ids=np.asarray(features["detections/class_id"], np.int32),
        detection_scores=np.asarray(features["detections/score"], np.float32),
    )


def parse_window(payload: bytes, where: str) -> Window:
    """Returns the window of a serialised record; raises as `parse_features` and `window_from_features` do."""
    return window_from_features(parse_features(payload, where), where)


def decode_frames(window: Window, positions: np.ndarray) -> np.ndarray:
    """Decodes the frames at `positions`, as stored.

    Returns:
        uint8 (U, H, W, 3) RGB.

    Raises:
        BadRecordError: a frame is not stored, not a JPEG, or of another size than the first.
    """
    decoded: list[np.ndarray] = []
    for position in positions:
        try:
            jpeg = window.frames[window.frame_indices.index(int(position))]
            with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as image:
                decoded.append(np.asarray(image.convert("RGB")))
        except (
            ValueError,
            IndexError,
            OSError,
            SyntaxError,
            Image.DecompressionBombError,
        ) as error:
            raise BadRecordError(f"{window.where}: frame {position} cannot be decoded") from error
        if decoded[-1].shape != decoded[0].shape:
            raise BadRecordError(
                f"{window.where}: frame {position} has another size than the frame before it"
            )
    return np.stack(decoded)


_FIELDS = {
    "clip_id": bytes,
    "frame_indices": int,
    "people/person_id": bytes,
    "people/sentence": bytes,
    "people/box": float,
    "people/labels/ragged_flat_values": int,
    "people/labels/ragged_row_lengths_0": int,
    "detections/box": float,
    "detections/class_id": int,
    "detections/score": float,
    "frames": bytes,
}
_KIND_NAMES = {bytes: "bytes", int: "integers", float: "floats"}


def _text(features: dict[str, Any], field: str, where: str) -> list[str]:
    try:
        return [value.decode() for value in features[field]]
    except UnicodeDecodeError as error:
        raise BadRecordError(f"{where}: field {field!r} is not UTF-8") from error


def _people(features: dict[str, Any], where: str) -> tuple[Person, ...]:
    ids = _text(features, "people/person_id", where)
    sentences = _text(features, "people/sentence", where)
    label_counts = features["people/labels/ragged_row_lengths_0"]
    _expect_length(features, "people/sentence", len(ids), where)
    _expect_length(features, "people/box", 4 * len(ids), where)
    _expect_length(features, "people/labels/ragged_row_lengths_0", len(ids), where)
    if label_counts and min(label_counts) < 0:
        raise BadRecordError(f"{where}: field 'people/labels/ragged_row_lengths_0' is negative")
    _expect_length(features, "people/labels/ragged_flat_values", sum(label_counts), where)
    boxes = np.asarray(features["people/box"], np.float32).reshape(-1, 4)
    people, first = [], 0
    for row, person_id in enumerate(ids):
        name = f"{where}: person {person_id!r}"
        sentence = sentences[row]
        labels = tuple(
            features["people/labels/ragged_flat_values"][first : first + label_counts[row]]
        )
        first += label_counts[row]
        x1, y1, x2, y2 = map(float, boxes[row])
        if not sentence.strip():
            raise BadRecordError(f"{name}: field 'sentence' is empty")
        if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
            raise BadRecordError(
                f"{name}: field 'box' is ({x1:g}, {y1:g}, {x2:g}, {y2:g}), expected 0 <= x1 < x2 <= 1, y too"
            )
        for label in labels:
            if not 1 <= label <= NUM_ACTIONS:
                raise BadRecordError(
                    f"{name}: field 'labels' holds {label}, expected AVA ids 1..{NUM_ACTIONS}"
                )
        people.append(Person(person_id, sentence, boxes[row], labels))
    return tuple(people)


def _check_detections(features: dict[str, Any], where: str) -> None:
    for class_id in features["detections/class_id"]:
        if not 1 <= class_id < NO_OBJECT_CLASS:
            raise BadRecordError(
                f"{where}: field 'detections/class_id' holds {class_id}, expected COCO ids 1..{NO_OBJECT_CLASS - 1}"
            )
    for number in features["detections/box"]:
        if not 0 <= number <= 1:
            raise BadRecordError(
                f"{where}: field 'detections/box' holds {number:g}, expected fractions in [0, 1]"
            )


def _expect_length(features: dict[str, Any], field: str, length: int, where: str) -> None:
    if len(features[field]) != length:
        raise BadRecordError(
            f"{where}: field {field!r} has {len(features[field])} values, expected {length}"
        )


def _values(feature: tf.train.Feature) -> list[Any]:
    kind = feature.WhichOneof("kind")
    return list(getattr(feature, kind).value) if kind else []
