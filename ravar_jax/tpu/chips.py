"""TPU generations, the slices that exist of them, and the devices of a slice without having it.

    "v5e:4x4" --table of chips--> libtpu's description of the slice --> devices that `jit(...).lower().compile()` takes

Peaks and bandwidths are Google's published ones (cloud.google.com/tpu/docs); a link's is what is left of it in use.
"""

import dataclasses
import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from ravar_jax.errors import UsageError, UserError
from ravar_jax.tpu.host import NO_HOST


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation.

    Attributes:
        name: as in a topology's name.
        hbm_bytes: memory of a chip.
        peak_flops: bfloat16 operations a second.
        hbm_bandwidth: bytes a second.
        link_bandwidth: bytes a second of one inter-chip link in one direction; a chip has two links an axis.
        ring_multiple: an axis whose length is a multiple of it is closed to a ring.
        slices: the shapes that can be had, smallest first.
        options: what libtpu must be told of a slice for one device a chip, as JAX sees it on the real one.
    """

    name: str
    hbm_bytes: float
    peak_flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    ring_multiple: int
    slices: tuple[tuple[int, ...], ...]
    options: tuple[tuple[str, str], ...] = ()


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = tuple(
    sorted(
        [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
        + [
            (4 * a, 4 * b, 4 * c)
            for a in range(1, 5)
            for b in range(a, 5)
            for c in range(b, 7)
            if 64 * a * b * c <= 4096
        ],
        key=math.prod,
    )
)
_ONE_DEVICE = (("chip_config_name", "megacore"),)

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32e9, 275e12, 1228e9, 45e9, 4, _CUBES, _ONE_DEVICE),
        Chip("v5e", 16e9, 197e12, 819e9, 45e9, 16, _FLAT),
        Chip("v5p", 95e9, 459e12, 2765e9, 90e9, 4, _CUBES, _ONE_DEVICE),
        Chip("v6e", 32e9, 918e12, 1640e9, 90e9, 16, _FLAT),
    )
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice.

    Attributes:
        chip: what it is made of.
        shape: chips along each axis of the network.
        devices: what a mesh is made of.
    """

    chip: Chip
    shape: tuple[int, ...]
    devices: Sequence[jax.Device]

    @property
    def name(self) -> str:
        """As on the command line."""
        return topology_name(self.chip, self.shape)

    @property
    def num_chips(self) -> int:
        """Distinct coordinates: without megacore, v4 and v5p show two devices a chip."""
        return len({tuple(device.coords) for device in self.devices})

    @property
    def hbm_per_device(self) -> float:
        """Bytes: a device's share of its chip."""
        return self.chip.hbm_bytes * self.num_chips / len(self.devices)

    @property
    def flops_per_device(self) -> float:
        """A second, a device's share of its chip."""
        return self.chip.peak_flops * self.num_chips / len(self.devices)

    @property
    def bandwidth_per_device(self) -> float:
        """Bytes of HBM a second, a device's share of its chip."""
        return self.chip.hbm_bandwidth * self.num_chips / len(self.devices)


def topology_name(chip: Chip, shape: tuple[int, ...]) -> str:
    """Returns "v5e:4x4" of a chip and a shape."""
    return f"{chip.name}:{'x'.join(map(str, shape))}"


def parse_topology(name: str) -> tuple[Chip, tuple[int, ...]]:
    """Returns chip and shape of "v5e:4x4".

    Raises:
        UsageError: there is no such slice; the message lists some that exist.
    """
    kind, _, layout = name.partition(":")
    chip = CHIPS.get(kind)
    if chip is None:
        some = ", ".join(topology_name(chip, chip.slices[3]) for chip in CHIPS.values())
        raise UsageError(f"--topology={name}: there is no TPU {kind!r}; some that exist: {some}")
    shape = tuple(int(size) if size.isdecimal() else 0 for size in layout.split("x"))
    if shape in chip.slices:
        return chip, shape
    largest, some = (
        math.prod(chip.slices[-1]),
        ", ".join(topology_name(chip, shape) for shape in chip.slices[:8]),
    )
    count = math.prod(shape)
    beyond = f"{count} chips are more than the {largest} of the largest" if count > largest else ""
    raise UsageError(
        f"--topology={name}: {beyond or 'no such slice'} of TPU {kind}; some that exist: {some}"
    )


def describe_slice(chip: Chip, shape: tuple[int, ...]) -> Slice:
    """Returns a slice with the devices that libtpu describes.

    Raises:
        UserError: libtpu is not installed, or refuses the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            'libtpu, which compiles for TPU, is not installed: pip install "jax[tpu]" (Linux on x86-64, about 700 MB)'
        )
    # There is no TPU that two processes could both want. What a real host is must not matter either.
    os.environ.update(NO_HOST, TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    options: dict[str, Any] = dict(chip.options)
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    name = topology_name(chip, shape)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={name}: libtpu refuses it: {error}") from error
    return Slice(chip, shape, found.devices)


def slices_of(chip: Chip, smallest: int, largest: int) -> list[tuple[int, ...]]:
    """Returns one shape for each number of chips that is a power of two from `smallest` to `largest`.

    Of several shapes of as many chips it is the most compact.
    """
    shapes: dict[int, tuple[int, ...]] = {}
    for shape in chip.slices:
        count = math.prod(shape)
        if smallest <= count <= largest and count.bit_count() == 1:
            shapes[count] = min(shapes.get(count, shape), shape, key=max)
    return [shapes[count] for count in sorted(shapes)]
