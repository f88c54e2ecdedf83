"""Trains a model, or goes on from the last checkpoint in the workdir.

    python launch/train.py --config configs/quickstart.py --workdir runs/quickstart

Writes config.json, metrics.jsonl, TensorBoard events and checkpoints, and at the end final_metrics.json with the scores
on the test split. A run of task "pretrain" also writes its backbone, as WORKDIR/backbone. On several hosts, the same
command on each is one run (README, "Pods").
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags

from launch import command_line

command_line.define_config_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; an earlier run in it is resumed.", required=True
)


def main() -> None:
    """Checks the config, trains, evaluates on the test split."""
    # Imported here so that --help and a wrong flag answer at once.
    import functools
    import json

    import jax
    from etils import epath
    from jax.experimental import multihost_utils

    from configs.base import CHOICES
    from data_pipelines import input_pipeline
    from ravar_jax import config_check, distributed, evaluate, sharding, train
    from ravar_jax.backbone import load_backbone
    from ravar_jax.tasks import pretrain, ravar
    from ravar_jax.tokenizer import Tokenizer

    distributed.initialize()
    command_line.start_jax()
    config, workdir = flags.FLAGS.config, epath.Path(_WORKDIR.value)
    config_check.check_config(config, CHOICES, jax.device_count())
    distributed.check_same(json.dumps(config.to_dict(), sort_keys=True))
    config_check.claim_workdir(workdir, config, write=False)  # written once training can begin

    # A split that is missing stops the run now, not at its end. What is not there yet is built, once.
    with distributed.first_process_first("dataset"):
        for split in ("train", "val", "test"):
            input_pipeline.split_size(config, split)
    if config.task == "pretrain":
        task = pretrain.make_task(config)
        sentences = input_pipeline.training_sentences(config)
        with distributed.first_process_first("tokenizer"):
            tokenizer: Tokenizer = pretrain.own_tokenizer(workdir, config, sentences)
        train_batches, eval_batches = (
            input_pipeline.pretrain_batches,
            input_pipeline.pretrain_eval_batches,
        )
    else:
        task = ravar.make_task(config)
        tokenizer = load_backbone(config.model.backbone).tokenizer
        train_batches, eval_batches = input_pipeline.train_batches, input_pipeline.eval_batches
    evaluation = functools.partial(eval_batches, config, tokenizer, sentences=config.data.sentences)

    state = train.train_and_evaluate(
        config,
        workdir,
        functools.partial(train_batches, config, tokenizer),
        functools.partial(evaluation, split="val"),
        task,
        functools.partial(input_pipeline.describe_examples, config, "train"),
    )
    if config.task == "pretrain":
        backbone = multihost_utils.process_allgather(state.params["backbone"], tiled=True)
        if jax.process_index() == 0:
            frozen = task.frozen.get("backbone", {})  # the second stage's image encoder
            pretrain.export_backbone({**backbone, **frozen}, config, workdir)

    final = workdir / "final_metrics.json"
    if final.exists():
        return
    mesh = sharding.make_mesh(config.mesh)
    scores = evaluate.evaluate(
        task,
        state.params,
        train.place_frozen(task.placed, mesh),
        evaluation(split="test"),
        mesh,
        split="test",
        split_size=input_pipeline.split_size(config, "test"),
        step=config.train.steps,
        sentences=config.data.sentences,
        iou_gate=config.evaluation.iou_gate,
    )
    if jax.process_index() == 0:
        config_check.write_atomically(final, json.dumps(scores, indent=2, allow_nan=False) + "\n")
        print(evaluate.table(scores, split="test"))


if __name__ == "__main__":
    command_line.run(main)
