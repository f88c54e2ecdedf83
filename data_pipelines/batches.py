"""The tf.data graph: numbers of a range -> a few examples a call, in parallel -> batches -> numpy arrays.

Nothing in it draws or remembers anything: the k-th element is a function of k, so a stream starts anywhere.
"""

import logging
import math
import os
import weakref
from collections.abc import Callable, Iterator

import numpy as np

from data_pipelines.example_order import stream_position
from data_pipelines.examples import Example, ExampleSource
from data_pipelines.quiet_tensorflow import tf

_log = logging.getLogger(__name__)
Batch = dict[str, np.ndarray]
Order = Callable[[int], tuple[int, int]]
# Reading ahead in order; more threads than this only hold more frames in memory.
_PARALLEL_READS = min(8, max(2, os.cpu_count() or 2))
_PREFETCHED_BATCHES = 2
_ROWS_A_CALL = 8  # at most: what a call costs is spread over them
_ENDLESS = np.iinfo(np.int64).max


class Batches(Iterator[Batch]):
    """The local share of global batches, from `start_step` on.

    Attributes:
        num_left_out: examples of the split that are not in the batches on purpose.
    """

    def __init__(
        self,
        source: ExampleSource,
        order: Order,
        *,
        batch_size: int,
        start_step: int,
        stop_step: int | None,
        process_index: int,
        process_count: int,
        num_left_out: int = 0,
    ):
        """Args: batch_size: global. stop_step: None is endless. The rest as `example_order` and `examples` say."""
        self.num_left_out = num_left_out
        self._source = source
        # What a reading thread raised: TensorFlow passes on no more than its text.
        self._errors: list[Exception] = []

        def read(row: int) -> Example:
            position = stream_position(row, batch_size, process_index, process_count)
            return source.read(*order(position))

        dataset = _dataset(
            read,
            example=source.read(0, -1),
            rows=batch_size // process_count,
            rows_a_call=batch_size // process_count if source.cheap else _ROWS_A_CALL,
            start_step=start_step,
            stop_step=stop_step,
            errors=self._errors,
        )
        self._iterator = [dataset.as_numpy_iterator()]
        # Reading threads must be gone before the interpreter is; nothing above refers to `self`, so that dropping an
        # endless stream stops them too.
        weakref.finalize(self, self._iterator.clear)

    @property
    def num_truncated(self) -> int:
        """Distinct sentences that were longer than the text length so far."""
        return self._source.num_truncated

    @property
    def num_bad_records(self) -> int:
        """Distinct records that could not be read so far."""
        return self._source.bad_records.count

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
            UserError: what a reading thread met.
        """
        try:
            return next(self._iterator[0])
        except tf.errors.OpError as error:
            raise (self._errors or [error])[0] from None
        except StopIteration:
            if self.num_bad_records:
                _log.warning(
                    "%d record(s) could not be read and were masked out", self.num_bad_records
                )
            raise


def _dataset(
    read: Callable[[int], Example],
    *,
    example: Example,
    rows: int,
    rows_a_call: int,
    start_step: int,
    stop_step: int | None,
    errors: list[Exception],
) -> tf.data.Dataset:
    """Returns the dataset of batches of `rows` rows, which `read` gives by number; `example` is any one of them."""
    rows_a_call = math.gcd(rows, rows_a_call)
    calls = rows // rows_a_call
    keys = sorted(example)
    dtypes = [tf.as_dtype(example[key].dtype) for key in keys]

    def read_call(call: np.ndarray) -> list[np.ndarray]:
        try:
            first = int(call) * rows_a_call
            examples = [read(row) for row in range(first, first + rows_a_call)]
            return [np.stack([each[key] for each in examples]) for key in keys]
        except Exception as error:
            errors.append(error)
            raise

    def read_op(call: tf.Tensor) -> dict[str, tf.Tensor]:
        values = tf.numpy_function(read_call, [call], dtypes)
        for key, value in zip(keys, values, strict=True):
            value.set_shape((rows_a_call, *example[key].shape))
        return dict(zip(keys, values, strict=True))

    def join(value: tf.Tensor) -> tf.Tensor:
        return tf.reshape(value, (rows, *value.shape[2:]))

    stop_step = _ENDLESS // rows if stop_step is None else stop_step
    dataset = tf.data.Dataset.range(start_step * calls, stop_step * calls)
    dataset = dataset.map(read_op, num_parallel_calls=_PARALLEL_READS, deterministic=True)
    if calls > 1:
        dataset = dataset.batch(calls, drop_remainder=True)
        dataset = dataset.map(lambda batch: tf.nest.map_structure(join, batch))
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.threading.max_intra_op_parallelism = 1
    options.threading.private_threadpool_size = _PARALLEL_READS
    return dataset.prefetch(_PREFETCHED_BATCHES).with_options(options)
