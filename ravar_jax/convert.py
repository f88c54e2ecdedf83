"""PyTorch parameter names and layouts to this project's, and back: one mapping table per model, numpy only.

A table row is (PyTorch name, path here, layout). `dense` transposes (out, in) to (in, out); `qkv` splits the fused
weight (3 D, D) into three kernels in the order query, key, value; `as_is` copies.
"""

from collections.abc import Mapping

import numpy as np

from ravar_jax.errors import UserError

Params = dict[str, "Params | np.ndarray"]

_HEADS = {
    "bbox_regressio_head": ("box_head", ("0", "2", "4")),  # the release's spelling
    "classification_head": ("action_head", ("0", "3", "5")),
}
_AGENT_BLOCKS = ("agent_temporal", "agent_box", "agent_semantic")


def _dense_rows(torch_name: str, path: str) -> list[tuple[str, str, str]]:
    return [
        (f"{torch_name}.weight", f"{path}/kernel", "dense"),
        (f"{torch_name}.bias", f"{path}/bias", "as_is"),
    ]


def _fusion_mapping() -> tuple[tuple[str, str, str], ...]:
    rows = []
    for torch_name, path in (
        ("proj", "project_detections"),
        ("proj_box", "expand_boxes"),
        ("proj_sem", "expand_text"),
    ):
        rows += _dense_rows(torch_name, path)
    for block in _AGENT_BLOCKS:
        for norm in ("norm1", "norm2"):
            rows.append((f"{block}.{norm}.weight", f"{block}/{norm}/scale", "as_is"))
            rows.append((f"{block}.{norm}.bias", f"{block}/{norm}/bias", "as_is"))
        rows.append((f"{block}.attn.qkv.weight", f"{block}/attention/{{}}_kernel", "qkv"))
        rows += _dense_rows(f"{block}.attn.proj", f"{block}/attention/output")
        rows += _dense_rows(f"{block}.attn.pool.0", f"{block}/attention/pool_in")
        rows += _dense_rows(f"{block}.attn.pool.2", f"{block}/attention/pool_out")
        rows += _dense_rows(f"{block}.mlp.fc1", f"{block}/mlp_in")
        rows += _dense_rows(f"{block}.mlp.fc2", f"{block}/mlp_out")
    for torch_head, (head, indices) in _HEADS.items():
        for layer, index in enumerate(indices, start=1):
            rows += _dense_rows(f"{torch_head}.{index}", f"{head}/layer{layer}")
    return tuple(rows)


# The 63 tensors of the released fusion (spec section 8).
FUSION_MAPPING = _fusion_mapping()


def fusion_from_torch(state_dict: Mapping[str, np.ndarray]) -> Params:
    """Returns RefAtomNet parameters from the release's 63 fusion tensors.

    Raises:
        UserError: naming every missing and every unknown key at once.
    """
    known = {row[0] for row in FUSION_MAPPING}
    missing, unknown = sorted(known - set(state_dict)), sorted(set(state_dict) - known)
    if missing or unknown:
        raise UserError(
            f"not a RefAtomNet fusion: missing {missing or 'none'}, unknown {unknown or 'none'}"
        )
    params: Params = {}
    for torch_name, path, layout in FUSION_MAPPING:
        array = np.asarray(state_dict[torch_name])
        if layout == "qkv":
            for name, part in zip(("query", "key", "value"), np.split(array, 3), strict=True):
                _assign(params, path.format(name), part.T)
        else:
            _assign(params, path, array.T if layout == "dense" else array)
    return params


def fusion_to_torch(params: Mapping) -> dict[str, np.ndarray]:
    """Returns the release's 63 tensors from RefAtomNet parameters, or from a tree of their gradients."""
    state_dict = {}
    for torch_name, path, layout in FUSION_MAPPING:
        if layout == "qkv":
            parts = [_lookup(params, path.format(name)) for name in ("query", "key", "value")]
            state_dict[torch_name] = np.concatenate([part.T for part in parts])
        else:
            array = _lookup(params, path)
            state_dict[torch_name] = array.T if layout == "dense" else array
    return state_dict


def _assign(tree: Params, path: str, array: np.ndarray) -> None:
    *folders, leaf = path.split("/")
    for folder in folders:
        tree = tree.setdefault(folder, {})  # type: ignore[assignment]
    tree[leaf] = np.ascontiguousarray(array)


def _lookup(tree: Mapping, path: str) -> np.ndarray:
    for key in path.split("/"):
        tree = tree[key]
    return np.asarray(tree)
