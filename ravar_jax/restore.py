"""A finished or running training run, brought back from its workdir to evaluate it or to predict with it."""

import dataclasses
import os
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ravar_jax import checkpoints, config_check, sharding, train
from ravar_jax.backbone import load_backbone
from ravar_jax.errors import UsageError, UserError
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
        params: The trained parameters of a checkpoint, on the mesh.
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


def restore_run(workdir: os.PathLike | str, step: str = "latest") -> Run:
    """Restores a checkpoint of the run in `workdir`, whatever mesh it was trained on.

    Args:
        workdir: The run's folder.
        step: "latest", "best" (by `checkpoint.best_metric` on the val split) or a number.

    Raises:
        UserError: there is no run or no such checkpoint, it is damaged, it is of a pre-training, or its frozen weights
            are not those that `model.backbone`, `model.detector` and `model.label_table` give now.
        UsageError: `step` is none of these.
    """
    config = config_check.read_config(workdir)
    if config.task != "ravar":
        raise UserError(
            f"{workdir} is a run of task {config.task}, whose scores are in its final_metrics.json"
        )
    manager = checkpoints.open_reader(workdir, config.checkpoint.get("best_metric", ""))
    number = _find_step(manager, config, step)
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
        abstract = abstract_state(task, optimizer, mesh)
        try:
            state, _ = train.restore_state(manager, number, abstract, task.frozen)
        except checkpoints.DamagedCheckpoint as error:
            others = [str(other) for other in manager.all_steps() if other != number]
            hint = f"; whole ones may be of step {', '.join(others)} (--step)" if others else ""
            raise UserError(f"{error}{hint}") from error
    return Run(
        config=config,
        task=task,
        params=state.params,
        frozen=train.place_frozen(task.frozen, mesh),
        tokenizer=load_backbone(config.model.backbone).tokenizer,
        mesh=mesh,
        step=int(state.step),
    )


def _find_step(manager: Any, config: ConfigDict, step: str) -> int:
    if step == "latest":
        return manager.latest_step()
    if step == "best":
        best = manager.best_step() if config.checkpoint.get("keep_best", 0) else None
        if best is None:
            raise UserError(
                f"--step=best: {manager.directory} has no checkpoint that was kept for its score; train with "
                "--config.checkpoint.keep_best=1"
            )
        return best
    if not step.isdecimal():
        raise UsageError(f"--step={step}: expected latest, best or the number of a checkpoint")
    if int(step) not in manager.all_steps():
        there = ", ".join(map(str, sorted(manager.all_steps())))
        raise UserError(f"--step={step}: {manager.directory} has checkpoints of step {there}")
    return int(step)
