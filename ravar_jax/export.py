"""A run as a folder that answers without this package.

output/model.jax_export   the model with its weights, by `jax.export`: cpu, cuda and tpu, any batch size
output/params/            the trained parameters, an orbax checkpoint
output/tokenizer.model    or vocab.txt: the backbone's tokenizer, a copy
output/saved_model/       if asked: the same for TensorFlow (`launch/saved_model.py`)
output/model_card.md      what goes in and comes out, config, metrics, hashes (`model_card.py`)

frames, token ids and mask, boxes, class ids --backbone, fusion--> action logits, box
image tokens, text tokens and mask, boxes, class ids --fusion--> the same, where the backbone is too large to be inside
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export as jax_export

from ravar_jax.backbone import SHIPPED
from ravar_jax.conversion.convert import new_folder
from ravar_jax.errors import UserError
from ravar_jax.model_card import model_card
from ravar_jax.models.attention import portable
from ravar_jax.restore import Run
from ravar_jax.weights import save_params

MODEL_FILE, CARD_FILE = "model.jax_export", "model_card.md"
PLATFORMS = ("cpu", "cuda", "tpu")
OUTPUTS = ("action_logits", "box")
MAX_BACKBONE_BYTES = 500_000_000
MAX_WEIGHT_BYTES = 2_000_000_000  # a serialised program cannot hold 2 GiB


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """The model as bytes.

    Attributes:
        serialized: of `jax.export`.
        inputs: shape and dtype of each input by its name, with the backbone inside `frames` and `token_ids`, else
            `image_tokens` and `text_tokens`; the first axis is the batch `b`.
        outputs: likewise.
        calling_convention: of the serialised form, which tells what versions of JAX read it.
    """

    serialized: bytes
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    calling_convention: int


@dataclasses.dataclass(frozen=True)
class ModelFunction:
    """What is exported, before it is bytes.

    Attributes:
        call: (weights, inputs by name) -> outputs by name.
        weights: pytree of host arrays.
        inputs: `ShapeDtypeStruct`s by name, the batch symbolic.
    """

    call: Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]
    weights: Any
    inputs: dict[str, jax.ShapeDtypeStruct]


def model_function(run: Run) -> ModelFunction:
    """Returns the run's evaluation of one clip.

    Raises:
        UserError: the weights are more than a serialised program holds.
    """
    with_backbone = _num_bytes(whole_backbone(run.params, run.frozen)) < MAX_BACKBONE_BYTES
    params, frozen = run.params, {name: run.frozen[name] for name in ("backbone", "label_table")}
    if not with_backbone:
        params = {name: part for name, part in params.items() if name != "backbone"}
        frozen["backbone"] = {}
    size = _num_bytes((params, frozen))
    if size > MAX_WEIGHT_BYTES:
        raise UserError(
            f"{MODEL_FILE} would hold {size / 1e9:.2f} GB of weights, and a serialised program at most "
            f"{MAX_WEIGHT_BYTES / 1e9:g} GB"
        )

    def call(weights: Any, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        clip = "frames" if with_backbone else "image_tokens"
        batch = inputs | {clip: inputs[clip][:, None]}  # one evaluation clip
        # Evaluation's own, which `predict` hands through.
        unread = dict.fromkeys(("action_labels", "target_box", "mask", "example_id"), 0)
        params, frozen = weights
        with portable():
            predicted = run.task.predict(params, frozen, batch | unread)
        return {name: predicted[name] for name in OUTPUTS}

    weights = jax.device_get((params, frozen))  # off the mesh: it runs on one device
    return ModelFunction(call, weights, _inputs(run.config, with_backbone))


def export_model(function: ModelFunction) -> ExportedModel:
    """Traces the function with its weights as constants, and serialises it."""

    def answer(**inputs: jax.Array) -> dict[str, jax.Array]:
        return function.call(function.weights, inputs)

    exported = jax_export.export(jax.jit(answer), platforms=PLATFORMS)(**function.inputs)
    _, inputs = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    return ExportedModel(
        bytes(exported.serialize()),
        {name: inputs[name] for name in function.inputs},
        jax.tree.unflatten(exported.out_tree, exported.out_avals),
        exported.calling_convention_version,
    )


def write_export(
    run: Run,
    workdir: pathlib.Path,
    output: pathlib.Path,
    *,
    arithmetic: str,
    clip_positions: Sequence[Sequence[int]],
    write_more: Callable[[pathlib.Path, ModelFunction], None] | None = None,
) -> ExportedModel:
    """Writes the folder, which appears under its name when it is complete, and returns the model.

    Args:
        run: of `restore_run`.
        workdir: of the run; its `final_metrics.json` goes into the card.
        output: must not exist, or be an empty folder.
        arithmetic: the config's switches in words.
        clip_positions: of the frames of each evaluation clip within a window.
        write_more: writes other forms of the function into the folder it is given.

    Raises:
        UserError: `output` is in the way, the model is too large, or a file of the run is damaged.
    """
    metrics = read_final_metrics(workdir)
    tokenizer_file = _tokenizer_file(run)
    function = model_function(run)
    model = export_model(function)
    params = jax.device_get(run.params)
    if output.is_dir() and not any(output.iterdir()):
        output.rmdir()
    with new_folder(output) as folder:
        save_params(folder, params)
        (folder / MODEL_FILE).write_bytes(model.serialized)
        shutil.copyfile(tokenizer_file, folder / tokenizer_file.name)
        if write_more is not None:
            write_more(folder, function)
        more = sorted(folder.rglob("saved_model.pb"))
        named = [folder / MODEL_FILE, folder / tokenizer_file.name, *more]
        files = {str(path.relative_to(folder)): _sha256(path) for path in named}
        text = model_card(
            config=run.config,
            step=run.step,
            tokenizer=run.tokenizer,
            params=params,
            backbone=whole_backbone(params, run.frozen),
            label_table=run.frozen["label_table"],
            inputs=model.inputs,
            outputs=model.outputs,
            calling_convention=model.calling_convention,
            files=files,
            metrics=metrics,
            arithmetic=arithmetic,
            clip_positions=clip_positions,
        )
        (folder / CARD_FILE).write_text(text)
    return model


def read_final_metrics(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns the scores that the run ended with; empty where it has not ended.

    Raises:
        UserError: the file is not a JSON object.
    """
    file = workdir / "final_metrics.json"
    try:
        metrics = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from error
    if not isinstance(metrics, dict):
        raise UserError(f"{file} is damaged: expected an object")
    return metrics


def whole_backbone(params: Any, frozen: Any) -> dict[str, Any]:
    """Returns the backbone's parameters, those that were trained in place of the frozen."""
    return {**frozen["backbone"], **params.get("backbone", {})}


def _inputs(config: Any, with_backbone: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns what the exported function takes; the batch is symbolic."""
    data, model = config.data, config.model
    (batch,) = jax_export.symbolic_shape("b")
    side, length = data.image_size, data.text_length
    shapes: dict[str, tuple[tuple[int, ...], Any]]
    if with_backbone:
        shapes = {
            "frames": ((data.num_frames, side, side, 3), jnp.uint8),
            "token_ids": ((length,), jnp.int32),
        }
    else:
        shapes = {
            "image_tokens": ((model.num_query_tokens, model.width), jnp.float32),
            "text_tokens": ((length, model.width), jnp.float32),
        }
    shapes |= {
        "attention_mask": ((length,), jnp.int32),
        "boxes": ((model.num_detections, 4), jnp.float32),
        "class_ids": ((model.num_detections,), jnp.int32),
    }
    return {
        name: jax.ShapeDtypeStruct((batch, *shape), dtype)
        for name, (shape, dtype) in shapes.items()
    }


def _tokenizer_file(run: Run) -> pathlib.Path:
    """Returns the file that the run's tokenizer was read from.

    Raises:
        UserError: it has changed since.
    """
    folder = pathlib.Path(run.config.model.backbone or SHIPPED)
    vocab = folder / "vocab.txt"
    file = vocab if vocab.exists() else folder / "tokenizer.model"
    if _sha256(file) != run.tokenizer.sha256:
        raise UserError(f"{file} has changed while it was read")
    return file


def _sha256(file: pathlib.Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _num_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
