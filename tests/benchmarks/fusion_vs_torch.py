"""Times a train step of the fusion against the released arithmetic in PyTorch eager, on CPU.

    python -m tests.benchmarks.fusion_vs_torch [--rounds 5] [--steps 2] [--batch 64]

Full width (768, 32 tokens, 100 detections), `official` settings, features given: forward, backward, gradient clipping
and BertAdam. Both start from the same weights and see the same batch; first their outputs are compared. Rounds
alternate so that both meet the same load. Prints one JSON object; `ratio` is PyTorch's median time over ours.
"""

import argparse
import json
import math
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

WIDTH, TOKENS, AGENTS, DETECTIONS, ACTIONS, TEXT_LENGTH = 768, 32, 4, 100, 80, 24
TOTAL_STEPS = 1000
TOLERANCE = 1e-4


class TorchAgentAttention(nn.Module):
    """Spec 3.6, step by step, one head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.pool = nn.Sequential(
            nn.Linear(WIDTH, WIDTH // 2), nn.GELU(), nn.Linear(WIDTH // 2, AGENTS * WIDTH)
        )
        self.scale = WIDTH**-0.5

    def forward(self, x, cross=None):
        rows, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(rows, tokens, 3, 1, WIDTH).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        pooled = self.pool(q.squeeze(1)).mean(dim=1)
        agents = pooled.reshape(rows, AGENTS, 1, WIDTH).transpose(1, 2)
        attention = ((agents * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        fused = attention
        if cross is not None:
            total = cross[0] + cross[1]
            fused = (fused * total.softmax(dim=-1) + fused * total.softmax(dim=1) + fused) / 3
        values = fused @ v
        if cross is not None:
            total = cross[2] + cross[3]
            agents = (agents * total.softmax(dim=-1) + agents * total.softmax(dim=1) + agents) / 3
        query_attention = ((q * self.scale) @ agents.transpose(-2, -1)).softmax(dim=-1)
        out = (query_attention @ values).transpose(1, 2).reshape(rows, tokens, WIDTH)
        return self.proj(out), attention, agents


class TorchMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)
        self.act = nn.GELU()

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class TorchAgentBlock(nn.Module):
    """Spec 3.7."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attn = TorchAgentAttention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = TorchMlp()

    def forward(self, x, cross=None):
        attended, attention, agents = self.attn(self.norm1(x), cross)
        x = x + attended
        return x + self.mlp(self.norm2(x)), attention, agents


class TorchFusion(nn.Module):
    """Spec 3.3 to 3.8 at the `official` settings, with the released tensor names."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH + 4, WIDTH)
        self.proj_box = nn.Linear(DETECTIONS, TOKENS)
        self.proj_sem = nn.Linear(1, TOKENS)
        self.agent_temporal = TorchAgentBlock()
        self.agent_box = TorchAgentBlock()
        self.agent_semantic = TorchAgentBlock()
        self.bbox_regressio_head = nn.Sequential(
            nn.Linear(WIDTH, 512), nn.ReLU(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 4)
        )
        self.classification_head = nn.Sequential(
            nn.Linear(WIDTH, 512),
            nn.Dropout(0.2),
            nn.ReLU(),
            nn.Linear(512, 256),
            nn.ReLU(),
            nn.Linear(256, ACTIONS),
        )

    def forward(self, image_tokens, text_tokens, boxes, class_ids, label_table):
        cx, cy, w, h = boxes.unbind(-1)
        corners = torch.stack([cx - h / 2, cy - w / 2, cx + h / 2, cy + w / 2], dim=-1)
        labels = label_table.index_select(0, class_ids.flatten() - 1).view(*class_ids.shape, WIDTH)
        z = self.proj(torch.cat([corners, labels], dim=-1))
        z[class_ids != 1] = 0
        box_tokens = self.proj_box(z.transpose(1, 2)).transpose(1, 2)
        _, box_map, box_agents = self.agent_box(box_tokens)
        text = text_tokens.mean(dim=1).unsqueeze(-1)
        semantic = self.proj_sem(text).transpose(1, 2)
        semantic, semantic_map, semantic_agents = self.agent_semantic(semantic)
        cross = (semantic_map, box_map, semantic_agents, box_agents)
        temporal, _, _ = self.agent_temporal(image_tokens, cross)
        fused = z.mean(dim=1) + semantic.mean(dim=1) + temporal.mean(dim=1)
        return self.classification_head(fused), self.bbox_regressio_head(fused)


class TorchBertAdam:
    """The released optimizer: a loop over the tensors, spec section 6."""

    def __init__(self, model: nn.Module, learning_rate: float, warmup: float) -> None:
        self.tensors = list(model.named_parameters())
        self.learning_rate, self.warmup = learning_rate, warmup
        self.state: dict[str, dict] = {}

    def step(self) -> None:
        for name, p in self.tensors:
            if p.grad is None:
                continue
            if name not in self.state:
                zeros = torch.zeros_like(p.data)
                self.state[name] = {"step": 0, "m": zeros, "v": zeros.clone()}
            state = self.state[name]
            nn.utils.clip_grad_norm_(p, 1.0)
            grad = p.grad.data
            state["m"].mul_(0.9).add_(grad, alpha=0.1)
            state["v"].mul_(0.98).addcmul_(grad, grad, value=0.02)
            update = state["m"] / (state["v"].sqrt() + 1e-6)
            if "bias" not in name:
                update += 0.2 * p.data
            x = state["step"] / TOTAL_STEPS
            factor = x / self.warmup if x < self.warmup else 0.5 * (1 + math.cos(math.pi * x))
            p.data.add_(-self.learning_rate * factor * update)
            state["step"] += 1


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
