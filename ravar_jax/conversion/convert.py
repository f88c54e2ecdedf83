"""Whole checkpoints of the frozen models, turned into the folders that this project reads.

    BLIP-2 (LAVIS, Hugging Face)  -->  params/, config.json, vocab.txt: a backbone's folder (`ravar_jax/backbone.py`)
                                       and unread.safetensors: LAVIS's heads, which a checkpoint written back holds too
    DETR (authors, Hugging Face)  -->  params/, config.json: a detector's folder (`ravar_jax/detector.py`)
    XLM-R (Hugging Face)          -->  label_table.npy, float32 (91, D)

A folder is written beside its place and renamed when it is complete.
"""

import contextlib
import dataclasses
import json
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy
import sentencepiece

from ravar_jax.backbone import BackboneConfig
from ravar_jax.class_names import COCO_NAMES
from ravar_jax.conversion import blip2, detr, xlm_roberta
from ravar_jax.conversion.blip2_sizes import naming_of, sizes_of
from ravar_jax.conversion.mapping import Params, from_torch
from ravar_jax.conversion.weight_files import LazyTensors
from ravar_jax.detector import param_shapes
from ravar_jax.errors import UserError
from ravar_jax.label_embeddings import label_embeddings, label_ids
from ravar_jax.models.detr import DETR_R50
from ravar_jax.models.xlm_roberta import XlmRoberta
from ravar_jax.weights import save_params
from ravar_jax.wordpiece import WordPieceTokenizer

Tensors = Mapping[str, np.ndarray]
XLMR_HEAD_WIDTH = 64
UNREAD = "unread.safetensors"


def convert_blip2(
    tensors: LazyTensors, vocab_file: pathlib.Path, output: pathlib.Path
) -> BackboneConfig:
    """Writes a BLIP-2 first stage as a backbone's folder and returns its sizes.

    Args:
        tensors: LAVIS's names, or those of Hugging Face's `Blip2ForImageTextRetrieval`.
        vocab_file: BERT's WordPiece vocabulary, without "[DEC]".
        output: folder to write; must not exist.

    Raises:
        UserError: a tensor is missing, unused or misshapen (all are named), the vocabulary is of another size, or
            `output` exists.
    """
    tensors = blip2.whole_names(tensors)
    config, params = blip2_params(tensors, vocab_file)
    with new_folder(output) as folder:
        write_blip2(folder, config, params, vocab_file, tensors)
    return config


def blip2_params(tensors: Tensors, vocab_file: pathlib.Path) -> tuple[BackboneConfig, Params]:
    """Returns sizes and parameters of a BLIP-2 first stage; raises as `convert_blip2` does."""
    config = BackboneConfig(**sizes_of(tensors))
    WordPieceTokenizer(vocab_file, config.qformer["vocab_size"])  # before gigabytes are read
    make_table, ignored = {
        "lavis": (blip2.lavis_table, blip2.LAVIS_IGNORED),
        "hf": (blip2.hf_blip2_table, blip2.HF_IGNORED),
    }[naming_of(tensors)]
    table = make_table(config.vision["depth"], config.qformer["depth"])
    shapes = jax.eval_shape(config.init, jax.random.key(0))
    return config, from_torch(
        tensors, table, model="BLIP-2 first stage", shapes=shapes, ignored=ignored
    )


def write_blip2(
    folder: pathlib.Path,
    config: BackboneConfig,
    params: Params,
    vocab_file: pathlib.Path,
    tensors: Tensors,
) -> None:
    """Writes a backbone's folder; of LAVIS's tensors also those that nothing here reads, for the way back."""
    write_model(folder, params, dataclasses.asdict(config))
    shutil.copyfile(vocab_file, folder / "vocab.txt")
    unread = {
        name: np.array(tensors[name], order="C")
        for name in tensors
        if any(re.fullmatch(pattern, name) for pattern in blip2.LAVIS_IGNORED)
    }
    if unread:
        safetensors.numpy.save_file(unread, folder / UNREAD)


def convert_detr(tensors: Tensors, output: pathlib.Path) -> None:
    """Writes DETR-R50 as a detector's folder.

    Args:
        tensors: names of the authors' file, or those of Hugging Face's `DetrForObjectDetection`.
        output: folder to write; must not exist.

    Raises:
        UserError: a tensor is missing, unused or misshapen (all are named), or `output` exists.
    """
    params = detr_params(tensors)
    with new_folder(output) as folder:
        write_model(folder, params, DETR_R50)


def detr_params(tensors: Tensors) -> Params:
    """Returns DETR-R50's parameters; raises as `convert_detr` does."""
    depths = detr.depths_of(DETR_R50)
    if "query_embed.weight" in tensors:
        table = detr.detr_table(*depths)
    else:
        timm = any(".layer1.0.conv1." in name for name in tensors)
        table = detr.hf_detr_table(*depths, timm_backbone=timm, saved=True)
    return from_torch(
        tensors,
        table,
        model="DETR-R50",
        shapes=param_shapes(DETR_R50),
        # A counter that PyTorch keeps for training; the norms are frozen.
        ignored=(r".*\.num_batches_tracked",),
    )


def convert_xlmr(tensors: Tensors, pieces_file: pathlib.Path, output: pathlib.Path) -> np.ndarray:
    """Writes `label_table.npy`, the 91 COCO names as XLM-R embeds them, and returns it, float32 (91, D).

    Args:
        tensors: names of Hugging Face's `XLMRobertaModel`, with or without `roberta.` in front.
        pieces_file: XLM-R's SentencePiece model.
        output: folder to write; must not exist.

    Raises:
        UserError: a tensor is missing, unused or misshapen (all are named), the SentencePiece model does not fit, or
            `output` exists.
    """
    tensors = {name.removeprefix("roberta."): array for name, array in tensors.items()}
    word, position = (f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position"))
    mlp = "encoder.layer.0.intermediate.dense.weight"
    absent = [name for name in (word, position, mlp) if name not in tensors]
    if absent:
        raise UserError(f"not an XLM-R: missing {'; missing '.join(absent)}")
    vocab_size, width = tensors[word].shape
    layers = (re.fullmatch(r"encoder\.layer\.(\d+)\..*", name) for name in tensors)
    model = XlmRoberta(
        width=width,
        depth=1 + max(int(match[1]) for match in layers if match),
        num_heads=width // XLMR_HEAD_WIDTH,
        mlp_width=tensors[mlp].shape[0],
        vocab_size=vocab_size,
        max_positions=tensors[position].shape[0],
    )
    ids, mask = label_ids(_pieces(pieces_file, vocab_size))
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids, mask)["params"]
    params = from_torch(
        tensors,
        xlm_roberta.xlm_roberta_table(model.depth),
        model="XLM-R",
        shapes=shapes,
        ignored=xlm_roberta.IGNORED,
    )
    with jax.default_matmul_precision("highest"):
        table = np.asarray(label_embeddings(model, params, ids, mask))
    with new_folder(output) as folder:
        np.save(folder / "label_table.npy", table)
    return table


def _pieces(file: pathlib.Path, vocab_size: int) -> list[list[int]]:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
    except (OSError, RuntimeError) as error:
        raise UserError(f"{file}: not a readable SentencePiece model") from error
    # fairseq's ids are one more than the pieces', and XLM-R has one for "<mask>" behind them.
    if processor.vocab_size() + 2 != vocab_size:
        raise UserError(
            f"{file}: {processor.vocab_size()} pieces, the model's {vocab_size} ids expect {vocab_size - 2}"
        )
    return processor.encode(list(COCO_NAMES))


def write_model(folder: pathlib.Path, params: Params, sizes: dict[str, Any]) -> None:
    """Writes `params/` and `config.json`."""
    save_params(folder, params)
    (folder / "config.json").write_text(json.dumps(sizes, indent=2) + "\n")


@contextlib.contextmanager
def new_folder(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a folder to write into, which becomes `output` at the end and is removed on any failure.

    Raises:
        UserError: `output` exists.
    """
    if output.exists():
        raise UserError(f"--output {output} exists; delete it or choose another")
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
