"""`model_card.md` of an exported model: all that its user needs to know without this package."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from ravar_jax.class_names import AVA_ACTIONS
from ravar_jax.models.refatomnet import NO_OBJECT_CLASS
from ravar_jax.tokenizer import SentencePieceTokenizer, Tokenizer
from ravar_jax.weights import hash_weights

EXAMPLE_SENTENCE = "the person in the red shirt"
_PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")
_SENTENCEPIECE = (
    "SentencePiece: 2, the pieces (`sentencepiece.SentencePieceProcessor(model_file='{file}').encode(sentence)`, cut "
    "to {room}), 3, then 0 up to {length}"
)
_WORDPIECE = (
    "BERT's lower-casing WordPiece: [CLS], the pieces (`tokenizers.BertWordPieceTokenizer('{file}').encode(sentence, "
    "add_special_tokens=False).ids`, cut to {room}), [SEP], then [PAD] up to {length}"
)


def model_card(
    *,
    config: Any,
    step: int,
    tokenizer: Tokenizer,
    params: Any,
    backbone: Any,
    label_table: Any,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    calling_convention: int,
    files: Mapping[str, str],
    metrics: Mapping[str, Any],
    arithmetic: str,
    clip_positions: Sequence[Sequence[int]],
) -> str:
    """Returns the card's text.

    Args:
        config: of the run.
        step: of its checkpoint.
        tokenizer: of its backbone.
        params: what was trained, a nested dict.
        backbone: all of the backbone's parameters, likewise.
        label_table: (91, D) float32.
        inputs: shape and dtype by name, in the order of the table; with `frames` the backbone is inside.
        outputs: likewise.
        calling_convention: of the serialised model.
        files: SHA-256 by name, the model's first, the tokenizer's second, then a SavedModel's, if any.
        metrics: of `final_metrics.json`; empty without one.
        arithmetic: the config's switches in words.
        clip_positions: of the frames of each evaluation clip within a window.
    """
    model_file, tokenizer_file, *saved_models = files
    with_backbone = "frames" in inputs
    data = config.data
    dataset = f"{data.dataset}, seed {data.seed}" if data.dataset == "mini_refava" else data.dataset
    lines = [
        "# Model card",
        "",
        "RefAtomNet (arXiv 2407.01872): a clip with several people and a sentence that describes one of them go in; "
        "the scores of that person's 80 AVA actions and its box come out.",
        "",
        f"Step {step} of {config.train.steps}, trained on {dataset}. Arithmetic: {arithmetic}. Computed in "
        f"{config.model.dtype}, without dropout.",
        "",
        "## Files",
        "",
        "| file | SHA-256 | what |",
        "|---|---|---|",
        f"| `{model_file}` | {files[model_file]} | the model with its weights, for "
        "`jax.export.deserialize(...).call(...)`: cpu, cuda and tpu, any batch size b |",
        f"| `{tokenizer_file}` | {files[tokenizer_file]} | the tokenizer |",
        *(f"| `{name}` | {files[name]} | the model for TensorFlow |" for name in saved_models),
        "| `params/` | by parameter, below | what was trained, an orbax checkpoint (`PyTreeCheckpointer`) |",
        "",
        "The model needs jax, numpy and flatbuffers. It runs on one device, its matrix products at the platform's "
        "default precision.",
        "",
        "```python",
        "from jax import export",
        "",
        f'with open("{model_file}", "rb") as file:',
        "    model = export.deserialize(file.read())",
        f"answer = model.call({', '.join(f'{name}={name}' for name in inputs)})  # a dict",
        "```",
        "",
        "## Inputs",
        "",
        *_array_table(inputs, _input_meanings(config)),
        "",
        *_notes(config, tokenizer, with_backbone, clip_positions),
        "",
        "## Outputs",
        "",
        *_array_table(
            outputs,
            {
                "action_logits": "any number; the sigmoid is the probability; column k - 1 is AVA's action k, below",
                "box": "x1, y1, x2, y2 as fractions of the frame; neither clipped nor ordered",
            },
        ),
        "",
        "; ".join(f"{number} {name}" for number, name in sorted(AVA_ACTIONS.items())) + ".",
        "",
        "## Sentences",
        "",
        *_sentences(data.text_length, tokenizer, tokenizer_file),
        "",
        "## Metrics",
        "",
        *_metric_lines(metrics, step),
        "",
        "## Config",
        "",
        "```json",
        json.dumps(config.to_dict(), indent=2),
        "```",
        "",
        "## Weights",
        "",
        "SHA-256 is of dtype, shape and bytes (`ravar_jax/weights.py`).",
        "",
        f"- backbone, {'inside the model' if with_backbone else 'not inside the model'}: "
        f"{_count(backbone):,} parameters, SHA-256 of the list of their paths and hashes {_hash_of_all(backbone)}",
        f"- label table, inside the model: {hash_weights({'label_table': label_table})['label_table']}",
        "",
        f"`params/`, {_count(params):,} parameters:",
        "",
        "| parameter | dtype | shape | SHA-256 |",
        "|---|---|---|---|",
        *_param_rows(params),
        "",
        "## Versions",
        "",
        f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
        + f"; calling convention {calling_convention} of `jax.export`.",
    ]
    return "\n".join(lines) + "\n"


def _input_meanings(config: Any) -> dict[str, str]:
    released = config.data.pixels == "released"
    colours = "negatives (255 - value) in BGR order" if released else "RGB"
    boxes, classes = {
        "dataset": (
            "by descending score, padded with 0",
            f"COCO ids 1..90 (person is 1), padded with {NO_OBJECT_CLASS}, no object",
        ),
        "detr": (
            "DETR's of the key frame, in query order",
            f"each query's most likely class, 0..{NO_OBJECT_CLASS}: COCO ids (person is 1), or "
            f"{NO_OBJECT_CLASS}, no object",
        ),
        "none": ("0 everywhere", f"{NO_OBJECT_CLASS} (no object) everywhere"),
    }[config.model.detections]
    return {
        "frames": f"0..255, {colours}, resized as Pillow's bicubic, aspect not kept; normalised inside the model",
        "token_ids": "the tokenizer's ids",
        "image_tokens": "of the backbone, any number; the mean over the clip's frames",
        "text_tokens": "of the backbone, any number",
        "attention_mask": "1 at ids, 0 at padding; never all 0",
        "boxes": f"detections cx, cy, w, h, 0..1 of the frame; {boxes}",
        "class_ids": classes,
    }


def _notes(
    config: Any, tokenizer: Tokenizer, with_backbone: bool, clip_positions: Sequence[Sequence[int]]
) -> list[str]:
    """Returns what a table of arrays cannot say of the inputs."""
    data = config.data
    notes = [
        "A clip is of a window of 90 positions, 30 a second, whose key frame, of which boxes are, is position 45. "
        f"Its {data.num_frames} frames are at {', '.join(map(str, clip_positions[0]))}."
    ]
    if len(clip_positions) > 1:
        notes.append(
            f"The run is evaluated on {len(clip_positions)} clips a window, and logits and boxes are averaged; a call "
            "takes one. The others are at "
            + "; ".join(", ".join(map(str, clip)) for clip in clip_positions[1:])
            + "."
        )
    if config.model.text_pooling == "all_positions":
        notes.append(
            "`model.text_pooling=all_positions`: the text is averaged over padding too, up to the longest sentence of "
            "the batch, so a row's answer depends on the others'. One row a call gives answers that do not."
        )
    if data.sentences == "blank":
        ids, mask, _ = tokenizer.encode([""], data.text_length)
        blank = ids[0, : int(mask.sum())].tolist()
        notes.append(f"It was trained without sentences: give the empty one's ids, {blank}.")
    if data.video == "blank":
        zero = "looks at no frames" if with_backbone else "takes image tokens of 0"
        notes.append(
            f"It was trained without video: it {zero}, and takes boxes of 0 and class ids of {NO_OBJECT_CLASS}."
        )
    return [line for note in notes for line in (note, "")][:-1]


def _sentences(length: int, tokenizer: Tokenizer, file: str) -> list[str]:
    kind = _SENTENCEPIECE if isinstance(tokenizer, SentencePieceTokenizer) else _WORDPIECE
    ids, mask, _ = tokenizer.encode([EXAMPLE_SENTENCE], length)
    return [
        f"{kind.format(file=file, room=length - 2, length=length)}; {tokenizer.vocab_size} ids.",
        "",
        f"`{EXAMPLE_SENTENCE}` is {ids[0, : int(mask.sum())].tolist()}.",
    ]


def _metric_lines(metrics: Mapping[str, Any], step: int) -> list[str]:
    if not metrics:
        return ["None: the run has no `final_metrics.json`."]
    rows = {key: value for key, value in metrics.items() if not isinstance(value, dict)}
    lines = ["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows.items())]
    if metrics.get("step") != step:
        lines += ["", f"They are of step {metrics.get('step')}, the exported weights of {step}."]
    return lines


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _array_table(arrays: Mapping[str, Any], meanings: Mapping[str, str]) -> list[str]:
    rows = [
        f"| `{name}` | {array.dtype} | ({', '.join(map(str, array.shape))}) | {meanings[name]} |"
        for name, array in arrays.items()
    ]
    return ["| name | dtype | shape | range and meaning |", "|---|---|---|---|", *rows]


def _param_rows(params: Any) -> list[str]:
    hashes, flat = hash_weights(params), traverse_util.flatten_dict(params, sep="/")
    return [
        f"| `{path}` | {flat[path].dtype} | {tuple(flat[path].shape)} | {hashes[path]} |"
        for path in hashes
    ]


def _count(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def _hash_of_all(params: Any) -> str:
    lines = [f"{path} {value}\n" for path, value in hash_weights(params).items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
