"""Compiles a config's train, evaluation and feature-caching steps for a TPU slice, on a machine without a TPU.

    python launch/compile_for_tpu.py --config configs/refatomnet.py --topology v5e:4x4 --output v5e.json

Needs libtpu, pip install "jax[tpu]" (Linux on x86-64), but no weights: where their folders are missing, BLIP-2's and
DETR's sizes are taken. Reports chips, memory a device, operations, every kind of collective, and an estimate of the
step time, as a table and as JSON (to --output; without, on standard output). Exit code 1 if a step does not fit.

    python launch/compile_for_tpu.py --config configs/refatomnet.py --topology v5e:4x4 --scaling

compiles the train step for slices of 16 to 256 chips of that generation (512 of v4 and v5p) at the same clips a chip.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags
from ml_collections import config_flags

from launch import command_line

command_line.define_config_flag()
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "The slice, as v5e:4x4, v6e:2x4, v5p:2x2x4 or v4:2x2x4.", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.")
_STEPS = flags.DEFINE_multi_enum(
    "step",
    ["train", "evaluation", "caching"],
    ["train", "evaluation", "caching"],
    "Which steps to compile; may be given several times.",
)
_CACHE_BATCH_SIZE = flags.DEFINE_integer(
    "cache_batch_size", 64, "--batch_size of launch/cache_features.py.", lower_bound=1
)
_SCALING = flags.DEFINE_bool(
    "scaling", False, "Compile the train step for all sizes of slices in place of the one."
)
_BATCH_PER_CHIP = flags.DEFINE_integer(
    "batch_per_chip",
    None,
    "With --scaling: clips a chip. Default: train.batch_size over the chips of --topology.",
    lower_bound=1,
)


def main() -> None:
    """Compiles, prints the table, writes the JSON."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX starts: libtpu is here, a TPU is not
    # Imported here so that --help and a wrong flag answer at once.
    import json

    from configs.base import CHOICES
    from ravar_jax import config_check
    from ravar_jax.errors import UserError
    from ravar_jax.tpu import chips, report

    config = flags.FLAGS.config
    where = chips.describe_slice(*chips.parse_topology(_TOPOLOGY.value))
    config_check.check_config(config, CHOICES, len(where.devices))
    result: dict = {
        "config": config_flags.get_config_filename(flags.FLAGS["config"]),
        "topology": where.name,
        "chips": where.num_chips,
        "devices": len(where.devices),
        "hosts": len({device.process_index for device in where.devices}),
        "hbm_per_device": where.hbm_per_device,
    }
    out = sys.stdout if _OUTPUT.value else sys.stderr
    if _SCALING.value:
        result["scaling"] = _scaling(config, where, out)
        wrong = [f"{row['topology']} does not fit" for row in result["scaling"] if not row["fits"]]
    else:
        result |= _steps(config, where)
        print(report.table(result), file=out)
        wrong = [
            report.does_not_fit(name, step, where)
            for name, step in result["steps"].items()
            if not step.get("fits", True)
        ]
    result |= {"fits": not wrong, "formulas": report.FORMULAS}
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    if _OUTPUT.value:
        file = Path(_OUTPUT.value)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    else:
        print(text, end="", flush=True)
    if wrong:
        raise UserError("; ".join(wrong))


def _steps(config, where) -> dict:
    """Returns `mesh`, `sizes` and `steps`: the report of every step that was asked for."""
    import jax

    from data_pipelines.cache_steps import trace_cache_steps
    from ravar_jax import config_check, sharding
    from ravar_jax.errors import UsageError
    from ravar_jax.tpu import programs, report

    mesh = sharding.make_mesh(config.mesh, where.devices)
    task, sizes = programs.task_of(config)
    steps: dict[str, dict] = {}

    def compile_step(name: str, traced: jax.stages.Traced, rows: int, unit: str, over) -> None:
        steps[name] = {"rows": rows, "unit": unit} | report.measure(traced, over, where)

    if "train" in _STEPS.value:
        traced = programs.trace_train_step(config, task, mesh)
        compile_step("train", traced, config.train.batch_size, "clips", mesh)
    if "evaluation" in _STEPS.value:
        traced = programs.trace_evaluation_step(config, task, mesh)
        compile_step("evaluation", traced, config.evaluation.batch_size, "examples", mesh)
    if "caching" in _STEPS.value:
        try:
            config_check.check_cacheable(config)
        except UsageError as error:
            steps["caching"] = {"skipped": str(error)}
        else:
            (backbone, _), (detector, _) = (
                programs.backbone_of(config.model),
                programs.detector_of(config.model),
            )
            over = jax.sharding.Mesh(mesh.devices.reshape(-1), ("data",))
            found = trace_cache_steps(
                config, backbone, detector, list(over.devices), _CACHE_BATCH_SIZE.value
            )
            for name, (traced, rows, unit) in found.items():
                compile_step(name, traced, rows, unit, over)
    return {"mesh": dict(mesh.shape), "sizes": sizes, "steps": steps}


def _scaling(config, where, out) -> list[dict]:
    """Returns the rows of the scaling table, each printed as it is known."""
    from ravar_jax.tpu import scaling

    batch = _BATCH_PER_CHIP.value or max(1, config.train.batch_size // where.num_chips)
    rows = []
    print(scaling.heading(), file=out, flush=True)
    for row in scaling.scaling(config, where.chip, batch):
        print(scaling.line(row), file=out, flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    command_line.run(main)
