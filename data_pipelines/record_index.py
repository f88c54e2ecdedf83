"""The index of a dataset folder: where each record of a split lies, and what has to be known before reading it.

TFRecord shards of a finished folder -> `write_index` -> `index_<split>.json` -> `load_index` -> `RecordIndex`, which
gives the number of examples, random access to the records, and refuses a shard that is missing or cut short before
anything is read.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import zlib
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from data_pipelines.quiet_tensorflow import tf
from ravar_jax.errors import UserError

INDEX_VERSION = 1
_SHARD = re.compile(
    r"(?P<name>.+)-(?P<split>[^-]+)\.tfrecord-(?P<shard>\d{5})-of-(?P<shards>\d{5})"
)
_HEADER_BYTES = 12  # before a payload: its length (8) and the length's checksum (4)
_FOOTER_BYTES = 4  # after it: its checksum


class BadRecordError(UserError):
    """A record that cannot be read, or is not what index and schema say; the message names file and offset."""


@dataclasses.dataclass(frozen=True)
class RecordIndex:
    """Where the N records (windows) of a split are.

    Attributes:
        folder: folder of the shards.
        split: name of the split.
        files: shard names, in order.
        file_numbers: int (N,), row of `files`.
        offsets: int (N,), first byte of the payload in its file.
        lengths: int (N,), bytes of the payload.
        checksums: int (N,), `zlib.crc32` of the payload.
        num_people: int (N,), examples a record expands to.
        clip_ids: N strings.
        frame_sets: the distinct sets of stored frame positions, each ascending.
        frame_set_numbers: int (N,), row of `frame_sets`.
        fingerprint: SHA-256 of the index's content, hexadecimal.
    """

    folder: epath.Path
    split: str
    files: tuple[str, ...]
    file_numbers: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    checksums: np.ndarray
    num_people: np.ndarray
    clip_ids: tuple[str, ...]
    frame_sets: tuple[tuple[int, ...], ...]
    frame_set_numbers: np.ndarray
    fingerprint: str

    @property
    def num_windows(self) -> int:
        """Number of records."""
        return len(self.offsets)

    @property
    def num_examples(self) -> int:
        """Number of (window, person) pairs."""
        return int(self.num_people.sum())

    @functools.cached_property
    def examples(self) -> np.ndarray:
        """int64 (num_examples, 2): window and person of every example, in file order."""
        windows = np.repeat(np.arange(self.num_windows), self.num_people)
        firsts = np.cumsum(self.num_people) - self.num_people
        return np.stack([windows, np.arange(self.num_examples) - firsts[windows]], axis=1)

    def stored_positions(self, window: int) -> tuple[int, ...]:
        """Returns the frame positions that the record of `window` stores, ascending."""
        return self.frame_sets[self.frame_set_numbers[window]]

    def where(self, window: int) -> str:
        """Returns a name for the record of `window` that a user can find: file, first byte and clip."""
        file = self.folder / self.files[self.file_numbers[window]]
        return f"{file}, record at byte {self.offsets[window] - _HEADER_BYTES} (clip {self.clip_ids[window]})"

    def read(self, window: int) -> bytes:
        """Returns the payload of the record of `window`. Safe to call from several threads.

        Raises:
            BadRecordError: the file cannot be read there, or the payload fails its checksum.
        """
        file = self.folder / self.files[self.file_numbers[window]]
        length = int(self.lengths[window])
        try:
            with _open(file) as handle:
                handle.seek(int(self.offsets[window]))
                payload = handle.read(length)
        except (OSError, tf.errors.OpError) as error:
            raise BadRecordError(
                f"{self.where(window)}: cannot be read ({type(error).__name__})"
            ) from error
        if len(payload) != length:
            raise BadRecordError(f"{self.where(window)}: the file ends inside it")
        if zlib.crc32(payload) != self.checksums[window]:
            raise BadRecordError(f"{self.where(window)}: its bytes fail their checksum")
        return payload


def write_index(dataset_dir: epath.PathLike) -> list[str]:
    """Scans the TFRecord shards of `dataset_dir` and writes one `index_<split>.json` per split beside them.

    Every record is read and its TFRecord checksum verified. An index that is already there is replaced.

    Returns:
        The splits, sorted.

    Raises:
        UserError: the folder or a shard is missing, or a shard is truncated or damaged.
    """
    folder = epath.Path(dataset_dir)
    splits = _shards(folder)
    lengths = _promised_lengths(folder)
    for split, files in splits.items():
        content = _scan(folder, split, files, lengths.get(split))
        stored = {"fingerprint": _fingerprint(content), "content": content}
        _write_atomically(folder / _index_name(split), json.dumps(stored, separators=(",", ":")))
    return sorted(splits)


def load_index(dataset_dir: epath.PathLike, split: str, max_bad_records: int = 0) -> RecordIndex:
    """Loads the index of a split, writing it first where the folder has none, and checks the size of every shard.

    Args:
        dataset_dir: folder of the shards.
        split: name of the split.
        max_bad_records: records that truncated shards may have lost; reading one then raises BadRecordError.

    Raises:
        UserError: no such folder or split; the index is damaged; a shard is missing, truncated, or not the one that
            was indexed.
    """
    folder = epath.Path(dataset_dir)
    path = folder / _index_name(split)
    if not path.exists():
        splits = _shards(folder)
        if split not in splits:
            raise UserError(f"{folder} has no split {split!r}; it has: {', '.join(sorted(splits))}")
        write_index(folder)
    content, fingerprint = _read_content(path)
    columns = {key: np.asarray(content[key], dtype=np.int64) for key in _INTEGER_COLUMNS}
    ends = columns["offsets"] + columns["lengths"]
    lost = 0
    for number, (name, size) in enumerate(content["files"]):
        actual = _check_size(folder / name, size, may_be_cut=max_bad_records > 0)
        lost += int((ends[columns["file_numbers"] == number] > actual).sum())
        if lost > max_bad_records:
            raise UserError(
                f"{folder / name} is truncated: {actual} bytes, but its index says {size}; {lost} records lost, "
                f"data.max_bad_records={max_bad_records}"
            )
    return RecordIndex(
        folder=folder,
        split=split,
        files=tuple(name for name, _ in content["files"]),
        clip_ids=tuple(content["clip_ids"]),
        frame_sets=tuple(tuple(positions) for positions in content["frame_sets"]),
        fingerprint=fingerprint,
        **columns,
    )


def list_splits(dataset_dir: epath.PathLike) -> list[str]:
    """Returns the splits that have shards in `dataset_dir`, sorted.

    Raises:
        UserError: the folder does not exist or holds no shards.
    """
    return sorted(_shards(epath.Path(dataset_dir)))


_INTEGER_COLUMNS = (
    "file_numbers",
    "offsets",
    "lengths",
    "checksums",
    "num_people",
    "frame_set_numbers",
)


def _open(file: epath.Path) -> BinaryIO:
    # The built-in is several times faster than epath's, which only remote folders need.
    return file.open("rb") if "://" in os.fspath(file) else open(file, "rb")


def _index_name(split: str) -> str:
    return f"index_{split}.json"


def _shards(folder: epath.Path) -> dict[str, list[str]]:
    """Returns split -> shard names in order; raises UserError where a shard of a split is missing."""
    if not folder.is_dir():
        raise UserError(f"dataset folder {folder} does not exist")
    found: dict[str, dict[int, str]] = {}
    shard_counts: dict[str, tuple[str, int]] = {}
    for path in folder.iterdir():
        if match := _SHARD.fullmatch(path.name):
            found.setdefault(match["split"], {})[int(match["shard"])] = path.name
            shard_counts[match["split"]] = (match["name"], int(match["shards"]))
    if not found:
        raise UserError(f"dataset folder {folder} holds no TFRecord shards")
    for split, (name, count) in shard_counts.items():
        for shard in range(count):
            if shard not in found[split]:
                raise UserError(
                    f"{folder / f'{name}-{split}.tfrecord-{shard:05}-of-{count:05}'} is missing"
                )
    return {split: [files[shard] for shard in sorted(files)] for split, files in found.items()}


def _promised_lengths(folder: epath.Path) -> dict[str, list[int]]:
    """Returns split -> records a shard, as TFDS wrote them down; empty where it wrote nothing."""
    path = folder / "dataset_info.json"
    if not path.exists():
        return {}
    try:
        splits = json.loads(path.read_bytes()).get("splits", [])
        return {
            split["name"]: [int(length) for length in split.get("shardLengths", [])]
            for split in splits
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not what TFDS writes: {type(error).__name__}") from error


def _scan(
    folder: epath.Path, split: str, files: list[str], promised: list[int] | None
) -> dict[str, Any]:
    """Reads every record of a split and returns the content of its index."""
    content: dict[str, Any] = {
        "version": INDEX_VERSION,
        "split": split,
        "files": [],
        "clip_ids": [],
        "frame_sets": [],
    }
    content |= {key: [] for key in _INTEGER_COLUMNS}
    frame_sets: dict[tuple[int, ...], int] = {}
    for number, name in enumerate(files):
        offset = records = 0
        try:
            for payload in tf.data.TFRecordDataset(str(folder / name)).as_numpy_iterator():
                where = f"{folder / name}, record at byte {offset}"
                clip_id, people, positions = _described(payload, where)
                content["file_numbers"].append(number)
                content["offsets"].append(offset + _HEADER_BYTES)
                content["lengths"].append(len(payload))
                content["checksums"].append(zlib.crc32(payload))
                content["num_people"].append(people)
                content["clip_ids"].append(clip_id)
                content["frame_set_numbers"].append(
                    frame_sets.setdefault(positions, len(frame_sets))
                )
                offset += _HEADER_BYTES + len(payload) + _FOOTER_BYTES
                records += 1
        except tf.errors.OpError as error:
            raise UserError(
                f"{folder / name} is truncated or damaged at byte {offset} (record {records})"
            ) from error
        if promised and records != promised[number]:
            raise UserError(
                f"{folder / name} holds {records} records, but dataset_info.json says {promised[number]}"
            )
        content["files"].append([name, offset])
    content["frame_sets"] = [list(positions) for positions in frame_sets]
    return content


def _described(payload: bytes, where: str) -> tuple[str, int, tuple[int, ...]]:
    """Returns clip id ("" where it has none), number of people and stored positions of a record."""
    try:
        features = tf.train.Example.FromString(payload).features.feature
        clip_id = features["clip_id"].bytes_list.value
        decoded = clip_id[0].decode() if clip_id else ""
    except Exception as error:  # protobuf's DecodeError has several homes
        raise BadRecordError(f"{where}: is not a tf.train.Example of this schema") from error
    people = len(features["people/person_id"].bytes_list.value)
    if people != len(features["people/sentence"].bytes_list.value):  # examples would be lost unseen
        raise BadRecordError(f"{where}: its people and sentences differ in number")
    return decoded, people, tuple(features["frame_indices"].int64_list.value)


def _read_content(path: epath.Path) -> tuple[dict[str, Any], str]:
    """Returns the content of an index file and its fingerprint, which must be the one in the file."""
    try:
        stored = json.loads(path.read_bytes())
        content = stored["content"]
        intact = stored["fingerprint"] == _fingerprint(content)
        version = content["version"] if intact else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not an index; delete it to have it written again") from error
    if not intact:
        raise UserError(
            f"{path} is damaged: its fingerprint is not that of its content; delete it to have it written again"
        )
    if version != INDEX_VERSION:
        raise UserError(
            f"{path} has index version {version}, expected {INDEX_VERSION}; delete it to write it again"
        )
    return content, stored["fingerprint"]


def _fingerprint(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_size(file: epath.Path, size: int, may_be_cut: bool) -> int:
    """Returns the bytes of a file; raises UserError where they are more, or fewer and that may not be."""
    if not file.exists():
        raise UserError(f"{file} is missing")
    actual = file.stat().length
    if actual < size and not may_be_cut:
        raise UserError(f"{file} is truncated: {actual} bytes, but its index says {size}")
    if actual > size:
        raise UserError(
            f"{file} is not the indexed file: {actual} bytes, but its index says {size}"
        )
    return actual


def _write_atomically(path: epath.Path, text: str) -> None:
    """Writes beside `path` and renames, so that a reader never sees half an index."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
