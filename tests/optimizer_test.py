"""BertAdam, AdamW, schedules, masks. Parity with the released trajectories is golden_check_test's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.base import apply_preset, get_config
from ravar_jax.errors import UsageError
from ravar_jax.optimizer import (
    clip_by_global_norm,
    clip_each_by_norm,
    decays,
    make_optimizer,
    schedule_factor,
)


def optimizer_config(**overrides):
    config = apply_preset(get_config(), "official").optimizer
    config.update(overrides)
    return config


def nothing(path):
    return False


def train(optimizer, params, gradients):
    """Returns the parameters after each update."""
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    trajectory = []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory, state


def small_params():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "agent_box": {"attention": {"output": {"kernel": normal(3, 3), "bias": normal(3)}}},
        "agent_temporal": {
            "norm1": {"scale": normal(3), "bias": normal(3)},
            "mlp_in": {"kernel": normal(3, 4), "bias": normal(4)},
        },
    }


def gradients_of(params, steps, size=1.0):
    keys = jax.random.split(jax.random.key(1), steps)
    return [jax.tree.map(lambda p, k=k: size * jax.random.normal(k, p.shape), params) for k in keys]


def test_jump_factors_are_the_released_ones():
    factors = [float(schedule_factor(k / 10, 0.3, "jump")) for k in range(10)]
    released = [0, 0.3333, 0.6667, 0.7939, 0.6545, 0.5, 0.3455, 0.2061, 0.0955, 0.0245]
    np.testing.assert_allclose(factors, released, atol=5e-5)


def test_continuous_schedule_has_no_jump_and_ends_at_zero():
    x = np.linspace(0, 1, 1001)
    factors = np.array([schedule_factor(each, 0.3, "continuous") for each in x])
    assert np.abs(np.diff(factors)).max() < 0.005
    np.testing.assert_allclose(factors[[0, 150, 300, 650, 1000]], [0, 0.5, 1, 0.5, 0], atol=1e-5)
    assert schedule_factor(0.0, 0.0, "continuous") == 1.0  # no warm-up: starts at the top


def test_bert_adam_equals_a_plain_loop():
    params = small_params()
    gradients = gradients_of(params, 12, size=3.0)  # clipped: the norm is far above 1
    config = optimizer_config(learning_rate=0.02)
    trajectory, _ = train(make_optimizer(config, 12, nothing), params, gradients)

    flat = {
        jax.tree_util.keystr(k): np.asarray(v, np.float64)
        for k, v in jax.tree.leaves_with_path(params)
    }
    m = {k: np.zeros_like(v) for k, v in flat.items()}
    v = {k: np.zeros_like(x) for k, x in flat.items()}
    for step, gradient in enumerate(gradients):
        g = {
            jax.tree_util.keystr(k): np.asarray(x, np.float64)
            for k, x in jax.tree.leaves_with_path(gradient)
        }
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        for key in flat:
            clipped = g[key] * min(1, 1 / (norm + 1e-6))
            m[key] = 0.9 * m[key] + 0.1 * clipped
            v[key] = 0.98 * v[key] + 0.02 * clipped**2
            u = m[key] / (np.sqrt(v[key]) + 1e-6)
            if "bias" not in key:
                u += 0.2 * flat[key]
            x = step / 12
            eta = 0.02 * (x / 0.3 if x < 0.3 else 0.5 * (1 + np.cos(np.pi * x)))
            flat[key] = flat[key] - eta * u
    ours = {jax.tree_util.keystr(k): x for k, x in jax.tree.leaves_with_path(trajectory[-1])}
    for key, expected in flat.items():
        np.testing.assert_allclose(ours[key], expected, atol=1e-5, err_msg=key)


def test_clips_are_global_and_by_leaf():
    gradients = {"large": jnp.array([3.0, 4.0]), "small": jnp.array([0.5])}
    by_leaf, _ = clip_each_by_norm(1.0).update(gradients, optax.EmptyState())
    np.testing.assert_allclose(by_leaf["large"], [3 / 5, 4 / 5], rtol=1e-5)
    np.testing.assert_array_equal(by_leaf["small"], [0.5])
    together, _ = clip_by_global_norm(1.0).update(gradients, optax.EmptyState())
    np.testing.assert_allclose(together["small"], [0.5 / np.sqrt(25.25)], rtol=1e-5)
    loose, _ = clip_by_global_norm(6.0).update(gradients, optax.EmptyState())
    jax.tree.map(np.testing.assert_array_equal, loose, gradients)


def test_first_update_moves_nothing():
    params = small_params()
    trajectory, _ = train(
        make_optimizer(optimizer_config(), 10, nothing), params, gradients_of(params, 2)
    )
    jax.tree.map(np.testing.assert_array_equal, trajectory[0], params)
    assert not np.array_equal(
        trajectory[1]["agent_temporal"]["mlp_in"]["kernel"],
        params["agent_temporal"]["mlp_in"]["kernel"],
    )


@pytest.mark.parametrize("name", ["bert_adam", "adamw"])
def test_leaves_without_gradient_have_no_moments_and_never_move(name):
    params = small_params()
    config = optimizer_config(name=name, warmup=0.0)
    optimizer = make_optimizer(config, 5, lambda path: path.startswith("agent_box/"))
    # A huge gradient there must not even reach the clip of the others.
    gradients = gradients_of(params, 4)
    for gradient in gradients:
        gradient["agent_box"] = jax.tree.map(lambda g: 1e6 * g, gradient["agent_box"])
    trajectory, state = train(optimizer, params, gradients)
    jax.tree.map(np.testing.assert_array_equal, trajectory[-1]["agent_box"], params["agent_box"])
    assert not [
        k for k, _ in jax.tree.leaves_with_path(state) if "agent_box" in jax.tree_util.keystr(k)
    ]

    alone = {"agent_temporal": params["agent_temporal"]}
    expected, _ = train(
        make_optimizer(config, 5, nothing),
        alone,
        [{"agent_temporal": g["agent_temporal"]} for g in gradients],
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        trajectory[-1]["agent_temporal"],
        expected[-1]["agent_temporal"],
    )


@pytest.mark.parametrize(
    ("path", "released", "corrected"),
    [
        ("agent_box/attention/query_kernel", True, True),
        ("agent_box/mlp_in/kernel", True, True),
        ("agent_box/mlp_in/bias", False, False),
        ("agent_box/norm1/scale", True, False),
        ("agent_box/norm1/bias", False, False),
        ("visual_encoder/blocks/norm2/scale", True, False),
        ("visual_encoder/blocks/attention/q_bias", False, False),
        ("visual_encoder/position_embedding", True, True),
        ("backbone/query_former/layer0/attention/norm/scale", False, False),
        ("query_former/word_embedding/embedding", True, True),
        ("query_tokens", True, True),
    ],
)
def test_decay_mask(path, released, corrected):
    assert decays(path, decay_norms=True) is released
    assert decays(path, decay_norms=False) is corrected


@pytest.mark.parametrize("name", ["bert_adam", "adamw"])
@pytest.mark.parametrize("decay_norms", [True, False])
def test_decay_follows_the_mask(name, decay_norms):
    params = small_params()
    config = optimizer_config(name=name, warmup=0.0, decay_norms=decay_norms, learning_rate=0.1)
    zeros = [jax.tree.map(jnp.zeros_like, params)]
    trajectory, _ = train(make_optimizer(config, 5, nothing), params, zeros)
    block, start = trajectory[0]["agent_temporal"], params["agent_temporal"]
    np.testing.assert_allclose(
        block["mlp_in"]["kernel"], start["mlp_in"]["kernel"] * 0.98, rtol=1e-5
    )
    np.testing.assert_array_equal(block["mlp_in"]["bias"], start["mlp_in"]["bias"])
    np.testing.assert_allclose(
        block["norm1"]["scale"], start["norm1"]["scale"] * (0.98 if decay_norms else 1.0), rtol=1e-5
    )


def test_adamw_equals_optax():
    params = small_params()
    config = optimizer_config(name="adamw", schedule="continuous", learning_rate=0.01)
    gradients = gradients_of(params, 10, size=0.01)  # below the clip
    trajectory, _ = train(make_optimizer(config, 10, nothing), params, gradients)
    mask = jax.tree_util.tree_map_with_path(
        lambda k, _: "bias" not in jax.tree_util.keystr(k), params
    )
    reference = optax.adamw(
        lambda count: 0.01 * schedule_factor(count / 10, 0.3, "continuous"),
        weight_decay=0.2,
        mask=mask,
    )
    expected, _ = train(reference, params, gradients)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), trajectory[-1], expected[-1]
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"name": "sgd"}, "optimizer.name='sgd'"),
        ({"schedule": "flat"}, "optimizer.schedule='flat'"),
        ({"warmup": 1.0}, r"optimizer.warmup=1.0 is not in \[0, 1\)"),
        ({"learning_rate": 0.0}, "optimizer.learning_rate=0.0"),
        ({"clip_norm": -1.0}, "optimizer.clip_norm=-1.0"),
        ({"weight_decay": float("nan")}, "optimizer.weight_decay=nan"),
    ],
)
def test_bad_values_name_their_key(overrides, message):
    with pytest.raises(UsageError, match=message):
        make_optimizer(optimizer_config(**overrides), 10, nothing)
    with pytest.raises(UsageError, match=r"train\.steps=0"):
        make_optimizer(optimizer_config(), 0, nothing)
