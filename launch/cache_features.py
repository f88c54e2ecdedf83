"""Encodes a dataset with the frozen backbone once, into TFRecords that training reads instead of pixels.

    python launch/cache_features.py --config configs/quickstart.py --output data/quickstart_features

Then train with --config.data.feature_cache=data/quickstart_features. Killed, the same command goes on with the shards
that are missing; on several hosts (README, "Pods") each writes its share. --config.data.cache_dtype=bfloat16 halves the
files. A cache that no longer fits its config (other weights, tokenizer, pixels, positions or dataset) is refused by the
command that reads it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags

from launch import command_line

command_line.define_config_flag()
_OUTPUT = flags.DEFINE_string(
    "output", None, "Folder to write; must not exist, or hold this very cache.", required=True
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 64, "Frames, and sentences, encoded at a time.", lower_bound=1
)


def main() -> None:
    """Writes the cache, with progress on stderr."""
    # Imported here so that --help and a wrong flag answer at once.
    import json

    import jax

    from configs.base import CHOICES
    from data_pipelines import feature_cache_writer
    from data_pipelines.dataset_folder import dataset_folder
    from ravar_jax import config_check, distributed

    distributed.initialize()
    command_line.start_jax()
    config = flags.FLAGS.config
    config_check.check_config(config, CHOICES, jax.device_count())
    settings = {"config": config.to_dict(), "batch_size": _BATCH_SIZE.value}
    distributed.check_same(json.dumps(settings, sort_keys=True))
    with distributed.first_process_first("dataset"):
        dataset_folder(config)
    key = feature_cache_writer.write_cache(config, _OUTPUT.value, _BATCH_SIZE.value)
    print(f"{_OUTPUT.value}: {key}")


if __name__ == "__main__":
    command_line.run(main)
