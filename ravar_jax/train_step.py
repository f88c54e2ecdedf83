"""One optimizer step as one compiled program over the mesh, its state donated."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ravar_jax import sharding
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
    task: Task, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int
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
    """

    def train_step(
        state: TrainState, frozen: Any, batch: dict
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        compute = jax.value_and_grad(task.loss, has_aux=True)
        (loss, metrics), gradients = compute(state.params, frozen, batch, rng, True)
        grad_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        after = TrainState(step=state.step + 1, params=params, opt_state=opt_state)
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
        return after, {**metrics, "loss": loss, "grad_norm": grad_norm, "finite": finite}

    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(task, optimizer, mesh))
    # The frozen arrays and the batch keep the shardings they come with.
    return jax.jit(
        train_step, donate_argnums=0, in_shardings=(where, None, None), out_shardings=(where, None)
    )
