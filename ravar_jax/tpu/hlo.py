"""What a compiled program does, read off its text: matrix products, memory traffic, collectives.

XLA's own cost analysis counts the body of a loop once. Here every computation counts as often as it runs:

    times(entry) = 1,   times(body of a loop) = times(its caller) * trips,   times(called or fused) = times(its caller)
    total = sum over instructions of times(its computation) * cost(instruction)

The trips are XLA's `known_trip_count` or, where it is not written (TPU), the constant that the loop's counter is
compared with, less what the counter starts from.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|called_computations|branch_computations)=\{?([^}=]*)")
_CALLERS = ("fusion", "call", "conditional", "async-start")
_NO_TRAFFIC = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "opt-barrier",
}


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape: its element type, sizes, bytes, and whether it lies in HBM and not on the core."""

    dtype: str
    sizes: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> float:
        """Without the padding of its tiles."""
        match = re.search(r"\d+", self.dtype)
        bits = 8 if self.dtype == "pred" else int(match[0]) if match else 0
        return math.prod(self.sizes) * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: unique in its computation.
        opcode: as XLA writes it.
        arrays: of the result.
        operands: names in the same computation.
        content: what stands in the parentheses.
        attributes: what stands behind them.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    content: str
    attributes: str

    @property
    def bytes(self) -> float:
        """Of the result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else self.name

    def called(self) -> list[str]:
        """Names of the computations it calls or fuses; not a loop's."""
        return [name for group in _CALLED.findall(self.attributes) for name in _NAME.findall(group)]

    def attribute(self, name: str) -> str:
        """The computation that an attribute names."""
        match = re.search(rf"\b{name}=%([\w.\-]+)", self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run, by name; the last is the result."""

    name: str
    instructions: dict[str, Instruction]

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        """Returns the instruction that gives an operand."""
        return self.instructions[instruction.operands[index]]

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """By number."""
        given = (each for each in self.instructions.values() if each.opcode == "parameter")
        return {int(each.content): each for each in given}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who takes an instruction as operand."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for name in set(instruction.operands):
                users[name].append(instruction)
        return users


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction with its computation and how often it runs."""

    computation: Computation
    instruction: Instruction
    times: float


class Program:
    """A compiled module.

    Attributes:
        computations: by name.
        entry: where it starts.
        runs: every instruction that runs, loops' and fusions' inside, in order.
        unknown_loops: loops whose trips could not be read; their bodies count once.
    """

    def __init__(self, text: str):
        """Args: text: `compiled.as_text()`, of a scheduled module."""
        self.computations, self.entry = _parse(text)
        self.unknown_loops: list[str] = []
        self._costs: dict[tuple[str, bool], tuple[float, float]] = {}
        self.runs = list(self._walk(self.entry, 1.0))

    def _walk(self, name: str, times: float) -> Iterator[Run]:
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            yield Run(computation, instruction, times)
            if instruction.opcode == "while":
                trips = self.trips(computation, instruction)
                if trips is None:
                    self.unknown_loops.append(instruction.op_name)
                yield from self._walk(instruction.attribute("body"), times * (trips or 1))
            elif instruction.opcode in _CALLERS:
                for called in instruction.called():
                    yield from self._walk(called, times)

    def trips(self, computation: Computation, loop: Instruction) -> int | None:
        """Returns how often a loop runs; None if the text does not say."""
        known = re.search(r'known_trip_count"?:?=?\{"?n"?[:=]"?(\d+)', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.attribute("condition")].instructions
        test = list(condition.values())[-1]
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        counter, limit = (condition[name] for name in test.operands)
        if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
            return None
        index = re.search(r"index=(\d+)", counter.attributes)
        start = computation.operand(loop, 0)
        if index and start.opcode == "tuple":
            start = computation.operand(start, int(index[1]))
            while start.opcode in ("copy", "bitcast"):
                start = computation.operand(start, 0)
            if start.opcode == "constant":
                return int(limit.content) - int(start.content)
        return None

    @property
    def flops(self) -> float:
        """2 * M * N * K of every matrix product and convolution, as often as it runs."""
        return self._cost(self.entry, False)[0]

    @property
    def hbm_bytes(self) -> float:
        """Bytes that go between HBM and core, as often as they do."""
        return self._cost(self.entry, False)[1]

    def cost(
        self, computation: Computation, instruction: Instruction, fused: bool = False
    ) -> tuple[float, float]:
        """Returns operations and bytes of HBM of an instruction with all that it calls, for one run of it."""
        flops = product_flops(computation, instruction)
        moved = 0.0 if fused else self._traffic(computation, instruction)
        if instruction.opcode == "while":
            trips = self.trips(computation, instruction) or 1
            inner = self._cost(instruction.attribute("body"), fused)
            return trips * inner[0], trips * inner[1]
        if instruction.opcode in _CALLERS:
            inside = fused or instruction.opcode == "fusion"
            for called in instruction.called():
                inner = self._cost(called, inside)
                flops, moved = flops + inner[0], moved + inner[1]
        return flops, moved

    def _cost(self, name: str, fused: bool) -> tuple[float, float]:
        if (name, fused) not in self._costs:
            computation = self.computations[name]
            costs = [
                self.cost(computation, each, fused) for each in computation.instructions.values()
            ]
            self._costs[name, fused] = (sum(c[0] for c in costs), sum(c[1] for c in costs))
        return self._costs[name, fused]

    def _traffic(self, computation: Computation, instruction: Instruction) -> float:
        """Returns the bytes of HBM that an instruction reads and writes once.

        Of an operand that a fusion only takes a slice of (a layer's weights out of a scanned stack), the slice counts;
        likewise of a result that is written into a larger array.
        """
        opcode = instruction.opcode
        if opcode in _NO_TRAFFIC or opcode.endswith("-done"):
            return 0.0
        if opcode == "custom-call" and "ConcatBitcast" in instruction.attributes:
            return 0.0
        if opcode.endswith("-start"):
            if opcode in ("copy-start", "slice-start"):
                # (result, source, ...): what is moved is the smaller of the two, and one side of it may be the core.
                moved = min(array.bytes for array in instruction.arrays[:2])
                return moved * sum(array.in_hbm for array in instruction.arrays[:2])
            return 0.0
        operands = [computation.instructions[name] for name in instruction.operands]
        if opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * _in_hbm(instruction)
        if opcode == "dynamic-update-slice":
            return 2 * _in_hbm(operands[1])
        if opcode != "fusion":
            return _in_hbm(instruction) + sum(map(_in_hbm, operands))
        inner = self.computations[instruction.called()[0]]
        total = sum(
            min(_in_hbm(operand), self._read_of(inner, index))
            for index, operand in enumerate(operands)
        )
        root = list(inner.instructions.values())[-1]
        if root.opcode == "dynamic-update-slice":
            return total + min(_in_hbm(instruction), inner.operand(root, 1).bytes)
        return total + _in_hbm(instruction)

    def _read_of(self, computation: Computation, index: int) -> float:
        """Returns the bytes of a fusion's parameter that the fusion can at most read."""
        parameter = computation.parameters[index]
        total, pending = 0.0, [parameter]
        while pending:
            value = pending.pop()
            for user in computation.users[value.name]:
                if user.opcode in ("dynamic-slice", "slice"):
                    total += user.bytes
                elif user.opcode == "bitcast":
                    pending.append(user)
                elif user.opcode == "fusion":
                    inner = self.computations[user.called()[0]]
                    total += self._read_of(inner, user.operands.index(value.name))
                elif user.opcode != "dynamic-update-slice" or user.operands[0] != value.name:
                    return parameter.bytes  # the last case is written in place
        return total


def _in_hbm(instruction: Instruction) -> float:
    return sum(array.bytes for array in instruction.arrays if array.in_hbm)


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry = ""
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            header = line.removeprefix("ENTRY ").lstrip("%")
            name = re.split(r"[ (]", header, maxsplit=1)[0]
            current = {}
            computations[name] = Computation(name, current)
            if line.startswith("ENTRY"):
                entry = name
        elif line.startswith("  ") and " = " in line:
            instruction = _instruction(line)
            current[instruction.name] = instruction
    return computations, entry


def _instruction(line: str) -> Instruction:
    left, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    content = rest[opening + 1 : closing]
    arrays = tuple(
        Array(dtype, tuple(map(int, sizes.split(","))) if sizes else (), "S(" not in layout)
        for dtype, sizes, layout in _ARRAY.findall(shape)
    )
    operands = tuple(_NAME.findall(content))
    return Instruction(
        left.lstrip("%"), rest[:opening], arrays, operands, content, rest[closing + 1 :]
    )


def _closing(text: str, opening: int) -> int:
    """Returns where the parenthesis at `opening` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"no closing parenthesis in {text[:100]!r}")


def product_flops(computation: Computation, instruction: Instruction) -> float:
    """Returns the operations of a `dot` or `convolution`, 2 for every product that is added up; 0 of anything else.

    A TPU program has convolutions in place of batched products: the batch is a spatial axis with as many strides and
    dilations as leave one product each. Positions in padding or between dilated elements are no products.
    """
    if instruction.opcode == "dot":
        left = computation.operand(instruction, 0).arrays[0].sizes
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        axes = map(int, contracted[1].split(",")) if contracted and contracted[1] else ()
        return 2.0 * math.prod(instruction.arrays[0].sizes) * math.prod(left[i] for i in axes)
    if instruction.opcode != "convolution":
        return 0.0
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None
    left, right = (computation.operand(instruction, i).arrays[0].sizes for i in (0, 1))
    result = instruction.arrays[0].sizes
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    valid = 1.0
    for axis in range(len(labels[1]) - 2):
        label = str(axis)

        def field(name: str, default: str, axis: int = axis) -> str:
            return fields[name].split("x")[axis] if name in fields else default

        size, stride = int(field("size", "1")), int(field("stride", "1"))
        low = int(field("pad", "0_0").split("_")[0])
        left_dilation, right_dilation = (int(field(f"{s}_dilate", "1")) for s in ("lhs", "rhs"))
        out = np.arange(result[labels[3].index(label)])[:, None]
        places = out * stride + np.arange(size)[None] * right_dilation - low
        extent = (left[labels[1].index(label)] - 1) * left_dilation
        inside = (places >= 0) & (places <= extent) & (places % left_dilation == 0)
        valid *= float(inside.sum())
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    rows = result[labels[3].index("b")] / (int(groups[1]) if groups else 1)
    return 2.0 * valid * rows * right[labels[2].index("i")] * right[labels[2].index("o")]
