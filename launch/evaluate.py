"""Scores a trained run on a split.

    python launch/evaluate.py --workdir runs/quickstart --split test --output test.json

Prints mIoU, mAP and AUROC beside the class prior (what prevalence alone scores). With --sentences swapped each example
gets the sentence of another person of its window: a model that refers must fall far below its score with true sentences
on the same examples, which is printed beside it. --perturbation corrupts the frames first, as rain or noise would:

    python launch/evaluate.py --workdir runs/quickstart --split test --perturbation fog:3 --output fog3.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags

from launch import command_line

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_STEP = command_line.define_step_flag()
_SPLIT = flags.DEFINE_enum(
    "split", None, ["train", "val", "test"], "Split to evaluate on.", required=True
)
_SENTENCES = flags.DEFINE_enum(
    "sentences",
    None,
    ["true", "swapped", "blank"],
    "Sentences to give: the true ones, those of the next person of the window, or none. Default: as the run trained.",
)
_PERTURBATION = flags.DEFINE_string(
    "perturbation",
    None,
    "NAME:SEVERITY, a corruption of the frames and its strength of 1 to 5: shot_noise, gaussian_noise, brightness, "
    "contrast, saturation, motion_blur, fog or rain.",
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.", required=True)


def main() -> None:
    """Restores the checkpoint, scores it, writes the JSON file and prints the table."""
    from data_pipelines.perturbations import parse_perturbation

    text = _PERTURBATION.value
    perturbation = None if text is None else parse_perturbation(text)
    # Imported here so that --help and a wrong flag answer at once.
    import functools
    import json

    import jax
    from etils import epath

    from data_pipelines import input_pipeline
    from ravar_jax import config_check, distributed, evaluate
    from ravar_jax.restore import restore_run

    distributed.initialize()
    command_line.start_jax()
    run = restore_run(_WORKDIR.value, _STEP.value)
    config, split = run.config, _SPLIT.value
    sentences = _SENTENCES.value or config.data.sentences
    config.data.sentences = (
        "blank" if sentences == "blank" else "true"
    )  # the flag decides, not the run
    if perturbation and config.data.feature_cache:
        if jax.process_index() == 0:
            cache = config.data.feature_cache
            print(f"{cache} holds no pixels: {perturbation} is computed from frames")
        config.data.feature_cache = ""
    score = functools.partial(
        evaluate.evaluate,
        run.task,
        run.params,
        run.frozen,
        mesh=run.mesh,
        split=split,
        split_size=input_pipeline.split_size(config, split),
        step=run.step,
        iou_gate=config.evaluation.iou_gate,
        perturbation=text,
    )
    batches = functools.partial(
        input_pipeline.eval_batches, config, run.tokenizer, split, perturbation=perturbation
    )
    scores = score(batches(sentences=sentences), sentences=sentences)
    true_scores = None
    if sentences == "swapped":
        same_examples = score(batches(sentences="true", only_shared_windows=True), sentences="true")
        true_scores = {key: value for key, value in same_examples.items() if key.startswith(split)}
        scores["true_sentences"] = true_scores
    if jax.process_index() != 0:
        return
    output = epath.Path(_OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    config_check.write_atomically(output, json.dumps(scores, indent=2, allow_nan=False) + "\n")
    print(evaluate.table(scores, split=split, beside=true_scores))


if __name__ == "__main__":
    command_line.run(main)
