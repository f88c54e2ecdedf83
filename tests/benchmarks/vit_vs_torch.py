"""Times BLIP-2's image encoder against Hugging Face `transformers` in PyTorch, on CPU.

    python -m tests.benchmarks.vit_vs_torch [--blocks 4] [--frames 4] [--rounds 5]

Full width (1408, 16 heads, MLP 6144, 224 x 224, patches of 14), the first `--blocks` of the 39 blocks, float32, no
gradients. Both hold the same random weights; first their outputs are compared. Rounds alternate so that both meet the
same load. Prints one JSON object; `ratio` is our frames a second over PyTorch's.
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
import numpy as np
import torch
import transformers

from ravar_jax.conversion.blip2 import hf_blip2_table
from ravar_jax.conversion.mapping import from_torch
from ravar_jax.models.vision_transformer import VisionTransformer
from tests.torch_weights import state_of

SIDE = 224
SIZES: dict[str, Any] = {"width": 1408, "num_heads": 16, "mlp_width": 6144, "patch_size": 14}
BLOCKS_OF_VIT_G = 39
TOLERANCE = 1e-5  # of the largest value


def torch_encoder(blocks: int) -> torch.nn.Module:
    """Returns Hugging Face's image encoder as its users get it, with a key bias of zero, as EVA has none."""
    config = transformers.Blip2VisionConfig(
        hidden_size=SIZES["width"],
        intermediate_size=SIZES["mlp_width"],
        num_hidden_layers=blocks,
        num_attention_heads=SIZES["num_heads"],
        image_size=SIDE,
        patch_size=SIZES["patch_size"],
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    torch.manual_seed(0)
    model = transformers.Blip2VisionModel(config).eval()
    for layer in model.encoder.layers:
        width = SIZES["width"]
        torch.nn.init.normal_(layer.self_attn.qkv.bias, std=0.02)
        layer.self_attn.qkv.bias.data[width : 2 * width] = 0
    model.post_layernorm = torch.nn.Identity()  # LAVIS's ln_vision, which is not the encoder's here
    return model


def our_encoder(model: torch.nn.Module, blocks: int) -> tuple[VisionTransformer, Any]:
    """Returns the encoder and its parameters, those of `model`."""
    encoder = VisionTransformer(depth=blocks, **SIZES)
    pixels = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), np.float32)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), pixels)["params"]
    inside = "visual_encoder/"
    table = [
        row._replace(
            torch_names=tuple(name.removeprefix("vision_model.") for name in row.torch_names),
            path=row.path.removeprefix(inside),
        )
        for row in hf_blip2_table(blocks, 0)
        if row.path.startswith(inside)
    ]
    return encoder, from_torch(state_of(model), table, model="ViT-g", shapes=shapes)


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(blocks: int, frames: int, rounds: int) -> dict[str, Any]:
    """Returns what `main` prints."""
    torch.set_num_threads(os.cpu_count() or 1)
    model = torch_encoder(blocks)
    encoder, params = our_encoder(model, blocks)
    pixels = np.random.default_rng(0).standard_normal((frames, SIDE, SIDE, 3)).astype(np.float32)
    torch_pixels = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    params, ours_pixels = jax.device_put((params, pixels))
    encode = jax.jit(lambda params, pixels: encoder.apply({"params": params}, pixels))

    def run_torch() -> torch.Tensor:
        with torch.inference_mode():
            return model(torch_pixels).last_hidden_state

    def run_ours() -> jax.Array:
        return encode(params, ours_pixels).block_until_ready()

    expected, ours = run_torch().numpy(), np.asarray(run_ours())
    error = float(np.abs(ours - expected).max() / np.abs(expected).max())
    if error > TOLERANCE:
        sys.exit(f"error: outputs differ by {error:.2e} of the largest: not the same arithmetic")
    torch_times, our_times = [], []
    for _ in range(rounds):
        torch_times.append(seconds(run_torch))
        our_times.append(seconds(run_ours))
    torch_rate, our_rate = (frames / statistics.median(times) for times in (torch_times, our_times))
    return {
        "blocks": blocks,
        "blocks_of_the_whole": BLOCKS_OF_VIT_G,
        "frames": frames,
        "cores": os.cpu_count(),
        "relative_error": error,
        "torch_seconds": [round(t, 3) for t in torch_times],
        "jax_seconds": [round(t, 3) for t in our_times],
        "torch_frames_per_second": round(torch_rate, 3),
        "jax_frames_per_second": round(our_rate, 3),
        "ratio": round(our_rate / torch_rate, 3),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "jax": jax.__version__,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=4, help="2 or more; 39 is the whole encoder")
    parser.add_argument("--frames", type=int, default=4, help="frames in a batch")
    parser.add_argument("--rounds", type=int, default=5, help="alternated rounds")
    arguments = parser.parse_args()
    print(json.dumps(compare(arguments.blocks, arguments.frames, arguments.rounds), indent=2))


if __name__ == "__main__":
    main()
