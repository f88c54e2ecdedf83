"""Told to stop, a run saves and ends, whatever it is doing; hanging, it says where and ends."""

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
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

config = tiny_run.make_config(train__hang_seconds=8)
train_and_evaluate(config, sys.argv[1], batches, tiny_run.eval_batches, tiny_run.make_task())
"""


def told_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def train(
    workdir, train_batches=tiny_run.train_batches, eval_batches=tiny_run.eval_batches, task=None
):
    task = task or tiny_run.make_task()
    return train_and_evaluate(tiny_run.make_config(), workdir, train_batches, eval_batches, task)


def logged(workdir: Path) -> list[dict]:
    """Returns what a run logged, times left out."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    timed = ("train/clips_per_second", "train/data_wait_share")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nobody told to stop: its workdir and final state."""
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, train(workdir)


def assert_stops_and_goes_on(step: int, workdir: Path, straight, **told) -> None:
    """Trains with what sends the notice, then without."""
    before = signal.getsignal(signal.SIGTERM)
    message = f"told to stop: step {step} of 8 is saved in .*; the same command goes on"
    with pytest.raises(UserError, match=message):
        train(workdir, **told)
    assert signal.getsignal(signal.SIGTERM) == before
    assert int(max((workdir / "checkpoints").iterdir(), key=lambda f: int(f.name)).name) == step
    state = train(workdir)
    jax.tree.map(np.testing.assert_array_equal, state, straight[1])
    assert logged(workdir) == logged(straight[0])


@pytest.mark.parametrize("step", [0, 2])
def test_a_notice_while_data_is_awaited_does_not_wait_for_it(tmp_path, straight, step):
    def batches(start):
        yield from itertools.islice(tiny_run.train_batches(start), step)
        told_to_stop()
        threading.Event().wait()  # for ever, where no signal handler runs

    assert_stops_and_goes_on(step, tmp_path, straight, train_batches=batches)


def test_a_notice_while_evaluation_awaits_data_is_heard(tmp_path, straight):
    def batches():
        yield next(tiny_run.eval_batches())
        told_to_stop()
        threading.Event().wait()

    assert_stops_and_goes_on(4, tmp_path, straight, eval_batches=batches)


def test_a_notice_during_the_last_evaluation_is_heard(tmp_path, straight):
    evaluations = []

    def batches():
        evaluations.append(1)
        for batch in tiny_run.eval_batches():
            yield batch
            if len(evaluations) == 2:
                told_to_stop()

    assert_stops_and_goes_on(8, tmp_path, straight, eval_batches=batches)


@pytest.mark.parametrize(("function", "step"), [("loss", 1), ("predict", 4)])
def test_a_notice_during_compilation_is_heard(tmp_path, straight, function, step):
    class Traces(list):
        def append(self, name):
            if name == function:
                told_to_stop()

    assert_stops_and_goes_on(step, tmp_path, straight, task=tiny_run.make_task(Traces()))


def test_a_notice_during_a_step_saves_behind_it(tmp_path, straight):
    task = tiny_run.make_task()
    told = []

    def loss(params, frozen, batch, rng, train):
        def run_by_the_device(example):
            if example == 16 * 3 and not told:
                told.append(1)
                told_to_stop()

        jax.debug.callback(run_by_the_device, batch["example_id"][0])
        return task.loss(params, frozen, batch, rng, train)

    slow = dataclasses.replace(task, loss=loss)
    with pytest.raises(UserError, match=r"told to stop: step [34] of 8 is saved"):
        train(tmp_path, task=slow)
    jax.tree.map(np.testing.assert_array_equal, train(tmp_path), straight[1])
    assert logged(tmp_path) == logged(straight[0])


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
        while not (workdir / "metrics.jsonl").exists() or len(logged(workdir)) < 3:
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
    assert "Timeout (0:00:08)!" in done.stderr
    assert "in next_batch" in done.stderr
