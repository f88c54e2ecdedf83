"""The loss: against scikit-learn and plain numpy, in its reductions, and blind to masked rows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import log_loss

from ravar_jax.losses import ravar_loss

WEIGHTS: dict[str, Any] = {"box_weight": 1.0, "action_weight": 5.0, "box_reduction": "mean"}


def rows(num_rows=6) -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(num_rows, 80)).astype(np.float32) * 4
    box = rng.normal(size=(num_rows, 4)).astype(np.float32)
    labels = (rng.uniform(size=(num_rows, 80)) < 0.1).astype(np.float32)
    target = np.sort(rng.uniform(size=(num_rows, 4)), axis=1).astype(np.float32)
    return logits, box, labels, target


def ones(num_rows) -> Any:
    return np.ones(num_rows, np.float32)


def test_terms_equal_independent_ones():
    logits, box, labels, target = rows()
    loss, terms = ravar_loss(logits, box, labels, target, ones(6), **WEIGHTS)
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    action = log_loss(labels.ravel(), probabilities.ravel())
    squares = ((box - target) ** 2).mean()
    np.testing.assert_allclose(terms["action_loss"], action, rtol=1e-6)
    np.testing.assert_allclose(terms["box_loss"], squares, rtol=1e-6)
    np.testing.assert_allclose(loss, squares + 5 * action, rtol=1e-6)


def test_sum_reduction_adds_the_four_coordinates():
    logits, box, labels, target = rows()
    mask = ones(6)
    weights: dict[str, Any] = {"box_weight": 2.0, "action_weight": 0.0}
    mean, _ = ravar_loss(logits, box, labels, target, mask, box_reduction="mean", **weights)
    total, _ = ravar_loss(logits, box, labels, target, mask, box_reduction="sum", **weights)
    np.testing.assert_allclose(total, 4 * mean, rtol=1e-6)
    with pytest.raises(ValueError, match="box_reduction='max'"):
        ravar_loss(logits, box, labels, target, mask, box_reduction="max", **weights)


def test_masked_rows_change_nothing_even_with_nan():
    logits, box, labels, target = rows()
    mask: Any = np.array([1, 0, 1, 1, 0, 1], np.float32)

    def loss_of(logits, box, keep):
        return ravar_loss(logits, box, labels[keep], target[keep], mask[keep], **WEIGHTS)[0]

    keep = mask > 0
    expected = loss_of(logits[keep], box[keep], keep)
    logits[~keep], box[~keep] = np.nan, np.inf
    everything = np.ones(6, bool)
    value, gradients = jax.value_and_grad(loss_of, argnums=(0, 1))(
        jnp.asarray(logits), jnp.asarray(box), everything
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert (np.asarray(gradient)[~keep] == 0).all()
        assert (np.asarray(gradient)[keep] != 0).all()


def test_no_real_row_gives_zero():
    loss, _ = ravar_loss(*rows(), 0 * ones(6), **WEIGHTS)
    assert loss == 0


def test_large_logits_stay_finite_and_bfloat16_is_computed_in_float32():
    logits, box, labels, target = rows()
    logits[0, :2], labels[0, :2] = (300.0, -300.0), (0.0, 1.0)
    loss, _ = ravar_loss(jnp.asarray(logits, jnp.bfloat16), box, labels, target, ones(6), **WEIGHTS)
    assert loss.dtype == jnp.float32
    assert np.isfinite(loss)
    rounded: Any = np.asarray(jnp.asarray(logits, jnp.bfloat16).astype(jnp.float32))
    expected, _ = ravar_loss(rounded, box, labels, target, ones(6), **WEIGHTS)
    assert loss == expected


def test_rows_may_have_more_axes():
    logits, box, labels, target = rows()
    mask: Any = np.array([1, 0, 1, 1, 0, 1], np.float32)
    flat, _ = ravar_loss(logits, box, labels, target, mask, **WEIGHTS)
    logits, box, labels, target = (x.reshape(3, 2, -1) for x in (logits, box, labels, target))
    nested, _ = ravar_loss(logits, box, labels, target, mask.reshape(3, 2), **WEIGHTS)
    np.testing.assert_allclose(flat, nested, rtol=1e-6)
