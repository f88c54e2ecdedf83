"""Times the full-size train step against the same arithmetic in compiled PyTorch on one GPU.

    python -m tests.benchmarks.train_step_vs_torch --input pixels
    python -m tests.benchmarks.train_step_vs_torch --input features

RefAtomNet with BLIP-2's ViT-g and Q-Former frozen, random weights, `official` settings without dropout in what is
frozen, bfloat16 with float32 trained parameters. PyTorch gets what makes it fast: `transformers` with its fused
attention and bfloat16 weights, `torch.compile` of every block and of the trained half with its loss, and an optimizer
that updates all tensors together (foreach). Both start from the same weights and see the same batch; first their
outputs are compared. Rounds alternate; a round's steps are enqueued and waited for together. Prints one JSON object;
`ratio` is our clips a second over PyTorch's. `--device cpu --dtype float32 --blocks 2 --batch 2` needs no GPU.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some of the memory

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from torch import nn

from configs import refatomnet
from ravar_jax import benchmark
from ravar_jax.backbone import BLIP2, BackboneConfig, encode_frames
from ravar_jax.conversion.blip2 import HF_IGNORED, hf_blip2_table
from ravar_jax.conversion.fusion import fusion_table
from ravar_jax.conversion.mapping import from_torch
from ravar_jax.evaluate import make_predict
from ravar_jax.gpu import compiler_options
from ravar_jax.optimizer import make_optimizer
from ravar_jax.sharding import make_mesh, to_global
from ravar_jax.tasks import ravar
from ravar_jax.train import place_frozen
from ravar_jax.train_step import make_init, make_train_step
from tests.benchmarks.torch_refatomnet import (
    TOTAL_STEPS,
    WIDTH,
    TorchEncoder,
    TorchFusion,
    bert_adam,
    torch_blip2,
)
from tests.torch_weights import state_of

# Of the largest value of an output.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}


def make_config(rows: int, dtype: str) -> Any:
    """Returns the config of the step that both take."""
    config = refatomnet.get_config("official")
    config.model.frozen_dropout = "off"
    config.model.detections = "dataset"
    config.model.dtype = dtype
    config.train.steps = TOTAL_STEPS
    config.train.batch_size = rows
    return config


class TorchStep:
    """A train step in PyTorch; `outputs` gives logits and box without dropout."""

    def __init__(
        self,
        config: Any,
        fusion: TorchFusion,
        encoder: TorchEncoder | None,
        batch: dict[str, np.ndarray],
        table: np.ndarray,
        device: str,
        mode: str,
    ) -> None:
        self.config, self.fusion, self.encoder = config, fusion, encoder
        self.batch = {key: torch.from_numpy(value).to(device) for key, value in batch.items()}
        self.batch["class_ids"] = self.batch["class_ids"].long()
        self.table = torch.from_numpy(table).to(device)
        self.device = device
        self.autocast = config.model.dtype == "bfloat16"
        self.loss = self._loss if mode == "eager" else torch.compile(self._loss, mode=mode)
        self.count, self.params, self.decaying = 0, [], []
        self.rate = torch.zeros((), device=device)

    def _tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self.batch
        if self.encoder is None:
            return batch["image_tokens"], batch["text_tokens"]
        frames = batch["frames"]
        tokens = self.encoder.image(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        text = self.encoder.text(batch["token_ids"], batch["attention_mask"])
        return tokens.float().mean(dim=1), text.float()

    def _forward(
        self, image_tokens: torch.Tensor, text_tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            return self.fusion(
                image_tokens, text_tokens, self.batch["boxes"], self.batch["class_ids"], self.table
            )

    def _loss(self, image_tokens: torch.Tensor, text_tokens: torch.Tensor) -> torch.Tensor:
        logits, box = self._forward(image_tokens, text_tokens)
        labels, target = self.batch["action_labels"], self.batch["target_box"]
        bce = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels)
        return nn.functional.mse_loss(box.float(), target) + 5 * bce

    def outputs(self) -> tuple[np.ndarray, ...]:
        self.fusion.eval()
        with torch.no_grad():
            found = self._forward(*self._tokens())
        self.fusion.train()
        return tuple(value.float().cpu().numpy() for value in found)

    def __call__(self) -> torch.Tensor:
        loss = self.loss(*self._tokens())
        loss.backward()
        if not self.params:
            named = [(n, p) for n, p in self.fusion.named_parameters() if p.grad is not None]
            self.params = [p for _, p in named]
            self.decaying = [i for i, (name, _) in enumerate(named) if "bias" not in name]
            self.means = [torch.zeros_like(p) for p in self.params]
            self.squares = [torch.zeros_like(p) for p in self.params]
        optimizer = self.config.optimizer
        x = self.count / TOTAL_STEPS
        warm = x < optimizer.warmup
        factor = x / optimizer.warmup if warm else 0.5 * (1 + math.cos(math.pi * x))
        self.rate.fill_(optimizer.learning_rate * factor)
        with torch.no_grad():
            grads = [p.grad for p in self.params]
            bert_adam(self.params, grads, self.means, self.squares, self.decaying, self.rate)
        for p in self.params:
            p.grad = None
        self.count += 1
        return loss.detach()

    def run(self, steps: int) -> None:
        """Takes steps and waits for the last."""
        for _ in range(steps):
            loss = self()
        float(loss)


class OurStep:
    """The step that training runs: guard against non-finite values, dropout and metrics included."""

    def __init__(self, config: Any, task: Any, batch: dict[str, np.ndarray]) -> None:
        self.task, self.mesh = task, make_mesh(config.mesh)
        optimizer = make_optimizer(config.optimizer, TOTAL_STEPS, task.no_gradient)
        self.frozen = place_frozen(task.placed, self.mesh)
        with jax.set_mesh(self.mesh):
            self.state = make_init(task, optimizer, self.mesh, seed=0)()
            self.batch = to_global(batch, self.mesh)
            self.step = make_train_step(task, optimizer, self.mesh, seed=0)

    def outputs(self) -> tuple[np.ndarray, ...]:
        with jax.set_mesh(self.mesh):
            # A clip is an example's only evaluation clip.
            batch = {
                key: value[:, None] if key in ("frames", "image_tokens") else value
                for key, value in self.batch.items()
            }
            predict = make_predict(self.task, self.mesh)
            found = predict(self.state.params, self.frozen, batch)
        return np.asarray(found["action_logits"]), np.asarray(found["box"])

    def flops(self) -> float:
        with jax.set_mesh(self.mesh):
            traced = self.step.trace(self.state, self.frozen, self.batch)
        return benchmark.count_flops(traced.jaxpr.jaxpr)

    def run(self, steps: int) -> None:
        """Takes steps and waits for the last."""
        with jax.set_mesh(self.mesh):
            for _ in range(steps):
                self.state, metrics = self.step(self.state, self.frozen, self.batch)
            metrics["loss"].block_until_ready()


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def alternate(
    torch_run: Callable[[], Any], our_run: Callable[[], Any], rounds: int, times: int
) -> dict[str, Any]:
    """Times both in turns after two rounds that compile and warm up; seconds of one of `times`."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 2):
        for run, into in zip((torch_run, our_run), seconds, strict=True):
            start = time.perf_counter()
            run()
            taken = time.perf_counter() - start
            if number < 2:
                say(f"{'PyTorch' if run is torch_run else 'JAX'}, warming up: {taken:.2f} s")
            else:
                into.append(taken / times)
    medians = [statistics.median(values) for values in seconds]
    return {
        "torch_seconds": [round(t, 6) for t in seconds[0]],
        "jax_seconds": [round(t, 6) for t in seconds[1]],
        "torch_median": medians[0],
        "jax_median": medians[1],
        "ratio": round(medians[0] / medians[1], 3),
    }


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what `main` prints."""
    device, dtype, rows = arguments.device, arguments.dtype, arguments.batch
    config = make_config(rows, dtype)
    batch = benchmark.synthetic_batch(config, arguments.input)
    table = np.random.default_rng(1).standard_normal((91, WIDTH)).astype(np.float32)
    torch.manual_seed(1)
    fusion = TorchFusion()
    model = ravar.build_model(config.model)
    shapes = jax.eval_shape(lambda rng: ravar.init_fusion(model, rng), jax.random.key(0))
    params = from_torch(state_of(fusion), fusion_table(), model="fusion", shapes=shapes)
    fusion.to(device)

    sizes = dataclasses.replace(BLIP2, vision={**BLIP2.vision, "depth": arguments.blocks})
    if arguments.input == "pixels":
        blip2 = torch_blip2(sizes, device)
        backbone = from_torch(
            {name: tensor.cpu().numpy() for name, tensor in blip2.state_dict().items()},
            hf_blip2_table(arguments.blocks, sizes.qformer["depth"]),
            model="BLIP-2",
            shapes=sizes.param_shapes(),
            ignored=HF_IGNORED,
        )
        compiled = arguments.mode != "eager"
        encoder = TorchEncoder(blip2, device, getattr(torch, dtype), compiled)
    else:
        backbone, encoder = sizes.param_shapes(), None
        config.data.feature_cache = "none"
    task = ravar.build_task(config, sizes, backbone, None, table)
    task = dataclasses.replace(task, loaded={**task.loaded, **params})

    say("models made")
    theirs = TorchStep(config, fusion, encoder, batch, table, device, arguments.mode)
    ours = OurStep(config, task, batch)
    errors = [
        float(np.abs(a - b).max() / np.abs(b).max())
        for a, b in zip(ours.outputs(), theirs.outputs(), strict=True)
    ]
    if not max(errors) <= TOLERANCES[dtype]:
        sys.exit(f"error: outputs differ by {errors} of the largest: not the same arithmetic")
    say(f"outputs compared: {errors} of the largest")
    steps, rounds = arguments.steps, arguments.rounds
    result = alternate(lambda: theirs.run(steps), lambda: ours.run(steps), rounds, steps)
    flops = ours.flops()
    result |= {
        "torch_clips_per_second": round(rows / result["torch_median"], 1),
        "jax_clips_per_second": round(rows / result["jax_median"], 1),
        "flops_per_step": flops,
        "mfu": round(flops / result["jax_median"] / arguments.peak_flops, 4),
    }
    if encoder is not None:
        result["encoder"] = compare_encoders(arguments, sizes, encoder, ours, theirs)
    return result | {
        "input": arguments.input,
        "batch_size": rows,
        "relative_errors": errors,
        "torch_mode": arguments.mode,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "peak_flops": arguments.peak_flops,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "jax": jax.__version__,
        },
    }


def compare_encoders(
    arguments: argparse.Namespace,
    sizes: BackboneConfig,
    encoder: TorchEncoder,
    ours: OurStep,
    theirs: TorchStep,
) -> dict[str, Any]:
    """Times the frozen half alone, on the frames of the batch."""
    frames = theirs.batch["frames"].flatten(0, 1)
    our_frames = jnp.reshape(ours.batch["frames"], frames.shape)
    encode = jax.jit(
        functools.partial(encode_frames, sizes, dtype=jnp.dtype(arguments.dtype)),
        compiler_options=compiler_options(),
    )
    params = ours.frozen["backbone"]
    traced = encode.trace(params, our_frames)

    def run_torch() -> None:
        encoder.image(frames).sum().item()

    def run_ours() -> None:
        encode(params, our_frames).block_until_ready()

    result = alternate(run_torch, run_ours, arguments.rounds, 1)
    flops = benchmark.count_flops(traced.jaxpr.jaxpr)
    rates = {side: flops / result[f"{side}_median"] for side in ("torch", "jax")}
    mfus = {f"{side}_mfu": round(rate / arguments.peak_flops, 4) for side, rate in rates.items()}
    return result | mfus | {"frames": len(frames), "flops": flops}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--input", choices=("pixels", "features"), default="features")
    parser.add_argument("--batch", type=int, default=128, help="clips in a batch")
    parser.add_argument("--rounds", type=int, default=5, help="alternated rounds")
    parser.add_argument("--steps", type=int, default=5, help="steps of each side in a round")
    parser.add_argument("--blocks", type=int, default=39, help="of ViT-g; 39 is the whole")
    parser.add_argument("--dtype", choices=tuple(TOLERANCES), default="bfloat16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--mode",
        choices=("default", "reduce-overhead", "eager"),
        default="default",
        help="of torch.compile; eager does without it",
    )
    parser.add_argument(
        "--peak_flops", type=float, default=989e12, help="of the GPU; an H100's by default"
    )
    print(json.dumps(compare(parser.parse_args()), indent=2))


if __name__ == "__main__":
    main()
