"""The 63 tensors of the released fusion (spec section 8) and RefAtomNet's parameters."""

from ravar_jax.conversion.mapping import Row, dense_rows, norm_rows

_HEADS = {
    "bbox_regressio_head": ("box_head", ("0", "2", "4")),  # the release's spelling
    "classification_head": ("action_head", ("0", "3", "5")),
}
_AGENT_BLOCKS = ("agent_temporal", "agent_box", "agent_semantic")
_DENSE_OF_BLOCK = {
    "attn.proj": "attention/output",
    "attn.pool.0": "attention/pool_in",
    "attn.pool.2": "attention/pool_out",
    "mlp.fc1": "mlp_in",
    "mlp.fc2": "mlp_out",
}


def fusion_table() -> tuple[Row, ...]:
    """Returns the table of the released fusion."""
    rows = [
        *dense_rows("proj", "project_detections"),
        *dense_rows("proj_box", "expand_boxes"),
        *dense_rows("proj_sem", "expand_text"),
    ]
    for block in _AGENT_BLOCKS:
        for norm in ("norm1", "norm2"):
            rows += norm_rows(f"{block}.{norm}", f"{block}/{norm}")
        rows.append(Row((f"{block}.attn.qkv.weight",), f"{block}/attention/{{}}_kernel", "qkv"))
        for torch_name, path in _DENSE_OF_BLOCK.items():
            rows += dense_rows(f"{block}.{torch_name}", f"{block}/{path}")
    for torch_head, (head, indices) in _HEADS.items():
        for layer, index in enumerate(indices, start=1):
            rows += dense_rows(f"{torch_head}.{index}", f"{head}/layer{layer}")
    return tuple(rows)
