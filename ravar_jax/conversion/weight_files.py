"""Weight files: safetensors and PyTorch's, read one tensor at a time without running any code in them, and written.

PyTorch is imported only for its own files.
"""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  bfloat16 for numpy
import numpy as np
import safetensors

from ravar_jax.errors import UserError


class LazyTensors(Mapping[str, np.ndarray]):
    """Tensors by name; one is read when it is asked for and not kept, float16 and bfloat16 as float32."""

    def __init__(self, readers: Mapping[str, Callable[[], np.ndarray]]):
        """Args: readers: name -> function that reads the tensor."""
        self._readers = dict(readers)

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._readers[name]()
        return array.astype(np.float32) if array.dtype.name in ("float16", "bfloat16") else array

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def renamed(self, rename: Callable[[str], str | None]) -> "LazyTensors":
        """Returns the same tensors under other names, without those whose new name is None."""
        names = {name: rename(name) for name in self._readers}
        return LazyTensors(
            {new: self._readers[old] for old, new in names.items() if new is not None}
        )


def read_tensors(files: Sequence[str]) -> LazyTensors:
    """Returns the tensors of all files.

    Raises:
        UserError: a file is missing or not a file of weights, or two files hold a tensor of the same name.
    """
    readers: dict[str, Callable[[], np.ndarray]] = {}
    for file in files:
        if not os.path.isfile(file):
            raise UserError(f"--input {file}: no such file")
        read = _read_safetensors if file.endswith(".safetensors") else _read_torch
        found = read(file)
        twice = sorted(set(found) & set(readers))
        if twice:
            raise UserError(f"--input {file}: {twice[0]} is in an earlier file too")
        readers |= found
    return LazyTensors(readers)


def _read_safetensors(file: str) -> dict[str, Callable[[], np.ndarray]]:
    try:
        opened = safetensors.safe_open(file, framework="numpy")
        names = list(opened.keys())
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"--input {file}: not a readable safetensors file: {error}") from error
    return {name: functools.partial(opened.get_tensor, name) for name in names}


def _read_torch(file: str) -> dict[str, Callable[[], np.ndarray]]:
    torch = _import_torch(f"--input {file}: reading")
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # zipfile, pickle and torch report damage in their own ways
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--input {file}: not a PyTorch file of weights alone ({reason})"
        ) from error
    for entry in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(entry), dict):
            content = content[entry]
    if not isinstance(content, dict) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise UserError(f"--input {file}: expected tensors by name")

    def reader(tensor: Any) -> Callable[[], np.ndarray]:
        # numpy has no bfloat16 of PyTorch's
        return lambda: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    return {name: reader(tensor) for name, tensor in content.items()}


def write_torch(
    file: os.PathLike | str, tensors: Mapping[str, np.ndarray], entry: str | None
) -> None:
    """Writes tensors as PyTorch does, bare or as the entry `entry` of a dict."""
    torch = _import_torch(f"{file}: writing")
    content: Any = {
        # A copy where it must be: PyTorch takes no read-only memory.
        name: torch.from_numpy(np.require(array, requirements=("C", "W")))
        for name, array in tensors.items()
    }
    torch.save(content if entry is None else {entry: content}, file)


def _import_torch(doing: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{doing} a PyTorch file needs PyTorch") from error
    return torch
