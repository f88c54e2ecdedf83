"""Checkpoints of a run: `workdir/checkpoints/<step>/`, written by orbax in the background.

A checkpoint appears under its final name only when it is complete, so a kill at any moment leaves the older ones
intact and the newest complete one is where the run goes on. The file format does not notice a flipped byte, so every
checkpoint holds a checksum of each array.
"""

import contextlib
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from ravar_jax.errors import UserError

_SET_ASIDE = "damaged_checkpoints"
_JSON_FILES = ("meta/metadata", "state/_METADATA", "state/_sharding", "_CHECKPOINT_METADATA")


class DamagedCheckpoint(UserError):
    """A checkpoint cannot be read, or holds other values than were saved."""


class CheckpointConfig(Protocol):
    """The `checkpoint` section of a config; `every_steps` and `fall_back` are the training loop's business."""

    keep_last: int
    keep_every_steps: int
    keep_best: int
    best_metric: str


def open_manager(
    workdir: os.PathLike | str, checkpoint: CheckpointConfig
) -> contextlib.AbstractContextManager[ocp.CheckpointManager]:
    """Returns the manager to save and restore with; leaving its `with` block waits for the last save.

    Raises:
        UserError: on leaving, the last save failed.
    """
    keep: list[Any] = [preservation_policy.LatestN(checkpoint.keep_last)]
    if checkpoint.keep_every_steps:
        keep.append(preservation_policy.EveryNSteps(checkpoint.keep_every_steps))
    if checkpoint.keep_best:
        best = preservation_policy.BestN(
            get_metric_fn=_ranking(checkpoint.best_metric),
            n=checkpoint.keep_best,
            keep_checkpoints_without_metrics=False,
        )
        keep.append(best)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy(keep),
        best_fn=_ranking(checkpoint.best_metric),  # or orbax would not store scores
        cleanup_tmp_directories=True,  # what a killed run was writing
        enable_async_checkpointing=True,
    )
    return _closing(_open(epath.Path(workdir).absolute() / "checkpoints", options))


def open_reader(workdir: os.PathLike | str, best_metric: str = "") -> ocp.CheckpointManager:
    """Returns a manager that restores and never writes.

    Args:
        workdir: the run's folder.
        best_metric: what `best_step` goes by, as `checkpoint.best_metric`.

    Raises:
        UserError: if the run has no checkpoint.
    """
    folder = epath.Path(workdir).absolute() / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"no checkpoint in {workdir}: {folder} is missing")
    # Not `read_only=True`, which warns three times on standard error.
    options = ocp.CheckpointManagerOptions(
        create=False, save_root_metadata=False, best_fn=_ranking(best_metric)
    )
    manager = _open(folder, options)
    if manager.latest_step() is None:
        raise UserError(f"no complete checkpoint in {folder}")
    return manager


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: Any,
    meta: dict[str, Any],
    scores: Mapping[str, float | None] | None = None,
) -> None:
    """Saves a checkpoint, in the background once `state` is copied off the devices.

    Args:
        manager: of `open_manager`.
        step: its number.
        state: pytree of arrays.
        meta: plain JSON values.
        scores: of this state on the val split by their names; those that are None do not rank.

    Raises:
        UserError: this save or the one before it failed.
    """
    content = {"meta": meta, "checksums": checksums(state)}
    arguments = ocp.args.Composite(
        state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(content)
    )
    ranked = {name: value for name, value in (scores or {}).items() if value is not None}
    with _failure_named(manager):
        manager.save(step, args=arguments, metrics=ranked or None, force=True)


def finish(manager: ocp.CheckpointManager) -> None:
    """Waits for the save in the background.

    Raises:
        UserError: it failed.
    """
    with _failure_named(manager):
        manager.wait_until_finished()


def restore(
    manager: ocp.CheckpointManager, step: int, abstract_state: Any
) -> tuple[Any, dict[str, Any]]:
    """Returns the state and the meta of a checkpoint.

    Args:
        manager: of `open_manager` or `open_reader`.
        step: of a checkpoint that is there.
        abstract_state: `ShapeDtypeStruct`s with the shardings of the current mesh, which may differ from the saved.

    Raises:
        DamagedCheckpoint: in every process, if one of them cannot read it; the message names the file or the array.
    """
    folder = epath.Path(manager.directory) / str(step)
    arguments = ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract_state), meta=ocp.args.JsonRestore()
    )
    # Not the manager's: it ends in a barrier, at which a process that fails alone leaves the others waiting.
    handler = ocp.CompositeCheckpointHandler()
    try:
        restored, reason = handler.restore(folder, arguments), ""
    except Exception as error:  # orbax and tensorstore raise many types for damaged files
        restored, reason = None, _reason(error, folder)
    # Checksums are computed by all processes together, so all must have come so far.
    failed = np.flatnonzero(multihost_utils.process_allgather(np.asarray(bool(reason))))
    if failed.size:
        raise DamagedCheckpoint(
            f"checkpoint {folder} cannot be read ({reason or f'in process {failed[0]}'})"
        )
    saved, found = restored.meta["checksums"], checksums(restored.state)
    changed = [path for path in found if saved.get(path) != found[path]]
    if changed:
        more = f" and {len(changed) - 1} more" * (len(changed) > 1)
        raise DamagedCheckpoint(
            f"checkpoint {folder} is damaged: the values of {changed[0]}{more} are not those that were saved"
        )
    return restored.state, restored.meta["meta"]


def set_aside(manager: ocp.CheckpointManager, step: int) -> None:
    """Moves a checkpoint to `workdir/damaged_checkpoints/`, where nothing looks for it; all processes call this."""
    folder = pathlib.Path(manager.directory)
    if jax.process_index() == 0:
        aside = folder.parent / _SET_ASIDE
        aside.mkdir(exist_ok=True)
        taken = sum(1 for path in aside.iterdir() if path.name.partition(".")[0] == str(step))
        (folder / str(step)).rename(aside / (f"{step}.{taken}" if taken else str(step)))
    multihost_utils.sync_global_devices(f"checkpoint {step} set aside")
    manager.reload()


def checksums(tree: Any) -> dict[str, int]:
    """Returns {path: checksum of the array's bits}, the same for every sharding of the same values."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    values = jax.device_get(_checksums([leaf for _, leaf in leaves]))
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {path: int(value) for path, value in zip(paths, values, strict=True)}


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    def one(leaf: jax.Array) -> jax.Array:
        unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
        # Odd, so that every flipped bit changes the sum; distinct, so that exchanged values do.
        weights = 2 * jnp.arange(leaf.size, dtype=jnp.uint32).reshape(leaf.shape) + 1
        return jnp.sum(bits * weights, dtype=jnp.uint32)

    return [one(leaf) for leaf in leaves]


@contextlib.contextmanager
def _closing(manager: ocp.CheckpointManager) -> Iterator[ocp.CheckpointManager]:
    logger = logging.getLogger("absl")
    logger.addFilter(_is_worth_reading)
    try:
        yield manager
        finish(manager)
    except BaseException:
        with contextlib.suppress(Exception):  # the first error counts
            manager.close()
        raise
    else:
        manager.close()
    finally:
        logger.removeFilter(_is_worth_reading)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    """Keeps off stderr the traceback of what orbax raises anyway, and its surprise at a checkpoint without scores."""
    from_orbax = "orbax" in record.pathname
    return not from_orbax or (
        record.levelno < logging.ERROR and "tracked_metric" not in record.getMessage()
    )


def _open(folder: epath.Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    try:
        return ocp.CheckpointManager(folder, options=options)
    except ValueError as error:  # JSON that says when a checkpoint was written, or how good it is
        raise UserError(f"{folder} cannot be read: {_first_line(error)}") from error


def _ranking(metric: str) -> Any:
    """Returns the function that checkpoints are ranked by: scores -> number."""
    return lambda scores: scores.get(metric, float("-inf"))


@contextlib.contextmanager
def _failure_named(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Turns what a failed save raises into one line.

    Raises:
        UserError: naming the reason and the last whole checkpoint.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        manager.reload()  # from disk: it counts a checkpoint from the moment its writing begins
        last = manager.latest_step()
        kept = "there is none" if last is None else f"the last whole one is of step {last}"
        raise UserError(
            f"a checkpoint could not be written in {manager.directory} ({_first_line(error)}); {kept}"
        ) from error


def _reason(error: BaseException, folder: epath.Path) -> str:
    """Returns what is wrong with the files of a checkpoint, named from its folder on, in at most 300 characters."""
    if isinstance(error, json.JSONDecodeError):
        for name in _JSON_FILES:
            try:
                json.loads((folder / name).read_text())
            except ValueError as other:
                return f"{name}: {other}"
    causes = [_first_line(error)]
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
        causes.append(_first_line(error))
    text = next((line for line in reversed(causes) if str(folder) in line), causes[0])
    return text.replace('Error opening "cast" driver: Error opening "zarr" driver: ', "").replace(
        f"{folder}/", ""
    )[:300]


def _first_line(error: BaseException) -> str:
    """Returns what an error says, without what tensorstore adds for its authors."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(code[1]) if code else getattr(error, "errno", None)
    if number:
        return os.strerror(number)
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.split(r" \[(?:tensorstore_spec|source locations)", line)[0]
