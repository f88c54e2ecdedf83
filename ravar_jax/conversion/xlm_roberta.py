"""XLM-R as Hugging Face's `XLMRobertaModel` names it, and `models.xlm_roberta.XlmRoberta`'s parameters.

Its other classes put `roberta.` before these names; take that away before converting.
"""

from ravar_jax.conversion.bert import attention_rows, mlp_rows
from ravar_jax.conversion.mapping import Row, norm_rows

# What a checkpoint may hold beside the encoder: patterns of whole names.
IGNORED = (
    r"embeddings\.position_ids",  # 0, 1, 2, ...
    r"pooler\.dense\.(weight|bias)",
    r"lm_head\..*",
)


def xlm_roberta_table(depth: int) -> tuple[Row, ...]:
    """Returns the table; XLM-R base has a depth of 12."""
    rows = [
        Row((f"embeddings.{kind}_embeddings.weight",), f"{kind}_embedding/embedding")
        for kind in ("word", "position", "token_type")
    ]
    rows += norm_rows("embeddings.LayerNorm", "embedding_norm")
    for number in range(depth):
        layer, path = f"encoder.layer.{number}", f"layer{number}"
        rows += attention_rows(f"{layer}.attention", "self", f"{path}/attention")
        rows += mlp_rows(layer, path)
    return tuple(rows)
