"""The training loop: exact resume, kill -9, the guard against non-finite steps, one trace, what is logged."""

import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from ravar_jax import sharding
from ravar_jax.errors import UserError
from ravar_jax.metric_log import MetricLog
from ravar_jax.optimizer import make_optimizer
from ravar_jax.train import train_and_evaluate
from ravar_jax.train_step import make_init, make_train_step
from tests import tiny_run

_TIMINGS = ("train/clips_per_second", "train/data_wait_share")


def _train(workdir, config=None, train_batches=tiny_run.train_batches, task=None, **more):
    config = tiny_run.make_config() if config is None else config
    task = tiny_run.make_task() if task is None else task
    return train_and_evaluate(config, workdir, train_batches, tiny_run.eval_batches, task, **more)


def _interrupted_after(steps):
    """Batches that crash the loop once `steps` steps of the run were asked for."""

    def batches(start):
        yield from itertools.islice(tiny_run.train_batches(start), steps - start)
        raise KeyboardInterrupt

    return batches


def _logged(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in _TIMINGS} for line in lines]


def _assert_same_state(a, b):
    for (path, left), right in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert np.array_equal(left, right), jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run of 8 steps: its workdir and final state."""
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, _train(workdir)


def test_resumed_run_equals_straight_run(tmp_path, straight):
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path, train_batches=_interrupted_after(6))  # the last checkpoint is of step 4
    assert _logged(tmp_path)[-1]["step"] > 4
    _assert_same_state(_train(tmp_path), straight[1])
    assert _logged(tmp_path) == _logged(straight[0])


def test_resumed_on_another_mesh_and_interval(tmp_path, straight):
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path, train_batches=_interrupted_after(6))
    changed = tiny_run.make_config(
        mesh__data=2, mesh__fsdp=4, checkpoint__keep_last=5, train__log_every_steps=2
    )
    state = _train(tmp_path, changed)
    for left, right in zip(jax.tree.leaves(state), jax.tree.leaves(straight[1]), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6)


def test_kill_9_then_resume_equals_straight_run(tmp_path, repository):
    workdir = tmp_path / "killed"
    command = [sys.executable, "-m", "tests.tiny_run", str(workdir)]
    process = subprocess.Popen(command, cwd=repository, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    try:
        while not (workdir / "checkpoints" / "5").exists():
            assert process.poll() is None, "ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    config = tiny_run.make_long_config()
    resumed = _train(workdir, config)
    straight = _train(tmp_path / "straight", config)
    _assert_same_state(resumed, straight)
    assert _logged(workdir) == _logged(tmp_path / "straight")


def test_damaged_checkpoint_is_passed_over_only_when_asked(tmp_path, straight, capsys):
    shutil.copytree(straight[0], tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "8" / "meta" / "metadata").write_text("{")
    with pytest.raises(UserError, match=r"checkpoints/8 .*meta/metadata.* from step 4.*fall_back"):
        _train(tmp_path / "run")
    state = _train(tmp_path / "run", tiny_run.make_config(checkpoint__fall_back=True))
    assert "meta/metadata" in capsys.readouterr().err
    _assert_same_state(state, straight[1])
    assert _logged(tmp_path / "run") == _logged(straight[0])
    assert (tmp_path / "run" / "damaged_checkpoints" / "8").is_dir()


def test_the_best_evaluated_step_is_kept(tmp_path):
    evaluations = itertools.count(1)

    def eval_batches():
        right = (
            next(evaluations) == 2
        )  # others are scored on wrong labels, so that scores do not just rise
        for batch in tiny_run.eval_batches():
            labels = batch["action_labels"]
            yield batch | {"action_labels": labels if right else np.roll(labels, 1, axis=1)}

    config = tiny_run.make_config(
        train__eval_every_steps=2,
        checkpoint__every_steps=100,
        checkpoint__keep_last=1,
        checkpoint__keep_best=1,
    )
    train_and_evaluate(config, tmp_path, tiny_run.train_batches, eval_batches, tiny_run.make_task())
    scores = {row["step"]: row["val/mAP_macro"] for row in _logged(tmp_path) if "val/mIoU" in row}
    best = max(scores, key=lambda step: scores[step])
    assert scores[best] > scores[8]  # or the last would be kept anyhow
    assert {folder.name for folder in (tmp_path / "checkpoints").iterdir()} == {str(best), "8"}


def test_finished_run_is_not_trained_again(straight, capsys):
    def no_batches(start):
        raise AssertionError("asked for data")

    before = (straight[0] / "metrics.jsonl").read_text()
    _assert_same_state(_train(straight[0], train_batches=no_batches), straight[1])
    assert "already at step 8 of 8" in capsys.readouterr().err
    assert (straight[0] / "metrics.jsonl").read_text() == before


def test_logged_loss_falls_and_val_is_scored(straight):
    lines = _logged(straight[0])
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    val = [line for line in lines if "val/mAP_macro" in line]
    assert [line["step"] for line in val] == [4, 8]
    assert {"train/loss", "train/action_loss", "train/box_loss", "train/grad_norm"} <= lines[
        0
    ].keys()
    assert list((straight[0] / "tensorboard").iterdir())


def test_progress_line(tmp_path, capsys):
    _train(tmp_path, tiny_run.make_config(train__log_every_steps=4))
    err = capsys.readouterr().err
    assert re.search(
        r"step 4/8  loss \d+\.\d+  \d+\.\d clips/s  \d+:\d\d left  waiting for data \d+%", err
    )


def test_changed_config_is_refused(straight):
    with pytest.raises(UserError, match=r"optimizer.learning_rate was 0.01 and is now 0.5"):
        _train(straight[0], tiny_run.make_config(optimizer__learning_rate=0.5))


def test_other_frozen_weights_are_refused(straight):
    task = tiny_run.make_task()
    norm = task.frozen["vision_norm"]
    norm["scale"] = norm["scale"] * np.float32(1.01)
    with pytest.raises(UserError, match=r"other frozen weights .* vision_norm/scale differs"):
        _train(straight[0], task=task)


def test_non_finite_step_stops_and_keeps_the_good_checkpoint(tmp_path):
    def batches(start):
        for step, batch in enumerate(tiny_run.train_batches(start), start + 1):
            if step == 8:  # a step whose state would be saved
                batch["features"][3, 0] = np.nan
            yield batch

    def describe(example_ids):
        return [f"clip{number}/a" for number in example_ids]

    with pytest.raises(
        UserError,
        match=r"step 8 is not finite .*last good checkpoint is step 4 .*clip128/a, clip129/a",
    ):
        _train(tmp_path, train_batches=batches, describe_examples=describe)
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["4"]
    assert int(_train(tmp_path).step) == 8


def test_data_that_ends_early_is_an_error(tmp_path):
    def batches(start):
        return itertools.islice(tiny_run.train_batches(start), 3)

    with pytest.raises(UserError, match="the training data ended before step 4 of 8"):
        _train(tmp_path, train_batches=batches)


def test_each_program_is_traced_once(tmp_path):
    traces: list[str] = []
    _train(tmp_path, task=tiny_run.make_task(traces))
    assert traces.count("loss") == 1
    assert traces.count("predict") == 1  # over two evaluations


@pytest.fixture(scope="module")
def step_parts():
    """The mesh, init and train step of the tiny task."""
    config, task = tiny_run.make_config(), tiny_run.make_task()
    mesh = sharding.make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, 8, task.no_gradient)
    init, train_step = (
        make_init(task, optimizer, mesh, seed=0),
        make_train_step(task, optimizer, mesh, seed=0),
    )

    def run(state, batch):
        with jax.set_mesh(mesh):
            return train_step(state, task.frozen, sharding.to_global(batch, mesh))

    return mesh, init, run


def test_non_finite_step_leaves_the_state_as_it_was(step_parts):
    _, init, run = step_parts
    batch = tiny_run.make_batch(1)
    batch["features"][0] = np.inf
    after, metrics = run(init(), batch)
    assert not metrics["finite"]
    _assert_same_state(init(), after)


def test_state_is_donated_and_keeps_its_shardings(step_parts):
    mesh, init, run = step_parts
    state = init()
    kernel = state.params["action_head"]["layer3"]["kernel"]
    after, metrics = run(state, tiny_run.make_batch(1))
    assert metrics["finite"]
    assert int(after.step) == 1
    assert kernel.is_deleted()
    expected = sharding.infer_shardings(jax.eval_shape(lambda: after), mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding.spec, after) == jax.tree.map(
        lambda leaf: leaf.spec, expected
    )


def test_metric_log_drops_later_lines_and_a_torn_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "a": 0.5}\n{"step": 2}\n{"step": 3}\n{"step": 2, "b'
    )
    with MetricLog(tmp_path, start_step=2) as log:
        log.write(3, {"a": float("nan"), "b": None, "c": 1.5})
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "a": 0.5}\n{"step": 2}\n{"step": 3, "a": null, "b": null, "c": 1.5}\n'
    )
