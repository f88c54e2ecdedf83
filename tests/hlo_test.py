"""What is read off compiled programs, against numbers worked out by hand; programs for TPU need libtpu."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ravar_jax.tpu import chips
from ravar_jax.tpu.collectives import read_collectives, replica_groups, summarize
from ravar_jax.tpu.hlo import Program

LAYERS, ROWS, WIDTH = 10, 256, 128


def layers(x, weights):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    return jax.lax.scan(layer, x, weights)[0]


@pytest.fixture(scope="module")
def v5e() -> chips.Slice:
    pytest.importorskip("libtpu", reason="libtpu is not installed (tests/requirements.txt)")
    return chips.describe_slice(*chips.parse_topology("v5e:2x4"))


def compiled(function, mesh, *arguments):
    """Compiles for a mesh; arguments are (shape, dtype, spec)."""
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in arguments
    ]
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*shapes).compile().as_text()


def mesh_of(where, *sizes):
    return jax.make_mesh(
        sizes,
        ("data", "tensor"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=where.devices,
    )


def test_a_loop_counts_as_often_as_it_runs_on_cpu():
    x, weights = jnp.ones((ROWS, WIDTH)), jnp.ones((LAYERS, WIDTH, WIDTH))
    done = jax.jit(layers).lower(x, weights).compile()
    program = Program(done.as_text())
    assert program.flops == 2 * ROWS * WIDTH * WIDTH * LAYERS
    assert program.unknown_loops == []
    assert done.cost_analysis()["flops"] < program.flops / 2  # why this module exists


def test_a_loop_counts_as_often_as_it_runs_on_tpu(v5e):
    mesh = mesh_of(v5e, 8, 1)
    text = compiled(
        layers,
        mesh,
        ((8 * ROWS, WIDTH), jnp.bfloat16, P("data")),
        ((LAYERS, WIDTH, WIDTH), jnp.bfloat16, P()),
    )
    program = Program(text)
    assert program.unknown_loops == []
    assert program.flops == 2 * ROWS * WIDTH * WIDTH * LAYERS
    # Each layer's weights come from HBM once; nothing of the size of the whole stack is read a layer.
    weights, rows = 2 * LAYERS * WIDTH * WIDTH, 2 * ROWS * WIDTH
    assert weights <= program.hbm_bytes <= 2 * weights + 2 * rows * (LAYERS + 2)
    assert read_collectives(program, mesh, v5e) == []


def test_batched_products_and_convolutions_on_tpu(v5e):
    def attend(q, k, image, kernel):
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        seen = jax.lax.conv_general_dilated(
            image, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return scores.sum(), seen

    mesh = mesh_of(v5e, 8, 1)
    heads = (16, 64, 4, 32)
    text = compiled(
        attend,
        mesh,
        (heads, jnp.bfloat16, P("data")),
        (heads, jnp.bfloat16, P("data")),
        ((64, 17, 17, 128), jnp.bfloat16, P("data")),
        ((3, 3, 128, 128), jnp.bfloat16, P()),
    )
    scores = 2 * (2 * 4 * 64 * 64) * 32
    convolution = 2 * (8 * 8 * 8 * 128) * (3 * 3 * 128)
    assert Program(text).flops == scores + convolution


def test_bytes_and_axes_of_collectives_in_and_out_of_a_loop(v5e):
    mesh = mesh_of(v5e, 4, 2)

    def reduce(x, weights):
        def layer(total, w):
            partial = jax.lax.psum(jnp.tanh(total + w), "tensor")
            return jnp.sin(partial), None

        total, _ = jax.lax.scan(layer, x, weights)
        return jax.lax.psum(total, "data"), jax.lax.all_gather(x, "data", tiled=True)

    mapped = jax.shard_map(
        reduce, mesh=mesh, in_specs=(P("data"), P()), out_specs=(P(), P()), check_vma=False
    )
    text = compiled(
        mapped,
        mesh,
        ((4 * ROWS, WIDTH), jnp.float32, P("data")),
        ((LAYERS, ROWS, WIDTH), jnp.float32, P()),
    )
    found = read_collectives(Program(text), mesh, v5e)
    rows = {(row["kind"], *row["axes"]): row for row in summarize(found)}
    once = 4 * ROWS * WIDTH
    assert rows["all-reduce", "tensor"]["count"] == LAYERS
    assert rows["all-reduce", "tensor"]["bytes"] == LAYERS * once
    assert rows["all-reduce", "data"]["bytes"] == once
    assert rows["all-gather", "data"]["bytes"] == 4 * once
    assert set(rows) == {("all-reduce", "tensor"), ("all-reduce", "data"), ("all-gather", "data")}
    for each in found:
        assert each.group == {"tensor": 2, "data": 4}[each.axes[0]]
        assert 0 < each.exposed_seconds <= each.seconds
    # By hand: neighbours on a line, one link of 45 GB/s each way, a hop of a microsecond.
    tensor = next(each for each in found if each.axes == ("tensor",))
    assert tensor.seconds == pytest.approx(2 * (once / 2 / 45e9 + 1e-6))


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, x", [[0, 2], [1, 3]]),
        (
            "replica_groups=mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_1'}, x",
            [[0, 2], [1, 3]],
        ),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
    ],
)
def test_replica_groups_in_every_spelling(text, groups):
    np.testing.assert_array_equal(np.sort(replica_groups(text, 4), axis=0), np.sort(groups, axis=0))


def test_replica_groups_that_are_not_understood_are_refused():
    with pytest.raises(ValueError, match="unknown replica groups"):
        replica_groups("replica_groups=other, x", 4)


def test_collectives_of_cpu_devices_have_their_bytes():
    mesh = Mesh(np.asarray(jax.devices()), ("data",))

    def total(x):
        return jax.lax.psum(x, "data")

    mapped = jax.shard_map(total, mesh=mesh, in_specs=P("data"), out_specs=P())
    program = Program(jax.jit(mapped).lower(jnp.ones((8, 100))).compile().as_text())
    sent = [
        run.computation.operand(run.instruction, 0).bytes * run.times
        for run in program.runs
        if run.instruction.opcode.startswith("all-reduce")
        and not run.instruction.opcode.endswith("-done")
    ]
    assert sent == [400]
