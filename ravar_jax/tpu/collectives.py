"""The collectives of a compiled program: bytes, mesh axes, and how long they take on the slice's network.

An estimate, of `b` bytes among `n` devices, with `w` bytes a second in and out of a chip along the axes of the network
that the group spans (a ring counts both its directions, a line one), and a microsecond for each hop:

    all-gather, reduce-scatter    (n - 1) / n * b / w + hops       b: the whole array
    all-reduce                    twice that
    all-to-all                    (n - 1) / n * b / w / 2 + hops   b: a device's share
    collective-permute            b / w + hops

A synchronous collective overlaps with nothing. Of an asynchronous one, the roofline time of what is scheduled between
its start and its end is taken off.
"""

import dataclasses
import math
import re
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ravar_jax.tpu.chips import Slice
from ravar_jax.tpu.hlo import Program, Run

HOP_SECONDS = 1e-6
_FACTORS = {"all-reduce": 2.0, "all-to-all": 0.5, "ragged-all-to-all": 0.5}
KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective instruction.

    Attributes:
        kind: of `KINDS`.
        axes: of the mesh, those along which a group's devices differ.
        group: devices that take part together.
        bytes: of one run on one device, as the table above counts them.
        times: runs in a step.
        seconds: of one run, estimated.
        exposed_seconds: of one run, what does not overlap with other work.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    bytes: float
    times: float
    seconds: float
    exposed_seconds: float


def read_collectives(program: Program, mesh: Mesh, where: Slice) -> list[Collective]:
    """Returns every collective of a program compiled for a mesh over the devices of a slice."""
    return [
        _collective(program, run, kind, mesh, where)
        for run in program.runs
        if (kind := run.instruction.opcode.removesuffix("-start")) in KINDS
    ]


def summarize(collectives: list[Collective]) -> list[dict[str, Any]]:
    """Returns one row for each kind and axes: `count`, `bytes`, `seconds`, `exposed_seconds` of a step, a device."""
    rows: dict[tuple[str, tuple[str, ...]], dict[str, Any]] = {}
    for each in collectives:
        row = rows.setdefault(
            (each.kind, each.axes),
            {
                "kind": each.kind,
                "axes": list(each.axes),
                "count": 0.0,
                "bytes": 0.0,
                "seconds": 0.0,
                "exposed_seconds": 0.0,
            },
        )
        row["count"] += each.times
        for key in ("bytes", "seconds", "exposed_seconds"):
            row[key] += each.times * getattr(each, key)
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """Returns the groups (groups, devices of a group) that an instruction's attributes name, as indices into the mesh.

    XLA writes them as lists, as a transposed range, or as axes of a mesh of its own; pairs of source and target are
    groups of two.
    """
    pairs = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", attributes)
    if pairs:
        groups = [
            list(map(int, group.split(",")))
            for group in re.findall(r"[\d,]+", pairs[1][1:-1].replace("},{", " "))
        ]
        return np.asarray(groups)
    order = re.search(r"<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    shape = re.search(r"replica_groups=\[([\d,]+)\]", attributes)
    if order and shape:
        return _range(order[1], order[2]).reshape(_sizes(shape[1]))
    named = re.search(r"replica_groups=@?\w*mesh\[([^\]]*)\](.*?)\{([^}]*)\}", attributes)
    if named:
        axes = re.findall(r"'(\w+)'=(\d+)", named[1])
        ids = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", named[2])
        own = _range(ids[1], ids[2]) if ids else np.arange(devices)
        grid = own.reshape([int(size) for _, size in axes])
        picked = re.findall(r"'(\w+)'", named[3])
        if ":" not in named[3]:
            over = [index for index, (axis, _) in enumerate(axes) if axis in picked]
            rest = [index for index in range(grid.ndim) if index not in over]
            group = math.prod(grid.shape[index] for index in over)
            return grid.transpose(rest + over).reshape(-1, group)
    if "replica_groups={}" in attributes:
        return np.arange(devices)[None]
    raise ValueError(f"unknown replica groups: {attributes[:200]}")


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


def _range(sizes: str, order: str | None) -> np.ndarray:
    grid = np.arange(math.prod(_sizes(sizes))).reshape(_sizes(sizes))
    return (grid.transpose(_sizes(order)) if order else grid).ravel()


def _collective(program: Program, run: Run, kind: str, mesh: Mesh, where: Slice) -> Collective:
    instruction = run.instruction
    groups = replica_groups(instruction.attributes, mesh.size)
    places = np.stack(np.unravel_index(groups, mesh.devices.shape), axis=-1)
    axes = tuple(
        name
        for index, name in enumerate(mesh.axis_names)
        if (places[..., index] != places[:, :1, index]).any()
    )
    sent = sum(run.computation.instructions[name].bytes for name in instruction.operands)
    size = groups.shape[1]
    moved = sent * size if kind == "all-gather" else sent
    seconds = _seconds(kind, moved, groups, mesh, where)
    exposed = seconds
    if instruction.opcode.endswith("-start"):
        exposed = max(0.0, seconds - _work_until_done(program, run, where))
    return Collective(kind, axes, size, moved, run.times, seconds, exposed)


def _seconds(kind: str, moved: float, groups: np.ndarray, mesh: Mesh, where: Slice) -> float:
    coordinates = np.asarray([device.coords for device in mesh.devices.flat])[groups]
    bandwidth, hops = 0.0, 0
    for axis, length in enumerate(where.shape):
        span = int(np.ptp(coordinates[..., axis], axis=1).max())
        if span:
            ring = length % where.chip.ring_multiple == 0 and span == length - 1
            bandwidth += where.chip.link_bandwidth * (2 if ring else 1)
            hops += length // 2 if ring else span
    if not bandwidth:  # between the devices of one chip
        return moved / where.bandwidth_per_device
    share = 1.0 if kind == "collective-permute" else (groups.shape[1] - 1) / groups.shape[1]
    factor = _FACTORS.get(kind, 1.0)
    return factor * share * moved / bandwidth + max(factor, 1.0) * hops * HOP_SECONDS


def _work_until_done(program: Program, run: Run, where: Slice) -> float:
    """Returns the roofline seconds of what is scheduled between a start and its done."""
    seconds, begun = 0.0, False
    for each in run.computation.instructions.values():
        if each is run.instruction:
            begun = True
        elif begun and each.opcode.endswith("-done") and run.instruction.name in each.operands:
            break
        elif begun and each.opcode.removesuffix("-start") not in KINDS:
            flops, moved = program.cost(run.computation, each)
            seconds += max(flops / where.flops_per_device, moved / where.bandwidth_per_device)
    return seconds
