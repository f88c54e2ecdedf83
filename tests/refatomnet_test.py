"""The fusion's switches; the released arithmetic as a whole is proven by `golden_check_test.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from ravar_jax.models import agent_attention
from ravar_jax.models.refatomnet import RefAtomNet, corner_boxes, pool_text
from ravar_jax.tasks.ravar import build_model

BATCH, FRAMES, QUERIES, LENGTH, WIDTH = 2, 3, 8, 6, 16


def make_model(preset: str = "corrected", **changes: object) -> RefAtomNet:
    config = base.apply_preset(base.get_config(), preset).model
    config.update(width=WIDTH, num_query_tokens=QUERIES, **changes)
    return build_model(config)


def inputs(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    class_ids = np.full((BATCH, 100), 91)
    class_ids[:, :4] = [1, 1, 62, 1]
    return {
        "image_tokens": normal(BATCH, FRAMES, QUERIES, WIDTH),
        "text_tokens": normal(BATCH, LENGTH, WIDTH),
        "attention_mask": (np.arange(LENGTH) < np.array([[4], [3]])).astype(np.int32),
        "boxes": rng.uniform(0.2, 0.6, (BATCH, 100, 4)).astype(np.float32),
        "class_ids": class_ids,
        "label_table": normal(91, WIDTH),
    }


def test_frames_are_averaged_first() -> None:
    model, batch = make_model(), inputs()
    params = model.init(jax.random.key(0), **batch)
    whole = model.apply(params, **batch)
    batch["image_tokens"] = batch["image_tokens"].mean(1)
    np.testing.assert_allclose(model.apply(params, **batch).box, whole.box, atol=1e-6)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("text_pooling", "all_positions"),
        ("box_conversion", "swapped"),
        ("detections_kept", "person_over_100"),
        ("detections_kept", "all_over_100"),
        ("cross_softmax", "singleton"),
        ("aggregation", "mean_of_blocks"),
    ],
)
def test_every_switch_changes_the_answer(key: str, value: str) -> None:
    batch = inputs()
    params = make_model().init(jax.random.key(0), **batch)
    first = make_model().apply(params, **batch).action_logits
    second = make_model(**{key: value}).apply(params, **batch).action_logits
    assert np.abs(first - second).max() > 1e-6


def test_boxes_convert_with_and_without_the_swap() -> None:
    box = jnp.array([0.5, 0.4, 0.2, 0.6])
    np.testing.assert_allclose(corner_boxes(box, "correct"), [0.4, 0.1, 0.6, 0.7], atol=1e-6)
    np.testing.assert_allclose(corner_boxes(box, "swapped"), [0.2, 0.3, 0.8, 0.5], atol=1e-6)


def test_text_pooling_counts_the_positions_it_names() -> None:
    tokens = jnp.arange(2 * 4 * 1, dtype=jnp.float32).reshape(2, 4, 1)
    mask = jnp.array([[1, 1, 1, 0], [1, 0, 0, 0]])
    np.testing.assert_allclose(pool_text(tokens, mask, "masked")[:, 0], [1.0, 4.0])
    # Up to position 3, the longest of the batch, for both.
    np.testing.assert_allclose(pool_text(tokens, mask, "all_positions")[:, 0], [1.0, 5.0])


def test_released_fusion_softmax_over_one_head_is_all_ones() -> None:
    own, first, second = jax.random.normal(jax.random.key(0), (3, 2, 1, 4, 5))
    keys = jax.nn.softmax(first + second, axis=-1)
    fused = agent_attention._fuse(own, first, second, "singleton")
    np.testing.assert_allclose(fused, own * (keys + 2) / 3, rtol=1e-6)
    agents = jax.nn.softmax(first + second, axis=2)
    fused = agent_attention._fuse(own, first, second, "agents")
    np.testing.assert_allclose(fused, own * (keys + agents + 1) / 3, rtol=1e-6)


def test_other_objects_leave_no_trace_and_no_gradient() -> None:
    model, batch = make_model(), inputs()
    params = model.init(jax.random.key(0), **batch)
    moved = dict(batch, boxes=batch["boxes"].copy())
    moved["boxes"][:, 2] += 0.3  # the chair
    moved["boxes"][:, 4:] = 0.9  # no object
    same = model.apply(params, **moved).action_logits
    np.testing.assert_array_equal(same, model.apply(params, **batch).action_logits)
    grad = jax.grad(lambda boxes: model.apply(params, **dict(batch, boxes=boxes)).box.sum())
    gradient = grad(jnp.asarray(batch["boxes"]))
    assert np.all(gradient[:, 4:] == 0)
    assert np.all(gradient[:, 2] == 0)
    assert np.any(gradient[:, 0] != 0)


def test_class_zero_counts_as_no_object() -> None:
    model, batch = make_model(detections_kept="all_over_100"), inputs()
    params = model.init(jax.random.key(0), **batch)
    zero = dict(batch, class_ids=np.where(batch["class_ids"] == 91, 0, batch["class_ids"]))
    np.testing.assert_array_equal(model.apply(params, **zero).box, model.apply(params, **batch).box)


def test_no_detection_at_all_is_finite() -> None:
    for preset in base.PRESET_NAMES:
        model, batch = make_model(preset), inputs()
        batch["class_ids"][:] = 91
        params = model.init(jax.random.key(0), **batch)
        assert np.all(np.isfinite(model.apply(params, **batch).box)), preset


def test_bfloat16_compute_keeps_float32_parameters_and_outputs() -> None:
    batch = inputs()
    model = make_model(dtype="bfloat16")
    params = model.init(jax.random.key(0), **batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    low, high = model.apply(params, **batch), make_model().apply(params, **batch)
    assert low.box.dtype == jnp.float32
    np.testing.assert_allclose(low.action_logits, high.action_logits, atol=0.05)


def test_dropout_acts_in_training_only() -> None:
    model, batch = make_model(), inputs()
    params = model.init(jax.random.key(0), **batch)
    draw = lambda seed: model.apply(  # noqa: E731
        params, **batch, train=True, rngs={"dropout": jax.random.key(seed)}
    )
    assert np.any(draw(0).action_logits != draw(1).action_logits)
    np.testing.assert_array_equal(draw(0).box, model.apply(params, **batch).box)


def test_released_parameter_count() -> None:
    config = base.get_config().model
    model = build_model(config)
    shapes = jax.eval_shape(
        lambda: model.init(
            jax.random.key(0),
            jnp.zeros((1, 32, 768)),
            jnp.zeros((1, 4, 768)),
            jnp.ones((1, 4), jnp.int32),
            jnp.zeros((1, 100, 4)),
            jnp.ones((1, 100), jnp.int32),
            jnp.zeros((91, 768)),
        )
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 27_293_236
