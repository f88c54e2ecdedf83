"""The feature cache as training reads it: time means of frozen features, and detections, in place of pixels.

    folder/cache.json                          what the features depend on, and its SHA-256
    folder/features-<split>.tfrecord-*         one record a window: its people, detections and image tokens
    folder/features-text.tfrecord-*            one record a distinct sentence, the blank one first
    folder/index_<split>.json                  as of any dataset folder

`feature_cache_writer.py` writes it. A cache whose `cache.json` does not fit the config is refused, by
`cache_identity.py`.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from data_pipelines.cache_identity import check_content, read_description
from data_pipelines.examples import (
    BadRecords,
    Example,
    ReadingOptions,
    empty_fields,
    person_fields,
)
from data_pipelines.record_index import BadRecordError, load_index
from data_pipelines.records import Window, parse_features, window_from_features
from ravar_jax import config_check
from ravar_jax.errors import UserError

_log = logging.getLogger(__name__)
TEXT_SPLIT = "text"
BLANK_ROW = 0  # of the text table
_MEMORY_LIMIT = (
    1 << 30
)  # bytes; a smaller cache is held in memory, a larger one read record by record
# What parsed fields that are missing, or of another kind or size, raise.
_NOT_A_RECORD = (KeyError, IndexError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True)
class CachedWindow:
    """A window of a cache.

    Attributes:
        window: its people and stored detections; None for a record that could not be read when the cache was made.
        train_tokens: float32 (N, D), time mean over the training positions.
        eval_tokens: float32 (E, N, D), one time mean an evaluation clip.
        text_rows: rows of the text table, one a person.
        detected: boxes float32 (K, 4) and class ids int32 (K,) by the detector, which come before the stored ones;
            None in a cache made without it.
    """

    window: Window | None
    train_tokens: np.ndarray
    eval_tokens: np.ndarray
    text_rows: tuple[int, ...]
    detected: tuple[np.ndarray, np.ndarray] | None


@dataclasses.dataclass(frozen=True)
class CachedText:
    """A sentence: token_ids and attention_mask int32 (L,), tokens float32 (L, D)."""

    token_ids: np.ndarray
    attention_mask: np.ndarray
    tokens: np.ndarray


class CachedExamples:
    """Examples read from a cache: one person of a window each. An `examples.ExampleSource`.

    Attributes:
        index: of the split.
        num_truncated: sentences that were cut when the cache was made.
        bad_records: counted so far.
        cheap: whether the cache is held in memory.
    """

    def __init__(
        self,
        split: "CachedSplit",
        training: bool,
        options: ReadingOptions,
        max_bad_records: int,
        num_truncated: int,
    ):
        """Args: split: of the cache. training: time mean of training, else one an evaluation clip."""
        self.index = split.index
        self.num_truncated = num_truncated
        self.bad_records = BadRecords(max_bad_records)
        self.cheap = split.in_memory
        self._split = split
        self._training = training
        self._options = options
        self._known: dict[int, Example] = {}

    def read(self, epoch: int, example: int) -> Example:
        """Returns an example with image_tokens (N, D), or (E, N, D) in evaluation, and text_tokens (L, D)."""
        del epoch  # cached positions do not depend on it
        if example not in self._known:
            try:
                fields = self._padding() if example < 0 else self._read(example)
            except BadRecordError as error:
                self.bad_records.add(error)
                fields = self._padding()
            fields["example_id"] = np.array(example, np.int32)
            if not self._split.in_memory:
                return fields
            self._known[example] = fields
        return self._known[example]

    def _read(self, example: int) -> Example:
        number, person = map(int, self.index.examples[example])
        cached = self._split.window(number)
        if cached.window is None:
            where = self.index.where(number)
            raise BadRecordError(f"{where}: was unreadable when the cache was made")
        tokens = cached.train_tokens if self._training else cached.eval_tokens
        fields = person_fields(cached.window, person, self._options)
        if cached.detected is not None and not self._options.blank_video:
            fields["boxes"], fields["class_ids"] = cached.detected
        fields |= _text_fields(self._split.text(self._text_row(cached, person)))
        fields["image_tokens"] = np.zeros_like(tokens) if self._options.blank_video else tokens
        fields["mask"] = np.array(1, np.float32)
        return fields

    def _padding(self) -> Example:
        fields = empty_fields(self._options.num_detections)
        fields |= _text_fields(self._split.text(BLANK_ROW))
        fields["image_tokens"] = np.zeros(self._split.token_shape(self._training), np.float32)
        fields["mask"] = np.array(0, np.float32)
        return fields

    def _text_row(self, cached: CachedWindow, person: int) -> int:
        if self._options.sentences == "blank":
            return BLANK_ROW
        if self._options.sentences == "swapped" and cached.window is not None:
            return cached.text_rows[cached.window.next_person(person)]
        return cached.text_rows[person]


class CachedSplit:
    """The records of one split and the text table.

    Attributes:
        index: of the split.
        in_memory: whether records are kept after their first use, as they are where the whole cache is small.
    """

    def __init__(
        self,
        folder: epath.Path,
        split: str,
        shapes: Mapping[str, Any],
        dtype: str,
        max_bad_records: int,
    ):
        """Args: shapes: `cache.json`'s token shapes. dtype: of the stored tokens. The rest as `load_index` says."""
        self.index = load_index(folder, split, max_bad_records)
        self._text_index = load_index(folder, TEXT_SPLIT)
        self._shapes = shapes
        self._dtype = jnp.dtype(dtype)
        growth = 4 // self._dtype.itemsize  # tokens are kept as float32
        size = growth * sum(path.stat().length for path in folder.iterdir())
        self.in_memory = size < _MEMORY_LIMIT
        self._windows: dict[int, CachedWindow] = {}
        self._texts: dict[int, CachedText] = {}

    def token_shape(self, training: bool) -> tuple[int, ...]:
        """Returns the shape of `image_tokens` of an example."""
        return tuple(self._shapes["train_tokens" if training else "eval_tokens"])

    def window(self, number: int) -> CachedWindow:
        """Returns a window; raises BadRecordError where its record cannot be read."""
        window = self._windows.get(number) or self._read_window(number)
        if self.in_memory:
            self._windows[number] = window
        return window

    def text(self, row: int) -> CachedText:
        """Returns a row of the text table; raises UserError where it cannot be read."""
        text = self._texts.get(row) or self._read_text(row)
        if self.in_memory:
            self._texts[row] = text
        return text

    def _read_window(self, number: int) -> CachedWindow:
        where = self.index.where(number)
        features = parse_features(self.index.read(number), where)
        try:
            text_rows = np.asarray(features["text_rows"])
            if not (text_rows < self._text_index.num_windows).all():
                raise IndexError
            return CachedWindow(
                window=window_from_features(features, where) if features["readable"][0] else None,
                train_tokens=self._tokens(features, "train_tokens", "train_tokens"),
                eval_tokens=self._tokens(features, "eval_tokens", "eval_tokens"),
                text_rows=tuple(text_rows.tolist()),
                detected=_detected(features) if "detected_boxes" in features else None,
            )
        except _NOT_A_RECORD as error:
            raise BadRecordError(f"{where}: is not a record of this feature cache") from error

    def _read_text(self, row: int) -> CachedText:
        where = self._text_index.where(row)
        # Many examples share a sentence, so masking one does not help: not a BadRecordError.
        try:
            features = parse_features(self._text_index.read(row), where)
            return CachedText(
                token_ids=np.asarray(features["token_ids"], np.int32),
                attention_mask=np.asarray(features["attention_mask"], np.int32),
                tokens=self._tokens(features, "tokens", "text_tokens"),
            )
        except BadRecordError as error:
            raise UserError(str(error)) from error
        except _NOT_A_RECORD as error:
            raise UserError(f"{where}: is not a sentence of this feature cache") from error

    def _tokens(self, features: Mapping[str, Any], field: str, shape: str) -> np.ndarray:
        stored = np.frombuffer(features[field][0], self._dtype).reshape(self._shapes[shape])
        return stored.astype(np.float32, copy=False)


def cached_examples(
    config: ConfigDict, split: str, training: bool, options: ReadingOptions
) -> CachedExamples:
    """Opens a split of `data.feature_cache` for a config.

    Raises:
        UserError: there is no cache, it is damaged, or it was made for something else; names what differs.
        UsageError: the config also asks for what a cache cannot give.
    """
    config_check.check_cacheable(config)
    folder = epath.Path(config.data.feature_cache)
    described = read_description(folder)
    check_content(folder, described["content"], config)
    index = load_index(folder, split, config.data.max_bad_records)
    if described["num_truncated"]:
        _log.warning(
            "%d sentence(s) of %s are longer than data.text_length=%d ids and were cut",
            described["num_truncated"],
            folder,
            config.data.text_length,
        )
    opened = _open_split(
        str(folder),
        split,
        json.dumps(described["shapes"]),
        config.data.cache_dtype,
        config.data.max_bad_records,
        index.fingerprint,
    )
    return CachedExamples(
        opened, training, options, config.data.max_bad_records, described["num_truncated"]
    )


@functools.lru_cache(maxsize=4)
def _open_split(
    folder: str, split: str, shapes: str, dtype: str, max_bad_records: int, fingerprint: str
) -> CachedSplit:
    """Keeps opened splits, so that every evaluation of a run finds its records in memory."""
    del fingerprint  # only tells a cache that was written again from the one before
    return CachedSplit(epath.Path(folder), split, json.loads(shapes), dtype, max_bad_records)


def _text_fields(text: CachedText) -> Example:
    return {
        "token_ids": text.token_ids,
        "attention_mask": text.attention_mask,
        "text_tokens": text.tokens,
    }


def _detected(features: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    class_ids = np.asarray(features["detected_class_ids"], np.int32)
    boxes = np.frombuffer(features["detected_boxes"][0], np.float32)
    return boxes.reshape(len(class_ids), 4), class_ids
