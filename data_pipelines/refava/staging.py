"""Windows that are decoded, kept on disk until the whole dataset is written.

A build decodes in chunks, up to 32 windows of one video. A chunk's records lie one after the other in `<key>.records`;
`<key>.json`, written last, has a line for every window: where its record is, or why there is none. The key is a hash of
everything that decides those bytes, so a build that was killed finds what is done, and one with other input does not.
Shards are copied together from these files: no process ever holds more than one record.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from data_pipelines.quiet_tensorflow import tf
from data_pipelines.refava.annotations import Window
from data_pipelines.refava.skip_report import window_line
from data_pipelines.refava.sources import FrameFolder, ReadWindow, VideoFolder
from data_pipelines.schema import record_features
from ravar_jax.errors import UserError

# Windows that one child process reads in one pass: neighbours overlap by two of their three seconds.
_CHUNK_WINDOWS = 32
_LISTING_THREADS = 16  # a bucket answers in tens of milliseconds


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Windows of one video that are decoded together."""

    key: str  # names its files
    windows: tuple[Window, ...]


@dataclasses.dataclass(frozen=True)
class StagedRecord:
    """Where the record of one window lies."""

    clip_id: str
    file: str
    offset: int
    length: int
    crc32: int


@dataclasses.dataclass(frozen=True)
class Staging:
    """The folder, and how windows become records.

    Attributes:
        folder: Made by whoever builds.
        source: Where frames come from.
        jpeg_quality: Of the stored frames, 1..95.
    """

    folder: str
    source: VideoFolder | FrameFolder
    jpeg_quality: int

    def chunks(self, windows: Iterable[Window]) -> list[Chunk]:
        """Returns the windows in chunks of one video each, in order of time."""
        groups = list(_groups(windows))
        with concurrent.futures.ThreadPoolExecutor(_LISTING_THREADS) as pool:
            return [
                Chunk(key, group)
                for key, group in zip(pool.map(self._key, groups), groups, strict=True)
            ]

    def _key(self, windows: tuple[Window, ...]) -> str:
        content = {
            "decoders": [importlib.metadata.version(name) for name in ("av", "pillow")],
            "source": dataclasses.asdict(self.source),
            "files": self.source.fingerprint(windows[0].video_id, windows),
            "jpeg_quality": self.jpeg_quality,
            "windows": [dataclasses.asdict(window) for window in windows],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def discard_doubtful(self, chunks: Sequence[Chunk]) -> None:
        """Deletes, of an earlier build, chunks whose records are not whole or that left windows out.

        What was left out then, by a decoder that ran out of time or memory, may be readable now.
        """
        present = self._names()

        def discard(chunk: Chunk) -> None:
            if f"{chunk.key}.json" not in present:
                return
            lines = self._lines(chunk)
            records = self._records(chunk)
            size = sum(line["length"] for line in lines if not line["reason"])
            if any(line["reason"] for line in lines) or (
                size != (records.stat().length if records.exists() else 0)
            ):
                self._index(chunk).unlink()

        with concurrent.futures.ThreadPoolExecutor(_LISTING_THREADS) as pool:
            list(pool.map(discard, chunks))

    def missing(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Returns the chunks that are not done."""
        present = self._names()
        return [chunk for chunk in chunks if f"{chunk.key}.json" not in present]

    def stage(self, chunk: Chunk) -> None:
        """Decodes a chunk and writes its files."""
        lines, offset, encoder = [], 0, JpegEncoder(self.jpeg_quality)
        with (
            tfds.core.utils.incomplete_file(self._records(chunk)) as temporary,
            temporary.open("wb") as file,
        ):
            file.write(b"")  # in a bucket, a file that nothing is written to would not be made
            for read in self.source.read(chunk.windows[0].video_id, chunk.windows):
                line = window_line(read.window, read.frames_repeated, read.problem)
                if not read.problem:
                    record = _serialised(make_record(read, self.source.positions, encoder))
                    file.write(record)
                    line |= {
                        "offset": offset,
                        "length": len(record),
                        "crc32": zlib.crc32(record),
                    }
                    offset += len(record)
                lines.append(line)
        with tfds.core.utils.incomplete_file(self._index(chunk)) as temporary:
            temporary.write_text(json.dumps(lines))

    def read(self, chunks: Sequence[Chunk]) -> tuple[list[dict[str, Any]], list[StagedRecord]]:
        """Returns, of chunks that are done, a line for every window and where the records are."""
        with concurrent.futures.ThreadPoolExecutor(_LISTING_THREADS) as pool:
            of_chunk = list(pool.map(self._lines, chunks))
        records = [
            StagedRecord(
                line["clip_id"],
                str(self._records(chunk)),
                line["offset"],
                line["length"],
                line["crc32"],
            )
            for chunk, lines in zip(chunks, of_chunk, strict=True)
            for line in lines
            if not line["reason"]
        ]
        return list(itertools.chain.from_iterable(of_chunk)), records

    def _names(self) -> set[str]:
        return {path.name for path in epath.Path(self.folder).iterdir()}

    def _records(self, chunk: Chunk) -> epath.Path:
        return epath.Path(self.folder) / f"{chunk.key}.records"

    def _index(self, chunk: Chunk) -> epath.Path:
        return epath.Path(self.folder) / f"{chunk.key}.json"

    def _lines(self, chunk: Chunk) -> list[dict[str, Any]]:
        return json.loads(self._index(chunk).read_text())


def write_shard(shard: tuple[str, Sequence[StagedRecord]]) -> None:
    """Writes a file of TFRecords, given its path and what it holds, under its name only when whole.

    Raises:
        UserError: a staged record is damaged.
    """
    path, records = shard
    with (
        tfds.core.utils.incomplete_file(epath.Path(path)) as temporary,
        tf.io.TFRecordWriter(str(temporary)) as writer,
    ):
        for record in records:
            with epath.Path(record.file).open("rb") as file:
                file.seek(record.offset)
                payload = file.read(record.length)
            if zlib.crc32(payload) != record.crc32:
                raise UserError(
                    f"{record.file} is damaged at byte {record.offset} ({record.clip_id}); delete it and run again"
                )
            writer.write(payload)


class JpegEncoder:
    """Encodes the frames of windows; a frame that the window before had too is not encoded again."""

    def __init__(self, quality: int):
        self._quality = quality
        # By identity; the frame is kept so that nothing else can take its place in memory.
        self._encoded: dict[int, tuple[np.ndarray, bytes]] = {}

    def encode(self, frames: Sequence[np.ndarray]) -> list[bytes]:
        """Returns the JPEG bytes of uint8 (H, W, 3) frames."""
        self._encoded = {
            name: self._encoded.get(name) or (frame, self._jpeg(frame))
            for name, frame in {id(frame): frame for frame in frames}.items()
        }
        return [self._encoded[id(frame)][1] for frame in frames]

    def _jpeg(self, frame: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, format="JPEG", quality=self._quality)
        return buffer.getvalue()


def make_record(
    read: ReadWindow, positions: tuple[int, ...], encoder: JpegEncoder
) -> dict[str, Any]:
    """Returns the record of a window as `record_features` takes it."""
    window = read.window
    return {
        "clip_id": window.clip_id,
        "video_id": window.video_id,
        "key_time": window.key_second,
        "frames": encoder.encode(read.frames),
        "frame_indices": list(positions),
        "people": [
            {
                "person_id": person.person_id,
                "sentence": person.sentence,
                "box": list(person.box),
                "labels": list(person.labels),
            }
            for person in window.people
        ],
        "detections": [],
    }


def _groups(windows: Iterable[Window]) -> Iterator[tuple[Window, ...]]:
    ordered = sorted(windows, key=lambda window: (window.video_id, window.key_second))
    for _, of_video in itertools.groupby(ordered, key=lambda window: window.video_id):
        rest = tuple(of_video)
        for start in range(0, len(rest), _CHUNK_WINDOWS):
            yield rest[start : start + _CHUNK_WINDOWS]


def _serialised(record: dict[str, Any]) -> bytes:
    # TFDS leaves the order of the fields to chance, another one in every process.
    example = tf.train.Example.FromString(_features().serialize_example(record))
    return example.SerializeToString(deterministic=True)


@functools.cache
def _features() -> tfds.features.FeaturesDict:
    return record_features()
