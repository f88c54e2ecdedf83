"""The model at its real size on this machine: convert a checkpoint, train from pixels and from features, with memory.

    python -m tests.benchmarks.full_size --folder DIR [--batch 64]

Writes DIR/pytorch_model.bin with the 1,378 tensors of a released checkpoint (spec section 8) and random values, about
5 GB, and converts it with `launch/convert_weights.py --source official`. Then `launch/benchmark.py` times the train
step of `configs/refatomnet.py` in float32, on 2 clips from pixels and on `--batch` clips from features. Each is a
process of its own, whose memory is watched: `anonymous` is what it holds, `resident` also counts the pages of mapped
files, which the system takes back when it needs them. Needs 16 GB of disk. Prints one JSON object.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from ravar_jax.backbone import BLIP2
from ravar_jax.benchmark import random_weights
from ravar_jax.conversion.blip2 import lavis_table
from ravar_jax.conversion.detr import depths_of, detr_table
from ravar_jax.conversion.fusion import fusion_table
from ravar_jax.conversion.mapping import Row, to_torch
from ravar_jax.conversion.weight_files import write_torch
from ravar_jax.models.detr import DETR_R50, Detr
from ravar_jax.tasks import ravar

ROOT = Path(__file__).resolve().parents[2]
NUM_TENSORS = 1378
WORDS = BLIP2.qformer["vocab_size"] - 1  # of BERT's vocabulary; "[DEC]" is one more
# LAVIS's heads, which nothing here reads (spec section 8).
HEADS = {
    "Qformer.bert.embeddings.position_ids": (1, 512),
    "Qformer.cls.predictions.bias": (WORDS + 1,),
    "Qformer.cls.predictions.transform.dense.weight": (768, 768),
    "Qformer.cls.predictions.transform.dense.bias": (768,),
    "Qformer.cls.predictions.transform.LayerNorm.weight": (768,),
    "Qformer.cls.predictions.transform.LayerNorm.bias": (768,),
    "Qformer.cls.predictions.decoder.weight": (WORDS + 1, 768),
    "Qformer.cls.predictions.decoder.bias": (WORDS + 1,),
    "vision_proj.weight": (256, 768),
    "vision_proj.bias": (256,),
    "text_proj.weight": (256, 768),
    "text_proj.bias": (256,),
    "itm_head.weight": (2, 768),
    "itm_head.bias": (2,),
    "temp": (),
}


def random_tensors(shapes: Any, table: tuple[Row, ...], prefix: str) -> dict[str, np.ndarray]:
    """Returns the PyTorch tensors of a model with random weights."""
    params = random_weights(shapes)
    return {prefix + name: array for name, array in to_torch(params, table).items()}


def write_checkpoint(file: Path) -> None:
    """Writes a checkpoint in the release's layout."""
    config = base.get_config()
    rng = jax.random.key(0)
    backbone = jax.eval_shape(BLIP2.init, rng)
    detector = jax.eval_shape(Detr(**DETR_R50).init, rng, jnp.zeros((1, 64, 64, 3)))["params"]
    fusion = jax.eval_shape(
        lambda key: ravar.init_fusion(ravar.build_model(config.model), key), rng
    )
    depths = BLIP2.vision["depth"], BLIP2.qformer["depth"]
    tensors = random_tensors(backbone, lavis_table(*depths), "model.")
    tensors |= random_tensors(detector, detr_table(*depths_of(DETR_R50)), "detection_model.")
    tensors |= random_tensors(fusion, fusion_table(), "")
    for name, shape in HEADS.items():
        tensors[f"model.{name}"] = np.zeros(shape, np.float32)
    tensors["model.Qformer.bert.embeddings.position_ids"] = np.arange(512)[None]
    if len(tensors) != NUM_TENSORS:
        sys.exit(f"error: {len(tensors)} tensors, the release has {NUM_TENSORS}")
    write_torch(file, tensors, None)


def watched(program: str, flags: Mapping[str, object]) -> tuple[str, dict[str, float]]:
    """Runs a program of the repository; returns its standard output, its seconds and its largest memory in GB."""
    command = [program, *(f"--{name}={value}" for name, value in flags.items())]
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    peaks = {"anonymous_gb": 0.0, "resident_gb": 0.0}

    def watch() -> None:
        while process.poll() is None:
            held = memory_of(process.pid)
            peaks["anonymous_gb"] = max(peaks["anonymous_gb"], held.get("RssAnon", 0.0))
            peaks["resident_gb"] = max(peaks["resident_gb"], held.get("VmRSS", 0.0))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} ended with {process.returncode}")
    watcher.join()
    rounded = {key: round(value, 2) for key, value in peaks.items()}
    return output, rounded | {"seconds": round(time.perf_counter() - start, 1)}


def memory_of(pid: int) -> Mapping[str, float]:
    """Returns the kinds of memory of a process, GB (10^9 bytes); nothing when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.startswith(("RssAnon", "VmRSS")))
    return {name.rstrip(":"): int(kilobytes) * 1024 / 1e9 for name, kilobytes, _ in fields}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where everything is written")
    parser.add_argument("--batch", type=int, default=64, help="clips of a step from features")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, run = folder / "pytorch_model.bin", folder / "run"
    if not checkpoint.exists():
        write_checkpoint(checkpoint)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"word{i}" for i in range(WORDS - 4))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    table = np.random.default_rng(1).standard_normal((91, 768)).astype(np.float32)
    np.save(folder / "label_table.npy", table)
    size = checkpoint.stat().st_size / 1e9
    result: dict[str, Any] = {"checkpoint_gb": round(size, 2)}
    if not run.exists():
        flags = {"source": "official", "input": checkpoint, "output": run}
        flags |= {"vocab": folder / "vocab.txt", "label_table": folder / "label_table.npy"}
        _, held = watched("launch/convert_weights.py", flags)
        result["convert"] = held | {
            "anonymous_over_file": round(held["anonymous_gb"] / size, 2),
            "resident_over_file": round(held["resident_gb"] / size, 2),
        }
    weights = {
        "backbone": run / "backbone",
        "detector": run / "detector",
        "label_table": run / "label_table.npy",
    }
    rates = {}
    for source, batch, steps in (("pixels", 2, 1), ("features", arguments.batch, 5)):
        flags = {"config": "configs/refatomnet.py", "input": source, "steps": steps}
        flags |= {f"config.model.{key}": path for key, path in weights.items()}
        flags |= {"config.model.dtype": "float32", "config.train.batch_size": batch}
        flags["config.data.data_dir"] = folder / "none"  # the step alone is timed
        output, held = watched("launch/benchmark.py", flags)
        timed = json.loads(output)
        rates[source] = batch / timed["step_seconds_median"]
        keys = ("batch_size", "step_seconds_median", "compile_seconds", "flops_per_step")
        result[source] = {key: timed[key] for key in keys} | held
    result["features_over_pixels"] = round(rates["features"] / rates["pixels"], 1)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
