"""One example, as arrays: a person of a window (`PixelExamples`), or a whole window (`PixelWindows`).

index -> payload -> `Window` -> frames decoded and resized by Pillow, sentence ids, target, and detections or the key
frame that the detector finds them in. A source answers `read(epoch, example)` from several threads. Padding (example
-1) and unreadable records become an example of zeros with mask 0 and the blank sentence, so that no attention mask is
empty.
"""

import dataclasses
import logging
import threading
from typing import Any, Protocol

import numpy as np

from data_pipelines.augmentation import Augmentation, View
from data_pipelines.frame_sampling import FrameSampler
from data_pipelines.key_frame import KeyFrame
from data_pipelines.perturbations import Perturbation, perturb
from data_pipelines.preprocess import multi_hot, pad_detections, show_frames
from data_pipelines.record_index import BadRecordError, RecordIndex
from data_pipelines.records import Window, decode_frames, parse_window
from data_pipelines.schema import NUM_ACTIONS
from data_pipelines.sentence_ids import SentenceIds
from ravar_jax.batch_shapes import MAX_PEOPLE
from ravar_jax.errors import UserError
from ravar_jax.models.refatomnet import NO_OBJECT_CLASS

_log = logging.getLogger(__name__)
Example = dict[str, np.ndarray]
AS_STORED = View()


@dataclasses.dataclass(frozen=True)
class ReadingOptions:
    """What of a record is shown to the model.

    Attributes:
        sentences: `true`, `swapped` (that of the next person of the window) or `blank`.
        blank_video: frames or image tokens zero, and no detections.
        detections: whether the stored detections are given; otherwise every row is "no object".
        num_detections: rows of boxes and class ids (K).
        pixels: `rgb` or `released`.
        image_size: side of the square that frames are resized to (S).
        key_frame: what the detector is given; None where there is no detector.
        perturbation: of the decoded frames; None leaves them as they are.
        augmentation: what views of training examples are drawn from; None shows them as they are stored.
    """

    sentences: str
    blank_video: bool
    detections: bool
    num_detections: int
    pixels: str
    image_size: int
    key_frame: KeyFrame | None = None
    perturbation: Perturbation | None = None
    augmentation: Augmentation | None = None


class BadRecords:
    """Counts unreadable records by file and offset, and stops the run when there are too many."""

    def __init__(self, limit: int):
        """Args: limit: `data.max_bad_records`."""
        self._limit = limit
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Distinct unreadable records so far."""
        return len(self._seen)

    def add(self, error: BadRecordError) -> None:
        """Counts a record.

        Raises:
            UserError: the record is one too many; names its file and offset.
        """
        with self._lock:
            if str(error) in self._seen and len(self._seen) <= self._limit:
                return
            self._seen.add(str(error))
            counted = f"{error}; {len(self._seen)} unreadable, data.max_bad_records={self._limit}"
            if len(self._seen) > self._limit:
                raise UserError(counted)
            _log.warning("masked: %s", counted)


class ExampleSource(Protocol):
    """Where batches come from.

    Attributes:
        index: of the split.
        bad_records: counted so far.
        cheap: whether an example costs microseconds, so that a batch is better read in one call.
    """

    index: RecordIndex
    bad_records: BadRecords
    cheap: bool

    @property
    def num_truncated(self) -> int:
        """Distinct sentences cut so far."""

    def read(self, epoch: int, example: int) -> Example:
        """Returns an example without its batch axis; -1 is padding."""


class _PixelSource:
    """What both sources of pixels hold.

    Attributes:
        index: of the split.
        bad_records: counted so far.
        cheap: False; frames are decoded.
    """

    cheap = False

    def __init__(
        self,
        index: RecordIndex,
        sampler: FrameSampler,
        sentence_ids: SentenceIds,
        options: ReadingOptions,
        max_bad_records: int,
    ):
        """Raises UserError where the dataset does not store the positions that sampler and key frame need."""
        sampler.check(index)
        if options.key_frame is not None:
            options.key_frame.sampler.check(index)
        self.index = index
        self.bad_records = BadRecords(max_bad_records)
        self._sampler = sampler
        self._sentence_ids = sentence_ids
        self._options = options

    @property
    def num_truncated(self) -> int:
        """Distinct sentences cut so far."""
        return self._sentence_ids.num_truncated


class PixelExamples(_PixelSource):
    """Examples read from pixels: one person of a window each."""

    def read(self, epoch: int, example: int) -> Example:
        """Returns an example; `frames` is uint8 (T, S, S, 3), or (E, T, S, S, 3) in evaluation.

        With a detector, `key_frame` is uint8 (H, W, 3).
        """
        if example >= 0:
            number, person = self.index.examples[example]
            try:
                positions = self._sampler.draw(self.index.stored_positions(number), epoch, example)
                window = parse_window(self.index.read(number), self.index.where(number))
                sentence = sentence_of(window, person, self._options.sentences)
                view = self._view(epoch, example, window.people[person].box, sentence)
                frames = read_frames(window, positions, self._options, view)[self._sampler.rows]
                fields = person_fields(window, person, self._options, view)
                fields |= key_frame_field(window, self._options, view)
            except BadRecordError as error:
                self.bad_records.add(error)
            else:
                token_ids, attention_mask = self._sentence_ids(view.sentence(sentence))
                fields |= {"token_ids": token_ids, "attention_mask": attention_mask}
                return fields | {
                    "frames": frames,
                    "mask": np.array(1, np.float32),
                    "example_id": np.array(example, np.int32),
                }
        token_ids, attention_mask = self._sentence_ids("")
        empty = empty_fields(self._options.num_detections)
        empty |= {"token_ids": token_ids, "attention_mask": attention_mask}
        empty |= key_frame_field(None, self._options)
        empty["frames"] = empty_frames(self._sampler.rows.shape, self._options)
        return empty | {"mask": np.array(0, np.float32), "example_id": np.array(example, np.int32)}

    def _view(self, epoch: int, example: int, target_box: np.ndarray, sentence: str) -> View:
        augmentation = self._options.augmentation
        if augmentation is None:
            return AS_STORED
        return augmentation.draw(epoch, example, target_box, sentence)


class PixelWindows(_PixelSource):
    """Windows with all their people, for pretraining a backbone."""

    def __init__(self, index: RecordIndex, *arguments: Any):
        """Raises UserError as `_PixelSource` does, and where a window has too many people."""
        super().__init__(index, *arguments)
        if index.num_windows and index.num_people.max() > MAX_PEOPLE:
            window = int(index.num_people.argmax())
            raise UserError(
                f"{index.where(window)} holds {index.num_people[window]} people; pretraining takes {MAX_PEOPLE}"
            )

    def read(self, epoch: int, example: int) -> Example:
        """Returns a window; people that are missing are padding with the blank sentence and person_mask 0."""
        people, frames = [], empty_frames(self._sampler.rows.shape, self._options)
        if example >= 0:
            try:
                positions = self._sampler.draw(self.index.stored_positions(example), epoch, example)
                window = parse_window(self.index.read(example), self.index.where(example))
                frames = read_frames(window, positions, self._options)[self._sampler.rows]
                people = list(window.people)
            except BadRecordError as error:
                self.bad_records.add(error)
        sentences = [each.sentence if self._options.sentences == "true" else "" for each in people]
        missing = MAX_PEOPLE - len(people)
        encoded = [self._sentence_ids(sentence) for sentence in sentences + [""] * missing]
        boxes = [each.box for each in people] + [np.zeros(4, np.float32)] * missing
        labels = [multi_hot(each.labels) for each in people] + [
            np.zeros(NUM_ACTIONS, np.float32)
        ] * missing
        return {
            "frames": frames,
            "token_ids": np.stack([ids for ids, _ in encoded]),
            "attention_mask": np.stack([mask for _, mask in encoded]),
            "target_box": np.stack(boxes),
            "action_labels": np.stack(labels),
            "person_mask": np.asarray([1.0] * len(people) + [0.0] * missing, np.float32),
            "mask": np.array(bool(people), np.float32),
            "example_id": np.array(example, np.int32),
        }


def read_frames(
    window: Window, positions: np.ndarray, options: ReadingOptions, view: View = AS_STORED
) -> np.ndarray:
    """Returns the frames at `positions` as options and view want them, uint8 (U, S, S, 3).

    Raises:
        BadRecordError: a frame is not stored or cannot be decoded.
    """
    if options.blank_video:
        return empty_frames(positions.shape, options)
    frames = view.recolour(_decode(window, positions, options.perturbation))
    side = options.image_size
    return view.mirror(show_frames(frames, options.pixels, side, side, view.crop))


def empty_frames(clips: tuple[int, ...], options: ReadingOptions) -> np.ndarray:
    """Returns uint8 zeros (*clips, S, S, 3)."""
    return np.zeros((*clips, options.image_size, options.image_size, 3), np.uint8)


def key_frame_field(
    window: Window | None, options: ReadingOptions, view: View = AS_STORED
) -> Example:
    """Returns `key_frame`, uint8 (H, W, 3), zeros without a window or video; nothing where there is no detector.

    Raises:
        BadRecordError: the frame is not stored or cannot be decoded.
    """
    key = options.key_frame
    if key is None:
        return {}
    if window is None or options.blank_video:
        return {"key_frame": key.empty()}
    frames = view.recolour(_decode(window, key.sampler.positions, options.perturbation))
    return {"key_frame": view.mirror(key.show(frames[0], view.crop))}


def sentence_of(window: Window, person: int, sentences: str) -> str:
    """Returns the sentence that goes with a person: `true`, `swapped` or `blank`."""
    if sentences == "blank":
        return ""
    return window.people[window.next_person(person) if sentences == "swapped" else person].sentence


def person_fields(
    window: Window, person: int, options: ReadingOptions, view: View = AS_STORED
) -> Example:
    """Returns boxes (K, 4), class_ids (K,), target_box (4,) and action_labels (80,) of a person."""
    fields = empty_fields(options.num_detections)
    if options.detections and not options.blank_video:
        seen = view.detections(
            window.detection_boxes, window.detection_class_ids, window.detection_scores
        )
        fields["boxes"], fields["class_ids"] = pad_detections(*seen, options.num_detections)
    fields["target_box"] = view.corners(window.people[person].box)
    fields["action_labels"] = multi_hot(window.people[person].labels)
    return fields


def empty_fields(num_detections: int) -> Example:
    """Returns the fields of `person_fields` for nobody."""
    return {
        "boxes": np.zeros((num_detections, 4), np.float32),
        "class_ids": np.full(num_detections, NO_OBJECT_CLASS, np.int32),
        "target_box": np.zeros(4, np.float32),
        "action_labels": np.zeros(NUM_ACTIONS, np.float32),
    }


def _decode(window: Window, positions: np.ndarray, perturbation: Perturbation | None) -> np.ndarray:
    """Returns the frames at `positions`, ascending, in the stored size, perturbed or not: uint8 (U, H, W, 3) RGB.

    Raises:
        BadRecordError: one of them, or for motion blur any of the window, is not stored or cannot be decoded.
    """
    if perturbation is None:
        return decode_frames(window, positions)
    read = positions
    if perturbation.name == "motion_blur":  # a frame's neighbours need not be in the sample
        read = np.union1d(window.frame_indices, positions)
    frames = perturb(decode_frames(window, read), perturbation, window.clip_id, read)
    return frames[np.searchsorted(read, positions)]
