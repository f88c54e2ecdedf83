"""`model.remat` and `model.scan` change the program of a task's image encoder (its numbers: `tasks_test.py`)."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from configs import base
from configs.base import CHOICES
from data_pipelines.frozen_encoder import encoder_functions
from ravar_jax.backbone import BackboneConfig
from ravar_jax.batch_shapes import batch_shapes
from ravar_jax.benchmark import count_flops
from ravar_jax.models.refatomnet import NUM_LABELS
from ravar_jax.models.vision_transformer import VisionTransformer
from ravar_jax.tasks import ravar

WIDTH, DEPTH = 16, 3
LAYERS = {"width": WIDTH, "num_heads": 2, "mlp_width": 32}
SIZES = BackboneConfig(
    image_size=16,
    text_length=6,
    num_query_tokens=4,
    vision={**LAYERS, "depth": DEPTH, "patch_size": 4},
    qformer={**LAYERS, "depth": 1, "vocab_size": 20, "max_positions": 8},
)
REMAT = CHOICES["model.remat"]


def make_config(**model: Any) -> ConfigDict:
    config = base.get_config()
    config.data.update(image_size=16, text_length=6, num_frames=2)
    config.train.batch_size = 2
    config.model.update(width=WIDTH, num_query_tokens=4, **model)
    return config


def loss_and_params(**model: Any) -> tuple[Any, Any]:
    """Returns a task's loss of its parameters, and their shapes; `model` are keys of the config's section."""
    config = make_config(**model)
    table = jax.ShapeDtypeStruct((NUM_LABELS, WIDTH), jnp.float32)
    task = ravar.build_task(config, SIZES, SIZES.param_shapes(), None, table)
    params = jax.eval_shape(task.init_params, jax.random.key(0)) | task.loaded
    batch = batch_shapes(config, training=True, features=False)
    given = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (task.frozen, batch))
    return lambda params: task.loss(params, *given, jax.random.key(1), True)[0], params


def kept_bytes(loss: Any, params: Any) -> int:
    """Returns the bytes that the backward pass finds of the forward pass."""
    found = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(found))


def test_less_is_kept_for_the_backward_pass() -> None:
    # In bfloat16, whose dense layers have a gradient of their own, which a policy must see through.
    bfloat16 = {"train_backbone": True, "dtype": "bfloat16"}
    kept = [kept_bytes(*loss_and_params(**bfloat16, remat=remat)) for remat in REMAT]
    assert kept == sorted(set(kept), reverse=True)


def test_a_frozen_encoder_is_not_computed_again() -> None:
    costs = []
    for remat in ("none", "full"):
        loss, params = loss_and_params(train_qformer=True, remat=remat)
        flops = count_flops(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
        costs.append((flops, kept_bytes(loss, params)))
    assert costs[0] == costs[1]


@pytest.mark.parametrize(("scan", "unroll"), [(True, 1), (False, DEPTH)])
def test_scan_is_one_loop(scan: bool, unroll: int) -> None:
    loss, params = loss_and_params(scan=scan)
    frames, clips = jnp.zeros((1, 2, 16, 16, 3), jnp.uint8), jnp.zeros((1, 2), int)
    cached = encoder_functions(make_config(scan=scan), SIZES, None).time_means
    of_cache = cached.trace(SIZES.param_shapes(), frames, clips).jaxpr
    for jaxpr in (jax.make_jaxpr(loss)(params), of_cache):
        assert f"unroll={unroll}\n" in str(jaxpr)


def gradient_of_encoder(**program: Any) -> jax.stages.Lowered:
    """Returns the gradient's program of an encoder whose activations are more than its weights."""
    encoder = VisionTransformer(**LAYERS, depth=4, patch_size=2, **program)
    pixels = jnp.zeros((4, 16, 16, 3))
    params = jax.eval_shape(encoder.init, jax.random.key(0), pixels)
    return jax.jit(jax.grad(lambda params: jnp.sum(encoder.apply(params, pixels)))).lower(params)


def test_the_compiled_gradient_takes_less_memory() -> None:
    taken = [
        gradient_of_encoder(remat=remat).compile().memory_analysis().temp_size_in_bytes
        for remat in REMAT
    ]
    assert taken == sorted(set(taken), reverse=True)


def test_unrolled_the_compiler_is_told_to_compute_again() -> None:
    # The compiler for CPU ignores it.
    unrolled, loop = (gradient_of_encoder(remat="full", scan=scan) for scan in (False, True))
    assert "optimization_barrier" in unrolled.as_text()
    assert "optimization_barrier" not in loop.as_text()
