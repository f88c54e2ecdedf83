"""The shards of a feature cache while it is written: what a kill leaves of them is kept.

    output --lock--> .output.partial/ --shard after shard, each renamed when complete--> renamed to output

A shard holds whole batches, so a run that goes on, or several processes that share the shards out, encode the batches
that one run would have, to the same bits.
"""

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator

from etils import epath

from data_pipelines.quiet_tensorflow import tf
from ravar_jax.errors import UserError

SHARD_BYTES = 64 << 20  # aimed at: what a kill costs at most


@dataclasses.dataclass(frozen=True)
class Shards:
    """The shards of one split.

    Attributes:
        folder: of the cache that is being written.
        split: name of the split.
        total: records in all.
        per_shard: records of every shard but the last, which may have fewer.
    """

    folder: epath.Path
    split: str
    total: int
    per_shard: int

    @property
    def files(self) -> list[epath.Path]:
        """The shards, complete or not, in order."""
        count = max(1, -(-self.total // self.per_shard))
        names = (f"features-{self.split}.tfrecord-{i:05}-of-{count:05}" for i in range(count))
        return [self.folder / name for name in names]

    @property
    def num_written(self) -> int:
        """Records in the complete shards, whoever has written them."""
        return sum(last - first for first, last in map(self.rows, self._complete()))

    def rows(self, shard: int) -> tuple[int, int]:
        """Returns the numbers of a shard's first record and of the one behind its last."""
        return shard * self.per_shard, min((shard + 1) * self.per_shard, self.total)

    def check_written(self) -> None:
        """Reads the complete shards.

        Raises:
            UserError: one is damaged.
        """
        for shard in self._complete():
            file = self.files[shard]
            try:
                for _ in tf.data.TFRecordDataset(str(file)):
                    pass
            except tf.errors.OpError as error:
                raise UserError(f"{file} is damaged; delete it to have it written again") from error

    def missing(self, process_index: int, process_count: int) -> list[int]:
        """Returns the shards that a process has yet to write: every `process_count`-th is its own."""
        own = range(process_index, len(self.files), process_count)
        return [shard for shard in own if not self.files[shard].exists()]

    def write(self, shard: int, records: Iterator[bytes]) -> None:
        """Writes one shard; `records` are all of its records."""
        file = self.files[shard]
        unfinished = file.with_name(f".{file.name}.tmp")
        with tf.io.TFRecordWriter(str(unfinished)) as writer:
            for record in records:
                writer.write(record)
        unfinished.rename(file)

    def _complete(self) -> list[int]:
        return [shard for shard, file in enumerate(self.files) if file.exists()]


def plan_shards(
    folder: epath.Path, split: str, *, total: int, record_bytes: int, batch_rows: int
) -> Shards:
    """Returns shards of about `SHARD_BYTES`, each a whole number of batches.

    Args:
        folder: of the cache that is being written.
        split: name of the split.
        total: records in all.
        record_bytes: of one record, about.
        batch_rows: records encoded at a time.
    """
    batches = max(1, SHARD_BYTES // (record_bytes * batch_rows))
    return Shards(folder, split, total, batches * batch_rows)


@contextlib.contextmanager
def partial_folder(output: epath.Path, *, lock: bool) -> Iterator[epath.Path]:
    """Gives the folder beside `output` to write into, locked until the block or the process ends.

    Args:
        output: of the cache.
        lock: of several processes that write together, one locks.

    Raises:
        UserError: another process is writing there.
    """
    folder = output.with_name(f".{output.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    if not lock or "://" in os.fspath(folder):  # a bucket has no locks
        yield folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"another process is writing --output {output} (in {folder})") from error
    try:
        yield folder
    finally:
        os.close(descriptor)
