"""Rows of the parts of a BERT layer, which the Q-Former and XLM-R share."""

from ravar_jax.conversion.mapping import Row, dense_rows, norm_rows


def attention_rows(torch_name: str, inner: str, path: str) -> list[Row]:
    """Returns the rows of a BERT attention with its output projection and norm.

    Args:
        torch_name: of the attention.
        inner: what the checkpoint calls the module of the three projections.
        path: of `models.qformer.Attention`.
    """
    rows: list[Row] = []
    for part in ("query", "key", "value"):
        rows += dense_rows(f"{torch_name}.{inner}.{part}", f"{path}/{part}")
    rows += dense_rows(f"{torch_name}.output.dense", f"{path}/output")
    rows += norm_rows(f"{torch_name}.output.LayerNorm", f"{path}/norm")
    return rows


def mlp_rows(layer: str, path: str, *, suffix: str = "", prefix: str = "") -> list[Row]:
    """Returns the rows of a BERT layer's MLP; `suffix` and `prefix` tell a second MLP from the first."""
    return [
        *dense_rows(f"{layer}.intermediate{suffix}.dense", f"{path}/{prefix}mlp_in"),
        *dense_rows(f"{layer}.output{suffix}.dense", f"{path}/{prefix}mlp_out"),
        *norm_rows(f"{layer}.output{suffix}.LayerNorm", f"{path}/{prefix}mlp_norm"),
    ]
