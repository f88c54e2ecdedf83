"""Times a train step of the fusion against the released arithmetic in PyTorch eager, on CPU.

    python -m tests.benchmarks.fusion_vs_torch [--rounds 5] [--steps 2] [--batch 64]

Full width (768, 32 tokens, 100 detections), `official` settings, features given: forward, backward, gradient clipping
and BertAdam. Both start from the same weights and see the same batch; first their outputs are compared. Rounds
alternate so that both meet the same load. Prints one JSON object; `ratio` is PyTorch's median time over ours.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from configs import base
from ravar_jax.conversion.fusion import fusion_table
from ravar_jax.conversion.mapping import from_torch
from ravar_jax.losses import ravar_loss
from ravar_jax.optimizer import make_optimizer
from ravar_jax.sharding import make_mesh, to_global
from ravar_jax.tasks.ravar import build_model
from ravar_jax.tasks.task import Task
from ravar_jax.train_step import make_init, make_train_step
from tests.benchmarks.torch_refatomnet import (
    ACTIONS,
    DETECTIONS,
    TOKENS,
    TOTAL_STEPS,
    WIDTH,
    TorchBertAdam,
    TorchFusion,
)

TEXT_LENGTH = 24
TOLERANCE = 1e-4


def make_batch(rows: int) -> dict[str, np.ndarray]:
    """Returns random features and targets; about a third of the detections are people."""
    rng = np.random.default_rng(0)
    boxes = rng.uniform(0.05, 0.95, (rows, DETECTIONS, 4))
    return {
        "image_tokens": rng.standard_normal((rows, TOKENS, WIDTH)).astype(np.float32),
        "text_tokens": rng.standard_normal((rows, TEXT_LENGTH, WIDTH)).astype(np.float32),
        "attention_mask": np.ones((rows, TEXT_LENGTH), np.int32),
        "boxes": boxes.astype(np.float32),
        "class_ids": rng.choice([1, 62, 91], (rows, DETECTIONS)).astype(np.int32),
        "target_box": np.sort(rng.uniform(0, 1, (rows, 4)), axis=1).astype(np.float32),
        "action_labels": (rng.uniform(size=(rows, ACTIONS)) < 0.05).astype(np.float32),
        "mask": np.ones(rows, np.float32),
        "example_id": np.arange(rows, dtype=np.int32),
    }


def torch_step(
    model: TorchFusion, config, batch: dict[str, np.ndarray], label_table: np.ndarray
) -> Callable[[], float]:
    optimizer = TorchBertAdam(model, config.optimizer.learning_rate, config.optimizer.warmup)
    inputs = [torch.from_numpy(batch[k]) for k in ("image_tokens", "text_tokens", "boxes")]
    inputs += [torch.from_numpy(batch["class_ids"]).long(), torch.from_numpy(label_table)]
    labels, target = (torch.from_numpy(batch[k]) for k in ("action_labels", "target_box"))

    def step() -> float:
        for _, p in optimizer.tensors:
            p.grad = None
        logits, box = model(*inputs)
        bce = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        loss = nn.functional.mse_loss(box, target) + 5 * bce
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        return loss.item()

    return step


def model_inputs(batch, label_table) -> tuple:
    keys = ("image_tokens", "text_tokens", "attention_mask", "boxes", "class_ids")
    return (*(batch[key] for key in keys), label_table)


def our_step(
    config, params, batch, label_table: np.ndarray, without_gradient: set[str]
) -> Callable[[], float]:
    """Returns the step that training runs: guard against non-finite values, dropout and metrics included."""
    model = build_model(config.model)

    def loss(params, frozen, batch, rng, train):
        inputs = model_inputs(batch, frozen)
        output: Any = model.apply({"params": params}, *inputs, train=train, rngs={"dropout": rng})
        return ravar_loss(
            output.action_logits,
            output.box,
            batch["action_labels"],
            batch["target_box"],
            batch["mask"],
            box_weight=config.loss.box_weight,
            action_weight=config.loss.action_weight,
            box_reduction=config.loss.box_reduction,
        )

    task = Task(
        init_params=lambda rng: jax.tree.map(jnp.asarray, params),
        frozen=label_table,
        loss=loss,
        predict=lambda params, frozen, batch: {},
        no_gradient=lambda path: path in without_gradient,
    )
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, TOTAL_STEPS, task.no_gradient)
    state = make_init(task, optimizer, mesh, seed=0)()
    with jax.set_mesh(mesh):
        train_step = make_train_step(task, optimizer, mesh, seed=0)
        frozen = jax.device_put(label_table)
        global_batch = to_global(batch, mesh)

    def step() -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = train_step(state, frozen, global_batch)
        return float(metrics["loss"])

    return step


def time_steps(step: Callable[[], float], count: int) -> float:
    """Returns seconds a step; each step's loss is read, so the device has finished."""
    start = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - start) / count


def compare(rounds: int, steps: int, rows: int) -> dict:
    """Returns what `main` prints; rounds alternate PyTorch and this project."""
    config = base.apply_preset(base.get_config(), "official")
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    model = TorchFusion()
    batch = make_batch(rows)
    label_table = np.random.default_rng(1).standard_normal((91, WIDTH)).astype(np.float32)
    fusion = build_model(config.model)
    shapes = jax.eval_shape(fusion.init, jax.random.key(0), *model_inputs(batch, label_table))
    weights = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    params = from_torch(weights, fusion_table(), model="fusion", shapes=shapes["params"])

    model.eval()
    tensors = [torch.from_numpy(batch[k]) for k in ("image_tokens", "text_tokens", "boxes")]
    with torch.no_grad():
        class_ids = torch.from_numpy(batch["class_ids"]).long()
        expected = model(*tensors, class_ids, torch.from_numpy(label_table))
    ours: Any = fusion.apply({"params": params}, *model_inputs(batch, label_table))
    error = max(
        float(np.abs(np.asarray(a) - b.numpy()).max())
        for a, b in zip((ours.action_logits, ours.box), expected, strict=True)
    )
    if error > TOLERANCE:
        sys.exit(f"error: outputs differ by {error:.2e}: not the same arithmetic")

    model.train()
    run_torch = torch_step(model, config, batch, label_table)
    time_steps(run_torch, 2)  # the first touch of memory
    no_gradient = {name for name, p in model.named_parameters() if p.grad is None}
    still = {row.path for row in fusion_table() if row.torch_names[0] in no_gradient}
    run_ours = our_step(config, params, batch, label_table, still)
    time_steps(run_ours, 2)  # compilation
    torch_times, our_times = [], []
    for _ in range(rounds):
        torch_times.append(time_steps(run_torch, steps))
        our_times.append(time_steps(run_ours, steps))
    torch_time, our_time = statistics.median(torch_times), statistics.median(our_times)
    return {
        "max_abs_error": error,
        "batch_size": rows,
        "cores": os.cpu_count(),
        "rounds": rounds,
        "steps_per_round": steps,
        "torch_step_seconds": [round(t, 4) for t in torch_times],
        "jax_step_seconds": [round(t, 4) for t in our_times],
        "torch_median": round(torch_time, 4),
        "jax_median": round(our_time, 4),
        "ratio": round(torch_time / our_time, 3),
        "versions": {"torch": torch.__version__, "jax": jax.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="alternated rounds")
    parser.add_argument("--steps", type=int, default=2, help="steps of each side in a round")
    parser.add_argument("--batch", type=int, default=64, help="examples in a batch")
    arguments = parser.parse_args()
    print(json.dumps(compare(arguments.rounds, arguments.steps, arguments.batch), indent=2))


if __name__ == "__main__":
    main()
