"""Predictions for a stream of batches, and their scores."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ravar_jax import metrics, sharding
from ravar_jax.errors import UserError
from ravar_jax.gpu import compiler_options
from ravar_jax.tasks.task import Task

METRIC_NAMES = (
    "mIoU",
    "mAP_weighted",
    "mAP_macro",
    "AUROC_weighted",
    "AUROC_macro",
    "prior_mAP_weighted",
    "prior_mAP_macro",
)


def make_predict(task: Task, mesh: Mesh) -> Any:
    """Returns the jitted function (params, frozen, batch) -> what `predict` returns; call it under `jax.set_mesh`.

    Its results are replicated, so that every process can read them. jit finds its program again by the identity of
    `task.predict`.
    """
    return jax.jit(
        task.predict,
        out_shardings=NamedSharding(mesh, PartitionSpec()),
        compiler_options=compiler_options(),
    )


def predictions(
    task: Task, params: Any, frozen: Any, batches: Iterable[dict[str, np.ndarray]], mesh: Mesh
) -> dict[str, np.ndarray]:
    """Runs the task's `predict` over all batches; the whole set is in every process's memory.

    Args:
        task: The task.
        params: Its parameters, on the mesh.
        frozen: Its frozen arrays, on the mesh.
        batches: Host batches, equally many in every process.
        mesh: Of `sharding.make_mesh`.

    Returns:
        What `predict` returns, as arrays of the n real rows (mask > 0) in the order of the batches.

    Raises:
        UserError: if there is no real row.
    """
    predict = make_predict(task, mesh)
    pending, collected = None, []
    with jax.set_mesh(mesh):
        for batch in batches:
            dispatched = predict(params, frozen, sharding.to_global(batch, mesh))
            if pending is not None:  # read while the device works on the next one
                collected.append(jax.device_get(pending))
            pending = dispatched
    if pending is not None:
        collected.append(jax.device_get(pending))
    real = [batch["mask"] > 0 for batch in collected]
    if not any(rows.any() for rows in real):
        raise UserError("there is no example to evaluate")
    return {
        key: np.concatenate([batch[key][rows] for batch, rows in zip(collected, real, strict=True)])
        for key in collected[0]
    }


def score(predicted: dict[str, np.ndarray], *, split: str, iou_gate: str) -> dict[str, Any]:
    """Returns `<split>/mIoU` ... `<split>/prior_mAP_macro` (None where undefined), `num_examples` and `per_class`.

    Args:
        predicted: Of `predictions`.
        split: "train", "val" or "test".
        iou_gate: `evaluation.iou_gate`.

    Raises:
        UserError: if a prediction is not finite.
    """
    scores = metrics.score(
        predicted["action_logits"],
        predicted["action_labels"],
        predicted["box"],
        predicted["target_box"],
        iou_gate=iou_gate,
    )
    return {
        **{f"{split}/{name}": scores[name] for name in METRIC_NAMES},
        "num_examples": scores["num_examples"],
        "per_class": scores["per_class"],
    }


def evaluate(
    task: Task,
    params: Any,
    frozen: Any,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    *,
    split: str,
    split_size: int,
    step: int,
    sentences: str,
    iou_gate: str,
    perturbation: str | None = None,
) -> dict[str, Any]:
    """Returns the content of `final_metrics.json`: the scores of one split and what they were computed on.

    Args:
        task: The task.
        params: Its parameters, on the mesh.
        frozen: Its frozen arrays, on the mesh.
        batches: Host batches of the split.
        mesh: Of `sharding.make_mesh`.
        split: "train", "val" or "test".
        split_size: Examples in the split; those without a real row in the batches are the `num_left_out`.
        step: Of the checkpoint.
        sentences: "true", "swapped" or "blank", as the batches have them.
        iou_gate: `evaluation.iou_gate`.
        perturbation: "name:severity" of the batches' frames; None where they are as stored.
    """
    predicted = predictions(task, params, frozen, batches, mesh)
    scores = score(predicted, split=split, iou_gate=iou_gate)
    per_class = scores.pop("per_class")
    return {
        **scores,
        "num_left_out": split_size - len(np.unique(predicted["example_id"])),
        "step": step,
        "sentences": sentences,
        "perturbation": perturbation,
        "per_class": per_class,
    }


def table(scores: dict[str, Any], *, split: str, beside: dict[str, Any] | None = None) -> str:
    """Returns the scores as text: ours beside the class prior, and beside those with true sentences.

    Args:
        scores: Of `evaluate`.
        split: Its split.
        beside: `<split>/` keys of the same examples with their true sentences, for swapped ones.
    """
    ours = scores["sentences"]
    lines = [f"{'':16}{ours:>10}" + (f"{'true':>10}" if beside else "") + f"{'prior':>10}"]
    for name in METRIC_NAMES[:5]:
        prior = scores.get(f"{split}/prior_{name}")
        cells = [scores[f"{split}/{name}"]] + ([beside[f"{split}/{name}"]] if beside else [])
        cells_text = "".join(f"{'-' if cell is None else f'{cell:.4f}':>10}" for cell in cells)
        lines.append(f"{name:16}{cells_text}{'' if prior is None else f'{prior:.4f}':>10}".rstrip())
    lines.append(
        f"{scores['num_examples']} examples of {split}, step {scores['step']}, {ours} sentences"
        + (f", {scores['perturbation']}" if scores["perturbation"] else "")
        + (f"; {scores['num_left_out']} left out" if scores["num_left_out"] else "")
    )
    return "\n".join(lines)
