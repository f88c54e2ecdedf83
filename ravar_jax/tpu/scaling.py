"""How a train step scales over slices of one generation, at a fixed batch a chip, from the compiler's collectives.

    T(n) = compute + exposed                          estimated seconds of a step on n chips (`report.py`)
    efficiency(n) = compute / (compute + exposed)     exposed: collective time that does not overlap (`collectives.py`)
    T(smallest) / T(n)                                the same clips a chip: 1 is perfect scaling

`compute` is a roofline, so faster than a real chip is, which makes the efficiency a careful one. Input is not in it.
"""

import math
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from ravar_jax import sharding
from ravar_jax.tpu import programs, report
from ravar_jax.tpu.chips import Chip, describe_slice, slices_of

SMALLEST = 16
LARGEST = 512  # or the generation's
TARGET = 0.9
_MOST_CLIPS = 4096  # a chip, where the search for the target ends


def scaling(config: ConfigDict, chip: Chip, batch_per_chip: int) -> Iterator[dict[str, Any]]:
    """Yields one row a slice size, as it is compiled.

    Where clips come from a cache, a row also has `batch_for_target`: the fewest clips a chip, doubling from
    `batch_per_chip`, at which efficiency reaches `TARGET`; None where it is not reached.
    """
    first = None
    enough = batch_per_chip
    for shape in slices_of(chip, SMALLEST, LARGEST):
        row = _measure(config, chip, shape, batch_per_chip)
        if "step_seconds" in row:
            first = first or row["step_seconds"]
            row["relative_speed"] = first / row["step_seconds"]
            if config.data.feature_cache:
                # More chips never need fewer clips.
                found = row
                if enough > batch_per_chip:
                    found = _measure(config, chip, shape, enough)
                while _misses(found) and enough < _MOST_CLIPS:
                    enough *= 2
                    found = _measure(config, chip, shape, enough)
                reached = found.get("efficiency", 0.0) >= TARGET
                row["batch_for_target"] = enough if reached else None
        yield row


def _misses(row: dict[str, Any]) -> bool:
    """Whether a row that fits has too low an efficiency, so that more clips may help."""
    return "step_seconds" in row and row["efficiency"] < TARGET


def _measure(
    config: ConfigDict, chip: Chip, shape: tuple[int, ...], batch_per_chip: int
) -> dict[str, Any]:
    config = config.copy_and_resolve_references()
    config.train.batch_size = batch_per_chip * math.prod(shape)
    where = describe_slice(chip, shape)
    mesh = sharding.make_mesh(config.mesh, where.devices)
    task, _ = programs.task_of(config)
    step = report.measure(programs.trace_train_step(config, task, mesh), mesh, where)
    row: dict[str, Any] = {"topology": where.name, "chips": where.num_chips}
    row |= {"batch_per_chip": batch_per_chip, "fits": step["fits"]}
    if "memory" in step:
        row["memory_per_chip"] = step["memory"]["total"] * len(where.devices) / where.num_chips
        for key in (
            "collective_bytes",
            "compute_seconds",
            "exposed_seconds",
            "step_seconds",
            "efficiency",
        ):
            row[key] = step[key]
    return row


def heading() -> str:
    """Returns the table's first line."""
    return (
        f"{'slice':<12}{'chips':>6}{'clips/chip':>12}{'GB/chip':>9}{'collective MB':>15}{'step ms':>10}"
        f"{'efficiency':>12}{'T(16)/T(n)':>12}{'clips/chip for 90 %':>21}"
    )


def line(row: dict[str, Any]) -> str:
    """Returns a row as text."""
    start = f"{row['topology']:<12}{row['chips']:>6}{row['batch_per_chip']:>12}"
    if "step_seconds" not in row:
        return f"{start}  does not fit"
    target = row.get("batch_for_target", "-")
    return (
        f"{start}{row['memory_per_chip'] / 1e9:>9.2f}{row['collective_bytes'] / 1e6:>15.2f}"
        f"{1e3 * row['step_seconds']:>10.3f}{row['efficiency']:>12.1%}{row['relative_speed']:>12.3f}"
        f"{'not reached' if target is None else target:>21}"
    )
