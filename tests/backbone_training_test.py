"""Training runs with a backbone: from the cache as from pixels, and with a Q-Former that is trained too."""

import functools
import io
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from data_pipelines import input_pipeline
from data_pipelines.feature_cache_writer import write_cache
from ravar_jax.backbone import load_backbone
from ravar_jax.restore import restore_run
from ravar_jax.tasks import ravar
from ravar_jax.train import train_and_evaluate
from tests import tiny_dataset
from tests.tiny_cache import pixel_config, write_backbone

STEPS = 20


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with a backbone and a dataset in which every window looks different."""
    folder = tmp_path_factory.mktemp("made")
    dataset = tiny_dataset.write_dataset(folder)
    for split, people in tiny_dataset.SPLITS.items():
        windows = [tiny_dataset.record(f"{split}{i}", n) for i, n in enumerate(people)]
        for number, window in enumerate(windows):
            levels = [16 + 2 * position + 10 * number for position in tiny_dataset.POSITIONS]
            window["frames"] = [io.BytesIO(tiny_dataset.jpeg(level)) for level in levels]
        tiny_dataset.write_split(dataset, split, windows)
    write_backbone(folder / "backbone", seed=0)
    return folder


def make_config(folder, steps=STEPS):
    config = pixel_config(folder)
    config.optimizer.learning_rate = 1e-3
    config.train.update(steps=steps, batch_size=8, log_every_steps=1, eval_every_steps=steps)
    config.evaluation.batch_size = 8
    return config


def train(config, workdir):
    tokenizer = load_backbone(config.model.backbone).tokenizer
    task = ravar.make_task(config)
    state = train_and_evaluate(
        config,
        workdir,
        functools.partial(input_pipeline.train_batches, config, tokenizer),
        functools.partial(input_pipeline.eval_batches, config, tokenizer, "val"),
        task,
    )
    return task, state


def logged(workdir, key):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return np.array([line[key] for line in lines if key in line])


def paths(tree):
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(tree)
    ]


def test_training_from_the_cache_equals_training_from_pixels(made, tmp_path):
    config = make_config(made)
    train(config, tmp_path / "pixels")
    write_cache(config, tmp_path / "cache", report=lambda line: None)
    config.data.feature_cache = str(tmp_path / "cache")
    train(config, tmp_path / "cached")
    losses, cached = (logged(tmp_path / run, "train/loss") for run in ("pixels", "cached"))
    assert len(losses) == STEPS
    assert losses[:3].mean() - losses[-3:].mean() > 0.01  # it learns, so every step counts
    np.testing.assert_allclose(cached, losses, atol=1e-5, rtol=0)
    for key in ("val/mIoU", "val/mAP_weighted"):
        pixels, from_cache = (logged(tmp_path / run, key) for run in ("pixels", "cached"))
        np.testing.assert_allclose(from_cache, pixels, atol=1e-4)


@pytest.fixture(scope="module")
def tuned(made, tmp_path_factory):
    """A run of 4 steps that trained the Q-Former: its workdir, task and final state."""
    workdir = tmp_path_factory.mktemp("tuned") / "run"
    config = make_config(made, steps=4)
    config.model.train_qformer = True
    return workdir, *train(config, workdir)


def test_tuned_qformer_moves_and_the_image_encoder_stays(made, tuned):
    workdir, task, state = tuned
    before = load_backbone(str(made / "backbone")).params
    for path in ("vision_norm/bias", "query_former/layer0/cross_attention/query/bias"):
        moved, start = state.params["backbone"], before  # biases: no decay moves them
        for name in path.split("/"):
            moved, start = moved[name], start[name]
        assert np.abs(np.asarray(moved) - start).max() > 1e-6, path
    assert (np.asarray(state.params["backbone"]["query_tokens"]) != before["query_tokens"]).any()
    run = restore_run(workdir)
    for frozen in (task.frozen, run.frozen):
        jax.tree.map(
            np.testing.assert_array_equal,
            frozen["backbone"]["visual_encoder"],
            before["visual_encoder"],
        )
    jax.tree.map(np.testing.assert_array_equal, run.params, state.params)


def test_image_encoder_is_neither_in_the_state_nor_on_disk(tuned):
    workdir, _, state = tuned
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(workdir / "checkpoints" / "4" / "state").item_metadata.tree
    for held in (paths(state.params), paths(state.opt_state), paths(saved)):
        assert any("query_former" in path for path in held)
        assert not [path for path in held if "visual_encoder" in path]
