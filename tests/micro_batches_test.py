"""A batch computed in parts has the loss and the gradients of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from ravar_jax import sharding
from ravar_jax.errors import UserError
from ravar_jax.train import train_and_evaluate
from ravar_jax.train_step import TrainState, make_train_step
from tests import tiny_run

ROWS = 64


@pytest.fixture(scope="module")
def batch():
    """Rows of which few are real, unevenly spread over the parts; one of four has none at all."""
    rows = tiny_run.make_batch(1, ROWS)
    rows["mask"] = (np.random.default_rng(1).uniform(size=ROWS) < 0.4).astype(np.float32)
    rows["mask"][1::4] = 0
    real = [int(rows["mask"][part::4].sum()) for part in range(4)]
    assert real == [8, 0, 4, 6]  # by halves 12 and 6
    rows["features"][1::4] *= 1000
    return rows


def step(batch, micro_batches, shape):
    """Returns metrics and gradients of one step, and the state's shardings beside those wanted."""
    task = tiny_run.make_task(dropout=0.0)
    mesh = sharding.make_mesh(ConfigDict(dict(zip(sharding.AXES, shape, strict=True))))
    optimizer = optax.sgd(1.0)
    params = jax.device_get(task.init_params(jax.random.key(0)))
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    where = sharding.infer_shardings(state, mesh)
    with jax.set_mesh(mesh):
        run = make_train_step(task, optimizer, mesh, 0, micro_batches)
        on_mesh = sharding.to_global(batch, mesh)
        after, metrics = run(jax.device_put(state, where), task.frozen, on_mesh)
    wanted = jax.tree.map(
        lambda leaf, to: leaf.sharding.is_equivalent_to(to, leaf.ndim), after, where
    )
    assert all(jax.tree.leaves(wanted))
    gradients = jax.tree.map(lambda old, new: old - np.asarray(new), params, after.params)
    return jax.device_get(metrics), gradients


@pytest.fixture(scope="module")
def whole(batch):
    return step(batch, 1, (8, 1, 1))


@pytest.mark.parametrize(
    ("micro_batches", "shape"), [(4, (8, 1, 1)), (2, (8, 1, 1)), (4, (2, 2, 2))]
)
def test_loss_and_gradients_are_those_of_the_whole(batch, whole, micro_batches, shape):
    metrics, gradients = step(batch, micro_batches, shape)
    assert metrics["finite"]
    assert sorted(metrics) == sorted(whole[0])
    for found, expected in ((metrics, whole[0]), (gradients, whole[1])):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), found, expected
        )


def test_parts_do_not_move_rows_between_devices(batch):
    task = tiny_run.make_task(dropout=0.0)
    mesh = sharding.make_mesh(ConfigDict({"data": 8, "fsdp": 1, "tensor": 1}))
    optimizer = optax.sgd(1.0)
    params = task.init_params(jax.random.key(0))
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    with jax.set_mesh(mesh):
        run = make_train_step(task, optimizer, mesh, 0, 4)
        text = run.lower(state, task.frozen, sharding.to_global(batch, mesh)).compile().as_text()
    assert "all-reduce" in text  # of the gradients
    for moved in ("all-to-all", "all-gather", "collective-permute"):
        assert moved not in text


def test_a_run_in_parts_trains_and_resumes(tmp_path):
    config = tiny_run.make_config(train__micro_batches=2)
    state = train_and_evaluate(
        config, tmp_path, tiny_run.train_batches, tiny_run.eval_batches, tiny_run.make_task()
    )
    assert int(state.step) == 8
    with pytest.raises(UserError, match="train.micro_batches was 2 and is now 1"):
        train_and_evaluate(
            tiny_run.make_config(),
            tmp_path,
            tiny_run.train_batches,
            tiny_run.eval_batches,
            tiny_run.make_task(),
        )
