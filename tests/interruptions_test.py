"""Told to stop, a run saves and ends, whatever it is doing; hanging, it says where and ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from ravar_jax.errors import UserError
from ravar_jax.train import train_and_evaluate
from tests import tiny_run
from tests.together import free_address

# Two processes of four devices each; slow enough that a signal comes in time.
PROGRAM = """
import sys, time
import jax
import tests.conftest
from ravar_jax import distributed
from ravar_jax.errors import UserError
from ravar_jax.train import train_and_evaluate
from tests import tiny_run

jax.config.update("jax_num_cpu_devices", 4)
distributed.initialize()
share = slice(0, 8) if jax.process_index() == 0 else slice(8, 16)

def own(batches):
    for batch in batches:
        time.sleep(0.05)
        yield {key: value[share] for key, value in batch.items()}

config = tiny_run.make_config(train__steps=2000, train__eval_every_steps=2000, checkpoint__every_steps=500)
try:
    train_and_evaluate(
        config,
        sys.argv[1],
        lambda start: own(tiny_run.train_batches(start)),
        lambda: own(tiny_run.eval_batches()),
        tiny_run.make_task(),
    )
except UserError as error:
    sys.exit(f"error: {error}")
"""
HANGING = """
import sys, time
import tests.conftest
from ravar_jax.train import train_and_evaluate
from tests import tiny_run

def batches(start):
    yield from [tiny_run.make_batch(1)] * 2
    time.sleep(600)

config = tiny_run.make_config(train__hang_seconds=3)
train_and_evaluate(config, sys.argv[1], batches, tiny_run.eval_batches, tiny_run.make_task())
"""


def told_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def train(workdir, train_batches=tiny_run.train_batches, eval_batches=tiny_run.eval_batches):
    config, task = tiny_run.make_config(), tiny_run.make_task()
    return train_and_evaluate(config, workdir, train_batches, eval_batches, task)


def logged_losses(workdir: Path) -> dict[int, float]:
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def assert_goes_on_as_if_nothing_had_happened(workdir: Path, straight: Path) -> None:
    ours, theirs = train(workdir), train(straight)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert logged_losses(workdir) == logged_losses(straight)


def test_a_notice_while_data_is_awaited_saves_after_the_step(tmp_path):
    def batches(start):
        for number, batch in enumerate(tiny_run.train_batches(start)):
            if number == 2:
                told_to_stop()
            yield batch

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(
        UserError, match="told to stop: step 3 of 8 is saved in .*; the same command goes on"
    ):
        train(tmp_path / "run", batches)
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()
    assert signal.getsignal(signal.SIGTERM) == before
    assert_goes_on_as_if_nothing_had_happened(tmp_path / "run", tmp_path / "straight")


def test_a_notice_during_evaluation_cuts_it_short(tmp_path):
    asked = []

    def batches():
        for batch in tiny_run.eval_batches():
            asked.append(batch)
            if len(asked) == 1:
                told_to_stop()
            yield batch

    with pytest.raises(UserError, match="told to stop: step 4 of 8 is saved"):
        train(tmp_path / "run", eval_batches=batches)
    assert len(asked) == 1
    assert_goes_on_as_if_nothing_had_happened(tmp_path / "run", tmp_path / "straight")


def test_a_notice_to_one_process_stops_both_at_one_step(tmp_path, repository):
    workdir = tmp_path / "run"
    job = {"JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(workdir)],
            cwd=repository,
            env={**os.environ, **job, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        deadline = time.monotonic() + 120
        while not (workdir / "metrics.jsonl").exists() or len(logged_losses(workdir)) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1], "\n".join(outputs)
    steps = [re.search(r"told to stop: step (\d+) of 2000 is saved", text) for text in outputs]
    assert steps[0] is not None
    assert steps[1] is not None
    assert steps[0][1] == steps[1][1]
    assert (workdir / "checkpoints" / steps[0][1]).is_dir()


def test_a_run_that_hangs_shows_where_and_ends(tmp_path, repository):
    command = [sys.executable, "-c", HANGING, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Timeout (0:00:03)!" in done.stderr
    assert "in next_batch" in done.stderr
