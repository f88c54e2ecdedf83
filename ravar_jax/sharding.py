"""Where arrays live on the mesh ("data", "fsdp", "tensor"): its shape in the config is the whole strategy.

`PARAM_RULES` gives every parameter a PartitionSpec by its path, and the optimizer's moments the same one; batches are
split over ("data", "fsdp"). Axes of size 1 cost nothing, so the specs never change with the mesh. Models know only
`constrain`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ravar_jax.errors import UsageError, UserError

AXES: Final = ("data", "fsdp", "tensor")
BATCH_AXES: Final = ("data", "fsdp")

_COLUMNS = PartitionSpec("fsdp", "tensor")  # (in, out) kernel whose outputs are split
_ROWS = PartitionSpec("tensor", "fsdp")  # the kernel behind it, whose inputs are split
_SPLIT_BIAS = PartitionSpec("tensor")
_REPLICATED = PartitionSpec()

# (pattern, spec): the pattern matches the end of a '/'-joined path in full, so that the moments of a parameter, which
# lie deeper in the optimizer's state, follow it. First match wins, no match is an error.
PARAM_RULES: Final[tuple[tuple[str, PartitionSpec], ...]] = (
    # Fusion. The rows of `project_detections` are 4 box coordinates and an embedding: an odd number, never split.
    (r"project_detections/kernel", PartitionSpec(None, ("fsdp", "tensor"))),
    (r"agent_\w+/attention/(query|key|value)_kernel", _COLUMNS),
    (r"agent_\w+/(attention/pool_in|mlp_in)/kernel", _COLUMNS),
    (r"agent_\w+/(attention/pool_in|mlp_in)/bias", _SPLIT_BIAS),
    (r"agent_\w+/(attention/pool_out|attention/output|mlp_out)/kernel", _ROWS),
    (r"(box|action)_head/layer1/kernel", _COLUMNS),
    (r"(box|action)_head/layer1/bias", _SPLIT_BIAS),
    (r"(box|action)_head/layer2/kernel", _ROWS),
    (r"agent_\w+/(attention/pool_out|attention/output|mlp_out)/bias", _REPLICATED),
    (r"agent_\w+/norm[12]/(scale|bias)", _REPLICATED),
    (r"(project_detections|(box|action)_head/layer2)/bias", _REPLICATED),
    (r"(box|action)_head/layer3/(kernel|bias)", _REPLICATED),
    (r"expand_(boxes|text)/(kernel|bias)", _REPLICATED),
    (r"label_table", _REPLICATED),
    # Image encoder: the leading axis of everything in `blocks` is the block.
    (r"blocks/(attention/(query|key|value)|mlp_in)/kernel", PartitionSpec(None, *_COLUMNS)),
    (r"blocks/(attention/(query|key|value)|mlp_in)/bias", PartitionSpec(None, *_SPLIT_BIAS)),
    (r"blocks/(attention/output|mlp_out)/kernel", PartitionSpec(None, *_ROWS)),
    (r"blocks/((attention/output|mlp_out)/bias|norm[12]/(scale|bias))", _REPLICATED),
    (r"visual_encoder/(cls_token|position_embedding)", _REPLICATED),
    (r"visual_encoder/(patch_embedding|stem_conv\d+)/(kernel|bias)", _REPLICATED),
    (r"visual_encoder/stem_norm\d+/(scale|bias)|vision_norm/(scale|bias)", _REPLICATED),
    # Q-Former, XLM-R and grounding decoders. A vocabulary is an odd number too.
    (r"word_embedding/embedding", PartitionSpec(None, ("fsdp", "tensor"))),
    (r"layer\d+/((cross_)?attention/(query|key|value)|(query_)?mlp_in)/kernel", _COLUMNS),
    (r"layer\d+/((cross_)?attention/(query|key|value)|(query_)?mlp_in)/bias", _SPLIT_BIAS),
    (r"layer\d+/((cross_)?attention/output|(query_)?mlp_out)/kernel", _ROWS),
    (r"layer\d+/((cross_)?attention/output|(query_)?mlp_out)/bias", _REPLICATED),
    (r"layer\d+/((cross_)?attention/norm|(query_)?mlp_norm)/(scale|bias)", _REPLICATED),
    (r"(position|token_type)_embedding/embedding|embedding_norm/(scale|bias)", _REPLICATED),
    (r"query_tokens", _REPLICATED),
    (r"(patch_)?decoder/(person|token|match_\w+)/kernel", _COLUMNS),
    (r"(patch_)?decoder/word/kernel", PartitionSpec(("fsdp", "tensor"))),
    (r"(patch_)?decoder/word_(before|after)/embedding", PartitionSpec(None, ("fsdp", "tensor"))),
    (r"(patch_)?decoder/(\w+/bias|(action|box)/kernel)", _REPLICATED),
    # DETR; its layers and box head match the rules above. Its frozen ResNet is 94 MB in all, and 92 classes are never
    # split.
    (r"resnet/(\w+/)?\w*conv\d?/kernel", _REPLICATED),
    (r"resnet/(\w+/)?\w*norm\d?/(scale|bias|mean|var)", _REPLICATED),
    (r"input_projection/kernel", PartitionSpec(None, None, ("fsdp", "tensor"))),
    (r"class_head/kernel", PartitionSpec(("fsdp", "tensor"))),
    (r"(input_projection|class_head)/bias|decoder/norm/scale|query_embedding", _REPLICATED),
)


class MeshConfig(Protocol):
    """The `mesh` section of a config: axis sizes, at most one of them -1 for the devices that are left."""

    data: int
    fsdp: int
    tensor: int


def make_mesh(mesh: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of a config over all devices, or over those given.

    Raises:
        UsageError: an axis size is neither positive nor -1, or several are -1.
        UserError: the sizes do not multiply to the number of devices.
    """
    sizes = [getattr(mesh, axis) for axis in AXES]
    named = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    devices = jax.devices() if devices is None else devices
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UsageError(f"{named}: sizes are positive, and at most one is -1 (the rest)")
    known = math.prod(size for size in sizes if size != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise UserError(
            f"{named} does not fit {len(devices)} devices: the product must be {len(devices)}"
        )
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes)
    # Auto: with Explicit, the default, a sharding constraint is an assertion instead of a request.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def matches(pattern: str, path: str) -> bool:
    """Returns whether a pattern of `PARAM_RULES` matches whole names at the end of a '/'-joined path."""
    return re.fullmatch(rf"(?:.*/)?(?:{pattern})", path) is not None


def param_spec(path: str) -> PartitionSpec:
    """Returns the spec of the first rule that matches the end of a '/'-joined path.

    Raises:
        ValueError: no rule does; the message names the path.
    """
    for pattern, spec in PARAM_RULES:
        if matches(pattern, path):
            return spec
    raise ValueError(f"no rule of sharding.PARAM_RULES matches {path}")


def infer_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns a tree of `NamedSharding`s for parameters, optimizer state or a whole train state.

    Args:
        tree: arrays or `ShapeDtypeStruct`s; scalars are replicated.
        mesh: from `make_mesh`.

    Raises:
        ValueError: a leaf matches no rule, or its rule has more axes than the leaf.
        UserError: an axis of a leaf is not divisible by the mesh axes its rule puts on it. All messages name the path.
    """

    def sharding(key_path: Any, leaf: Any) -> NamedSharding:
        if np.ndim(leaf) == 0:
            return NamedSharding(mesh, _REPLICATED)
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        spec = param_spec(path)
        if len(spec) > np.ndim(leaf):
            raise ValueError(f"{path}: shape {leaf.shape} has fewer axes than its rule {spec}")
        for size, axes in zip(leaf.shape, spec, strict=False):
            names = (axes,) if isinstance(axes, str) else axes or ()
            parts = math.prod(mesh.shape[name] for name in names)
            if size % parts:
                named = "*".join(f"mesh.{name}" for name in names)
                raise UserError(
                    f"{path}: {size} of shape {leaf.shape} is not divisible by {named}={parts}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def abstract(tree: Any, mesh: Mesh) -> Any:
    """Returns parameters or a train state as `ShapeDtypeStruct`s that carry the shardings of `infer_shardings`."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=where),
        tree,
        infer_shardings(tree, mesh),
    )


def with_sharding(tree: Any, where: NamedSharding) -> Any:
    """Returns a tree of arrays or shapes as `ShapeDtypeStruct`s that all lie as `where` says."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of every array of a batch: its rows over ("data", "fsdp")."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays of this process's part of a batch.

    Args:
        batch: arrays with the same number of rows, which all processes hold equally many of.
        mesh: from `make_mesh`.

    Raises:
        UserError: the global number of rows is not divisible by the devices they are split over.
    """
    sharding, processes = batch_sharding(mesh), jax.process_count()
    parts = _batch_parts(mesh.shape)
    arrays = {}
    for key, array in batch.items():
        rows = len(array) * processes
        if rows % parts:
            raise UserError(
                f"a global batch of {rows} examples is not divisible by mesh.data*mesh.fsdp={parts}; change "
                "train.batch_size, evaluation.batch_size or the mesh"
            )
        arrays[key] = jax.make_array_from_process_local_data(
            sharding, array, (rows, *array.shape[1:])
        )
    return arrays


def constrain(x: jax.Array) -> jax.Array:
    """Asks that axis 0 of an activation stays split as batches are; does nothing outside `jax.set_mesh`.

    Neither does it where axis 0 cannot be split evenly (a model run eagerly on one example, which JAX would refuse);
    real batches have been checked by `to_global`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % _batch_parts(mesh.shape):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def _batch_parts(mesh_shape: Mapping[str, int]) -> int:
    return math.prod(mesh_shape[axis] for axis in BATCH_AXES)
