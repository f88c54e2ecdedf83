"""The training loop, read from top to bottom: set up, restore, step, log, evaluate, save.

Order of operations that others rely on: what a step logs is on disk before its checkpoint is, and a step is known to
be finite before its state is saved. So a run killed at any moment goes on from its last checkpoint as if nothing had
happened, and that checkpoint is good.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ravar_jax import checkpoints, config_check, evaluate, sharding
from ravar_jax.errors import UserError
from ravar_jax.interruptions import Interruptions, Stopped
from ravar_jax.metric_log import MetricLog
from ravar_jax.optimizer import make_optimizer
from ravar_jax.progress import Progress, say
from ravar_jax.tasks.task import Task
from ravar_jax.train_step import TrainState, abstract_state, make_init, make_train_step

Batch = dict[str, np.ndarray]


def train_and_evaluate(
    config: ConfigDict,
    workdir: os.PathLike | str,
    train_batches: Callable[[int], Iterator[Batch]],
    eval_batches: Callable[[], Iterator[Batch]],
    task: Task,
    describe_examples: Callable[[np.ndarray], list[str]] | None = None,
) -> TrainState:
    """Trains to `config.train.steps`, going on from the latest checkpoint in `workdir` if there is one.

    Args:
        config: A checked config.
        workdir: Gets `config.json`, `checkpoints/`, `metrics.jsonl` and `tensorboard/`.
        train_batches: Number of steps done -> the batches that follow; the order is a function of config and step.
        eval_batches: -> the batches of the val split, evaluated every `train.eval_every_steps` and at the end.
        task: What is trained.
        describe_examples: `example_id`s -> names of training examples, for error messages.

    Returns:
        The final state, on the mesh.

    Raises:
        UserError: the workdir is of another config, its checkpoint is damaged or of other frozen weights, the data
            ends early, a step is not finite (naming step and examples; the last checkpoint is from before it), or the
            run was told to stop (SIGTERM) and has saved its state.
    """
    first_process = jax.process_index() == 0
    config_check.claim_workdir(workdir, config, write=first_process)
    mesh = sharding.make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps, task.no_gradient)
    meta = {"frozen": frozen_fingerprint(task.frozen)}
    frozen = place_frozen(task.placed, mesh)
    total = config.train.steps

    with (
        jax.set_mesh(mesh),
        checkpoints.open_manager(workdir, config.checkpoint) as manager,
        Interruptions(config.train.hang_seconds) as interruptions,
    ):
        start, due = manager.latest_step() or 0, False
        if manager.latest_step() is None:
            state = make_init(task, optimizer, mesh, config.seed)()
        else:  # of step 0: a converted checkpoint
            abstract = abstract_state(task, optimizer, mesh)
            start, state, saved = _restore_newest(
                manager, abstract, task.frozen, config.checkpoint.fall_back
            )
            due = saved.get("evaluation_due", False)
        if start >= total and not due:
            say(f"{workdir} is already at step {start} of {total}: nothing to train")
            return state
        say(_start_line(state.params, mesh, start, total, config.train.batch_size))

        train_step = make_train_step(task, optimizer, mesh, config.seed, config.train.micro_batches)
        batches = interruptions.watched(train_batches(start))
        progress = Progress(start, total, config.train.batch_size)
        log = MetricLog(workdir, start, evaluate_again=due) if first_process else None
        pending: tuple[int, dict[str, jax.Array], np.ndarray] | None = None

        def settle() -> None:
            """Fetches the metrics of the pending step, stops if it was not finite, logs it if it is due."""
            nonlocal pending
            assert pending is not None
            step, on_device, example_ids = pending
            pending = None
            metrics = {key: value.item() for key, value in jax.device_get(on_device).items()}
            if not metrics.pop("finite"):
                raise UserError(
                    _not_finite(step, metrics, example_ids, describe_examples, manager, workdir)
                )
            if step % config.train.log_every_steps == 0 or step == total:
                speed, waited = progress.measure(step, metrics["loss"])
                if log is not None:
                    logged = {f"train/{key}": value for key, value in metrics.items()}
                    log.write(
                        step,
                        {
                            **logged,
                            "train/clips_per_second": speed,
                            "train/data_wait_share": waited,
                        },
                    )

        def val_scores(step: int, state: TrainState) -> dict[str, Any]:
            """Scores a state on the val split, and logs it."""
            with progress.paused():
                batches = interruptions.watched(eval_batches())
                predicted = evaluate.predictions(task, state.params, frozen, batches, mesh)
                scores = evaluate.score(predicted, split="val", iou_gate=config.evaluation.iou_gate)
            say(_val_line(step, scores))
            if log is not None:
                names = [f"val/{name}" for name in evaluate.METRIC_NAMES]
                log.write(step, {name: scores[name] for name in names})
            return {name: scores[f"val/{name}"] for name in evaluate.METRIC_NAMES}

        def stop(step: int, state: TrainState, due: bool) -> UserError:
            """Saves a state, if that is not done, with the notice that its evaluation is due."""
            if manager.latest_step() != step:
                checkpoints.save(manager, step, state, {**meta, "evaluation_due": due})
            checkpoints.finish(manager)
            return UserError(
                f"told to stop: step {step} of {total} is saved in {workdir}; the same command goes on"
            )

        try:
            if due:
                try:
                    val_scores(start, state)
                except Stopped:
                    raise stop(start, state, due) from None
            for step in range(start + 1, total + 1):
                evaluate_now = step % config.train.eval_every_steps == 0 or step == total
                save_now = (
                    step % config.checkpoint.every_steps == 0
                    or step == total
                    or (evaluate_now and config.checkpoint.keep_best > 0)
                )
                if save_now:
                    # So that a kill costs at most the one checkpoint that is being written.
                    checkpoints.finish(manager)
                try:
                    batch = progress.next_batch(batches, step)
                except Stopped:
                    if pending is not None:
                        settle()
                    raise stop(step - 1, state, due=False) from None
                state, on_device = train_step(state, frozen, sharding.to_global(batch, mesh))
                if pending is not None:  # one step late, so that fetching never stalls the device
                    settle()
                pending = (step, on_device, batch["example_id"])

                stop_now = interruptions.stop_at(manager, step)
                if evaluate_now or save_now or stop_now:
                    settle()
                scores = None
                if evaluate_now and not stop_now:
                    try:
                        scores = val_scores(step, state)
                    except Stopped:
                        stop_now = True
                if stop_now:
                    raise stop(step, state, due=evaluate_now and scores is None)
                if save_now:  # behind the evaluation, whose scores say which checkpoints are kept
                    checkpoints.save(manager, step, state, meta, scores)
        finally:
            if log is not None:
                log.close()
    return state


def _restore_newest(
    manager: Any, abstract: TrainState, frozen: Any, fall_back: bool
) -> tuple[int, TrainState, dict[str, Any]]:
    """Returns step, state and meta of the newest checkpoint; with `fall_back`, of the newest that can be read.

    Raises:
        UserError: as `restore_state`.
    """
    while True:
        step = manager.latest_step()
        try:
            return step, *restore_state(manager, step, abstract, frozen)
        except checkpoints.DamagedCheckpoint as error:
            older = max((other for other in manager.all_steps() if other < step), default=None)
            if older is None:
                raise UserError(f"{error}; there is none before it") from error
            if not fall_back:
                raise UserError(
                    f"{error}; to go on from step {older}, delete that folder or set "
                    "--config.checkpoint.fall_back=True"
                ) from error
            checkpoints.set_aside(manager, step)
            say(
                f"{error}; it is now in damaged_checkpoints/, and the run goes on from step {older}"
            )


def restore_state(
    manager: Any, step: int, abstract: TrainState, frozen: Any
) -> tuple[TrainState, dict[str, Any]]:
    """Returns a checkpoint's state and meta.

    Raises:
        DamagedCheckpoint: it cannot be read.
        UserError: it was trained on frozen arrays other than `frozen`.
    """
    state, meta = checkpoints.restore(manager, step, abstract)
    then, now = meta["frozen"], frozen_fingerprint(frozen)
    for path in sorted(then.keys() | now.keys()):
        if path not in then or path not in now or not _same_array(then[path], now[path]):
            raise UserError(
                f"the run in {manager.directory.parent} was trained on other frozen weights than model.backbone, "
                f"model.detector and model.label_table give now: {path} differs"
            )
    return state, meta


def frozen_fingerprint(frozen: Any) -> dict[str, Any]:
    """Returns {path: [shape, mean, mean magnitude]} of a pytree of host arrays.

    Not a hash: a label table that is computed at start differs in its last bits from one machine to the next.
    """
    fingerprint = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(frozen):
        array = np.asarray(leaf, np.float32)
        # By rows: the magnitudes of a stack of large matrices would take as much memory as it does.
        rows = array if array.ndim > 1 else array.reshape(1, -1)
        magnitude = sum(float(np.sum(np.abs(row), dtype=np.float64)) for row in rows)
        means = [float(np.mean(array, dtype=np.float64)), magnitude / max(array.size, 1)]
        fingerprint[jax.tree_util.keystr(path, simple=True, separator="/")] = [
            list(array.shape),
            *means,
        ]
    return fingerprint


def _same_array(then: list[Any], now: list[Any]) -> bool:
    tolerance = 1e-4 * now[2] + 1e-12
    return (
        then[0] == now[0]
        and abs(then[1] - now[1]) <= tolerance
        and abs(then[2] - now[2]) <= tolerance
    )


def place_frozen(frozen: Any, mesh: Mesh) -> Any:
    """Returns the frozen arrays on the mesh, in shards as if they were trained.

    Raises:
        UserError: an array cannot be split as `sharding.PARAM_RULES` has it.
    """
    return jax.device_put(frozen, sharding.infer_shardings(frozen, mesh))


def _start_line(params: Any, mesh: Mesh, start: int, total: int, batch_size: int) -> str:
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    device = mesh.devices.flat[0]
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return (
        f"training {count:,} parameters from step {start} to {total}, {batch_size} clips a step, on "
        f"{mesh.size} {device.device_kind} device{'s' * (mesh.size > 1)} ({shape}), "
        f"{jax.process_count()} process{'es' * (jax.process_count() > 1)}; the first step compiles"
    )


def _val_line(step: int, scores: dict[str, Any]) -> str:
    shown = ("mAP_macro", "prior_mAP_macro", "AUROC_macro", "mIoU")
    values = {name: scores[f"val/{name}"] for name in shown}
    text = "  ".join(
        f"{name} {'-' if value is None else f'{value:.4f}'}" for name, value in values.items()
    )
    return f"step {step}  val: {text}  ({scores['num_examples']} examples)"


def _not_finite(
    step: int,
    metrics: dict[str, float],
    example_ids: np.ndarray,
    describe_examples: Callable[[np.ndarray], list[str]] | None,
    manager: Any,
    workdir: os.PathLike | str,
) -> str:
    names = (
        describe_examples(example_ids)
        if describe_examples
        else [str(number) for number in example_ids.tolist()]
    )
    last = manager.latest_step()
    kept = (
        f"the last good checkpoint is step {last}"
        if last is not None
        else "no checkpoint was written yet"
    )
    return (
        f"step {step} is not finite (loss {metrics['loss']}, gradient norm {metrics['grad_norm']}); {kept} in "
        f"{workdir}; examples of the step: {', '.join(names)}"
    )
