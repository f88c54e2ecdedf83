"""In which order examples are read: a pure function of (seed, epoch) in training, file order in evaluation.

Global step s covers stream positions s*B to (s+1)*B-1 of an endless stream of epochs, and process p of P takes the
p-th contiguous share of each global batch. So a run resumes from its step alone, on any number of processes.
"""

import functools

import numpy as np

from ravar_jax.errors import UsageError, UserError


class TrainingOrder:
    """An endless stream in which every epoch holds each example once, in an order of its own."""

    def __init__(self, num_examples: int, seed: int):
        """Args: num_examples: of the split, at least 1. seed: of the run."""
        if not num_examples:
            raise UserError("the train split holds no examples")
        self._num_examples = num_examples
        self._seed = seed
        self._permutation = functools.lru_cache(maxsize=4)(self._draw_permutation)

    def __call__(self, position: int) -> tuple[int, int]:
        """Returns (epoch, example) at a position of the stream."""
        epoch, place = divmod(position, self._num_examples)
        return epoch, int(self._permutation(epoch)[place])

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(self._num_examples)


class EvaluationOrder:
    """Each example of a list once, then padding up to a whole number of global batches."""

    def __init__(self, examples: np.ndarray):
        """Args: examples: int (n,), numbers of examples in file order."""
        self._examples = examples

    def __call__(self, position: int) -> tuple[int, int]:
        """Returns (0, example), or (0, -1) where the position is padding."""
        return 0, int(self._examples[position]) if position < len(self._examples) else -1

    def num_batches(self, batch_size: int) -> int:
        """Returns the number of global batches, the same on every process."""
        return -(-len(self._examples) // batch_size)


def local_batch_size(batch_size: int, process_count: int, key: str) -> int:
    """Returns the rows of the global batch that one process reads.

    Raises:
        UsageError: the global batch cannot be shared out evenly; names `key`.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UsageError(
            f"{key}={batch_size} is not a positive multiple of the {process_count} processes"
        )
    return batch_size // process_count


def stream_position(row: int, batch_size: int, process_index: int, process_count: int) -> int:
    """Returns the stream position of the `row`-th example that a process reads, counted from step 0."""
    local = batch_size // process_count
    step, place = divmod(row, local)
    return step * batch_size + process_index * local + place
