"""Windows as the feature cache encodes them: every frame that training or evaluation reads, and the record's bytes."""

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.examples import (
    BadRecords,
    Example,
    ReadingOptions,
    empty_frames,
    key_frame_field,
    read_frames,
)
from data_pipelines.frame_sampling import (
    cached_positions,
    evaluation_sampler,
    training_sampler,
)
from data_pipelines.key_frame import key_frame
from data_pipelines.record_index import BadRecordError, RecordIndex
from data_pipelines.records import parse_window


class CacheWindows:
    """Windows with every frame that training or evaluation reads. An `examples.ExampleSource`.

    Attributes:
        num_frames: U, the frames read of a window.
        train_rows: int (T,), which of the frames read are those of training.
        eval_rows: int (E, T), which are those of each evaluation clip.
    """

    num_truncated = 0
    cheap = False

    def __init__(self, index: RecordIndex, config: ConfigDict):
        """Raises UserError where the dataset lacks a position that the config needs."""
        samplers = (training_sampler(config), evaluation_sampler(config))
        key = key_frame(config)
        for sampler in (*samplers, *([key.sampler] if key else [])):
            sampler.check(index)
        self._positions = cached_positions(config)
        self.index = index
        self.bad_records = BadRecords(config.data.max_bad_records)
        self.train_rows, self.eval_rows = (
            np.searchsorted(self._positions, each.clips) for each in samplers
        )
        self.num_frames = len(self._positions)
        self._options = ReadingOptions(
            sentences="true",
            blank_video=False,
            detections=False,
            num_detections=0,
            pixels=config.data.pixels,
            image_size=config.data.image_size,
            key_frame=key,
        )

    def sentences(self, number: int) -> list[str]:
        """Returns the sentences of a window's people; none of a record that cannot be read, which is counted."""
        try:
            window = parse_window(self.index.read(number), self.index.where(number))
        except BadRecordError as error:
            self.bad_records.add(error)
            return []
        return [person.sentence for person in window.people]

    def read(self, epoch: int, example: int) -> Example:
        """Returns frames uint8 (U, S, S, 3), the record's bytes (empty if unreadable) and its number.

        With a detector, `key_frame` is uint8 (H, W, 3).
        """
        del epoch
        frames, record = empty_frames(self._positions.shape, self._options), b""
        key_field = key_frame_field(None, self._options)
        if example >= 0:
            try:
                payload = self.index.read(example)
                window = parse_window(payload, self.index.where(example))
                key_field = key_frame_field(window, self._options)
                frames, record = read_frames(window, self._positions, self._options), payload
            except BadRecordError as error:
                self.bad_records.add(error)
        return {
            **key_field,
            "frames": frames,
            "record": np.asarray(record, object),
            "example_id": np.array(example, np.int32),
        }
