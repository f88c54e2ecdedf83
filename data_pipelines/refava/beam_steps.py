"""One step of work on Apache Beam: any runner, progress on stderr, an error line instead of Beam's own."""

import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds
import tqdm

from ravar_jax.errors import UserError

# Beam's own choice on one machine, "DirectRunner", first tries to download another runner.
_LOCAL_RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"
_POLL_SECONDS = 2.0


def run_step(
    function: Callable[[Any], None],
    elements: Sequence[Any],
    config: tfds.download.DownloadConfig,
) -> None:
    """Calls `function` on every element, wherever the runner of `config` does so, and waits.

    Args:
        function: Is pickled; may be called again on an element whose worker was lost.
        elements: Are pickled.
        config: Its `beam_options` and `beam_runner`; without a runner threads of this process do it, without options as
            many as there are cores.

    Raises:
        UserError: As raised by `function`.
    """
    import apache_beam as beam
    from apache_beam.options.pipeline_options import (
        PipelineOptions,
        StandardOptions,
        TypeOptions,
    )

    options = config.beam_options or PipelineOptions(
        ["--direct_running_mode=multi_threading", f"--direct_num_workers={os.cpu_count()}"]
    )
    if config.beam_runner is None and options.view_as(StandardOptions).runner is None:
        options.view_as(StandardOptions).runner = _LOCAL_RUNNER
    options.view_as(TypeOptions).pipeline_type_check = False
    try:
        with beam.Pipeline(runner=config.beam_runner, options=options) as pipeline:
            _ = pipeline | beam.Create(elements) | beam.Reshuffle() | beam.Map(function)
    except Exception as error:
        # Beam wraps what a step raised into text of its own.
        if told := re.search(r"UserError: (.*?)( \[while running|\n|$)", str(error)):
            raise UserError(told[1]) from error
        raise


@contextlib.contextmanager
def progress(doing: str, unit: str, total: int, count_done: Callable[[], int]) -> Iterator[None]:
    """Shows on stderr, while the body runs, how much is done, how fast, and the time left.

    Args:
        doing: What is done.
        unit: What is counted.
        total: Of all.
        count_done: Asked every two seconds; looks at what lies on disk, so that it serves all runners.
    """
    stop = threading.Event()
    # smoothing=0: work is counted in chunks, so only the average rate says when it will end.
    with tqdm.tqdm(
        desc=doing,
        unit=f" {unit}",
        total=total,
        initial=count_done(),
        smoothing=0,
        file=sys.stderr,
    ) as bar:

        def update() -> None:
            bar.update(count_done() - bar.n)

        def watch() -> None:
            while not stop.wait(_POLL_SECONDS):
                with contextlib.suppress(Exception):  # a bucket that does not answer this once
                    update()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
            update()
        finally:
            stop.set()
            watcher.join()
