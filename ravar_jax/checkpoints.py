"""Checkpoints of a run: `workdir/checkpoints/<step>/`, written by orbax in the background.

A checkpoint appears under its final name only when it is complete, so a kill at any moment leaves the older ones
intact and the newest complete one is where the run goes on. The file format does not notice a flipped byte, so every
checkpoint holds a checksum of each array.
"""

import os
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from ravar_jax.errors import UserError


class CheckpointConfig(Protocol):
    """The `checkpoint` section of a config; `every_steps` is the training loop's business."""

    keep_last: int
    keep_every_steps: int


def open_manager(workdir: os.PathLike | str, checkpoint: CheckpointConfig) -> ocp.CheckpointManager:
    """Returns the manager to save and restore with; use it as a context manager, which waits for the last save."""
    keep = [preservation_policy.LatestN(checkpoint.keep_last)]
    if checkpoint.keep_every_steps:
        keep.append(preservation_policy.EveryNSteps(checkpoint.keep_every_steps))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy(keep),
        cleanup_tmp_directories=True,  # what a killed run was writing
        enable_async_checkpointing=True,
    )
    return ocp.CheckpointManager(epath.Path(workdir).absolute() / "checkpoints", options=options)


def open_reader(workdir: os.PathLike | str) -> ocp.CheckpointManager:
    """Returns a manager that restores and never writes.

    Raises:
        UserError: if the run has no checkpoint.
    """
    folder = epath.Path(workdir).absolute() / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"no checkpoint in {workdir}: {folder} is missing")
    # Not `read_only=True`, which warns three times on standard error.
    options = ocp.CheckpointManagerOptions(create=False, save_root_metadata=False)
    manager = ocp.CheckpointManager(folder, options=options)
    if manager.latest_step() is None:
        raise UserError(f"no complete checkpoint in {folder}")
    return manager


def save(manager: ocp.CheckpointManager, step: int, state: Any, meta: dict[str, Any]) -> None:
    """Saves `state` (copied off the devices before this returns) and `meta` (plain JSON values) as `step`."""
    content = {"meta": meta, "checksums": checksums(state)}
    arguments = ocp.args.Composite(
        state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(content)
    )
    manager.save(step, args=arguments, force=True)


def restore(manager: ocp.CheckpointManager, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the state and the meta of the latest checkpoint.

    Args:
        manager: With at least one checkpoint.
        abstract_state: `ShapeDtypeStruct`s with the shardings of the current mesh, which may differ from the saved.

    Raises:
        UserError: if the latest checkpoint cannot be read. There is no silent fallback to an older one.
    """
    step = manager.latest_step()
    folder = epath.Path(manager.directory) / str(step)
    arguments = ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract_state), meta=ocp.args.JsonRestore()
    )
    try:
        restored = manager.restore(step, args=arguments)
        saved, found = restored.meta["checksums"], checksums(restored.state)
    except Exception as error:  # orbax and tensorstore raise many types for damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(_damaged(folder, reason[:300])) from error
    changed = [path for path in found if saved.get(path) != found[path]]
    if changed:
        raise UserError(
            _damaged(folder, f"the values of {changed[0]} are not those that were saved")
        )
    return restored.state, restored.meta["meta"]


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


def _damaged(folder: epath.Path, reason: str) -> str:
    return f"checkpoint {folder} cannot be read ({reason}); delete that folder to go on from the one before it"
