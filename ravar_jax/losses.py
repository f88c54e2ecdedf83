"""The training loss: binary cross-entropy on the actions plus squared error on the box.

`ravar_loss` is what every task minimises; its weights and the reduction of the box term are config (`loss.*`).
"""

import jax
import jax.numpy as jnp


def ravar_loss(
    action_logits: jax.Array,
    box: jax.Array,
    action_labels: jax.Array,
    target_box: jax.Array,
    mask: jax.Array,
    *,
    box_weight: float,
    action_weight: float,
    box_reduction: str,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the weighted loss and its two terms, averaged over the real rows.

    Computed in float32 whatever the inputs are. A masked row has weight 0 and sends back a gradient of exactly 0, even
    if it holds NaN; with no real row at all the loss is 0.

    Args:
        action_logits: (..., 80), before the sigmoid.
        box: (..., 4) predicted x1, y1, x2, y2, any real number (the head has no sigmoid).
        action_labels: (..., 80) multi-hot 0 or 1.
        target_box: (..., 4) x1, y1, x2, y2 in [0, 1].
        mask: (...) 1 for a real row, 0 for padding.
        box_weight: factor of the box term.
        action_weight: factor of the action term.
        box_reduction: over the 4 coordinates, "mean" (released) or "sum" (paper); then always the mean over rows.

    Returns:
        The float32 scalar loss and `{"action_loss", "box_loss"}`, float32 scalars before their weights.

    Raises:
        ValueError: `box_reduction` is neither "mean" nor "sum".

    Source: RAVAR `modules/major.py`, forward (MSE + 5 * BCE-with-logits).
    """
    if box_reduction not in ("mean", "sum"):
        raise ValueError(f'box_reduction={box_reduction!r} is neither "mean" nor "sum"')
    real = mask > 0
    # Masked rows are replaced before the arithmetic: a weight of 0 alone would keep a NaN in the gradient.
    logits = jnp.where(real[..., None], action_logits.astype(jnp.float32), 0.0)
    error = jnp.where(
        real[..., None], box.astype(jnp.float32) - target_box.astype(jnp.float32), 0.0
    )
    labels = jnp.where(real[..., None], action_labels.astype(jnp.float32), 0.0)

    # log(1 + exp(-|x|)) keeps the cross-entropy finite for large logits.
    cross_entropy = (
        jnp.maximum(logits, 0.0) - logits * labels + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    )
    squares = jnp.square(error)
    box_rows = squares.mean(-1) if box_reduction == "mean" else squares.sum(-1)

    num_real = jnp.maximum(real.sum(), 1)
    action_loss = jnp.where(real, cross_entropy.mean(-1), 0.0).sum() / num_real
    box_loss = jnp.where(real, box_rows, 0.0).sum() / num_real
    loss = box_weight * box_loss + action_weight * action_loss
    return loss, {"action_loss": action_loss, "box_loss": box_loss}
