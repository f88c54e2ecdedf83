"""Annotations and movies -> a finished dataset folder: check, build, index, report, and only then the final name."""

import concurrent.futures
import contextlib
import dataclasses
import io
import json
import logging
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from data_pipelines import record_index
from data_pipelines.refava.annotations import Annotations, Window
from data_pipelines.refava.refava_dataset_builder import (
    Builder,
    RefavaConfig,
    nothing_kept,
    summarise,
)
from data_pipelines.refava.sources import FrameFolder, VideoFolder
from ravar_jax.errors import UserError

REPORT_NAME = "report.json"
# Beam's own choice on one machine, "DirectRunner", first tries to download another runner.
_LOCAL_RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"


def dataset_dir(data_dir: Path, config_name: str) -> Path:
    """Returns the folder of the finished dataset."""
    return data_dir / "refava" / config_name / str(Builder.VERSION)


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


def finished_report(folder: Path, described: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the report of the dataset that is already there, or None where there is none.

    Raises:
        UserError: If the dataset there was made from something else, naming what differs.
    """
    if not folder.exists():
        return None
    try:
        report = json.loads((folder / REPORT_NAME).read_text())
        before = report["input"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder} exists without a readable {REPORT_NAME}; --overwrite replaces it"
        ) from error
    for key, value in described.items():
        if before.get(key) != value:
            raise UserError(
                f"{folder} holds a dataset made with other input: {key} was {_short(before.get(key))}, now "
                f"{_short(value)}; choose another --data_dir, or --overwrite"
            )
    return report


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def check(annotations: Annotations, source: VideoFolder | FrameFolder) -> dict[str, dict[str, Any]]:
    """Looks at the file of every video, without decoding windows; returns the expected report of each split."""
    by_video: dict[str, list[Window]] = defaultdict(list)
    for windows in annotations.splits.values():
        for window in windows:
            by_video[window.video_id].append(window)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        checked = dict(
            zip(by_video, pool.map(source.check, by_video, by_video.values()), strict=True)
        )
    reports = {}
    for split, windows in annotations.splits.items():
        lines = []
        for window in windows:
            problem = checked[window.video_id].get(window.clip_id)
            lines.append(
                {
                    "clip_id": window.clip_id,
                    "people": len(window.people),
                    "frames_repeated": 0,
                    "reason": problem.reason if problem else "",
                    "detail": problem.detail if problem else "",
                }
            )
        reports[split] = summarise(lines)
    if not any(report["windows_kept"] for report in reports.values()):
        raise UserError(nothing_kept(*next(iter(reports.items()))))
    return reports


def check_skipped(splits: dict[str, dict[str, Any]], allowed: float) -> None:
    """Refuses to leave out more of the windows than allowed.

    Args:
        splits: reports of the splits, expected or of a build.
        allowed: share of all windows, 0 to 1.

    Raises:
        UserError: more are left out; names the commonest reason.
    """
    total = sum(report["windows"] for report in splits.values())
    skipped = [reason for report in splits.values() for reason in report["skipped"]]
    count = sum(reason["windows"] for reason in skipped)
    if count > allowed * total:
        by_reason: dict[str, int] = defaultdict(int)
        for reason in skipped:
            by_reason[reason["reason"]] += reason["windows"]
        commonest = max(by_reason, key=lambda name: by_reason[name])
        raise UserError(
            f"{count} of {total} windows would be left out ({count / total:.1%}; {by_reason[commonest]}: {commonest}), "
            f"--max_skipped_share={allowed:g} allows fewer"
        )


def build(
    annotations: Annotations,
    config: RefavaConfig,
    expected: dict[str, dict[str, Any]],
    data_dir: Path,
    beam_options: Sequence[str],
    max_skipped_share: float = 1.0,
) -> dict[str, Any]:
    """Builds the dataset under a temporary name, and gives it its final one when it is complete.

    Args:
        annotations: What `read_annotations` found in `config.annotations`.
        config: What to build.
        expected: What `check` said; splits of which nothing can be read are left out.
        data_dir: The TFDS data directory. An older dataset of the same name is replaced.
        beam_options: Beam pipeline options, each `--name=value`.
        max_skipped_share: of the windows, which may turn out unreadable; with more nothing is kept.

    Returns:
        The content of the dataset's `report.json`.

    Raises:
        UserError: If no window of a split, or fewer than wanted of all, could be read, or the pipeline failed.
    """
    with _quiet():
        from apache_beam.options.pipeline_options import PipelineOptions

    final = dataset_dir(data_dir, config.name)
    temporary = data_dir / f".incomplete_refava_{config.name}"
    shutil.rmtree(temporary, ignore_errors=True)  # of an interrupted build
    reports = temporary / "reports"
    reports.mkdir(parents=True)
    splits = tuple(split for split, report in expected.items() if report["windows_kept"])
    config = dataclasses.replace(config, report_dir=str(reports), splits=splits)
    try:
        tfds.disable_progress_bar()
        beam = PipelineOptions([f"--runner={_LOCAL_RUNNER}", *beam_options])
        try:
            # TFDS prints that it downloads, and where its temporary folder is.
            with _quiet(), contextlib.redirect_stdout(io.StringIO()):
                builder = Builder(config=config, data_dir=str(temporary))
                builder.download_and_prepare(
                    download_config=tfds.download.DownloadConfig(beam_options=beam)
                )
        except Exception as error:
            # Beam wraps what a step raised into text of its own.
            if told := re.search(r"UserError: (.*?)( \[while running|\n|$)", str(error)):
                raise UserError(told[1]) from error
            raise
        built = Path(builder.data_dir)
        record_index.write_index(built)
        report = {
            "dataset": "refava",
            "config": config.name,
            "version": str(Builder.VERSION),
            "annotations": config.annotations,
            "videos": config.videos,
            "frames": config.frames,
            "input": describe_input(annotations, config),
            "splits": {
                split: json.loads((reports / f"{split}.json").read_text())
                if split in splits
                else expected[split]
                for split in expected
            },
        }
        check_skipped(report["splits"], max_skipped_share)
        (built / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():
            final.rename(temporary / "replaced")
        built.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back the warnings that Beam and TFDS give about themselves; errors still show."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def table(splits: dict[str, dict[str, Any]]) -> str:
    """Returns a table of what was kept and skipped, and the reasons."""
    columns = ("windows", "people", "windows_kept", "people_kept", "windows_with_repeated_frames")
    heads = ("split", "windows", "people", "windows kept", "people kept", "with repeated frames")
    rows = [
        heads,
        *((split, *(str(report[name]) for name in columns)) for split, report in splits.items()),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    for split, report in splits.items():
        for skipped in report["skipped"]:
            example = skipped["examples"][0]
            lines.append(
                f"{split}: skipped {skipped['windows']} windows ({skipped['people']} people), {skipped['reason']}; "
                f"first {example['clip_id']}: {example['detail']}"
            )
    return "\n".join(lines)
