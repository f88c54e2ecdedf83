"""How fast a train step is: compile time, step time, clips a second, model FLOPs utilisation, memory, wait for input.

config --synthetic batch, the real train step--> compile, warm up, time
jaxpr of the step --matrix products and convolutions, loops multiplied out--> FLOPs
"""

import math
import pathlib
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.extend import core
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ravar_jax import sharding
from ravar_jax.batch_shapes import batch_shapes
from ravar_jax.optimizer import make_optimizer
from ravar_jax.tasks.task import Task
from ravar_jax.train import place_frozen
from ravar_jax.train_step import make_init, make_train_step

MFU_FORMULA = "flops_per_step / (step_seconds_median * devices * peak_flops_per_device)"
FLOPS_FORMULA = (
    "2*M*N*K of every matrix product and 2*output*window*channels of every convolution in the train step's jaxpr "
    "(forward, backward, recomputation), loop bodies times their length"
)


def synthetic_batch(config: ConfigDict, source: str) -> dict[str, np.ndarray]:
    """Returns one random training batch of the main task with the config's shapes (README, "Input contract").

    Args:
        config: of a run.
        source: `features` for cached image and text tokens, `pixels` for frames.
    """
    random = np.random.default_rng(0)
    shapes = batch_shapes(config, training=True, features=source == "features")
    low = random.uniform(0, 0.5, (*shapes["target_box"].shape[:-1], 2))
    given = {
        "token_ids": np.full(shapes["token_ids"].shape, 5),
        "attention_mask": np.ones(shapes["attention_mask"].shape),
        "boxes": random.uniform(0.2, 0.6, shapes["boxes"].shape),
        "class_ids": random.choice([1, 62, 91], shapes["class_ids"].shape),
        "target_box": np.concatenate([low, low + 0.3], axis=-1),
        "action_labels": random.uniform(size=shapes["action_labels"].shape) < 0.05,
        "mask": np.ones(shapes["mask"].shape),
        "example_id": np.arange(config.train.batch_size),
    }
    for key, leaf in shapes.items():
        if leaf.dtype == np.uint8:
            given[key] = random.integers(0, 256, leaf.shape, np.uint8)
        elif key not in given:
            given[key] = random.standard_normal(leaf.shape, np.float32)
    return {key: given[key].astype(leaf.dtype) for key, leaf in shapes.items()}


def random_weights(shapes: Any) -> Any:
    """Returns numpy arrays float32 of the shapes of a tree: scales and variances near 1, all others small."""
    generator = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        values = generator.standard_normal(leaf.shape, np.float32) * np.float32(0.02)
        return 1 + values if name in ("scale", "var") else values

    return jax.tree_util.tree_map_with_path(draw, shapes)


def measure_step(
    config: ConfigDict,
    task: Task,
    batch: dict[str, np.ndarray],
    *,
    steps: int,
    peak_flops: float | None,
    batches: Iterator[dict[str, np.ndarray]] | None = None,
) -> dict[str, Any]:
    """Compiles the train step and times it, each step until its loss is known.

    Args:
        config: of a run; mesh, optimizer and seed count.
        task: what is trained.
        batch: of this process.
        steps: timed, at least 1, after 2 that are not.
        peak_flops: of one device, per second; None leaves `mfu` None.
        batches: of the input pipeline, to train on as a run does; None leaves `input_wait_share` None.

    Returns:
        `compile_seconds` (nothing cached) and `compile_seconds_cached` (the same program from the persistent
        compilation cache), `step_seconds_median`, `step_seconds_min`, `clips_per_second`, `flops_per_step`,
        `compiler_flops_per_device` (XLA's own count, in which a loop's body counts once), `mfu`, memory in bytes
        (the compiler's count of a device, the device's own peak where it tells, the process's peak),
        `input_wait_share`, formulas and devices.
    """
    mesh = sharding.make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps, task.no_gradient)
    frozen = place_frozen(task.placed, mesh)
    with jax.set_mesh(mesh):
        state = make_init(task, optimizer, mesh, config.seed)()
        on_device = sharding.to_global(batch, mesh)
        train_step = make_train_step(task, optimizer, mesh, config.seed, config.train.micro_batches)
        traced = train_step.trace(state, frozen, on_device)
        compiled, compile_seconds, cached_seconds = compile_twice(traced)
        seconds = []
        for _ in range(steps + 2):
            start = time.perf_counter()
            state, metrics = compiled(state, frozen, on_device)
            metrics["loss"].block_until_ready()
            seconds.append(time.perf_counter() - start)
        fed = _measure_fed(train_step, state, frozen, batches, mesh, steps)
    median = statistics.median(seconds[2:])
    flops = count_flops(traced.jaxpr.jaxpr)
    analysis = compiled.cost_analysis() or {}
    devices = mesh.devices.size
    return {
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "devices": devices,
        "batch_size": config.train.batch_size,
        "compile_seconds": round(compile_seconds, 3),
        "compile_seconds_cached": None if cached_seconds is None else round(cached_seconds, 3),
        "steps_timed": steps,
        "step_seconds_median": round(median, 6),
        "step_seconds_min": round(min(seconds[2:]), 6),
        "clips_per_second": round(config.train.batch_size / median, 2),
        "flops_per_step": flops,
        "flops_formula": FLOPS_FORMULA,
        "compiler_flops_per_device": analysis.get("flops"),
        "flops_per_second": flops / median,
        "peak_flops_per_device": peak_flops,
        "mfu": None if peak_flops is None else flops / (median * devices * peak_flops),
        "mfu_formula": MFU_FORMULA,
        **_memory(compiled),
        **fed,
    }


def compile_twice(traced: Any) -> tuple[Any, float, float | None]:
    """Compiles a traced function with an empty compilation cache, and again from what that left there.

    Returns:
        The program, the seconds of both; None where the platform cannot keep the program.
    """
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, value in zip(names, (folder, 0.0, -1), strict=True):
                jax.config.update(name, value)
            for _ in range(2):
                jax.clear_caches()
                compilation_cache.reset_cache()
                lowered = traced.lower()
                start = time.perf_counter()
                compiled = lowered.compile()
                seconds.append(time.perf_counter() - start)
            kept = any(pathlib.Path(folder).iterdir())
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
    return compiled, seconds[0], seconds[1] if kept else None


def _memory(compiled: Any) -> dict[str, Any]:
    analysis = compiled.memory_analysis()
    kinds = ("argument", "output", "alias", "temp")
    of_device = jax.local_devices()[0].memory_stats() or {}
    return {
        "compiler_bytes_per_device": {
            kind: getattr(analysis, f"{kind}_size_in_bytes", None) for kind in kinds
        },
        "peak_bytes_of_device": of_device.get("peak_bytes_in_use"),
        "peak_bytes_of_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _measure_fed(
    train_step: Any,
    state: Any,
    frozen: Any,
    batches: Iterator[dict[str, np.ndarray]] | None,
    mesh: Mesh,
    steps: int,
) -> dict[str, Any]:
    """Trains as the loop does, on the pipeline's batches, and tells how much of the time it waited for them."""
    if batches is None:
        return {"fed_clips_per_second": None, "input_wait_share": None}
    waited, clips, begin, previous = 0.0, 0, 0.0, None
    for step in range(steps + 2):
        if step == 2:  # compiled and warm
            waited, clips, begin = 0.0, 0, time.perf_counter()
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        state, metrics = train_step(state, frozen, sharding.to_global(batch, mesh))
        clips += len(batch["mask"])
        if previous is not None:  # one step late, as in training
            previous.block_until_ready()
        previous = metrics["loss"]
    jax.block_until_ready(previous)
    seconds = time.perf_counter() - begin
    return {
        "fed_clips_per_second": round(clips / seconds, 2),
        "input_wait_share": round(waited / seconds, 4),
    }


def count_flops(jaxpr: core.Jaxpr) -> float:
    """Returns the floating point operations of the matrix products and convolutions of a jaxpr."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = _shape(equation.invars[0])
            inner = math.prod(shape[axis] for axis in contracted)
            total += 2.0 * inner * math.prod(_shape(equation.outvars[0]))
        elif equation.primitive.name == "conv_general_dilated":
            kernel = _shape(equation.invars[1])
            out_features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            window = math.prod(kernel) / out_features
            total += 2.0 * window * math.prod(_shape(equation.outvars[0]))
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(count_flops(inner) for inner in inner_jaxprs(equation.params))
    return total


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def inner_jaxprs(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """Yields the jaxprs among an equation's parameters: of calls, loops, rematerialised parts and branches."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def measure_input(batches: Iterator[dict[str, np.ndarray]], count: int) -> dict[str, Any]:
    """Reads `count` batches after one that is not timed; returns clips a second and what was read."""
    next(batches)
    start = time.perf_counter()
    clips = sum(len(next(batches)["mask"]) for _ in range(count))
    seconds = time.perf_counter() - start
    return {"input_clips_per_second": round(clips / seconds, 2), "input_batches_timed": count}
