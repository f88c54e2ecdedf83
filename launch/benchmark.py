"""Times the train step and the input pipeline of a config; prints one JSON object.

    python launch/benchmark.py --config configs/quickstart.py --peak_flops 197e12

The step runs on a synthetic batch, so it needs no dataset; with --random_weights it needs no weights either:

    python launch/benchmark.py --config configs/refatomnet.py --input pixels --random_weights

Without that flag, where the dataset, or the feature cache of the config, is there already, training is fed from it as
well, which gives the share of time spent waiting for input; nothing is built.
Compile time is given without and with the persistent compilation cache, memory by the compiler's count and as used.
"""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

from absl import flags
from ml_collections import config_flags

from launch import command_line

config_flags.DEFINE_config_file(
    "config",
    str(_ROOT / "configs" / "quickstart.py"),
    "Configuration file of a run of task ravar; keys as --config.a.b=value.",
    lock_config=True,
)
_INPUT = flags.DEFINE_enum(
    "input",
    "features",
    ["features", "pixels"],
    "What the step gets: cached image and text tokens, or frames that go through the backbone.",
)
_STEPS = flags.DEFINE_integer("steps", 20, "Steps to time; 2 more warm up.", lower_bound=1)
_PEAK_FLOPS = flags.DEFINE_float(
    "peak_flops", None, "Peak FLOP/s of one device at the config's dtype, for MFU.", lower_bound=1.0
)
_RANDOM_WEIGHTS = flags.DEFINE_bool(
    "random_weights",
    False,
    "Draw the weights of backbone and detector; where their folders are missing, BLIP-2's and DETR's sizes are taken.",
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write as well.")


def main() -> None:
    """Measures, prints, and writes the file if asked."""
    # Imported here so that --help and a wrong flag answer at once.
    import dataclasses
    import json

    import jax

    from configs.base import CHOICES
    from ravar_jax import benchmark, config_check
    from ravar_jax.errors import UsageError
    from ravar_jax.tasks import ravar
    from ravar_jax.tpu import programs

    config = flags.FLAGS.config
    config_check.check_config(config, CHOICES, jax.device_count())
    if config.task != "ravar":
        raise UsageError(f"task={config.task}: the benchmark times task ravar")
    if _INPUT.value == "features":
        for key in ("train_backbone", "train_qformer"):
            if config.model[key]:
                raise UsageError(f"--input=features: model.{key} needs --input=pixels")
    command_line.start_jax()
    if _RANDOM_WEIGHTS.value:
        task, _ = programs.task_of(config)
        task = dataclasses.replace(
            task,
            frozen=benchmark.random_weights(task.placed),
            loaded=benchmark.random_weights(task.loaded),
        )
    else:
        task = ravar.make_task(config)
    batch = benchmark.synthetic_batch(config, _INPUT.value)
    result: dict = {
        "config": config_flags.get_config_filename(flags.FLAGS["config"]),
        "input": _INPUT.value,
    }
    # Without weights there may be no tokenizer either.
    batches = None if _RANDOM_WEIGHTS.value else _input(config)
    result |= benchmark.measure_step(
        config, task, batch, steps=_STEPS.value, peak_flops=_PEAK_FLOPS.value, batches=batches
    )
    if batches is None:
        result["input_clips_per_second"] = None
    else:
        result |= benchmark.measure_input(batches, 10)
    text = json.dumps(result, indent=2, allow_nan=False)
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(text + "\n")
    print(text)


def _input(config):
    """Returns the training batches of the config's own input, None where there is no dataset."""
    from ravar_jax.backbone import load_backbone

    if not _has_dataset(config):
        return None
    from data_pipelines import input_pipeline

    tokenizer = load_backbone(config.model.backbone).tokenizer
    return input_pipeline.train_batches(config, tokenizer, 0)


def _has_dataset(config) -> bool:
    """Tells whether what the config reads is there; only then is TensorFlow needed."""
    folder = Path(config.data.feature_cache or Path(config.data.data_dir) / config.data.dataset)
    if not any(folder.glob("**/*.tfrecord*")):
        return False
    if config.data.feature_cache or config.data.dataset != "mini_refava":
        return True
    from data_pipelines.mini_refava.mini_refava_dataset_builder import Builder, MiniRefavaConfig

    data = config.data
    scenes = MiniRefavaConfig(
        seed=data.seed, num_clips=data.num_clips, stored_frames=data.stored_frames
    )
    return Builder(data_dir=data.data_dir, config=scenes).is_prepared()


if __name__ == "__main__":
    command_line.run(main)
