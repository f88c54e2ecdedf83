"""The mesh and the table of parameter rules; that the mesh changes no loss is in same_losses_test.py."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs.base import apply_preset, get_config
from ravar_jax import sharding
from ravar_jax.errors import UsageError, UserError
from ravar_jax.models.blip2 import Blip2
from ravar_jax.models.detr import Detr
from ravar_jax.models.grounding_decoder import GroundingDecoder
from ravar_jax.models.refatomnet import RefAtomNet
from ravar_jax.models.xlm_roberta import XlmRoberta
from ravar_jax.optimizer import make_optimizer
from ravar_jax.tasks.ravar import build_model


def mesh_of(data=1, fsdp=1, tensor=1):
    return sharding.make_mesh(types.SimpleNamespace(data=data, fsdp=fsdp, tensor=tensor))


def small_fusion() -> RefAtomNet:
    config = apply_preset(get_config(), "corrected").model
    config.width = 32
    config.action_dropout = 0.0
    return build_model(config)


def fusion_inputs(batch, width=32):
    rng = np.random.default_rng(0)
    return {
        "image_tokens": rng.normal(size=(batch, 32, width)).astype(np.float32),
        "text_tokens": rng.normal(size=(batch, 6, width)).astype(np.float32),
        "attention_mask": np.ones((batch, 6), np.int32),
        "boxes": rng.uniform(size=(batch, 100, 4)).astype(np.float32),
        "class_ids": rng.integers(1, 92, (batch, 100)).astype(np.int32),
    }


def label_table(width=32):
    return np.random.default_rng(1).normal(size=(91, width)).astype(np.float32)


def shapes_of_all_models():
    """Every kind of parameter the project has, as the tasks nest them."""
    fusion = small_fusion()
    vision = {
        "width": 16,
        "depth": 2,
        "num_heads": 2,
        "mlp_width": 32,
        "patch_size": 8,
        "stem_widths": (8,),
    }
    qformer = {
        "width": 32,
        "depth": 2,
        "num_heads": 2,
        "mlp_width": 64,
        "vocab_size": 31,
        "max_positions": 8,
    }
    backbone = Blip2(vision, qformer, 4)
    decoder = GroundingDecoder(mlp_width=64, vocab_size=31)
    detector = Detr(
        resnet={"stem_width": 8, "widths": (16, 32), "depths": (1, 2)},
        width=32,
        encoder_depth=1,
        decoder_depth=1,
        num_heads=2,
        mlp_width=64,
        num_queries=7,
        num_classes=92,
    )
    label_encoder = XlmRoberta(
        width=32, depth=1, num_heads=2, mlp_width=64, vocab_size=31, max_positions=8
    )
    key, ids = jax.random.key(0), jnp.zeros((1, 6), jnp.int32)

    def init():
        tokens, text = jnp.zeros((1, 4, 32)), jnp.zeros((1, 1, 6, 32))
        owners = jnp.ones((1, 1, 4), bool)
        return {
            **fusion.init(key, **fusion_inputs(1), label_table=label_table())["params"],
            "backbone": backbone.init(key, jnp.zeros((1, 16, 16, 3)), ids, ids)["params"],
            "decoder": decoder.init(key, tokens, text, ids[None], ids[None], owners)["params"],
            "detector": detector.init(key, jnp.zeros((1, 16, 16, 3)))["params"],
            "label_encoder": label_encoder.init(key, ids, ids)["params"],
            "label_table": jnp.zeros((91, 32)),
        }

    return jax.eval_shape(init)


def paths(tree):
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(tree)
    ]


def test_minus_one_takes_the_rest():
    assert dict(mesh_of(data=-1, fsdp=2).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert dict(mesh_of(data=2, tensor=-1).shape) == {"data": 2, "fsdp": 1, "tensor": 4}


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((3, 1, 1), UserError, "mesh.data=3, mesh.fsdp=1, mesh.tensor=1 does not fit 8 devices"),
        ((-1, 3, 1), UserError, "mesh.data=-1, mesh.fsdp=3, mesh.tensor=1 does not fit 8 devices"),
        ((4, 1, 1), UserError, "does not fit 8 devices"),
        ((-1, -1, 1), UsageError, "at most one is -1"),
        ((0, 1, 8), UsageError, "mesh.data=0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, error, message):
    with pytest.raises(error, match=message):
        mesh_of(*sizes)


def test_every_parameter_has_a_rule_and_every_rule_a_parameter():
    names = paths(shapes_of_all_models())
    for name in names:
        sharding.param_spec(name)
    used = {
        next(i for i, (rule, _) in enumerate(sharding.PARAM_RULES) if sharding.matches(rule, name))
        for name in names
    }
    unused = [rule for i, (rule, _) in enumerate(sharding.PARAM_RULES) if i not in used]
    assert not unused


def test_every_large_matrix_is_split():
    tree = shapes_of_all_models()
    replicated = {
        path
        for path, leaf in zip(paths(tree), jax.tree.leaves(tree), strict=True)
        if leaf.size >= 32 * 32 and sharding.param_spec(path) == PartitionSpec()
    }
    # Small whatever the model's width, feeding odd sizes, or of a network that is small altogether.
    assert {path for path in replicated if "/resnet/" not in path} <= {
        "action_head/layer3/kernel",
        "backbone/visual_encoder/patch_embedding/kernel",
        "decoder/action/kernel",
        "expand_boxes/kernel",
        "label_table",
    }


def test_an_unknown_parameter_is_refused_by_path():
    with pytest.raises(ValueError, match="agent_box/attention/gate"):
        sharding.infer_shardings({"agent_box": {"attention": {"gate": jnp.ones(3)}}}, mesh_of(8))


def test_an_indivisible_parameter_is_refused_by_path():
    tree = {"agent_box": {"mlp_in": {"kernel": jax.ShapeDtypeStruct((30, 64), jnp.float32)}}}
    sharding.infer_shardings(tree, mesh_of(data=8))
    with pytest.raises(UserError, match=r"agent_box/mlp_in/kernel: 30 of .* mesh.fsdp=4"):
        sharding.infer_shardings(tree, mesh_of(data=2, fsdp=4))
    flat = {"agent_box": {"mlp_in": {"kernel": jnp.ones(64)}}}
    with pytest.raises(ValueError, match="agent_box/mlp_in/kernel: shape"):
        sharding.infer_shardings(flat, mesh_of(8))


def test_moments_follow_their_parameters_and_scalars_are_replicated():
    params = shapes_of_all_models()
    mesh = mesh_of(2, 2, 2)
    for name in ("bert_adam", "adamw"):
        config = get_config().optimizer
        config.name = name
        optimizer = make_optimizer(config, 10, lambda path: path.startswith("agent_box/mlp_out"))
        state = jax.eval_shape(optimizer.init, params)
        specs = {
            p: s.spec
            for p, s in zip(
                paths(state), jax.tree.leaves(sharding.infer_shardings(state, mesh)), strict=True
            )
        }
        kernel = [
            spec for path, spec in specs.items() if path.endswith("agent_temporal/mlp_in/kernel")
        ]
        assert kernel == [PartitionSpec("fsdp", "tensor")] * 2
        counts = [spec for path, spec in specs.items() if path.endswith("count")]
        assert set(counts) == {PartitionSpec()}


def test_batches_are_split_over_data_and_fsdp_and_must_divide():
    mesh = mesh_of(2, 2, 2)
    rows = np.arange(24, dtype=np.float32).reshape(8, 3)
    x: Any = sharding.to_global({"rows": rows}, mesh)["rows"]
    np.testing.assert_array_equal(x, rows)
    assert x.sharding.spec == PartitionSpec(("data", "fsdp"))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3)}
    with pytest.raises(UserError, match=r"batch of 6 examples .* mesh.data\*mesh.fsdp=4"):
        sharding.to_global({"rows": rows[:6]}, mesh)


def test_constrain_splits_the_batch_under_a_mesh_and_is_nothing_without():
    x = jnp.ones((8, 3))
    assert sharding.constrain(x) is x
    with jax.set_mesh(mesh_of(4, 2, 1)):
        y: Any = jax.jit(sharding.constrain)(x)
        assert y.sharding.spec == PartitionSpec(("data", "fsdp"))
        odd = sharding.constrain(x[:3])
    assert odd.shape == (3, 3)
