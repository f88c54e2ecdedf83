"""One optimizer step as one compiled program over the mesh, its state donated."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ravar_jax import sharding
from ravar_jax.gpu import compiler_options
from ravar_jax.tasks.task import Task


@flax.struct.dataclass
class TrainState:
    """Everything a checkpoint holds.

    Attributes:
        step: Steps done, int32 scalar.
        params: Trainable parameters, nested dict of float32 arrays.
        opt_state: State of the optimizer.
    """

    step: jax.Array
    params: Any
    opt_state: Any


def make_init(task: Task, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> Any:
    """Returns the function `() -> TrainState` at step 0, compiled, sharded over the mesh."""
    init = _init_of(task, optimizer, seed)
    shapes = jax.eval_shape(init, task.loaded)
    jitted = jax.jit(init, out_shardings=sharding.infer_shardings(shapes, mesh))
    # An argument: gigabytes of weights must not become constants of the compiled program.
    return functools.partial(jitted, task.loaded)


def abstract_state(task: Task, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns the state as `ShapeDtypeStruct`s that carry this mesh's shardings: what a checkpoint is restored into."""
    return sharding.abstract(jax.eval_shape(_init_of(task, optimizer, seed=0), task.loaded), mesh)


def _init_of(task: Task, optimizer: optax.GradientTransformation, seed: int) -> Any:
    def init(loaded: Any) -> TrainState:
        # Copies: the state is donated, and what was loaded may start another run.
        params = {**task.init_params(jax.random.key(seed)), **jax.tree.map(jnp.array, loaded)}
        return TrainState(
            step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params)
        )

    return init


def make_train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    micro_batches: int = 1,
) -> Any:
    """Returns the jitted function (state, frozen, batch) -> (state, metrics); call it under `jax.set_mesh(mesh)`.

    The state is donated. Dropout is drawn from `fold_in(key(seed), state.step)`, so nothing about it is stored.
    `metrics` are scalars: `loss`, what the task's loss reports (`action_loss`, `box_loss`), `grad_norm` before
    clipping, and `finite`. Where loss or gradient norm is not finite, the state comes back as it was, with its step.

    Args:
        task: What is trained.
        optimizer: Of `optimizer.make_optimizer`; clips.
        mesh: Of `sharding.make_mesh`.
        seed: The config's.
        micro_batches: Parts that the batch is computed in, one after the other. Loss and gradients are those of the
            whole batch: sums over the parts in float32, each weighted by its real rows, which is exact where the
            task's loss is a mean over the real rows. Only dropout differs, which every part draws for itself.
    """
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(task, optimizer, mesh))
    compute = jax.value_and_grad(task.loss, has_aux=True)

    def of_batch(params: Any, frozen: Any, batch: dict, rng: jax.Array) -> tuple[Any, Any]:
        """Returns ((loss, metrics), gradients)."""
        if micro_batches == 1:
            return compute(params, frozen, batch, rng, True)

        def add_part(total: Any, part: Any) -> tuple[Any, Any]:
            number, rows = part
            values, gradients = compute(params, frozen, rows, jax.random.fold_in(rng, number), True)
            weight = jnp.sum(rows["mask"] > 0, dtype=jnp.float32)
            total = jax.tree.map(lambda t, g: t + weight * g, total, gradients)
            return jax.lax.with_sharding_constraint(total, where.params), (weight, values)

        # Every n-th row goes into one part, so that no row changes its device.
        parts = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(-1, micro_batches, *x.shape[1:]), 0, 1), batch
        )
        split = NamedSharding(mesh, PartitionSpec(None, sharding.BATCH_AXES))
        parts = jax.lax.with_sharding_constraint(parts, split)
        zeros = jax.tree.map(jnp.zeros_like, params)
        numbers = jnp.arange(micro_batches)
        total, (weights, values) = jax.lax.scan(add_part, zeros, (numbers, parts))
        rows = jnp.maximum(jnp.sum(weights), 1.0)
        values = jax.tree.map(lambda value: jnp.sum(weights * value) / rows, values)
        return values, jax.tree.map(lambda t: t / rows, total)

    def train_step(
        state: TrainState, frozen: Any, batch: dict
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, metrics), gradients = of_batch(state.params, frozen, batch, rng)
        grad_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        after = TrainState(step=state.step + 1, params=params, opt_state=opt_state)
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
        return after, {**metrics, "loss": loss, "grad_norm": grad_norm, "finite": finite}

    # The frozen arrays and the batch keep the shardings they come with.
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(where, None, None),
        out_shardings=(where, None),
        compiler_options=compiler_options(),
    )
