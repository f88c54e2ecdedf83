"""The scores of an evaluation: mAP and AUROC over action classes, mIoU of the boxes, and the class-prior floor.

Host arrays in, plain Python numbers out. Classes without a positive in the evaluated set do not count; weighted scores
(the published ones) weigh each class by its positives, macro scores weigh all alike. A value that is undefined is None.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ravar_jax.class_names import AVA_ACTIONS
from ravar_jax.errors import UserError

IOU_GATE = 0.5  # the threshold of `iou_gate="0.5"`


def box_iou(boxes_a: np.ndarray, boxes_b: np.ndarray) -> np.ndarray:
    """Returns the intersection over union of pairs of boxes.

    An inverted box (x2 < x1 or y2 < y1) scores 0, as released, and so does a pair whose union is empty.

    Args:
        boxes_a: (n, 4) x1, y1, x2, y2, in the units of `boxes_b`, not clipped.
        boxes_b: (n, 4).

    Returns:
        float64 (n,) in [0, 1].

    Source: RAVAR `metrics.py`, bb_intersection_over_union.
    """
    a, b = np.asarray(boxes_a, np.float64), np.asarray(boxes_b, np.float64)
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    intersection = np.where((sides >= 0.0).all(axis=1), sides.prod(axis=1), 0.0)
    union = (a[:, 2:] - a[:, :2]).prod(axis=1) + (b[:, 2:] - b[:, :2]).prod(axis=1) - intersection
    iou = np.divide(intersection, union, out=np.zeros_like(union), where=union > 0.0)
    # Rounding can carry the quotient of a box with itself a hair past 1.
    return np.clip(iou, 0.0, 1.0)


def score(
    scores: np.ndarray,
    labels: np.ndarray,
    boxes_pred: np.ndarray,
    boxes_true: np.ndarray,
    iou_gate: str = "none",
) -> dict[str, Any]:
    """Returns the metrics of a set of examples, as fractions.

    With `iou_gate="0.5"` an example whose box has IoU < 0.5 ranks below every other example in all classes (a score of
    minus infinity). The released `test.py` instead sets its logits to 0, a probability of 0.5, which puts it above
    most negatives; the published numbers are not gated.

    Args:
        scores: (n, 80) logits or probabilities, averaged over clips.
        labels: (n, 80) multi-hot 0 or 1.
        boxes_pred: (n, 4) x1, y1, x2, y2, unclipped.
        boxes_true: (n, 4) x1, y1, x2, y2.
        iou_gate: "none" or "0.5".

    Returns:
        mIoU, mAP_weighted, mAP_macro, AUROC_weighted, AUROC_macro, prior_mAP_weighted and prior_mAP_macro (float or
        None), num_examples, and per_class: {"1".."80": {name, positives, AP, AUROC}}. The prior is a scorer that gives
        every example the class's prevalence in this very set: its average precision is that prevalence.

    Raises:
        UserError: scores or predicted boxes hold a NaN or an infinity.
    """
    # Here, as it takes a second to import, and commands that score nothing do without.
    from sklearn.metrics import average_precision_score, roc_auc_score

    if iou_gate not in ("none", "0.5"):
        raise ValueError(f'iou_gate={iou_gate!r} is neither "none" nor "0.5"')
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels) > 0
    _check_finite("action scores", scores)
    _check_finite("predicted boxes", np.asarray(boxes_pred))
    num_examples = len(scores)
    iou = box_iou(boxes_pred, boxes_true)
    if iou_gate == "0.5" and num_examples:
        # One below the lowest score stands for minus infinity, which scikit-learn refuses: only the order counts.
        scores = np.where(iou[:, None] < IOU_GATE, scores.min() - 1.0, scores)

    positives = labels.sum(axis=0)
    precision = _per_class(average_precision_score, labels, scores, positives > 0)
    # Positive for every example: there is nothing to rank against.
    auroc = _per_class(roc_auc_score, labels, scores, (positives > 0) & (positives < num_examples))
    prior = [count / num_examples if count else None for count in positives.tolist()]
    return {
        "mIoU": float(iou.mean()) if num_examples else None,
        "mAP_weighted": _average(precision, positives),
        "mAP_macro": _average(precision, np.ones_like(positives)),
        "AUROC_weighted": _average(auroc, positives),
        "AUROC_macro": _average(auroc, np.ones_like(positives)),
        "prior_mAP_weighted": _average(prior, positives),
        "prior_mAP_macro": _average(prior, np.ones_like(positives)),
        "num_examples": num_examples,
        "per_class": {
            str(action): {
                "name": name,
                "positives": int(positives[action - 1]),
                "AP": precision[action - 1],
                "AUROC": auroc[action - 1],
            }
            for action, name in sorted(AVA_ACTIONS.items())
        },
    }


def _per_class(
    metric: Callable[..., float], labels: np.ndarray, scores: np.ndarray, defined: np.ndarray
) -> list[float | None]:
    """Returns the metric of each class where it is defined, else None."""
    return [
        float(metric(labels[:, c], scores[:, c])) if defined[c] else None
        for c in range(labels.shape[1])
    ]


def _average(values: list[float | None], weights: np.ndarray) -> float | None:
    """Returns the weighted mean over the classes that have a value, None if no class has one."""
    known = [
        (value, weight)
        for value, weight in zip(values, weights.tolist(), strict=True)
        if value is not None
    ]
    if not known:
        return None
    return sum(value * weight for value, weight in known) / sum(weight for _, weight in known)


def _check_finite(what: str, array: np.ndarray) -> None:
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        row, column = bad[0].tolist()
        raise UserError(
            f"{what}: not finite at example {row}, column {column} ({len(bad)} such values in all)"
        )
