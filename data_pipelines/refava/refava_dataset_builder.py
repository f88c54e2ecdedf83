"""RefAVA, RefAVA++ and one's own annotated videos as a TFDS dataset of TFRecords, built with Apache Beam.

Annotations -> windows, in chunks of one video -> frames (child processes) -> JPEG -> one record a window
(`data_pipelines/schema.py`). Windows without readable frames are left out; what was kept and what was not, and why, is
written to `<report_dir>/<split>.json`.
"""

import dataclasses
import functools
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from data_pipelines.refava.annotations import SPLITS, Window, read_annotations
from data_pipelines.refava.sources import FrameFolder, ReadWindow, VideoFolder
from data_pipelines.schema import KEY_POSITION, NUM_POSITIONS, record_features
from ravar_jax.errors import UserError

# Windows that one child process reads in one pass: neighbours overlap by two of their three seconds.
_CHUNK_WINDOWS = 32
_NUM_EXAMPLES_IN_REPORT = 5
_CITATION = """@inproceedings{peng2024referring,
  title={Referring Atomic Video Action Recognition},
  author={Peng, Kunyu and others},
  booktitle={European Conference on Computer Vision (ECCV)},
  year={2024},
  note={arXiv:2407.01872}
}"""


@dataclasses.dataclass(eq=False)
class RefavaConfig(tfds.core.BuilderConfig):
    """What to build from what; `name` is refava, refava_plus_plus or ava_style, as the annotations say.

    Attributes:
        annotations: Folder of annotations.
        videos: Folder of movie files, or "".
        frames: Folder of extracted frames, or "".
        movie_start_seconds: Second of the annotations' clock at which the movie files start.
        short_side: Frames are scaled down to this many pixels on the shorter side.
        stored_positions: Positions 0..89 that are stored.
        jpeg_quality: Of the stored frames, 1..95.
        report_dir: Folder for the reports of the splits.
        splits: The splits to build.
    """

    annotations: str = ""
    videos: str = ""
    frames: str = ""
    movie_start_seconds: float = 0.0
    short_side: int = 256
    stored_positions: tuple[int, ...] = tuple(range(NUM_POSITIONS))
    jpeg_quality: int = 90
    report_dir: str = ""
    splits: tuple[str, ...] = SPLITS

    def source(self) -> VideoFolder | FrameFolder:
        """Returns where frames come from."""
        positions = tuple(sorted({*self.stored_positions, KEY_POSITION}))
        if self.frames:
            return FrameFolder(self.frames, positions, self.short_side)
        return VideoFolder(self.videos, self.movie_start_seconds, positions, self.short_side)


class Builder(tfds.core.GeneratorBasedBuilder):
    """The builder; its splits are Beam pipelines."""

    name = "refava"
    VERSION = tfds.core.Version("1.0.0")
    # TFDS looks beside the code for checksums of downloads; there are none, and the search needs a package more.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Windows of movies, the people described in them, their boxes and their AVA actions.",
            features=record_features(),
            homepage="https://github.com/KPeng9510/RAVAR",
            citation=_CITATION,
        )

    def _split_generators(self, dl_manager: Any, pipeline: Any) -> dict[str, Any]:
        import apache_beam as beam

        config = self.builder_config
        source = config.source()
        splits = {}
        for split, windows in read_annotations(config.annotations).splits.items():
            if split not in config.splits:
                continue
            read = functools.partial(_read_chunk, source=source, quality=config.jpeg_quality)
            outputs = (
                pipeline
                | f"Windows_{split}" >> beam.Create(list(chunks(windows)))
                | f"Spread_{split}" >> beam.Reshuffle()
                | f"Read_{split}" >> beam.FlatMap(read).with_outputs("report", main="examples")
            )
            write = functools.partial(_write_report, split=split, folder=config.report_dir)
            _ = (
                outputs.report
                | f"Collect_{split}" >> beam.combiners.ToList()
                | f"Report_{split}" >> beam.Map(write)
            )
            splits[split] = outputs.examples
        return splits

    def _generate_examples(self) -> Iterator[Any]:
        raise NotImplementedError("the splits are given as Beam collections")


def chunks(windows: Iterable[Window]) -> Iterator[list[Window]]:
    """Yields lists of windows of one video each, in order of time."""
    ordered = sorted(windows, key=lambda window: (window.video_id, window.key_second))
    for _, of_video in itertools.groupby(ordered, key=lambda window: window.video_id):
        rest = list(of_video)
        for start in range(0, len(rest), _CHUNK_WINDOWS):
            yield rest[start : start + _CHUNK_WINDOWS]


def _read_chunk(
    chunk: list[Window], source: VideoFolder | FrameFolder, quality: int
) -> Iterator[Any]:
    """Yields (clip id, record) of the windows that can be read, and a line for the report of every window."""
    import apache_beam as beam

    for read in source.read(chunk[0].video_id, chunk):
        line = {
            "clip_id": read.window.clip_id,
            "people": len(read.window.people),
            "frames_repeated": read.frames_repeated,
            "reason": read.problem.reason if read.problem else "",
            "detail": read.problem.detail if read.problem else "",
        }
        yield beam.pvalue.TaggedOutput("report", line)
        if not read.problem:
            yield read.window.clip_id, make_record(read, source.positions, quality)


def make_record(read: ReadWindow, positions: tuple[int, ...], quality: int) -> dict[str, Any]:
    """Returns the record of a window as `record_features` takes it."""
    encoded: dict[int, bytes] = {}  # a frame shown at several positions is encoded once
    for frame in read.frames:
        if id(frame) not in encoded:
            buffer = io.BytesIO()
            Image.fromarray(frame).save(buffer, format="JPEG", quality=quality)
            encoded[id(frame)] = buffer.getvalue()
    window = read.window
    return {
        "clip_id": window.clip_id,
        "video_id": window.video_id,
        "key_time": window.key_second,
        "frames": [encoded[id(frame)] for frame in read.frames],
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


def summarise(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns what was kept of a split and what was skipped, by reason, with the first examples."""
    skipped: dict[str, list[dict[str, Any]]] = {}
    for line in sorted(lines, key=lambda line: line["clip_id"]):
        if line["reason"]:
            skipped.setdefault(line["reason"], []).append(line)
    kept = [line for line in lines if not line["reason"]]
    return {
        "windows": len(lines),
        "people": sum(line["people"] for line in lines),
        "windows_kept": len(kept),
        "people_kept": sum(line["people"] for line in kept),
        "windows_with_repeated_frames": sum(line["frames_repeated"] > 0 for line in kept),
        "frames_repeated": sum(line["frames_repeated"] for line in kept),
        "skipped": [
            {
                "reason": reason,
                "windows": len(of_reason),
                "people": sum(line["people"] for line in of_reason),
                "examples": [
                    {"clip_id": line["clip_id"], "detail": line["detail"]}
                    for line in of_reason[:_NUM_EXAMPLES_IN_REPORT]
                ],
            }
            for reason, of_reason in skipped.items()
        ],
    }


def _write_report(lines: list[dict[str, Any]], split: str, folder: str) -> None:
    report = summarise(lines)
    if not report["windows_kept"]:
        raise UserError(nothing_kept(split, report))
    epath.Path(folder, f"{split}.json").write_text(json.dumps(report))


def nothing_kept(split: str, report: dict[str, Any]) -> str:
    """Returns the error line for a split of which no window could be read."""
    first = report["skipped"][0]
    example = first["examples"][0]
    return (
        f"split {split}: none of its {report['windows']} windows can be read; {first['windows']}: {first['reason']} "
        f"({example['clip_id']}: {example['detail']})"
    )
