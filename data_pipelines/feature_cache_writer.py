"""Writes a feature cache: the frozen models once over every window, the text encoder over every distinct sentence.

dataset -> batches of windows (`batches.py`) -> tokens of their frames on all devices -> time means -> TFRecords, with
what the detector finds in their key frames; then the sentences. Everything goes to a folder beside the output, which is
renamed when it is complete (`cache_shards.py`): a run that was killed goes on with the shards that are missing, and
several processes (`ravar_jax/distributed.py`) share them out.
"""

import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from data_pipelines import cache_identity, feature_cache
from data_pipelines.batches import Batches
from data_pipelines.cache_shards import partial_folder, plan_shards
from data_pipelines.cache_windows import CacheWindows
from data_pipelines.dataset_folder import dataset_folder
from data_pipelines.example_order import EvaluationOrder
from data_pipelines.frozen_encoder import FrozenEncoder, round_up, windows_a_batch
from data_pipelines.quiet_tensorflow import tf
from data_pipelines.record_index import RecordIndex, list_splits, load_index, write_index
from ravar_jax import config_check, distributed
from ravar_jax.backbone import load_backbone
from ravar_jax.detector import configured_detector
from ravar_jax.errors import UserError

_PROGRESS_SECONDS = 2.0


def write_cache(
    config: ConfigDict,
    output: epath.PathLike,
    batch_size: int = 64,
    report: Callable[[str], None] | None = None,
) -> str:
    """Encodes all splits of the config's dataset into `output`.

    Goes on where an earlier call with the same arguments was killed; does nothing where one has ended.

    Args:
        config: says which dataset, backbone, detector, pixels and positions.
        output: folder of the cache; must not exist, or hold the same cache.
        batch_size: frames (and sentences) encoded at a time, about; rounded up to whole windows and devices.
        report: called with a line of progress now and then; None prints it on stderr.

    Returns:
        The key of the cache.

    Raises:
        UserError: the dataset is missing or damaged, backbone or detector do not fit the config, or `output` is taken,
            by another cache, part of one, or a process that is writing it.
        UsageError: the config asks for features that cannot be cached.
    """
    report = report or functools.partial(print, file=sys.stderr, flush=True)
    config_check.check_cacheable(config)
    output = epath.Path(output)
    backbone = load_backbone(config.model.backbone)
    backbone.config.check_inputs(config.data.image_size, config.data.text_length)
    detector = configured_detector(config.model)
    dataset = dataset_folder(config)
    content = cache_identity.cache_content(
        config, cache_identity.frozen_hashes(backbone, detector), backbone.tokenizer.sha256
    )
    content[cache_identity.FINGERPRINT] = cache_identity.dataset_fingerprint(dataset)
    key = cache_identity.content_key(content)
    if output.exists() and any(output.iterdir()):
        return _existing(output, content, key, report)
    sources = {
        split: CacheWindows(load_index(dataset, split), config) for split in list_splits(dataset)
    }
    encoder = FrozenEncoder(config, backbone, detector)
    tokens = [backbone.config.num_query_tokens, backbone.config.width]
    description = {
        "key": key,
        "content": content,
        "shapes": {
            "train_tokens": tokens,
            "eval_tokens": [config.data.eval_clips, *tokens],
            "text_tokens": [config.data.text_length, backbone.config.width],
        },
        # Both decide which windows are encoded together, and so what a shard holds.
        "batches": {"--batch_size": batch_size, "devices": encoder.num_devices},
    }
    first_process = jax.process_index() == 0
    with partial_folder(output, lock=first_process) as folder:
        with distributed.first_process_first("start of the cache"):
            if first_process:
                _begin(folder, description)
        text_rows = _text_rows(sources)
        for split, source in sources.items():
            _write_windows(source, config, split, encoder, batch_size, text_rows, folder, report)
        num_truncated = _write_texts(list(text_rows), config, encoder, batch_size, folder, report)
        distributed.wait_for_all("shards of the cache")
        if first_process:
            write_index(folder)
            cache_identity.write_description(
                folder, {**description, "num_truncated": num_truncated}
            )
            if output.exists():
                output.rmdir()  # empty: checked above
            folder.rename(output)
    distributed.wait_for_all("end of the cache")
    return key


def _text_rows(sources: Mapping[str, CacheWindows]) -> dict[str, int]:
    """Returns the row of every distinct sentence in the text table, in the order of splits and records."""
    rows = {"": feature_cache.BLANK_ROW}
    for source in sources.values():
        for number in range(source.index.num_windows):
            for sentence in source.sentences(number):
                rows.setdefault(sentence, len(rows))
    return rows


def _write_windows(
    source: CacheWindows,
    config: ConfigDict,
    split: str,
    encoder: FrozenEncoder,
    batch_size: int,
    text_rows: Mapping[str, int],
    folder: epath.Path,
    report: Callable[[str], None],
) -> None:
    """Writes this process's share of the records of a split."""
    total, read = source.index.num_windows, source.num_frames
    windows = windows_a_batch(batch_size, read, encoder.num_devices)
    clips = np.concatenate([source.train_rows[np.newaxis], source.eval_rows])
    dtype, sizes = jnp.dtype(config.data.cache_dtype), encoder.backbone.config
    bytes_each = dtype.itemsize * len(clips) * sizes.num_query_tokens * sizes.width
    shards = plan_shards(folder, split, total=total, record_bytes=bytes_each, batch_rows=windows)
    shards.check_written()
    if written := shards.num_written:
        report(f"cache: {split} {written}/{total} windows were written before")
    missing = shards.missing(jax.process_index(), jax.process_count())
    own = sum(last - first for first, last in map(shards.rows, missing))
    progress = _Progress(split, own, read, report)
    order = EvaluationOrder(np.arange(total))

    def records(first: int, last: int) -> Iterator[bytes]:
        batches = Batches(
            source,
            order,
            batch_size=windows,
            start_step=first // windows,
            stop_step=-(-last // windows),
            process_index=0,  # shards are shared out, not batches
            process_count=1,
        )
        for batch in batches:
            means = encoder.time_means(batch["frames"], clips).astype(dtype)
            found = encoder.detections(batch["key_frame"]) if "key_frame" in batch else None
            real = np.flatnonzero(batch["example_id"] >= 0)
            progress.add(len(real))
            for row in real:
                number, payload = int(batch["example_id"][row]), batch["record"][row]
                example = _window_example(source.index, number, payload, means[row], text_rows)
                if found is not None:
                    _add_detected(example, found[0][row], found[1][row])
                yield example.SerializeToString(deterministic=True)

    for shard in missing:
        shards.write(shard, records(*shards.rows(shard)))
    if source.bad_records.count:
        report(f"cache: {split} {source.bad_records.count} unreadable record(s) were masked out")


class _Progress:
    """Reports windows done and frames a second, now and then and at the end."""

    def __init__(self, split: str, total: int, frames: int, report: Callable[[str], None]):
        """Args: total: windows that this process encodes. frames: read of a window."""
        self._split, self._total, self._frames, self._report = split, total, frames, report
        self._done = 0
        self._start = self._reported = time.monotonic()

    def add(self, windows: int) -> None:
        self._done += windows
        now = time.monotonic()
        if now - self._reported > _PROGRESS_SECONDS or self._done == self._total:
            self._reported = now
            rate = self._done * self._frames / (now - self._start)
            self._report(
                f"cache: {self._split} {self._done}/{self._total} windows, {rate:.0f} frames/s"
            )


def _window_example(
    index: RecordIndex,
    number: int,
    payload: bytes,
    means: np.ndarray,
    text_rows: Mapping[str, int],
) -> tf.train.Example:
    """Returns a cached record: the window's fields without its frames, and its tokens, training first."""
    example = tf.train.Example.FromString(payload)
    fields = example.features.feature
    readable = bool(payload)
    if readable:
        fields["frames"].bytes_list.ClearField("value")
        fields["frame_indices"].int64_list.ClearField("value")
        sentences = fields["people/sentence"].bytes_list.value
        fields["text_rows"].int64_list.value.extend(text_rows[each.decode()] for each in sentences)
    else:  # its place is kept: as many examples, all masked
        fields["clip_id"].bytes_list.value.append(index.clip_ids[number].encode())
        people = int(index.num_people[number])
        for field in ("people/person_id", "people/sentence"):
            fields[field].bytes_list.value.extend([b""] * people)
        fields["text_rows"].int64_list.value.extend([feature_cache.BLANK_ROW] * people)
    fields["readable"].int64_list.value.append(int(readable))
    fields["train_tokens"].bytes_list.value.append(means[0].tobytes())
    fields["eval_tokens"].bytes_list.value.append(means[1:].tobytes())
    return example


def _add_detected(example: tf.train.Example, boxes: np.ndarray, class_ids: np.ndarray) -> None:
    """Adds a window's detections, boxes (K, 4) and class ids (K,), to its cached record."""
    fields = example.features.feature
    fields["detected_boxes"].bytes_list.value.append(boxes.tobytes())
    fields["detected_class_ids"].int64_list.value.extend(class_ids.tolist())


def _write_texts(
    sentences: Sequence[str],
    config: ConfigDict,
    encoder: FrozenEncoder,
    batch_size: int,
    folder: epath.Path,
    report: Callable[[str], None],
) -> int:
    """Writes the text table and returns how many of its sentences were cut."""
    length, backbone = config.data.text_length, encoder.backbone
    ids, masks, num_truncated = backbone.tokenizer.encode(sentences, length)
    rows = round_up(batch_size, encoder.num_devices)
    dtype = jnp.dtype(config.data.cache_dtype)
    shards = plan_shards(
        folder,
        feature_cache.TEXT_SPLIT,
        total=len(sentences),
        record_bytes=dtype.itemsize * length * backbone.config.width,
        batch_rows=rows,
    )

    def records(start: int, stop: int) -> Iterator[bytes]:
        for first in range(start, stop, rows):
            batch_ids, batch_masks = ids[first : first + rows], masks[first : first + rows]
            missing = rows - len(batch_ids)  # filled up, so that one program serves every batch
            padding = ((0, missing), (0, 0))
            tokens = encoder.text(
                np.pad(batch_ids, padding), np.pad(batch_masks, padding, constant_values=1)
            )
            for token_ids, mask, values in zip(batch_ids, batch_masks, tokens, strict=False):
                example = tf.train.Example()
                fields = example.features.feature
                fields["token_ids"].int64_list.value.extend(token_ids.tolist())
                fields["attention_mask"].int64_list.value.extend(mask.tolist())
                fields["tokens"].bytes_list.value.append(values.astype(dtype).tobytes())
                yield example.SerializeToString(deterministic=True)

    shards.check_written()
    for shard in shards.missing(jax.process_index(), jax.process_count()):
        shards.write(shard, records(*shards.rows(shard)))
    report(
        f"cache: {len(sentences)} distinct sentences, {num_truncated} longer than data.text_length={length} and cut"
    )
    return num_truncated


def _begin(folder: epath.Path, description: dict[str, Any]) -> None:
    """Marks the folder with what will be in it; refuses one that holds shards of something else."""
    if any(folder.glob("features-*")):
        old = cache_identity.read_description(folder)
        phrases = cache_identity.differences(
            old["content"] | old["batches"], description["content"] | description["batches"]
        )
        if phrases:
            raise UserError(
                f"{folder} holds part of another cache: {'; '.join(phrases)}; delete it or choose another --output"
            )
    else:
        for unfinished in folder.iterdir():
            unfinished.unlink()
    cache_identity.write_description(folder, description)


def _existing(
    output: epath.Path, content: dict[str, Any], key: str, report: Callable[[str], None]
) -> str:
    """Accepts a finished cache of the same content; refuses anything else."""
    path = output / "cache.json"
    if not path.exists():
        raise UserError(f"--output {output} exists and is not a feature cache")
    phrases = cache_identity.differences(
        cache_identity.read_description(output)["content"], content
    )
    if phrases:
        raise UserError(
            f"--output {output} holds another cache: {'; '.join(phrases)}; delete it or choose another"
        )
    report(f"cache: {output} is already complete")
    return key
