"""A finished or running training run, brought back from its workdir to evaluate it or to predict with it."""

import dataclasses
import os
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ravar_jax import checkpoints, config_check, sharding, train
from ravar_jax.backbone import load_backbone
from ravar_jax.errors import UserError
from ravar_jax.optimizer import make_optimizer
from ravar_jax.tasks import ravar
from ravar_jax.tasks.task import Task
from ravar_jax.tokenizer import Tokenizer
from ravar_jax.train_step import abstract_state


@dataclasses.dataclass(frozen=True)
class Run:
    """A restored run.

    Attributes:
        config: Of the run, with its mesh fitted to the devices that are here.
        task: Its task.
        params: The trained parameters of its latest checkpoint, on the mesh.
        frozen: The task's frozen arrays, on the mesh.
        tokenizer: The backbone's.
        mesh: Over all devices.
        step: Of the checkpoint.
    """

    config: ConfigDict
    task: Task
    params: Any
    frozen: Any
    tokenizer: Tokenizer
    mesh: Mesh
    step: int


def restore_run(workdir: os.PathLike | str) -> Run:
    """Restores the latest checkpoint of the run in `workdir`, whatever mesh it was trained on.

    Raises:
        UserError: there is no run or no checkpoint, it is damaged, it is of a pre-training, or its frozen weights
            are not those that `model.backbone`, `model.detector` and `model.label_table` give now.
    """
    config = config_check.read_config(workdir)
    if config.task != "ravar":
        raise UserError(
            f"{workdir} is a run of task {config.task}, whose scores are in its final_metrics.json"
        )
    manager = checkpoints.open_reader(workdir)
    if (
        jax.device_count() % (config.mesh.fsdp * config.mesh.tensor)
        or min(config.mesh.fsdp, config.mesh.tensor) < 1
    ):
        config.mesh.fsdp = config.mesh.tensor = 1
    config.mesh.data = -1
    mesh = sharding.make_mesh(config.mesh)
    task = ravar.make_task(config)
    optimizer = make_optimizer(config.optimizer, config.train.steps, task.no_gradient)
    with jax.set_mesh(mesh), manager:
        state = train.restore_state(manager, abstract_state(task, optimizer, mesh), task.frozen)
    return Run(
        config=config,
        task=task,
        params=state.params,
        frozen=train.place_frozen(task.frozen, mesh),
        tokenizer=load_backbone(config.model.backbone).tokenizer,
        mesh=mesh,
        step=int(state.step),
    )
