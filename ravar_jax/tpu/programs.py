"""The steps that train and evaluate, traced for the mesh of a slice from sizes alone: no weight is read or made."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ravar_jax import backbone, detector, evaluate, sharding
from ravar_jax.batch_shapes import batch_shapes
from ravar_jax.models.detr import DETR_R50
from ravar_jax.models.refatomnet import NUM_LABELS
from ravar_jax.optimizer import make_optimizer
from ravar_jax.tasks import pretrain, ravar
from ravar_jax.tasks.task import Task
from ravar_jax.train_step import abstract_state, make_train_step


def backbone_of(model: ConfigDict) -> tuple[backbone.Backbone, str]:
    """Returns the backbone that `model.backbone` names, with shapes for weights, and whose sizes they are.

    Where the folder does not exist they are BLIP-2's.

    Raises:
        UserError: the folder exists and is not a backbone's.
    """
    folder = model.backbone
    if not folder or pathlib.Path(folder).is_dir():
        sizes, whose = backbone.load_sizes(folder), folder or "the shipped MiniBLIP"
    else:
        sizes, whose = backbone.BLIP2, f"BLIP-2, as {folder} is not here"
    # Nothing that is compiled reads a sentence.
    unread: Any = None
    return backbone.Backbone(sizes, sizes.param_shapes(), unread), whose


def detector_of(model: ConfigDict) -> tuple[detector.Detector | None, str]:
    """Returns the detector likewise; where the folder does not exist it is DETR-R50's sizes. None without a detector.

    Raises:
        UserError: the folder exists and is not a detector's, or it has other than `model.num_detections` queries.
    """
    if model.detections != "detr":
        return None, ""
    if pathlib.Path(model.detector).is_dir():
        (sizes, shapes), whose = detector.load_shapes(model.detector), model.detector
    else:
        sizes, shapes = DETR_R50, detector.param_shapes(DETR_R50)
        whose = f"DETR-R50, as {model.detector} is not here"
    detector.check_queries(model, sizes["num_queries"])
    return detector.Detector(sizes, shapes), whose


def task_of(config: ConfigDict) -> tuple[Task, str]:
    """Returns a config's task with shapes in place of weights, and whose sizes they are, for a person to read."""
    if config.task == "pretrain":
        sizes = pretrain.backbone_config(config)
        first_stage = sizes.param_shapes() if config.model.backbone else None
        return pretrain.build_task(config, first_stage), "the config's"
    label_table = jax.ShapeDtypeStruct((NUM_LABELS, config.model.width), jnp.float32)
    (encoder, whose), (found, also) = backbone_of(config.model), detector_of(config.model)
    task = ravar.build_task(config, encoder.config, encoder.params, found, label_table)
    return task, f"{whose}; {also}" if also else whose


def trace_train_step(config: ConfigDict, task: Task, mesh: Mesh) -> jax.stages.Traced:
    """Returns the train step as training jits it."""
    optimizer = make_optimizer(config.optimizer, config.train.steps, task.no_gradient)
    with jax.set_mesh(mesh):
        step = make_train_step(task, optimizer, mesh, config.seed, config.train.micro_batches)
        state = abstract_state(task, optimizer, mesh)
        return step.trace(state, sharding.abstract(task.placed, mesh), _batch(config, mesh, True))


def trace_evaluation_step(config: ConfigDict, task: Task, mesh: Mesh) -> jax.stages.Traced:
    """Returns the evaluation step as evaluation jits it."""
    optimizer = make_optimizer(config.optimizer, config.train.steps, task.no_gradient)
    with jax.set_mesh(mesh):
        params = abstract_state(task, optimizer, mesh).params
        frozen = sharding.abstract(task.placed, mesh)
        predict = evaluate.make_predict(task, mesh)
        return predict.trace(params, frozen, _batch(config, mesh, False))


def _batch(config: ConfigDict, mesh: Mesh, training: bool) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = batch_shapes(config, training=training, features=bool(config.data.feature_cache))
    return sharding.with_sharding(shapes, sharding.batch_sharding(mesh))
