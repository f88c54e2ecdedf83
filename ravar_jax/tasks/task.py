"""What the training and evaluation loops know of a task: pure functions of parameters, frozen arrays and a batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Task:
    """One task. The functions are pure and are traced by `jax.jit`; `B` is the global batch.

    Attributes:
        init_params: rng (a `jax.random.key`) -> trainable parameters that are drawn, a nested dict of float32 arrays.
        frozen: Pytree of arrays that are never trained (weights of backbone and detector, label table); passed to
            every step and never donated, optimised or checkpointed.
        loss: (params, frozen, batch, rng, train) -> (loss, metrics), scalars; `rng` is for dropout, `train` a bool.
        predict: (params, frozen, batch) -> dict of `action_logits` float32 (n, 80), `box` float32 (n, 4) as
            x1, y1, x2, y2 unclipped, `action_labels` (n, 80), `target_box` (n, 4), `mask` (n,), `example_id` (n,),
            averaged over the evaluation clips.
        no_gradient: '/'-joined path of a parameter -> whether the released program never gives it a gradient, so
            that it sees neither update nor weight decay.
        loaded: Trainable parameters that start from a file, to stand beside those of `init_params`.
        unread: Names in `frozen` that no step on the config's batches reads: the models whose features are cached.
    """

    init_params: Callable[[jax.Array], Any]
    frozen: Any
    loss: Callable[[Any, Any, dict, jax.Array, bool], tuple[jax.Array, dict[str, jax.Array]]]
    predict: Callable[[Any, Any, dict], dict[str, jax.Array]]
    no_gradient: Callable[[str], bool]
    loaded: dict[str, Any] = dataclasses.field(default_factory=dict)
    unread: tuple[str, ...] = ()

    @property
    def placed(self) -> Any:
        """What of `frozen` the steps on the config's batches read, and so has to lie on the devices."""
        return {name: part for name, part in self.frozen.items() if name not in self.unread}
