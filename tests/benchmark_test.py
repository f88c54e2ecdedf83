import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from ravar_jax import benchmark
from tests import tiny_run, untrained_run


def test_flops_are_those_of_the_products_with_loops_multiplied_out():
    weights = jnp.ones((10, 64, 64))

    def forward(x, weights):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jax.lax.scan(layer, x, weights)[0].sum()

    x = jnp.ones((8, 64))
    one_pass = 2 * 8 * 64 * 64 * 10
    assert benchmark.count_flops(jax.make_jaxpr(forward)(x, weights).jaxpr) == one_pass
    backward = jax.make_jaxpr(jax.grad(forward, argnums=(0, 1)))(x, weights)
    assert benchmark.count_flops(backward.jaxpr) == 4 * one_pass  # forward, again, and two products


def test_flops_of_a_convolution():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    jaxpr = jax.make_jaxpr(convolve)(jnp.ones((2, 9, 9, 3)), jnp.ones((3, 3, 3, 5))).jaxpr
    assert benchmark.count_flops(jaxpr) == 2 * (2 * 7 * 7 * 5) * (3 * 3 * 3)


def test_second_compilation_comes_from_the_cache():
    hits = []
    jax.monitoring.register_event_listener(
        lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None
    )
    before = jax.config.jax_compilation_cache_dir
    traced = jax.jit(lambda x: jnp.sin(x) @ x).trace(jnp.ones((8, 8)))
    compiled, cold, cached = benchmark.compile_twice(traced)
    assert len(hits) == 1
    assert cold > 0
    assert cached is not None
    assert compiled(jnp.zeros((8, 8))).sum() == 0
    assert jax.config.jax_compilation_cache_dir == before


def test_waiting_for_input_is_measured():
    def batches():
        while True:
            time.sleep(0.05)
            yield tiny_run.make_batch(1)

    config, task = tiny_run.make_config(), tiny_run.make_task()
    batch = tiny_run.make_batch(1)
    shares = [
        benchmark.measure_step(config, task, batch, steps=4, peak_flops=None, batches=fed)[
            "input_wait_share"
        ]
        for fed in (batches(), iter([batch] * 6))
    ]
    assert shares[0] > 0.5 > shares[1]


def test_input_speed_counts_clips():
    batches = iter([{"mask": [1, 1]}] * 4)
    result = benchmark.measure_input(batches, 3)
    assert result["input_batches_timed"] == 3
    assert result["input_clips_per_second"] > 0


@pytest.mark.parametrize(("source", "weights"), [("features", True), ("pixels", False)])
def test_command_times_a_step_without_tensorflow(repository, tmp_path, source, weights):
    untrained_run.write_backbone(tmp_path / "backbone")
    if not weights:
        for file in (tmp_path / "backbone").iterdir():
            if file.name != "config.json":
                file.unlink()
    changes = {
        "model.width": untrained_run.WIDTH,
        "model.num_query_tokens": 8,
        "model.backbone": tmp_path / "backbone",
        "data.image_size": untrained_run.IMAGE_SIZE,
        "data.text_length": untrained_run.TEXT_LENGTH,
        "data.data_dir": tmp_path / "data",
        "train.batch_size": 4,
    }
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    flags += [f"--input={source}", "--steps=2", "--peak_flops=1e12"]
    flags += [f"--random_weights={not weights}"]
    program = (
        "import runpy, sys; sys.modules['tensorflow'] = None; "
        f"sys.argv = ['launch/benchmark.py', *{flags!r}]; "
        "runpy.run_path('launch/benchmark.py', run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=repository,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed["input"] == source
    for absent in ("input_clips_per_second", "input_wait_share", "fed_clips_per_second"):
        assert printed[absent] is None
    assert 0 < printed["compile_seconds_cached"] < printed["compile_seconds"]
    assert printed["compiler_bytes_per_device"]["argument"] > 0
    assert printed["peak_bytes_of_process"] > 1e7
    used = printed["step_seconds_median"] * printed["devices"] * printed["peak_flops_per_device"]
    assert printed["mfu"] == pytest.approx(printed["flops_per_step"] / used, rel=1e-3)
    assert printed["clips_per_second"] == pytest.approx(
        4 / printed["step_seconds_median"], rel=1e-2
    )
