"""A training run of a second: two heads on made-up rows.

Also a program, to be killed: python -m tests.tiny_run WORKDIR
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import tests.conftest  # noqa: F401  the same JAX settings as in the test session
from configs import base
from ravar_jax.losses import ravar_loss
from ravar_jax.tasks.task import Task
from ravar_jax.train import train_and_evaluate

FEATURES = 256
HIDDEN = 16  # its kernels are split over fsdp and tensor, as the model's


def make_config(**changes) -> ConfigDict:
    config = base.get_config()
    config.update_from_flattened_dict(
        {
            "optimizer.learning_rate": 0.01,
            "optimizer.name": "adamw",
            "train.steps": 8,
            "train.batch_size": 16,
            "train.log_every_steps": 1,
            "train.eval_every_steps": 4,
            "evaluation.batch_size": 16,
            "checkpoint.every_steps": 4,
        }
    )
    config.update_from_flattened_dict(
        {key.replace("__", "."): value for key, value in changes.items()}
    )
    return config


def make_long_config(**changes) -> ConfigDict:
    long = {"train__steps": 20, "train__eval_every_steps": 10, "checkpoint__every_steps": 5}
    return make_config(**{**long, **changes})


def make_batch(seed: int, rows: int = 16) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = np.zeros((rows, 80), np.float32)
    labels[np.arange(rows), random.integers(0, 5, rows)] = 1
    low = random.uniform(0, 0.5, (rows, 2))
    return {
        "features": (
            0.05 * (random.normal(size=(rows, FEATURES)) + labels.argmax(1)[:, None])
        ).astype(np.float32),
        "action_labels": labels,
        "target_box": np.concatenate([low, low + 0.3], axis=1).astype(np.float32),
        "mask": np.ones((rows,), np.float32),
        "example_id": np.arange(rows, dtype=np.int32) + 16 * seed,
    }


def make_task(traces: list[str] | None = None, dropout: float = 0.2) -> Task:
    """Returns the task; `traces` gets the name of each function every time JAX traces it."""
    traces = [] if traces is None else traces

    def init_params(rng):
        def dense(number, rows, columns):
            kernel = jax.random.normal(jax.random.fold_in(rng, number), (rows, columns))
            return {"kernel": kernel / rows**0.5, "bias": jnp.zeros((columns,))}

        return {
            name: {"layer1": dense(size, FEATURES, HIDDEN), "layer3": dense(size + 1, HIDDEN, size)}
            for name, size in (("action_head", 80), ("box_head", 4))
        }

    def apply(params, frozen, features):
        def head(layers):
            hidden = features @ layers["layer1"]["kernel"] + layers["layer1"]["bias"][None]
            return jax.nn.relu(hidden) @ layers["layer3"]["kernel"] + layers["layer3"]["bias"][None]

        features = features * frozen["vision_norm"]["scale"][None]
        return head(params["action_head"]), head(params["box_head"])

    def loss(params, frozen, batch, rng, train):
        traces.append("loss")
        keep = jax.random.bernoulli(rng, 1 - dropout, batch["features"].shape)
        logits, box = apply(params, frozen, batch["features"] * keep)
        targets = batch["action_labels"], batch["target_box"], batch["mask"]
        return ravar_loss(
            logits, box, *targets, box_weight=1.0, action_weight=5.0, box_reduction="mean"
        )

    def predict(params, frozen, batch):
        traces.append("predict")
        logits, box = apply(params, frozen, batch["features"])
        rest = {key: batch[key] for key in ("action_labels", "target_box", "mask", "example_id")}
        return {"action_logits": logits, "box": box, **rest}

    frozen = {"vision_norm": {"scale": np.linspace(0.5, 1.5, FEATURES, dtype=np.float32)}}
    return Task(init_params, frozen, loss, predict, lambda path: False)


def train_batches(start: int) -> Iterator[dict[str, np.ndarray]]:
    step = start
    while True:
        step += 1
        yield make_batch(step)


def eval_batches() -> Iterator[dict[str, np.ndarray]]:
    yield make_batch(1001)
    last = make_batch(1002)
    last["mask"][5:] = 0
    yield last


def _slow_batches(start: int) -> Iterator[dict[str, np.ndarray]]:
    for batch in train_batches(start):
        time.sleep(0.05)
        yield batch


if __name__ == "__main__":
    train_and_evaluate(
        make_long_config(), Path(sys.argv[1]), _slow_batches, eval_batches, make_task()
    )
