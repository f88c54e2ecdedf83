"""Scores a run on MiniRefAVA apart for sentences that say the place and for those that single out by looks alone.

    python -m tests.benchmarks.place_or_looks --workdir runs/quickstart

Prints one JSON object: for each kind its share of the test split, macro mAP and mIoU. Two of three sentences say where
the person is among the others; the rest show whether the model finds people by what they look like.
"""

import argparse
import json

import numpy as np

from data_pipelines import input_pipeline
from data_pipelines.mini_refava.scenes import make_scene
from ravar_jax import evaluate
from ravar_jax.restore import restore_run


def says_place(name: str, seed: int) -> bool:
    """Whether the sentence of "clip_id/person_id" uses the place."""
    clip_id, person_id = name.split("/")
    *_, split, index = clip_id.split("_")
    return "place" in make_scene(seed, split, int(index)).people[int(person_id)].described_by


def main() -> None:
    """Predicts the test split and prints the scores."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", required=True)
    run = restore_run(parser.parse_args().workdir)
    batches = input_pipeline.eval_batches(run.config, run.tokenizer, "test")
    predicted = evaluate.predictions(run.task, run.params, run.frozen, batches, run.mesh)
    names = input_pipeline.describe_examples(run.config, "test", predicted["example_id"])
    placed = np.array([says_place(name, run.config.data.seed) for name in names])
    kinds = {}
    for kind, rows in (("place", placed), ("looks alone", ~placed)):
        part = {key: value[rows] for key, value in predicted.items()}
        scores = evaluate.score(part, split="test", iou_gate="none")
        kinds[kind] = {
            "share": round(float(rows.mean()), 3),
            "mAP_macro": round(scores["test/mAP_macro"], 3),
            "mIoU": round(scores["test/mIoU"], 3),
        }
    print(json.dumps(kinds))


if __name__ == "__main__":
    main()
