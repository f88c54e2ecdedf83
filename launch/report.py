"""Writes the report of a finished run into its workdir.

    python launch/report.py --workdir runs/quickstart

report.md holds the scores on the test split (from test_true.json, test_swapped.json and test_blank.json where
launch/evaluate.py wrote them, otherwise final_metrics.json), curves.png the training, examples.png examples of the test
split with true and predicted boxes and actions.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags

from launch import command_line

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the finished run.", required=True)
_NUM_PAIRS = flags.DEFINE_integer(
    "pairs", 4, "Windows to show, two people of each (one where no window has two).", lower_bound=0
)


def main() -> None:
    """Restores the run, predicts on the shown examples and writes the report."""
    # Imported here so that --help and a wrong flag answer at once.
    from configs.base import describe_switches
    from ravar_jax import report
    from ravar_jax.restore import restore_run

    workdir = Path(_WORKDIR.value)
    report.read_scores(workdir)  # a run that has not finished stops here
    command_line.start_jax()
    run = restore_run(workdir)
    examples = shown_examples(run, _NUM_PAIRS.value) if _NUM_PAIRS.value else []
    print(
        f"wrote {report.write_report(workdir, run.config, describe_switches(run.config), examples)}"
    )


def shown_examples(run, num_windows: int) -> list:
    """Returns `report.Example`s of evenly spaced test windows, two people of each where any window has two."""
    import numpy as np

    from data_pipelines import input_pipeline
    from data_pipelines.dataset_folder import dataset_folder
    from data_pipelines.examples import sentence_of
    from data_pipelines.record_index import load_index
    from data_pipelines.records import decode_frames, parse_window
    from data_pipelines.schema import KEY_POSITION
    from ravar_jax import evaluate, report

    config = run.config
    index = load_index(dataset_folder(config), "test")
    people = 2 if index.num_people.max() > 1 else 1
    windows = np.flatnonzero(index.num_people >= people)
    windows = windows[np.linspace(0, len(windows) - 1, min(num_windows, len(windows))).astype(int)]
    first_example = np.cumsum(index.num_people) - index.num_people
    chosen = (first_example[windows][:, None] + np.arange(people)).ravel()

    batches = input_pipeline.eval_batches(
        config, run.tokenizer, "test", sentences=config.data.sentences
    )
    with_chosen = (batch for batch in batches if np.isin(batch["example_id"], chosen).any())
    predicted = evaluate.predictions(run.task, run.params, run.frozen, with_chosen, run.mesh)
    rows = {int(example): row for row, example in enumerate(predicted["example_id"])}
    examples = []
    for example in chosen:
        number, person = index.examples[example]
        window = parse_window(index.read(number), index.where(number))
        row = rows[int(example)]
        examples.append(
            report.Example(
                frame=decode_frames(window, np.asarray([KEY_POSITION]))[0],
                sentence=sentence_of(window, person, config.data.sentences) or "(no sentence)",
                true_box=window.people[person].box,
                box=predicted["box"][row],
                labels=predicted["action_labels"][row],
                action_logits=predicted["action_logits"][row],
            )
        )
    return examples


if __name__ == "__main__":
    command_line.run(main)
