"""Compares this project's arithmetic with stored outputs of the released PyTorch programs.

    python -m tests.golden_check FILE...

A file's format is told by its keys. For each quantity one line `name max_abs_error tolerance ok|FAIL`; exit code 1 if
anything fails, cannot be read, or is of no known format. Weights and inputs are not in the files: they are drawn
again from the file's seed, by the parameter's PyTorch name.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs.base import apply_preset, get_config
from ravar_jax import backbone, losses, metrics
from ravar_jax.conversion.fusion import fusion_table
from ravar_jax.conversion.mapping import to_torch
from ravar_jax.errors import UserError
from ravar_jax.optimizer import make_optimizer
from ravar_jax.tasks.ravar import build_model
from ravar_jax.tpu.host import quiet_libtpu
from tests.golden_backbones import check_blip2, check_detr
from tests.golden_values import OUTPUT_TOLERANCE, Arrays, Result, max_error, seeded_params

GRADIENT_TOLERANCE = 1e-3  # of the norm, or of the largest listed entry
GRADIENT_FLOOR = 1e-8
EXACT_TOLERANCE = 1e-6  # optimizer and metrics
GREY_TOLERANCE = 1.0  # of 255


def check_refatomnet(golden: Arrays) -> Iterator[Result]:
    """Forward, loss and backward of the fusion with the `official` preset."""
    config = apply_preset(get_config(), "official")
    model = build_model(config.model)
    seed, batch, frames, text_length = (int(golden[k]) for k in ("seed", "B", "T", "text_len"))

    rng = np.random.default_rng([seed, 1])
    image_tokens = rng.standard_normal((batch * frames, 32, 768)).astype(np.float32)
    text_tokens = rng.standard_normal((batch, text_length, 768)).astype(np.float32)
    class_logits = rng.standard_normal((batch, 100, 92)) * 2
    class_logits[:, :37, 1] += 4
    class_logits[:, :, 0] = -10
    class_ids = class_logits.astype(np.float32).argmax(-1).astype(np.int32)
    boxes = rng.uniform(0.05, 0.95, (batch, 100, 4)).astype(np.float32)
    target_box = np.sort(rng.uniform(0, 1, (batch, 4)), axis=1)
    labels = (rng.uniform(size=(batch, 80)) < 0.05).astype(np.int64)
    label_table = np.random.default_rng([seed, 2]).standard_normal((91, 768)).astype(np.float32)
    inputs = {
        "image_tokens": image_tokens.reshape(batch, frames, 32, 768),
        "text_tokens": text_tokens,
        "attention_mask": np.ones((batch, text_length), np.int32),
        "boxes": boxes,
        "class_ids": class_ids,
        "label_table": label_table,
    }
    # A wrong draw would make every other line meaningless.
    yield "labels", max_error(labels, golden["labels"]), 0.0
    yield "box_target", max_error(target_box, golden["box_target"]), EXACT_TOLERANCE
    person = golden["class_logits_argmax_person"]
    yield "class_logits_argmax_person", max_error(class_ids == 1, person), 0.0

    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs)["params"])
    params = seeded_params(seed, fusion_table(), shapes)

    def loss_and_output(params):
        output: Any = model.apply({"params": params}, **inputs, train=False)
        loss, _ = losses.ravar_loss(
            output.action_logits,
            output.box,
            jnp.asarray(labels),
            jnp.asarray(target_box, jnp.float32),
            jnp.ones(batch),
            box_weight=config.loss.box_weight,
            action_weight=config.loss.action_weight,
            box_reduction=config.loss.box_reduction,
        )
        return loss, output

    with jax.default_matmul_precision("highest"):
        step = jax.jit(jax.value_and_grad(loss_and_output, has_aux=True))
        (loss, output), gradients = step(params)

    yield "logits", max_error(output.action_logits, golden["logits"]), OUTPUT_TOLERANCE
    yield "box", max_error(output.box, golden["box"]), OUTPUT_TOLERANCE
    yield "loss", max_error(loss, golden["loss"]), OUTPUT_TOLERANCE
    for block in ("agent_box", "agent_semantic", "agent_temporal"):
        for field in ("tokens", "agent_attention", "agent_tokens"):
            name = f"{block}/{field}"
            yield name, max_error(getattr(output.blocks[block], field), golden[name]), 1e-4
    yield from _compare_gradients(to_torch(gradients, fusion_table()), golden)


def _compare_gradients(ours: Arrays, golden: Arrays) -> Iterator[Result]:
    stored = {
        key.split("/", 1)[1] for key in golden if key.startswith(("grad_norm/", "grad_head/"))
    }
    for name in sorted(stored - set(ours)):
        yield f"grad_norm/{name}", math.inf, 0.0  # a tensor this model does not have
    for name, gradient in ours.items():
        if name not in stored:
            yield f"grad_absent/{name}", float(np.abs(gradient).max()), 0.0
            continue
        norm, head = golden[f"grad_norm/{name}"], golden[f"grad_head/{name}"]
        tolerance = max(GRADIENT_TOLERANCE * float(norm), GRADIENT_FLOOR)
        yield (
            f"grad_norm/{name}",
            max_error(np.linalg.norm(gradient.astype(np.float64)), norm),
            tolerance,
        )
        tolerance = max(GRADIENT_TOLERANCE * float(np.abs(head).max()), GRADIENT_FLOOR)
        yield f"grad_head/{name}", max_error(gradient.ravel()[:8], head), tolerance


def check_bertadam(golden: Arrays) -> Iterator[Result]:
    """Trajectories of one kernel and one bias under the released optimizer."""
    config = apply_preset(get_config(), "official").optimizer
    config.learning_rate = float(golden["lr"])
    config.warmup = float(golden["warmup"])
    config.weight_decay = float(golden["weight_decay"])
    optimizer = make_optimizer(config, int(golden["total_steps"]), lambda path: False)
    params = {"kernel": jnp.asarray(golden["kernel0"]), "bias": jnp.asarray(golden["bias0"])}
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    trajectory: dict[str, list[np.ndarray]] = {"kernel": [], "bias": []}
    for kernel, bias in zip(golden["grad_kernel"], golden["grad_bias"], strict=True):
        params, state = step(params, state, {"kernel": kernel, "bias": bias})
        for name, values in trajectory.items():
            values.append(np.asarray(params[name]))
    for name, values in trajectory.items():
        yield name, max_error(np.stack(values), golden[name]), EXACT_TOLERANCE


def check_metrics(golden: Arrays) -> Iterator[Result]:
    """Average precision, AUROC and IoU of stored scores and boxes."""
    boxes = golden["boxes_pred"], golden["boxes_true"]
    ours = metrics.score(golden["scores"], golden["labels"], *boxes)
    iou = metrics.box_iou(*boxes)
    yield "iou", max_error(iou, golden["iou"]), EXACT_TOLERANCE
    for name, key in (
        ("map_weighted", "mAP_weighted"),
        ("auroc_weighted", "AUROC_weighted"),
        ("map_macro", "mAP_macro"),
        ("auroc_macro", "AUROC_macro"),
    ):
        yield name, max_error(ours[key], golden[name]), EXACT_TOLERANCE
    yield "mIoU", max_error(ours["mIoU"], golden["iou"].mean()), EXACT_TOLERANCE


def check_preprocess(golden: Arrays) -> Iterator[Result]:
    """Frames resized to the clip's and to the key frame's size."""
    from data_pipelines.preprocess import resize_bicubic  # TensorFlow: slow to import

    frame, clip, key_frame = golden["frame"], golden["clip_input"], golden["key_frame"]
    ours = np.asarray(resize_bicubic(frame, *clip.shape[1:3]))
    # The clip was whole grey levels before mean, std and float16; rounding undoes the last one too.
    mean, std = (np.reshape(x, (1, 1, 1, 3)) for x in (backbone.MEAN, backbone.STD))
    clip = np.round((clip.astype(np.float64) * std + mean) * 255)
    yield "clip_input", max_error(ours, clip), GREY_TOLERANCE
    ours = np.asarray(resize_bicubic(frame, *key_frame.shape[1:3]))
    yield "key_frame", max_error(ours, key_frame), GREY_TOLERANCE


# Format, the keys it is told by, its check.
FORMATS: tuple[tuple[str, set[str], Callable[[Arrays], Iterator[Result]]], ...] = (
    (
        "refatomnet",
        {"seed", "B", "T", "text_len", "logits", "box", "loss"},
        check_refatomnet,
    ),
    (
        "bertadam",
        {"total_steps", "warmup", "lr", "kernel0", "bias0", "grad_kernel", "grad_bias"},
        check_bertadam,
    ),
    ("metrics", {"scores", "labels", "boxes_pred", "boxes_true", "iou"}, check_metrics),
    ("preprocess", {"frame", "clip_input", "key_frame"}, check_preprocess),
    ("blip2", {"config", "vit", "query_output", "text_output"}, check_blip2),
    ("detr", {"image", "pred_logits", "pred_boxes"}, check_detr),
)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Returns all arrays of an `.npz`.

    Raises:
        UserError: the file is missing, damaged or not an `.npz`.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except Exception as e:  # numpy, zipfile, zlib and tokenize each report damage in their own way
        raise UserError(f"{path}: not a readable .npz ({str(e) or type(e).__name__})") from e


def check_file(path: Path) -> bool:
    """Prints the comparison of one file; returns whether everything is ok.

    Raises:
        UserError: the file cannot be read, is of no known format, or lacks or garbles a part of its format.
    """
    golden = read_arrays(path)
    matches = [(name, check) for name, keys, check in FORMATS if keys <= set(golden)]
    if len(matches) != 1:
        keys = ", ".join(sorted(golden)[:6]) or "none"
        raise UserError(
            f"{path}: unknown format (keys: {keys}{', ...' if len(golden) > 6 else ''})"
        )
    name, check = matches[0]
    good = True
    try:
        for quantity, error, tolerance in check(golden):
            ok = error <= tolerance  # False for NaN
            good &= ok
            print(f"{quantity} {error:.3e} {tolerance:.1e} {'ok' if ok else 'FAIL'}", flush=True)
    except KeyError as e:
        raise UserError(f"{path}: a {name} file without the key {e}") from e
    except (SyntaxError, TypeError, ValueError) as e:
        raise UserError(f"{path}: not a sound {name} file: {str(e).splitlines()[0]}") from e
    return good


def main(arguments: list[str] | None = None) -> int:
    """Checks the files named on the command line; returns the exit code."""
    quiet_libtpu()
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden_check", description=__doc__.split("\n")[0]
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a golden .npz file")
    good = True
    for path in parser.parse_args(arguments).files:
        print(f"# {path}")
        try:
            good &= check_file(path)
        except UserError as e:
            print(f"FAIL {e}")
            good = False
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
