"""Feeds damaged files to every reader of data and counts what comes of it.

    python -m tests.benchmarks.fuzz [--inputs 1000] [--seed 0]

Files of each kind are written, damaged (cut, bits flipped, edited, made to carry code, given another schema) and read
as training, `launch/prepare_refava.py` and `launch/predict.py` read them. What is served is compared with what the
intact file serves. Prints a table, kinds by outcomes:

    refused     one line that names the file
    identical   all that is served equals the original
    masked      examples are masked out within `data.max_bad_records` (windows of a video: left out with a reason), and
                the rest equals the original
    as edited   annotations, which have no checksum: still valid, every line is one person, and some value differs
    altered     a video's pixels differ from the original's: its codec has no checksum either
    WRONG       anything else that is served
    CRASHED     anything raised but a one-line `UserError`
    SLOW        more than 30 seconds

Exit code 1 where the last three are not zero.
"""

import argparse
import collections
import faulthandler
import functools
import itertools
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from ravar_jax.errors import UserError
from tests.benchmarks import fuzz_annotations, fuzz_records, fuzz_videos
from tests.benchmarks.fuzz_damage import Trial, check_line

OUTCOMES = (
    "refused",
    "identical",
    "masked",
    "as edited",
    "altered",
    "WRONG",
    "CRASHED",
    "SLOW",
)
FAILURES = OUTCOMES[-3:]
SECONDS = 30


def make(folder: Path) -> dict[str, tuple[int, Trial]]:
    """Writes the intact files; returns kind -> its share of the inputs, and its trial."""
    kinds: dict[str, tuple[int, Trial]] = {}
    for module in (fuzz_records, fuzz_videos, fuzz_annotations):
        own = folder / module.__name__.rpartition(".")[2]
        own.mkdir(parents=True)
        kinds |= module.make(own)
    return kinds


def outcome_of(trial: Callable[[], str], folder: Path) -> str:
    """Runs a trial; a failure is told on stderr."""
    try:
        return trial()
    except UserError as error:
        try:
            check_line(str(error), folder)
        except AssertionError:
            traceback.print_exc()
            return "CRASHED"
        return "refused"
    except Exception:
        traceback.print_exc()
        return "CRASHED"


def schedule(kinds: Mapping[str, tuple[int, Trial]]) -> Iterator[tuple[str, int]]:
    """Yields (kind, number within the kind) for ever, each kind as often as its share says."""
    numbers: collections.Counter[str] = collections.Counter()
    largest = max(share for share, _ in kinds.values())
    while True:
        for turn in range(largest):
            for kind, (share, _) in kinds.items():
                if turn < share:
                    yield kind, numbers[kind]
                    numbers[kind] += 1


def fuzz(inputs: int, seed: int) -> dict[str, collections.Counter[str]]:
    """Returns kind -> outcome -> count."""
    with tempfile.TemporaryDirectory() as root:
        kinds = make(Path(root) / "intact")
        table: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in kinds}
        for step, (kind, number) in enumerate(itertools.islice(schedule(kinds), inputs)):
            folder = Path(root) / f"input{step}"
            folder.mkdir()
            rng = np.random.default_rng([seed, step])
            faulthandler.dump_traceback_later(4 * SECONDS, exit=True)  # hangs in a library too
            start = time.monotonic()
            trial = functools.partial(kinds[kind][1], folder, rng, number)
            outcome = outcome_of(trial, folder)
            seconds = time.monotonic() - start
            faulthandler.cancel_dump_traceback_later()
            outcome = "SLOW" if seconds > SECONDS else outcome
            table[kind][outcome] += 1
            if outcome in FAILURES:
                print(f"input {step} ({kind}, number {number}): {outcome}", file=sys.stderr)
            shutil.rmtree(folder)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=1000, help="damaged files")
    parser.add_argument("--seed", type=int, default=0, help="of the damage")
    arguments = parser.parse_args()
    logging.getLogger("data_pipelines").setLevel(logging.ERROR)  # one line a masked record
    table = fuzz(arguments.inputs, arguments.seed)
    table["all"] = sum(table.values(), collections.Counter())
    width = max(map(len, table))
    print(" " * width, *(f"{name:>9}" for name in OUTCOMES))
    for kind, counts in table.items():
        print(f"{kind:<{width}}", *(f"{counts[name]:>9}" for name in OUTCOMES))
    sys.exit(any(table["all"][name] for name in FAILURES))


if __name__ == "__main__":
    main()
