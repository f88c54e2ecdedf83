"""MiniRefAVA as a TFDS dataset: procedural scenes, rendered on all cores and written as TFRecords.

`build` makes the dataset of a (seed, num_clips, stored_frames) on first use and returns its folder.
"""

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from data_pipelines import schema
from data_pipelines.mini_refava import scenes, worker
from ravar_jax.errors import UsageError

VERSION = "1.3.0"  # changes whenever a scene of the same seed would look or read differently


class MiniRefavaConfig(tfds.core.BuilderConfig):
    """Which scenes and how much of them: one folder for each combination."""

    def __init__(self, *, seed: int, num_clips: int, stored_frames: int):
        super().__init__(
            name=f"seed{seed}_clips{num_clips}_frames{stored_frames}",
            description=f"{num_clips} clips of seed {seed}, {stored_frames} stored frames each",
        )
        self.seed = seed
        self.num_clips = num_clips
        self.stored_frames = stored_frames


class Builder(tfds.core.GeneratorBasedBuilder):
    """Builds MiniRefAVA; records as in `data_pipelines/schema.py`."""

    name = "mini_refava"
    VERSION = tfds.core.Version(VERSION)
    # TFDS looks beside the code for checksums of downloads; there are none, and the search needs a package more.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Procedural clips of 2 to 4 people with sentences, boxes, AVA actions and detections.",
            features=schema.record_features(),
            license="MIT",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        sizes = scenes.split_sizes(self.builder_config.num_clips)
        return {split: self._generate_examples(split, size) for split, size in sizes.items()}

    def _generate_examples(
        self, split: str, num_clips: int
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        config = self.builder_config
        for record in worker.rendered_clips(config.seed, split, num_clips, config.stored_frames):
            yield record["clip_id"], record


def build(data_dir: str, seed: int, num_clips: int, stored_frames: int) -> str:
    """Builds MiniRefAVA under `data_dir` unless it is complete there, and returns the folder of its TFRecords.

    Args:
      data_dir: where datasets are; created if needed.
      seed: which scenes, 0 or more.
      num_clips: clips in all splits together, at least 3.
      stored_frames: positions to store of the 90, see `scenes.stored_positions`.

    Raises:
      UsageError: if a number is out of range.
    """
    if seed < 0:
        raise UsageError(f"data.seed={seed}: expected 0 or more")
    if num_clips < 3:
        raise UsageError(
            f"data.num_clips={num_clips}: expected at least 3, one for each of train, val and test"
        )
    if not 1 <= stored_frames <= scenes.NUM_POSITIONS:
        raise UsageError(
            f"data.stored_frames={stored_frames}: expected 1 to {scenes.NUM_POSITIONS}"
        )
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    config = MiniRefavaConfig(seed=seed, num_clips=num_clips, stored_frames=stored_frames)
    builder = Builder(data_dir=os.path.expanduser(data_dir), config=config)
    folder = os.fspath(builder.data_path)
    if builder.is_prepared():
        return folder
    num_frames = len(scenes.stored_positions(stored_frames))
    print(
        f"MiniRefAVA: rendering {num_clips} clips of {num_frames} frames (seed {seed}) into {folder}",
        flush=True,
    )
    start = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS speaks of downloads; there are none
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    print(f"MiniRefAVA: done in {time.monotonic() - start:.0f} s", flush=True)
    return folder
