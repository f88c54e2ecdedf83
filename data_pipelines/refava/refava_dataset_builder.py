"""RefAVA, RefAVA++ and one's own annotated videos as a TFDS dataset of TFRecords, built with Apache Beam.

Annotations -> windows, in chunks of one video -> frames (child processes) -> JPEG -> one record a window
(`data_pipelines/schema.py`), kept in a folder of its own until all are done -> shards, index, `report.json`. TFDS's own
writer for Beam would sort all records in the runner's memory, and could not go on after a kill.
"""

import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from etils import epath

# `tfds build` puts only data_pipelines/ on the path.
if (_ROOT := str(Path(__file__).resolve().parents[2])) not in sys.path:
    sys.path.append(_ROOT)

from data_pipelines import record_index
from data_pipelines.refava import skip_report
from data_pipelines.refava.annotations import Annotations, read_annotations
from data_pipelines.refava.beam_steps import progress, run_step
from data_pipelines.refava.sources import FrameFolder, VideoFolder
from data_pipelines.refava.staging import Chunk, StagedRecord, Staging, write_shard
from data_pipelines.schema import KEY_POSITION, NUM_POSITIONS, record_features
from ravar_jax.errors import UsageError, UserError

REPORT_NAME = "report.json"
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
        annotations: Folder of annotations; if empty, `annotations` in TFDS's manual_dir.
        videos: Folder of movie files, or ""; if `frames` is empty too, `videos` or `frames` in TFDS's manual_dir.
        frames: Folder of extracted frames, or "".
        movie_start_seconds: Second of the annotations' clock at which the movie files start.
        short_side: Frames are scaled down to this many pixels on the shorter side.
        stored_positions: Positions 0..89 that are stored, besides the key frame's.
        jpeg_quality: Of the stored frames, 1..95.
        max_skipped_share: Of all windows, 0 to 1; with more the build fails.

    Raises:
        UsageError: A value is out of its range, or both videos and frames are given.
    """

    annotations: str = ""
    videos: str = ""
    frames: str = ""
    movie_start_seconds: float = 0.0
    short_side: int = 256
    stored_positions: Sequence[int] = tuple(range(NUM_POSITIONS))
    jpeg_quality: int = 90
    max_skipped_share: float = 0.1

    def __post_init__(self):
        self.movie_start_seconds = float(self.movie_start_seconds)  # JSON may say 900
        if self.videos and self.frames:
            raise UsageError("--videos, --frames: give exactly one of them")
        for name, allowed, expected in (
            ("short_side", self.short_side >= 16, "16 or more pixels"),
            ("jpeg_quality", 1 <= self.jpeg_quality <= 95, "1 to 95"),
            ("max_skipped_share", 0.0 <= self.max_skipped_share <= 1.0, "0 to 1"),
            (
                "stored_positions",
                all(position in range(NUM_POSITIONS) for position in self.stored_positions),
                f"whole numbers 0..{NUM_POSITIONS - 1}",
            ),
        ):
            if not allowed:
                raise UsageError(f"--{name}={getattr(self, name)}: expected {expected}")

    def source(self) -> VideoFolder | FrameFolder:
        """Returns where frames come from."""
        positions = tuple(sorted({*self.stored_positions, KEY_POSITION}))
        if self.frames:
            return FrameFolder(self.frames, positions, self.short_side)
        return VideoFolder(self.videos, self.movie_start_seconds, positions, self.short_side)


class Builder(tfds.core.dataset_builder.FileReaderBuilder):
    """The builder; decoding and writing are steps on Apache Beam."""

    name = "refava"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        RefavaConfig(name="refava", description="The released RefAVA pickles."),
        RefavaConfig(name="refava_plus_plus", description="The released RefAVA++ pickles."),
        RefavaConfig(name="ava_style", description="One's own CSV or JSONL."),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = """\
        manual_dir holds annotations/ (the released pickles, or CSV or JSONL) and either videos/ (<video>.mp4, .mkv,
        .avi, .webm or .mov) or frames/ (<video>/image_<6 digits>.jpg). data_pipelines/refava/README.md says more."""
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

    def _create_builder_config(self, builder_config: Any, version: Any) -> RefavaConfig:
        # TFDS refuses settings of one's own under the name of a listed config; here the names say what is read.
        if isinstance(builder_config, RefavaConfig):
            return builder_config
        return super()._create_builder_config(builder_config, version)

    def download_and_prepare(self, **kwargs) -> None:
        """Builds the dataset unless it is there; see TFDS. What a killed build had decoded is used."""
        staging = self._staging_folder()
        super().download_and_prepare(**kwargs)
        if staging.exists():
            staging.rmtree()

    def _staging_folder(self) -> epath.Path:
        return self.data_dir_root / f".staged_{self.name}_{self.builder_config.name}"

    def _download_and_prepare(
        self,
        dl_manager: tfds.download.DownloadManager,
        download_config: tfds.download.DownloadConfig,
    ) -> None:
        if self.info.file_format != tfds.core.FileFormat.TFRECORD:
            raise UserError(f"file format {self.info.file_format}: expected tfrecord")
        config = _with_folders(self.builder_config, dl_manager)
        annotations = read_annotations(config.annotations)
        if annotations.config_name != config.name:
            raise UserError(
                f"--config {config.name}: {config.annotations} holds the layout {annotations.config_name}"
            )
        folder = self._staging_folder()
        folder.mkdir(parents=True, exist_ok=True)
        staging = Staging(str(folder), config.source(), config.jpeg_quality)
        chunks = {split: staging.chunks(windows) for split, windows in annotations.splits.items()}
        _decode(
            staging, [chunk for of_split in chunks.values() for chunk in of_split], download_config
        )
        staged = {split: staging.read(of_split) for split, of_split in chunks.items()}
        reports = {split: skip_report.summarise(lines) for split, (lines, _) in staged.items()}
        skip_report.check_skipped(reports, config.max_skipped_share)
        self._write_shards(
            {split: records for split, (_, records) in staged.items()}, download_config
        )
        record_index.write_index(self.data_path)
        report = {
            "dataset": self.name,
            "config": config.name,
            "version": str(self.version),
            "annotations": config.annotations,
            "videos": config.videos,
            "frames": config.frames,
            "input": describe_input(annotations, config),
            "splits": reports,
        }
        (self.data_path / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")

    def _write_shards(
        self, records: dict[str, list[StagedRecord]], download_config: tfds.download.DownloadConfig
    ) -> None:
        shards: list[tuple[str, list[StagedRecord]]] = []
        splits = []
        for split, of_split in records.items():
            if not of_split:  # the report says why
                continue
            # In an order that has nothing to do with movies and times, and is always the same.
            of_split.sort(
                key=lambda record: hashlib.sha256(f"{split} {record.clip_id}".encode()).digest()
            )
            num_bytes = sum(record.length for record in of_split)
            count = download_config.get_shard_config().get_number_shards(num_bytes, len(of_split))
            bounds = [round(len(of_split) * shard / count) for shard in range(count + 1)]
            name = self._get_filename_template(split)
            of_shard = [of_split[a:b] for a, b in itertools.pairwise(bounds)]
            shards += [
                (str(name.sharded_filepath(shard_index=shard, num_shards=count)), content)
                for shard, content in enumerate(of_shard)
            ]
            splits.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[len(content) for content in of_shard],
                    num_bytes=num_bytes,
                    filename_template=name,
                )
            )

        def count_done() -> int:
            present = {path.name for path in self.data_path.iterdir()}
            return sum(len(content) for path, content in shards if epath.Path(path).name in present)

        total = sum(len(content) for _, content in shards)
        with progress("writing shards", "windows", total, count_done):
            run_step(write_shard, shards, download_config)
        self.info.set_splits(tfds.core.SplitDict(splits))


def _with_folders(config: RefavaConfig, dl_manager: tfds.download.DownloadManager) -> RefavaConfig:
    """Returns the config with the folders of TFDS's manual_dir where it names none."""
    if config.annotations and (config.videos or config.frames):
        return config
    manual = dl_manager.manual_dir
    annotations = config.annotations or str(manual / "annotations")
    videos, frames = config.videos, config.frames
    if not videos and not frames:
        if (manual / "videos").is_dir():
            videos = str(manual / "videos")
        if (manual / "frames").is_dir():
            frames = str(manual / "frames")
        if bool(videos) == bool(frames):
            raise UserError(f"{manual}: expected either videos/ or frames/ in it")
    return dataclasses.replace(config, annotations=annotations, videos=videos, frames=frames)


def _decode(
    staging: Staging, chunks: Sequence[Chunk], download_config: tfds.download.DownloadConfig
) -> None:
    staging.discard_doubtful(chunks)
    total = sum(len(chunk.windows) for chunk in chunks)

    def count_done() -> int:
        return total - sum(len(chunk.windows) for chunk in staging.missing(chunks))

    with progress("decoding", "windows", total, count_done):
        run_step(staging.stage, staging.missing(chunks), download_config)


def describe_input(annotations: Annotations, config: RefavaConfig) -> dict[str, Any]:
    """Returns what a dataset is made from and how; two builds with equal values need not both be made."""
    return {
        "annotations_sha256": annotations.sha256,
        "source": "frames" if config.frames else "videos",
        "movie_start_seconds": config.movie_start_seconds,
        "short_side": config.short_side,
        "stored_positions": list(config.source().positions),
        "jpeg_quality": config.jpeg_quality,
    }
