"""Reading pickles without running anything they hold.

Only containers, numbers, text and numpy arrays or scalars of numbers and text come back. No global of a pickle is ever
looked up: the few names that such data needs are answered by stand-ins of this module, which rebuild numpy values as
plain Python ones, and every other name is refused.
"""

import math
import os
import pickle
from typing import Any, Literal

import numpy as np
from etils import epath

from ravar_jax.errors import UserError

_NUMBER_KINDS = "biufUS"  # bool, int, unsigned, float, text, bytes


class _Dtype:
    """Stands for `numpy.dtype`: keeps the type string and byte order."""

    def __init__(self, code: Any):
        if not isinstance(code, str):
            raise ValueError("a numpy dtype of an unexpected form")
        self.code = code
        self.order: Literal["<", ">", "=", "|"] = "="

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise ValueError(f"a numpy dtype of byte order {state[1]!r}")
        self.order = state[1]

    def build(self) -> np.dtype:
        dtype = np.dtype(self.code).newbyteorder(self.order)
        if dtype.kind not in _NUMBER_KINDS:
            raise ValueError(f"a numpy array of dtype {dtype}")
        return dtype


class _Array:
    """Stands for `numpy.ndarray`: `value` is the nested list of its entries, or one entry."""

    def __init__(self) -> None:
        self.value: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if isinstance(data, list):  # dtype object: the entries themselves
            if dtype.code not in ("O", "O8") or len(shape) != 1 or len(data) != shape[0]:
                raise ValueError("a numpy array of objects that is not one-dimensional")
            self.value = data
        else:
            raw = data if isinstance(data, bytes) else data.encode("latin1")
            self.value = (
                np.frombuffer(raw, dtype.build())
                .reshape(shape, order="F" if fortran else "C")
                .tolist()
            )


class _Stand:
    """Answers for one global; being neither a class nor a function, it takes no state from a pickle."""

    __slots__ = ("_function",)

    def __init__(self, function: Any):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("state for a function")


def _scalar(dtype: _Dtype, data: Any) -> Any:
    raw = data if isinstance(data, bytes) else data.encode("latin1")
    return np.frombuffer(raw, dtype.build(), count=1)[0].item()


def _from_buffer(data: Any, dtype: _Dtype, shape: Any, order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", bytes(data)))
    return array


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


def _stands() -> dict[tuple[str, str], _Stand]:
    stands = {
        ("numpy", "ndarray"): _Stand(_Array),
        ("numpy", "dtype"): _Stand(lambda code, *flags: _Dtype(code)),
        ("_codecs", "encode"): _Stand(_encode),  # bytes, up to protocol 2
    }
    for builtins in ("builtins", "__builtin__"):  # sets, up to protocol 3
        stands[builtins, "set"] = stands[builtins, "frozenset"] = _Stand(
            lambda items=(): set(items)
        )
    for core in ("numpy.core", "numpy._core"):  # before and since numpy 2
        stands[core + ".multiarray", "_reconstruct"] = _Stand(lambda *arguments: _Array())
        stands[core + ".multiarray", "scalar"] = _Stand(_scalar)
        stands[core + ".numeric", "_frombuffer"] = _Stand(_from_buffer)
    return stands


class _ForbiddenGlobal(Exception):
    pass


class _Unpickler(pickle.Unpickler):
    _stands = _stands()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._stands[module, name]
        except KeyError:
            raise _ForbiddenGlobal(f"{module}.{name}") from None


def read_pickle(path: str | os.PathLike) -> Any:
    """Returns the value in a pickle of plain data. `as_list` and `as_number` read its sequences and numbers.

    Raises:
        UserError: If the file asks for any global beyond those of plain data (naming it, nothing having run), or is
            truncated or malformed.
    """
    with epath.Path(path).open("rb") as file:
        try:
            return _Unpickler(file).load()
        except _ForbiddenGlobal as error:
            raise UserError(
                f"{path}: refused, the pickle asks for {error}; expected only dict, list, tuple, set, str, bytes, "
                "numbers and numpy arrays of them"
            ) from None
        except Exception as error:  # a malformed pickle raises nearly anything
            detail = " ".join(str(error).split()) or "no detail"
            raise UserError(
                f"{path}: truncated or not a pickle ({type(error).__name__}: {detail})"
            ) from error


def as_list(value: Any) -> list | None:
    """Returns the entries of a list, tuple, set or numpy array, or None for anything else."""
    if isinstance(value, _Array):
        value = value.value
    return list(value) if isinstance(value, list | tuple | set | frozenset) else None


def as_number(value: Any) -> float | None:
    """Returns a finite int or float as float, or None for anything else."""
    if isinstance(value, _Array):
        value = value.value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
