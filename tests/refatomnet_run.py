"""Twenty steps of RefAtomNet at a small width on made-up features, on any mesh and by any number of processes.

Also a program: python -m tests.refatomnet_run FOLDER RUN DEVICES DATA FSDP TENSOR, where DEVICES are those of a process
and RUN gets the checkpoints, behind the one of step 0 that is there.
"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import tests.conftest  # noqa: F401  the same JAX settings as in the test session
from ravar_jax import benchmark, checkpoints, config_check, distributed, sharding, train
from ravar_jax.optimizer import make_optimizer
from ravar_jax.tasks import ravar
from ravar_jax.train_step import TrainState, abstract_state
from tests import untrained_run

STEPS, ROWS, WIDTH = 20, 16, untrained_run.WIDTH
MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2))


def make_config(folder: Path, mesh: tuple[int, ...]) -> ConfigDict:
    config = untrained_run.make_config(
        folder / "backbone",
        data__feature_cache="of made-up features",
        model__label_table=str(folder / "labels.npy"),
        model__num_detections=8,
        optimizer__learning_rate=0.01,
        train__steps=STEPS,
        train__batch_size=ROWS,
        train__log_every_steps=1,
        train__eval_every_steps=STEPS,
        evaluation__batch_size=ROWS,
        checkpoint__every_steps=STEPS,
    )
    config.mesh.update(dict(zip(sharding.AXES, mesh, strict=True)))
    return config


def write_start(folder: Path) -> None:
    """Writes `folder/backbone` and `folder/start`, a run of random parameters at step 0, split over data."""
    untrained_run.write_backbone(folder / "backbone")
    untrained_run.write_label_table(folder / "labels.npy")
    config = make_config(folder, MESHES[0])
    config_check.claim_workdir(folder / "start", config, write=True)
    task = ravar.make_task(config)
    optimizer = make_optimizer(config.optimizer, STEPS, task.no_gradient)
    abstract = abstract_state(task, optimizer, sharding.make_mesh(config.mesh))
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    state = state.replace(params=untrained_run.random_leaves(abstract.params))
    state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract))
    with checkpoints.open_manager(folder / "start", config.checkpoint) as manager:
        meta = {"frozen": train.frozen_fingerprint(task.frozen)}
        checkpoints.save(manager, 0, state, meta)


def run(folder: Path, name: str, mesh: tuple[int, ...]) -> Path:
    """Trains from the checkpoint of `folder/start`, with this process's rows; returns the workdir.

    Every parameter and moment must lie in its shards in the end.
    """
    workdir = folder / name
    with distributed.first_process_first("start"):
        if not workdir.exists():
            shutil.copytree(folder / "start", workdir)
    config = make_config(folder, mesh)
    rows = rows_of_all_steps(config)
    share = ROWS // jax.process_count()

    def batch(step: int) -> dict[str, np.ndarray]:
        first = ROWS * step + share * jax.process_index()
        return {key: value[first : first + share] for key, value in rows.items()}

    def eval_batches() -> Iterator[dict[str, np.ndarray]]:
        last = batch(STEPS)
        yield last | {"image_tokens": last["image_tokens"][:, None]}  # one clip each

    state = train.train_and_evaluate(
        config,
        workdir,
        lambda start: map(batch, range(start, STEPS)),
        eval_batches,
        ravar.make_task(config),
    )
    check_shards(state, mesh)
    return workdir


def rows_of_all_steps(config: ConfigDict) -> dict[str, np.ndarray]:
    """Returns the rows of every step, and behind them those of the val split."""
    config = config.copy_and_resolve_references()
    config.train.batch_size = ROWS * (STEPS + 1)
    return benchmark.synthetic_batch(config, "features")


def check_shards(state: TrainState, mesh: tuple[int, ...]) -> None:
    """Asserts that every leaf of a state lies as the table of rules has it."""
    _, fsdp, tensor = mesh
    wanted: Any = sharding.infer_shardings(state, state.step.sharding.mesh)
    kernels = 0
    for (path, leaf), where in zip(
        jax.tree.leaves_with_path(state), jax.tree.leaves(wanted), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim), name
        if name.endswith("agent_temporal/mlp_in/kernel"):  # the table itself might split nothing
            kernels += 1
            shapes = {shard.data.shape for shard in leaf.addressable_shards}
            assert shapes == {(WIDTH // fsdp, 4 * WIDTH // tensor)}, name
    assert kernels == 3  # the parameter and both its moments


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", int(sys.argv[3]))
    jax.config.update("jax_disable_most_optimizations", True)
    distributed.initialize()
    run(Path(sys.argv[1]), sys.argv[2], tuple(map(int, sys.argv[4:])))
