"""PyTorch parameter names and layouts to this project's, and back: what every model's table runs on. Numpy only.

A table is a tuple of `Row`s. Together they are a bijection between the tensors of a checkpoint and the parameters here;
`from_torch` refuses anything else and says everything that is wrong at once.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ravar_jax.errors import UserError

Params = dict[str, "Params | np.ndarray"]


class Row(NamedTuple):
    """One row of a table.

    Attributes:
        torch_names: PyTorch names; more than one only if they are stacked.
        path: '/'-joined path here; in a fused layout it holds `{}` for the names of the layout's parts.
        layout: a key of `LAYOUTS`.
        stacked: whether they lie on a new leading axis here (scanned blocks, even if there is only one).
    """

    torch_names: tuple[str, ...]
    path: str
    layout: str = "as_is"
    stacked: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths that the row fills."""
        parts = LAYOUTS[self.layout].parts
        return tuple(self.path.format(part) for part in parts if part != ZERO)


class Layout(NamedTuple):
    """How a tensor turns into a parameter and back.

    Attributes:
        parts: names of what is fused on PyTorch's first axis, `ZERO` for a part that has no parameter here; ("",) is a
            tensor of its own.
        from_torch, to_torch: of one part.
    """

    parts: tuple[str, ...]
    from_torch: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


WHOLE = ("",)
ZERO = "zero"  # the checkpoint holds zeros in place of a parameter that the model does not have
_QKV = ("query", "key", "value")


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _transpose(array: np.ndarray) -> np.ndarray:
    return array.T


LAYOUTS = {
    "as_is": Layout(WHOLE, _same, _same),
    "dense": Layout(WHOLE, _transpose, _transpose),  # (out, in) -> (in, out)
    # (out, in, height, width) -> (height, width, in, out)
    "conv": Layout(WHOLE, lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)),
    "qkv": Layout(_QKV, _transpose, _transpose),  # (3 D, in) -> three of (in, D)
    "qkv_bias": Layout(_QKV, _same, _same),  # (3 D,) -> three of (D,)
    "q0v_bias": Layout(("query", ZERO, "value"), _same, _same),  # (3 D,) -> two of (D,)
}


def dense_rows(torch_name: str, path: str) -> tuple[Row, ...]:
    """Returns the rows of a linear layer with bias."""
    return (
        Row((f"{torch_name}.weight",), f"{path}/kernel", "dense"),
        Row((f"{torch_name}.bias",), f"{path}/bias"),
    )


def norm_rows(torch_name: str, path: str) -> tuple[Row, ...]:
    """Returns the rows of a LayerNorm."""
    return (
        Row((f"{torch_name}.weight",), f"{path}/scale"),
        Row((f"{torch_name}.bias",), f"{path}/bias"),
    )


def from_torch(
    state_dict: Mapping[str, np.ndarray],
    table: Iterable[Row],
    *,
    model: str,
    shapes: Mapping,
    ignored: Sequence[str] = (),
) -> Params:
    """Returns this project's parameters from a checkpoint's tensors.

    Args:
        state_dict: PyTorch name -> array; tensors are read one at a time, so it may be lazy.
        table: of the model.
        model: its name, for the error.
        shapes: nested dict of anything with a `shape`: the model's parameters.
        ignored: patterns of whole names that a checkpoint may hold and this project has no use for.

    Raises:
        UserError: naming every missing, unused and misshapen tensor at once.
    """
    table = tuple(table)
    known = dict.fromkeys(name for row in table for name in row.torch_names)
    wrong = [f"missing {name}" for name in known if name not in state_dict]
    wrong += [
        f"unused {name}"
        for name in state_dict
        if name not in known and not any(re.fullmatch(pattern, name) for pattern in ignored)
    ]
    params: Params = {}
    for row in table:
        if not all(name in state_dict for name in row.torch_names):
            continue
        layout = LAYOUTS[row.layout]
        tensors = [np.asarray(state_dict[name]) for name in row.torch_names]
        fits = all(
            len(tensor.shape) and tensor.shape[0] % len(layout.parts) == 0 for tensor in tensors
        )
        if layout.parts != WHOLE and not fits:
            wrong.append(f"misshapen {row.torch_names[0]} {tensors[0].shape}")
            continue
        pieces = [
            np.split(tensor, len(layout.parts)) if layout.parts != WHOLE else [tensor]
            for tensor in tensors
        ]
        for number, part in enumerate(layout.parts):
            own = [piece[number] for piece in pieces]
            if part == ZERO:
                wrong += [
                    f"non-zero {name}, part {number + 1} of {len(layout.parts)}"
                    for name, array in zip(row.torch_names, own, strict=True)
                    if array.any()
                ]
                continue
            path = row.path.format(part)
            shape = tuple(_lookup(shapes, path).shape)
            if row.stacked:
                shape = shape[1:]
            converted = [layout.from_torch(array) for array in own]
            misshapen = [
                f"misshapen {name} {tensor.shape}, {path} is {shape}"
                for name, tensor, array in zip(row.torch_names, tensors, converted, strict=True)
                if array.shape != shape
            ]
            wrong += misshapen
            if not misshapen:
                _assign(params, path, np.stack(converted) if row.stacked else converted[0])
    if wrong:
        raise UserError(f"not a {model}: {'; '.join(wrong)}")
    return params


def to_torch(params: Mapping, table: Iterable[Row]) -> dict[str, np.ndarray]:
    """Returns a checkpoint's tensors from this project's parameters, or from a tree of their gradients."""
    return {name: array for row in table for name, array in _row_to_torch(params, row)}


def _row_to_torch(params: Mapping, row: Row) -> Iterator[tuple[str, np.ndarray]]:
    layout = LAYOUTS[row.layout]
    leaves = [np.asarray(_lookup(params, path)) for path in row.paths]
    for number, name in enumerate(row.torch_names):
        own = [leaf[number] if row.stacked else leaf for leaf in leaves]
        tensors = [layout.to_torch(leaf) for leaf in own]
        for index, part in enumerate(layout.parts):
            if part == ZERO:
                tensors.insert(index, np.zeros_like(tensors[0]))
        yield name, np.concatenate(tensors) if len(tensors) > 1 else tensors[0]


def _assign(tree: Params, path: str, array: np.ndarray) -> None:
    *folders, leaf = path.split("/")
    for folder in folders:
        tree = tree.setdefault(folder, {})  # type: ignore[assignment]
    tree[leaf] = np.ascontiguousarray(array)


def _lookup(tree: Mapping, path: str):
    for key in path.split("/"):
        tree = tree[key]
    return tree
