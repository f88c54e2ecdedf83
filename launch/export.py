"""Exports a trained run as a folder that answers with JAX alone, without this package.

    python launch/export.py --workdir runs/quickstart --output exported

Writes model.jax_export (the model with its weights, for CPU, CUDA and TPU and any batch size), params/ (the trained
parameters, an orbax checkpoint), the tokenizer's file, and model_card.md, which says what goes in and what comes out.
--saved_model adds saved_model/, the same for TensorFlow, and needs the package orbax-export.
A frozen backbone of 500 MB or more stays outside, and the model then takes its image and text tokens.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags

from launch import command_line

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_STEP = command_line.define_step_flag()
_OUTPUT = flags.DEFINE_string(
    "output", None, "Folder to write; must not exist, or be empty.", required=True
)
_SAVED_MODEL = flags.DEFINE_boolean(
    "saved_model", False, "Also write a TensorFlow SavedModel; needs the package orbax-export."
)


def main() -> None:
    """Restores the checkpoint and writes the folder."""
    from ravar_jax import config_check
    from ravar_jax.errors import UserError

    output = Path(_OUTPUT.value)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output {output} exists; delete it or choose another")
    task = config_check.read_config(_WORKDIR.value).task
    if task != "ravar":
        raise UserError(f"{_WORKDIR.value} is a run of task {task}; only task ravar is exported")
    # Imported here so that --help, a wrong flag and a folder that is in the way answer at once.
    from launch import saved_model

    if _SAVED_MODEL.value:
        saved_model.check_installed()
    from configs.base import describe_switches
    from data_pipelines.frame_sampling import evaluation_sampler
    from ravar_jax import export
    from ravar_jax.restore import restore_run

    command_line.start_jax()
    run = restore_run(_WORKDIR.value, _STEP.value)
    model = export.write_export(
        run,
        Path(_WORKDIR.value),
        output,
        arithmetic=describe_switches(run.config),
        clip_positions=evaluation_sampler(run.config).clips.tolist(),
        write_more=saved_model.write_saved_model if _SAVED_MODEL.value else None,
    )
    size = f"{(output / export.MODEL_FILE).stat().st_size / 1e6:.1f} MB"
    also = f", {saved_model.FOLDER}/" * _SAVED_MODEL.value
    print(f"wrote {output}/: {export.MODEL_FILE} ({size}){also} takes {', '.join(model.inputs)}")


if __name__ == "__main__":
    command_line.run(main)
