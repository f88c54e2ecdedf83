"""Frozen weights on disk: an orbax checkpoint of a nested dict of arrays, `folder/params/`; and their hashes.

Reading or writing takes little memory beside the arrays themselves, which may be most of a machine's.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import traverse_util

from ravar_jax.errors import UserError

_CHUNK = 32 << 20  # bytes: what is compressed, and read where an array is sharded, at a time


def save_params(folder: os.PathLike | str, params: Any) -> None:
    """Writes `folder/params/`, which must not exist; it appears under its name when it is complete."""
    # Orbax warns that there is nothing of several processes to merge.
    with _checkpointer() as checkpointer, _without_warnings():
        checkpointer.save(
            epath.Path(folder).absolute() / "params",
            args=ocp.args.PyTreeSave(
                params,
                save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), params),
            ),
        )


def load_params(folder: os.PathLike | str, shapes: Any) -> Any:
    """Returns the parameters in `folder/params/`.

    Args:
        folder: of `save_params`.
        shapes: nested dict of `ShapeDtypeStruct`s. Leaves that carry a sharding are created in their shards; others are
            read as numpy arrays.

    Raises:
        UserError: the folder is missing or damaged, or holds other parameters than `shapes`; every difference is named.
    """
    path = epath.Path(folder).absolute() / "params"
    if not path.is_dir():
        raise UserError(f"{path} is missing")
    arguments = jax.tree.map(_restore_args, shapes)
    try:
        with _checkpointer() as checkpointer:
            found = checkpointer.metadata(path).item_metadata.tree
            wrong = differences(_shapes(found), _shapes(shapes))
            if not wrong:
                return checkpointer.restore(
                    path, args=ocp.args.PyTreeRestore(item=shapes, restore_args=arguments)
                )
    except Exception as error:  # orbax and tensorstore raise many types for damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read ({reason[:300]})") from error
    raise UserError(f"{path}: {'; '.join(wrong)}")


def _checkpointer() -> ocp.Checkpointer:
    """Returns a checkpointer that copies no array, and has a gigabyte at a time under way.

    In orbax's own format, OCDBT, all that was compressed would stay in memory to the end of a save.
    """
    handlers = ocp.type_handlers
    registry = handlers.create_type_handler_registry(
        (np.ndarray, handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, handlers.ArrayHandler()),
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        save_concurrent_gb=1,
        restore_concurrent_gb=1,
        type_handler_registry=registry,
    )
    return ocp.Checkpointer(handler)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def differences(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Returns one phrase for each missing, unknown and misshapen parameter; both map paths to shapes."""
    wrong = [f"missing {path}" for path in sorted(set(expected) - set(found))]
    wrong += [f"unknown {path}" for path in sorted(set(found) - set(expected))]
    wrong += [
        f"{path} is {found[path]}, expected {expected[path]}"
        for path in sorted(set(found) & set(expected))
        if found[path] != expected[path]
    ]
    return wrong


def hash_weights(params: Any) -> dict[str, str]:
    """Returns SHA-256 of the dtype, shape and bytes of every array of a nested dict, by its '/'-joined path."""
    hashes = {}
    for path, array in sorted(traverse_util.flatten_dict(params, sep="/").items()):
        array = np.ascontiguousarray(array)
        header = f"{array.dtype.str}{array.shape}".encode()
        hashes[path] = hashlib.sha256(header + array.tobytes()).hexdigest()
    return hashes


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    if getattr(leaf, "sharding", None) is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype)
