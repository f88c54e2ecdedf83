"""Evaluation: every real row once and in order, what the result holds, the table."""

import json

import jax
import numpy as np
import pytest

from ravar_jax import evaluate, sharding
from ravar_jax.errors import UserError
from tests import tiny_run


@pytest.fixture(scope="module")
def parts():
    """Task, parameters and mesh of the tiny run."""
    task = tiny_run.make_task()
    return (
        task,
        task.init_params(jax.random.key(0)),
        sharding.make_mesh(tiny_run.make_config().mesh),
    )


def _evaluate(parts, batches, **changes):
    task, params, mesh = parts
    values = {
        "split": "test",
        "split_size": 40,
        "step": 7,
        "sentences": "true",
        "iou_gate": "none",
        **changes,
    }
    return evaluate.evaluate(task, params, task.frozen, batches, mesh, **values)


def test_predictions_are_the_real_rows_in_order(parts):
    task, params, mesh = parts
    predicted = evaluate.predictions(task, params, task.frozen, tiny_run.eval_batches(), mesh)
    first, last = tiny_run.eval_batches()
    assert predicted["example_id"].tolist() == [*first["example_id"], *last["example_id"][:5]]
    features = (
        np.concatenate([first["features"], last["features"][:5]])
        * task.frozen["vision_norm"]["scale"]
    )
    hidden = np.maximum(features @ params["box_head"]["layer1"]["kernel"], 0)
    expected = hidden @ params["box_head"]["layer3"]["kernel"]
    np.testing.assert_allclose(predicted["box"], expected, atol=1e-4)
    assert all(len(values) == 21 for values in predicted.values())


def test_result_has_the_documented_keys(parts):
    result = _evaluate(parts, tiny_run.eval_batches())
    names = [f"test/{name}" for name in evaluate.METRIC_NAMES]
    described = ["num_examples", "num_left_out", "step", "sentences", "perturbation", "per_class"]
    assert list(result) == names + described
    assert (result["num_examples"], result["num_left_out"], result["step"]) == (21, 19, 7)
    assert len(result["per_class"]) == 80
    assert result["per_class"]["80"]["AP"] is None  # no positive: undefined
    json.dumps(result, allow_nan=False)


def test_padding_does_not_change_the_scores(parts):
    unpadded = tiny_run.make_batch(1001)
    padding = {key: np.full_like(values, 9) for key, values in unpadded.items()}
    padding["mask"] = np.zeros_like(unpadded["mask"])
    assert _evaluate(parts, [unpadded]) == _evaluate(parts, [unpadded, padding])


def test_nothing_to_evaluate_and_not_finite(parts):
    batch = tiny_run.make_batch(1)
    with pytest.raises(UserError, match="no example to evaluate"):
        _evaluate(parts, [{**batch, "mask": np.zeros_like(batch["mask"])}])
    with pytest.raises(UserError, match="not finite"):
        _evaluate(parts, [{**batch, "features": np.full_like(batch["features"], np.nan)}])


def test_table_shows_prior_and_true_beside_swapped(parts):
    result = _evaluate(parts, tiny_run.eval_batches(), sentences="swapped")
    beside = {key: value for key, value in result.items() if key.startswith("test/")}
    beside["test/mAP_macro"] = 0.125
    lines = evaluate.table(result, split="test", beside=beside).splitlines()
    assert lines[0].split() == ["swapped", "true", "prior"]
    row = next(line.split() for line in lines if line.startswith("mAP_macro"))
    assert row[1:] == [
        f"{result['test/mAP_macro']:.4f}",
        "0.1250",
        f"{result['test/prior_mAP_macro']:.4f}",
    ]
    assert "21 examples of test" in lines[-1]
    assert "19 left out" in lines[-1]
