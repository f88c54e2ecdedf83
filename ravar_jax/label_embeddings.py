"""The label table of the location-semantic stream, made with XLM-R from the names of the COCO classes (spec 3.3).

names --SentencePiece (the user's file)--> pieces --label_ids--> ids --label_embeddings--> table (91, 768)
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ravar_jax.class_names import COCO_NAMES
from ravar_jax.models.xlm_roberta import BEGIN, END, PAD, UNKNOWN, XlmRoberta


def label_ids(pieces: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns XLM-R's token ids and mask, int32 (n, L), of names, with BEGIN and END, padded to the longest.

    Args:
        pieces: of each name, as the SentencePiece model numbers them. fairseq put its own special tokens in front, so
            its ids are one more, and the unknown piece, 0 there, is UNKNOWN.
    """
    length = max(len(name) for name in pieces) + 2
    ids = np.full((len(pieces), length), PAD, np.int32)
    for row, name in enumerate(pieces):
        moved = [UNKNOWN if piece == 0 else piece + 1 for piece in name]
        ids[row, : len(name) + 2] = [BEGIN, *moved, END]
    return ids, (ids != PAD).astype(np.int32)


def label_embeddings(
    model: XlmRoberta, params: Any, token_ids: np.ndarray, attention_mask: np.ndarray
) -> jax.Array:
    """Returns the label table (91, D) float32: the mean of each name's tokens, BEGIN and END too.

    Args:
        model: XLM-R base for the released table, D = 768.
        params: its parameters.
        token_ids: (91, L), rows in the order of `COCO_NAMES`.
        attention_mask: (91, L).

    Raises:
        ValueError: if there is not one row for each name.
    """
    if len(token_ids) != len(COCO_NAMES):
        raise ValueError(f"{len(token_ids)} rows of ids, but {len(COCO_NAMES)} names")
    tokens: Any = model.apply({"params": params}, token_ids, attention_mask)
    weights = jnp.asarray(attention_mask, jnp.float32)[..., None]
    return (tokens * weights).sum(axis=1) / weights.sum(axis=1)
