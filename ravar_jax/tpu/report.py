"""What a step needs of a slice and how long it takes there: one dict for JSON, one table for people.

The step time is a roofline, a lower bound and an estimate: all operations at the chip's peak, or all traffic with HBM
at its bandwidth, whichever takes longer, and then the collectives that do not overlap (`collectives.py`).
"""

import math
import time
from typing import Any

import jax
from jax.extend import core
from jax.sharding import Mesh

from ravar_jax.benchmark import FLOPS_FORMULA, count_flops, inner_jaxprs
from ravar_jax.tpu.chips import Slice
from ravar_jax.tpu.collectives import read_collectives, summarize
from ravar_jax.tpu.hlo import Program

FORMULAS = {
    "flops_per_step": FLOPS_FORMULA,
    "flops_per_device": "2*M*N*K of every matrix product and convolution of the compiled program of one device, those "
    "in a loop's body times its trips",
    "compiler_flops_per_device": "XLA's own count, in which a loop's body counts once",
    "total": "arguments + outputs - aliased + temporaries + code, bytes a device",
    "compute_seconds": "max(flops_per_device / peak, hbm_bytes / bandwidth): an estimate, a lower bound",
    "step_seconds": "compute_seconds + exposed_seconds of all collectives: an estimate",
    "efficiency": "compute_seconds / step_seconds",
}
_LARGEST = 5


def measure(traced: jax.stages.Traced, mesh: Mesh, where: Slice) -> dict[str, Any]:
    """Compiles a traced step for the devices of a slice and reports what came out (`FORMULAS`)."""
    start = time.perf_counter()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        line = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
        return {"fits": False, "compiler": line, "largest": _largest(traced)}
    seconds = time.perf_counter() - start
    text = compiled.as_text()
    assert text is not None
    program = Program(text)
    collectives = summarize(read_collectives(program, mesh, where))
    memory = _memory(compiled.memory_analysis())
    flops, moved = program.flops, program.hbm_bytes
    compute = max(flops / where.flops_per_device, moved / where.bandwidth_per_device)
    exposed = sum(row["exposed_seconds"] for row in collectives)
    return {
        "fits": memory["total"] <= where.hbm_per_device,
        "memory": memory,
        "memory_share": memory["total"] / where.hbm_per_device,
        "largest": _largest(traced),
        "flops_per_step": count_flops(traced.jaxpr.jaxpr),
        "flops_per_device": flops,
        "compiler_flops_per_device": (compiled.cost_analysis() or {}).get("flops"),
        "hbm_bytes": moved,
        "unknown_loops": program.unknown_loops,
        "collectives": collectives,
        "collective_bytes": sum(row["bytes"] for row in collectives),
        "compute_seconds": compute,
        "exposed_seconds": exposed,
        "step_seconds": compute + exposed,
        "efficiency": compute / (compute + exposed) if compute + exposed else 1.0,
        "compile_seconds": round(seconds, 1),
    }


def _memory(stats: Any) -> dict[str, int]:
    kinds = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    return kinds | {"total": sum(kinds.values()) - 2 * kinds["aliased"]}


def _largest(traced: jax.stages.Traced) -> list[dict[str, Any]]:
    """Returns the largest arguments and the largest results of the traced step, each `name`, `shape`, `bytes`.

    They are whole: what a device holds of them depends on the mesh. XLA may fuse a result away.
    """
    rows = [
        _row(jax.tree_util.keystr(path[1:], simple=True, separator="/"), info)
        for path, info in jax.tree_util.tree_leaves_with_path(traced.args_info)
    ]
    kinds: tuple[list[dict[str, Any]], ...] = (rows, _results(traced.jaxpr.jaxpr, ""))
    return [row for kind in kinds for row in sorted(kind, key=lambda row: -row["bytes"])[:_LARGEST]]


def _results(jaxpr: core.Jaxpr, scope: str) -> list[dict[str, Any]]:
    """Returns the distinct results of a jaxpr's equations, inner ones included."""
    rows: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    for equation in jaxpr.eqns:
        inner_scope = "/".join(filter(None, (scope, str(equation.source_info.name_stack))))
        inner = list(inner_jaxprs(equation.params))
        found = [row for each in inner for row in _results(each, inner_scope)]
        if not inner:
            name = f"{inner_scope}/{equation.primitive.name}"
            found = [_row(name, each.aval) for each in equation.outvars]
        for row in found:
            rows.setdefault((row["name"], tuple(row["shape"])), row)
    return list(rows.values())


def _row(name: str, array: Any) -> dict[str, Any]:
    size = math.prod(array.shape) * getattr(array.dtype, "itemsize", 4)
    return {"name": name, "shape": list(array.shape), "dtype": str(array.dtype), "bytes": size}


def does_not_fit(name: str, result: dict[str, Any], where: Slice) -> str:
    """Returns why a step does not fit, naming its largest tensors."""
    why = (
        f"{gigabytes(result['memory']['total'])} GB a device"
        if "memory" in result
        else result["compiler"]
    )
    largest = "; ".join(
        f"{row['name']} {row['dtype']}{row['shape']} {gigabytes(row['bytes'])} GB"
        for row in sorted(result["largest"], key=lambda row: -row["bytes"])[:_LARGEST]
    )
    room = gigabytes(where.hbm_per_device)
    return f"{name} does not fit {where.name}, {room} GB a device: {why}; largest tensors, whole: {largest}"


def table(result: dict[str, Any]) -> str:
    """Returns the report of `launch/compile_for_tpu.py` as text."""
    lines = [
        f"{result['config']} on {result['topology']}: {result['chips']} chips, {result['devices']} devices, "
        f"{result['hosts']} hosts, mesh {' x '.join(f'{k} {v}' for k, v in result['mesh'].items())}",
        f"sizes: {result['sizes']}",
    ]
    for name, step in result["steps"].items():
        if "skipped" in step:
            lines += ["", f"{name}: skipped, {step['skipped']}"]
            continue
        lines += ["", f"{name}, {step['rows']:,} {step['unit']} a step"]
        if "memory" not in step:
            lines.append(f"  does not fit: {step['compiler']}")
            continue
        memory = step["memory"]
        kinds = ", ".join(f"{k} {gigabytes(v)}" for k, v in memory.items() if k != "total")
        verdict = "fits" if step["fits"] else "DOES NOT FIT"
        lines += [
            f"  HBM a device, GB  {gigabytes(memory['total'])} of {gigabytes(result['hbm_per_device'])} "
            f"({step['memory_share']:.0%}), {verdict}: {kinds}",
            f"  TFLOP             {step['flops_per_step'] / 1e12:,.3f} a step, "
            f"{step['flops_per_device'] / 1e12:,.4f} a device as compiled",
            f"  estimated step    {milliseconds(step['step_seconds'])} ms = compute "
            f"{milliseconds(step['compute_seconds'])} + collectives {milliseconds(step['exposed_seconds'])} "
            f"(roofline); efficiency {step['efficiency']:.1%}",
        ]
        for row in step["collectives"]:
            lines.append(
                f"  {row['kind']:<18}over {' x '.join(row['axes']) or 'nothing'}: {row['count']:.0f} a step, "
                f"{row['bytes'] / 1e6:,.3f} MB, {milliseconds(row['seconds'])} ms"
            )
        if not step["collectives"]:
            lines.append("  collectives       none")
        if step["unknown_loops"]:
            lines.append(f"  counted once: loops of unknown length, {step['unknown_loops']}")
        lines.append(f"  compiled in       {step['compile_seconds']:.0f} s")
    return "\n".join(lines)


def gigabytes(count: float) -> str:
    """Returns bytes as 10^9 bytes."""
    return f"{count / 1e9:.2f}"


def milliseconds(seconds: float) -> str:
    """Returns seconds as milliseconds."""
    return f"{1e3 * seconds:.3f}"
