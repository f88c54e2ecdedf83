"""The metrics: hand-computed cases, undefined values, the gate and the prior. Parity is golden_check_test's."""

import json
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from ravar_jax import metrics
from ravar_jax.errors import UserError

BOX = np.array([[0.1, 0.1, 0.5, 0.5]])


def examples(num_examples=40, seed=0) -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(seed)
    labels = (rng.uniform(size=(num_examples, 80)) < 0.1).astype(np.float32)
    labels[:, 22] = 0  # id 23: no positive
    labels[:, 11] = 1  # id 12: every example
    labels[0, 0], labels[1, 0] = 1, 0
    scores = rng.normal(size=(num_examples, 80)).astype(np.float32) + labels
    true = np.sort(rng.uniform(size=(num_examples, 2, 2)), axis=1).reshape(num_examples, 4)
    return scores, labels, true + rng.normal(size=true.shape) * 0.02, true


@pytest.mark.parametrize(
    ("box", "iou"),
    [
        ([0.1, 0.1, 0.5, 0.5], 1.0),
        ([0.1, 0.1, 0.5, 0.3], 0.5),
        ([0.3, 0.3, 0.7, 0.7], 0.04 / 0.28),
        (
            [0.6, 0.6, 0.9, 0.9],
            0.0,
        ),  # apart in both axes: a product of two negative sides is no overlap
        ([0.5, 0.1, 0.1, 0.5], 0.0),  # x inverted
        ([0.5, 0.5, 0.1, 0.1], 0.0),  # both inverted
        ([-1.0, -1.0, 2.0, 2.0], 0.16 / 9.0),  # not clipped
    ],
)
def test_iou_cases(box, iou):
    np.testing.assert_allclose(metrics.box_iou(np.array([box]), BOX), [iou], atol=1e-12)


def test_iou_of_two_empty_boxes_is_zero():
    point = np.full((1, 4), 0.3)
    assert metrics.box_iou(point, point) == [0.0]


def test_weighted_and_macro_average_over_defined_classes():
    scores, labels, boxes, true = examples()
    result = metrics.score(scores, labels, boxes, true)
    ap, auc, count = [], [], []
    for c in range(80):
        positives = labels[:, c].sum()
        entry = result["per_class"][str(c + 1)]
        assert entry["positives"] == positives
        if positives == 0:
            assert entry["AP"] is None
            assert entry["AUROC"] is None
            continue
        ap.append(average_precision_score(labels[:, c], scores[:, c]))
        assert entry["AP"] == pytest.approx(ap[-1])
        if positives < len(labels):
            auc.append(roc_auc_score(labels[:, c], scores[:, c]))
            count.append(positives)
            assert entry["AUROC"] == pytest.approx(auc[-1])
        else:
            assert entry["AUROC"] is None
    positives = labels.sum(0)
    assert result["mAP_weighted"] == pytest.approx(np.average(ap, weights=positives[positives > 0]))
    assert result["mAP_macro"] == pytest.approx(np.mean(ap))
    assert result["AUROC_weighted"] == pytest.approx(np.average(auc, weights=count))
    assert result["AUROC_macro"] == pytest.approx(np.mean(auc))
    assert result["num_examples"] == 40


def test_prior_is_the_score_of_a_constant_scorer():
    scores, labels, boxes, true = examples()
    result = metrics.score(scores, labels, boxes, true)
    constant = metrics.score(np.zeros_like(scores), labels, boxes, true)
    for name in ("weighted", "macro"):
        assert result[f"prior_mAP_{name}"] == pytest.approx(constant[f"mAP_{name}"])
        assert constant[f"AUROC_{name}"] == pytest.approx(0.5)


def test_names_and_columns_belong_together():
    scores, labels, boxes, true = examples()
    per_class = metrics.score(scores, labels, boxes, true)["per_class"]
    assert list(per_class) == [str(i) for i in range(1, 81)]
    assert per_class["12"] == {"name": "stand", "positives": 40, "AP": 1.0, "AUROC": None}


def test_gated_examples_rank_below_all_others():
    scores = np.zeros((4, 80))
    labels = np.zeros((4, 80))
    labels[:2, 0] = 1
    scores[:, 0] = [3.0, -4.0, 2.0, -5.0]
    boxes = np.repeat(BOX, 4, axis=0)
    wrong = boxes.copy()
    wrong[[0, 2]] += 0.4  # one positive and one negative lose their boxes
    gated = metrics.score(scores, labels, wrong, boxes, iou_gate="0.5")
    # Order: positive -4, negative -5, then the gated positive and negative together. With the released score of 0
    # the gated pair would lead.
    assert gated["per_class"]["1"]["AP"] == pytest.approx(0.5 * 1 + 0.5 * (2 / 4))
    ungated = metrics.score(scores, labels, wrong, boxes)
    assert ungated["per_class"]["1"]["AP"] == pytest.approx(0.5 * 1 + 0.5 * (2 / 3))
    assert gated["mIoU"] == ungated["mIoU"] == pytest.approx(0.5)


def test_undefined_is_null_never_nan():
    boxes = np.repeat(BOX, 3, axis=0)
    result = metrics.score(np.zeros((3, 80)), np.zeros((3, 80)), boxes, boxes)
    assert result["mAP_macro"] is None
    assert result["AUROC_weighted"] is None
    assert result["prior_mAP_weighted"] is None
    empty = metrics.score(np.zeros((0, 80)), np.zeros((0, 80)), boxes[:0], boxes[:0], "0.5")
    assert empty["mIoU"] is None
    assert empty["num_examples"] == 0
    every = metrics.score(np.zeros((3, 80)), np.ones((3, 80)), boxes, boxes)
    assert every["AUROC_macro"] is None
    assert every["mAP_macro"] == 1.0
    for each in (result, empty, every):
        json.dumps(each, allow_nan=False)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_place(value):
    scores, labels, boxes, true = examples()
    bad = scores.copy()
    bad[7, 3] = value
    with pytest.raises(UserError, match="action scores: not finite at example 7, column 3"):
        metrics.score(bad, labels, boxes, true)
    boxes[5, 2] = value
    with pytest.raises(UserError, match="predicted boxes: not finite at example 5, column 2"):
        metrics.score(scores, labels, boxes, true)


def test_unknown_gate_is_refused():
    with pytest.raises(ValueError, match=r"iou_gate='0\.3'"):
        metrics.score(*examples(), "0.3")
