"""The released optimizer (BertAdam) and AdamW, as optax transforms, with their schedules and decay masks.

Gradients are clipped to a global norm, turned into an update (BertAdam: moments without bias correction), weight decay
is added to the leaves that decay, and the sum is scaled by the scheduled learning rate. Leaves that the task declares
without gradient are left out of all of it: they have no moments, do not decay and never move.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from ravar_jax.errors import UsageError

# Released constants: BertAdam's two decay rates, and what keeps both its divisions finite.
_MEAN_DECAY = 0.9
_SQUARE_DECAY = 0.98
_EPSILON = 1e-6
_ADAMW_SQUARE_DECAY = 0.999
_ADAMW_EPSILON = 1e-8


class OptimizerConfig(Protocol):
    """The `optimizer` section of a config."""

    name: str
    learning_rate: float
    warmup: float
    schedule: str
    weight_decay: float
    decay_norms: bool
    clip_norm: float


class MomentsState(NamedTuple):
    """Running means of the gradient and of its square, shaped like the parameters."""

    mean: optax.Updates
    square: optax.Updates


def schedule_factor(fraction: jax.Array | float, warmup: float, schedule: str) -> jax.Array:
    """Returns the learning rate's factor in [0, 1] at a fraction of the training.

    Linear from 0 to 1 over the first `warmup` of the training, then a cosine: "jump" is the released
    0.5 * (1 + cos(pi x)), which falls at once from 1.0 to 0.794 after a warm-up of 0.3; "continuous" starts its half
    period where the warm-up ends, so it leaves from 1.0. Both reach 0 at the end.

    Args:
        fraction: number of updates made / number of updates in all, in [0, 1).
        warmup: share of the training, in [0, 1).
        schedule: "jump" or "continuous".

    Raises:
        UsageError: `schedule` is neither.

    Source: RAVAR `modules/optimization.py`, warmup_cosine.
    """
    x = jnp.asarray(fraction, jnp.float32)
    if schedule == "jump":
        phase = x
    elif schedule == "continuous":
        phase = (x - warmup) / (1.0 - warmup)
    else:
        raise UsageError(f'optimizer.schedule={schedule!r} is neither "jump" nor "continuous"')
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * phase))
    return jnp.where(x < warmup, x / max(warmup, 1e-12), cosine)


def decays(path: str, decay_norms: bool) -> bool:
    """Returns whether weight decay applies to a parameter.

    Biases never decay. The scale of a LayerNorm decays only with `decay_norms`, as in the released program: its filter
    looks for "LayerNorm" in a name, which misses the norms of the agent blocks and of the ViT. It does find those of
    the Q-Former, which therefore never decay.

    Args:
        path: '/'-joined path of the parameter.
        decay_norms: `optimizer.decay_norms`.
    """
    *parents, leaf = path.split("/")
    if "bias" in path:
        return False
    if leaf == "scale":
        return decay_norms and "query_former" not in parents
    return True


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales all gradients by min(1, max_norm / (norm + 1e-6)), norm over all leaves together.

    `optax.clip_by_global_norm` leaves out the 1e-6, which the released program has (torch's `clip_grad_norm_`).
    """

    def update(updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None):
        del params
        factor = _clip_factor(_norm(updates), max_norm)
        return jax.tree.map(lambda g: g * factor, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def clip_each_by_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales every leaf by min(1, max_norm / (norm + 1e-6)), norm of that leaf alone.

    Almost inert behind the global clip, whose 1e-6 already keeps each norm below `max_norm`; BertAdam does it.
    """

    def update(updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None):
        del params

        def clip(g: jax.Array) -> jax.Array:
            return g * _clip_factor(_norm(g), max_norm)

        return jax.tree.map(clip, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_bert_moments() -> optax.GradientTransformation:
    """Turns gradients into m / (sqrt(v) + 1e-6), with decay rates 0.9 and 0.98 and no bias correction.

    Source: RAVAR `modules/optimization.py`, BertAdam.step.
    """

    def init(params: optax.Params) -> MomentsState:
        return MomentsState(
            jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)
        )

    def update(updates: optax.Updates, state: MomentsState, params: optax.Params | None = None):
        del params
        mean = jax.tree.map(
            lambda m, g: _MEAN_DECAY * m + (1.0 - _MEAN_DECAY) * g, state.mean, updates
        )
        square = jax.tree.map(
            lambda v, g: _SQUARE_DECAY * v + (1.0 - _SQUARE_DECAY) * g * g, state.square, updates
        )
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + _EPSILON), mean, square)
        return updates, MomentsState(mean, square)

    return optax.GradientTransformation(init, update)


def make_optimizer(
    optimizer: OptimizerConfig, total_steps: int, no_gradient: Callable[[str], bool]
) -> optax.GradientTransformation:
    """Returns the optimizer of a config, clipping included.

    The first update of a run with warm-up has learning rate 0, as released.

    Args:
        optimizer: the config's `optimizer` section.
        total_steps: updates of the whole training, at least 1.
        no_gradient: True for the '/'-joined path of a leaf that is to stay as it is.

    Raises:
        UsageError: a value is out of range; the message names its key.
    """
    if total_steps < 1:
        raise UsageError(f"train.steps={total_steps} is not at least 1")
    if not 0.0 <= optimizer.warmup < 1.0:
        raise UsageError(f"optimizer.warmup={optimizer.warmup} is not in [0, 1)")
    for key in ("learning_rate", "clip_norm"):
        value = getattr(optimizer, key)
        if not value > 0.0:
            raise UsageError(f"optimizer.{key}={value} is not above 0")
    if not optimizer.weight_decay >= 0.0:
        raise UsageError(f"optimizer.weight_decay={optimizer.weight_decay} is below 0")
    schedule_factor(
        0.0, optimizer.warmup, optimizer.schedule
    )  # an unknown schedule stops here, not in a traced step

    # Plain values, so that a later change of the config does not reach into the compiled step.
    learning_rate, warmup, schedule = optimizer.learning_rate, optimizer.warmup, optimizer.schedule
    decay_norms = optimizer.decay_norms

    def scheduled_rate(count: jax.Array) -> jax.Array:
        return learning_rate * schedule_factor(count / total_steps, warmup, schedule)

    def decay_mask(params: optax.Params) -> optax.Params:
        return _map_with_path(lambda path: decays(path, decay_norms), params)

    def groups(params: optax.Params) -> optax.Params:
        return _map_with_path(lambda path: "still" if no_gradient(path) else "moving", params)

    if optimizer.name == "bert_adam":
        direction = optax.chain(clip_each_by_norm(optimizer.clip_norm), scale_by_bert_moments())
    elif optimizer.name == "adamw":
        direction = optax.scale_by_adam(_MEAN_DECAY, _ADAMW_SQUARE_DECAY, _ADAMW_EPSILON)
    else:
        raise UsageError(f'optimizer.name={optimizer.name!r} is neither "bert_adam" nor "adamw"')
    moving = optax.chain(
        clip_by_global_norm(optimizer.clip_norm),
        direction,
        optax.add_decayed_weights(optimizer.weight_decay, decay_mask),
        optax.scale_by_learning_rate(scheduled_rate),
    )
    return optax.partition({"moving": moving, "still": optax.set_to_zero()}, groups)


def _norm(tree: optax.Updates) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def _clip_factor(norm: jax.Array, max_norm: float) -> jax.Array:
    return jnp.minimum(1.0, max_norm / (norm + _EPSILON))


def _map_with_path(function: Callable[[str], object], tree: optax.Params) -> optax.Params:
    """Maps a function of the '/'-joined path over the leaves of a tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: function(jax.tree_util.keystr(path, simple=True, separator="/")), tree
    )
