"""What `launch/prepare_refava.py` does around the builder: looks at the files first, replaces only by what is whole."""

import concurrent.futures
import contextlib
import io
import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from data_pipelines.refava.annotations import Annotations, Window
from data_pipelines.refava.refava_dataset_builder import REPORT_NAME, Builder, RefavaConfig
from data_pipelines.refava.skip_report import summarise, window_line
from data_pipelines.refava.sources import FrameFolder, VideoFolder
from ravar_jax.errors import UsageError, UserError


def dataset_dir(data_dir: epath.Path, config_name: str) -> epath.Path:
    """Returns the folder of the finished dataset."""
    return data_dir / "refava" / config_name / str(Builder.VERSION)


def finished_report(folder: epath.Path, described: dict[str, Any]) -> dict[str, Any] | None:
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
    return {
        split: summarise(
            [
                window_line(window, 0, checked[window.video_id].get(window.clip_id))
                for window in windows
            ]
        )
        for split, windows in annotations.splits.items()
    }


def beam_options(words: Sequence[str]) -> Any:
    """Returns Apache Beam's `PipelineOptions` of words such as `runner=DataflowRunner`, None of no words.

    Raises:
        UsageError: Beam knows no such option or runner, or a value is not one of the option's.
    """
    if not words:
        return None
    told = io.StringIO()
    with _quiet():
        from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
        from apache_beam.runners.runner import create_runner

        options = PipelineOptions([f"--{word}" for word in words])
        try:
            with contextlib.redirect_stderr(told):
                known = options.get_all_options()
            unknown = set(options.get_all_options(retain_unknown_options=True)) - set(known)
            if runner := options.view_as(StandardOptions).runner:
                create_runner(runner)
        except SystemExit:  # its parser has printed why
            problem = told.getvalue().strip().rpartition("error: ")[2]
            raise UsageError(f"--beam_pipeline_options: {problem}") from None
        except (AttributeError, ImportError, ValueError) as error:
            raise UsageError(f"--beam_pipeline_options: {error}") from error
    if unknown:
        raise UsageError(f"--beam_pipeline_options: Apache Beam has no option {min(unknown)}")
    return options


def build(
    config: RefavaConfig,
    data_dir: epath.Path,
    beam: Any,
    extra_report: dict[str, Any],
) -> dict[str, Any]:
    """Builds the dataset in a folder of its own, and gives it its final name when it is complete.

    Args:
        config: What to build.
        data_dir: The TFDS data directory. An older dataset of the same name is replaced.
        beam: Of `beam_options`.
        extra_report: Goes into `report.json` beside what the builder says.

    Returns:
        The content of the dataset's `report.json`.

    Raises:
        UserError: If fewer windows than wanted could be read, or the pipeline failed. What was decoded is kept for the
            next time.
    """
    final = dataset_dir(data_dir, config.name)
    unfinished = data_dir / f".incomplete_refava_{config.name}"
    shards = unfinished / Builder.name  # of a build that was killed; not what it decoded
    if shards.exists():
        shards.rmtree()
    tfds.disable_progress_bar()
    # TFDS prints that it downloads, and where its temporary folder is.
    with _quiet(), contextlib.redirect_stdout(io.StringIO()):
        builder = Builder(config=config, data_dir=str(unfinished))
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(beam_options=beam)
        )
    built = epath.Path(builder.data_dir)
    report = json.loads((built / REPORT_NAME).read_text()) | extra_report
    (built / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        final.rename(unfinished / "replaced")
    built.rename(final)
    unfinished.rmtree()
    return report


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back the warnings that Beam and TFDS give about themselves; errors still show."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
