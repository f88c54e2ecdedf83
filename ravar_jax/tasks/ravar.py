"""The main task: RefAtomNet on features from the cache, or on frames through the backbone and the detector."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ravar_jax.backbone import (
    Backbone,
    BackboneConfig,
    encode_frames,
    encode_text,
    load_backbone,
)
from ravar_jax.class_names import COCO_NAMES
from ravar_jax.detector import Detector, configured_detector, detect
from ravar_jax.errors import UserError
from ravar_jax.losses import ravar_loss
from ravar_jax.models.refatomnet import NUM_LABELS, RefAtomNet
from ravar_jax.tasks.task import Task
from ravar_jax.wordpiece import WordPieceTokenizer

_MODEL_KEYS = tuple(
    name for name in RefAtomNet.__dataclass_fields__ if name not in ("dtype", "parent", "name")
)
_MAKE_TABLE = "launch/convert_weights.py --source xlmr writes one, as label_table.npy"
# With the released aggregation nothing downstream reads agent_box's tokens (spec section 5).
_UNREAD = tuple(f"agent_box/{name}/" for name in ("attention/output", "norm2", "mlp_in", "mlp_out"))


def unread(config: Any, path: str) -> bool:
    """Whether nothing that counts depends on a parameter of the fusion, so that its gradient is zero."""
    return config.model.aggregation == "sum" and path.startswith(_UNREAD)


def build_model(model_config: Any) -> RefAtomNet:
    """Returns the module that the `model` section of a config describes."""
    attributes = {key: model_config[key] for key in _MODEL_KEYS}
    return RefAtomNet(**attributes, dtype=jnp.dtype(model_config.dtype))


def init_fusion(model: RefAtomNet, rng: jax.Array) -> Any:
    """Returns new parameters of the fusion."""
    width = model.width
    return model.init(
        rng,
        jnp.zeros((1, model.num_query_tokens, width)),
        jnp.zeros((1, 1, width)),
        jnp.ones((1, 1), jnp.int32),
        jnp.zeros((1, model.num_detections, 4)),
        jnp.ones((1, model.num_detections), jnp.int32),
        jnp.zeros((NUM_LABELS, width)),
    )["params"]


def load_label_table(file: str, width: int) -> np.ndarray:
    """Reads label embeddings, float32 (91, width): row r is COCO id r + 1, row 90 "None".

    Raises:
        UserError: if the file is missing, unreadable or of another shape.
    """
    try:
        table = np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"model.label_table={file}: no such file; {_MAKE_TABLE}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"model.label_table={file}: not a .npy file of numbers") from error
    if table.shape != (NUM_LABELS, width):
        raise UserError(
            f"model.label_table={file}: shape {table.shape}, expected ({NUM_LABELS}, {width})"
        )
    return table.astype(np.float32)


def compute_label_table(backbone: Backbone) -> np.ndarray:
    """Embeds the 91 COCO names with the backbone's text encoder, averaged over all output tokens (spec 3.3).

    Raises:
        UserError: the backbone is a BLIP-2, which the release gives XLM-R's table.
    """
    if isinstance(backbone.tokenizer, WordPieceTokenizer):
        raise UserError(
            f"model.label_table is empty, and BLIP-2 has none of its own; {_MAKE_TABLE}"
        )
    ids, mask, _ = backbone.tokenizer.encode(COCO_NAMES, backbone.config.text_length)
    tokens = np.asarray(
        encode_text(backbone.config, backbone.params, jnp.asarray(ids), jnp.asarray(mask))
    )
    weights = mask[..., None] / mask.sum(1)[:, None, None]
    return (tokens * weights).sum(1).astype(np.float32)


def make_task(config: Any) -> Task:
    """Builds the task from a whole config.

    Raises:
        UserError: if backbone, label table or detector cannot be loaded, or as `build_task`.
    """
    file = config.model.label_table
    # Before the backbone, whose weights take a while to read.
    label_table = load_label_table(file, config.model.width) if file else None
    backbone = load_backbone(config.model.backbone)
    detector = configured_detector(config.model)
    if label_table is None:
        label_table = compute_label_table(backbone)
    return build_task(config, backbone.config, backbone.params, detector, label_table)


def build_task(
    config: Any,
    sizes: BackboneConfig,
    backbone_params: Any,
    detector: Detector | None,
    label_table: Any,
) -> Task:
    """Builds the task on models whose weights are arrays, or `ShapeDtypeStruct`s for a task that is only compiled.

    Args:
        config: A whole config.
        sizes: The backbone's.
        backbone_params: Its parameters.
        detector: Where detections come from; None without.
        label_table: (91, D).

    Raises:
        UserError: if the models do not fit `model.width` and `model.num_query_tokens`, or frames and sentences are of
            sizes that the backbone does not take.
    """
    model = build_model(config.model)
    dtype = jnp.dtype(config.model.dtype)
    if sizes.width != config.model.width:
        raise UserError(
            f"model.width={config.model.width}, but the backbone's tokens are {sizes.width} wide"
        )
    if sizes.num_query_tokens != config.model.num_query_tokens:
        raise UserError(
            f"model.num_query_tokens={config.model.num_query_tokens}, "
            f"but the backbone has {sizes.num_query_tokens}"
        )
    sizes.check_inputs(config.data.image_size, config.data.text_length)
    sizes = sizes.compiled_as(config.model)
    if config.model.train_backbone:
        still: dict[str, Any] = {}
    elif config.model.train_qformer:
        # The encoder's final norm (ln_vision) is trained, as the release lets it require a gradient (spec section 5).
        still = {"visual_encoder": backbone_params["visual_encoder"]}
    else:
        still = backbone_params
    tuned = {name: part for name, part in backbone_params.items() if name not in still}
    frozen = {"label_table": label_table, "backbone": still}
    if detector is not None:
        frozen["detector"] = detector.params
    frozen_dropout = config.model.frozen_dropout == "on"
    # What is trained has its dropout in training; of the backbone, only the Q-Former has any.
    qformer_dropout = frozen_dropout or "query_former" in tuned
    blank_video = config.data.video == "blank"

    def init_params(rng: jax.Array) -> Any:
        return init_fusion(model, rng)

    def split(params: Any, frozen: Any) -> tuple[Any, Any]:
        """Returns the fusion's parameters and the whole backbone's."""
        fusion = {key: value for key, value in params.items() if key != "backbone"}
        return fusion, {
            **jax.lax.stop_gradient(frozen.get("backbone", {})),
            **params.get("backbone", {}),
        }

    def image_tokens(weights: Any, batch: Any, rng: jax.Array | None) -> jax.Array:
        """Returns (B, N, D), the mean over a clip's frames."""
        if "image_tokens" in batch:
            return batch["image_tokens"]
        frames = batch["frames"]
        flat = frames.reshape(-1, *frames.shape[-3:])
        tokens = encode_frames(sizes, weights, flat, dtype=dtype, dropout_rng=rng)
        tokens = jnp.mean(tokens.reshape(*frames.shape[:-3], *tokens.shape[1:]), axis=-3)
        # Blank frames still have tokens; the text-only twin must see none.
        return jnp.zeros_like(tokens) if blank_video else tokens

    def text_tokens(weights: Any, batch: Any, rng: jax.Array | None) -> jax.Array:
        if "text_tokens" in batch:
            return batch["text_tokens"]
        ids, mask = batch["token_ids"], batch["attention_mask"]
        if rng is None:
            return encode_text(sizes, weights, ids, mask, dtype=dtype)
        # The release encodes the sentence once a frame, each with dropout of its own, and averages (Q13).
        times = config.data.num_frames if frozen_dropout else 1
        ids, mask = (jnp.repeat(x, times, axis=0) for x in (ids, mask))
        tokens = encode_text(sizes, weights, ids, mask, dtype=dtype, dropout_rng=rng)
        return jnp.mean(tokens.reshape(-1, times, *tokens.shape[1:]), axis=1)

    def detections(frozen: Any, batch: Any, rng: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Returns boxes (B, K, 4) and class ids (B, K): the detector's where there are key frames, else the batch's."""
        if detector is None or blank_video or "key_frame" not in batch:
            return batch["boxes"], batch["class_ids"]
        found = detect(
            detector.sizes,
            frozen["detector"],
            batch["key_frame"],
            pixels=config.data.pixels,
            dtype=dtype,
            dropout_rng=rng,
        )
        return found.boxes, found.class_ids

    def loss(
        params: Any, frozen: Any, batch: Any, rng: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        fusion, weights = split(params, frozen)
        head_rng, image_rng, text_rng, detector_rng = jax.random.split(rng, 4)
        noisy = train and qformer_dropout
        output: Any = model.apply(
            {"params": fusion},
            image_tokens(weights, batch, image_rng if noisy else None),
            text_tokens(weights, batch, text_rng if noisy else None),
            batch["attention_mask"],
            *detections(frozen, batch, detector_rng if train and frozen_dropout else None),
            frozen["label_table"],
            train=train,
            rngs={"dropout": head_rng},
        )
        return ravar_loss(
            output.action_logits,
            output.box,
            batch["action_labels"],
            batch["target_box"],
            batch["mask"],
            box_weight=config.loss.box_weight,
            action_weight=config.loss.action_weight,
            box_reduction=config.loss.box_reduction,
        )

    def predict(params: Any, frozen: Any, batch: Any) -> dict[str, jax.Array]:
        """Averages logits and boxes over the evaluation clips, the axis behind the batch."""
        fusion, weights = split(params, frozen)
        tokens = image_tokens(weights, batch, None)
        clips = tokens.shape[1]
        text, found = text_tokens(weights, batch, None), detections(frozen, batch, None)
        rest = [jnp.repeat(x, clips, axis=0) for x in (text, batch["attention_mask"], *found)]
        flat = tokens.reshape(-1, *tokens.shape[2:])
        output: Any = model.apply(
            {"params": fusion}, flat, *rest, frozen["label_table"], train=False
        )
        logits, box = (
            jnp.mean(x.reshape(-1, clips, x.shape[-1]), axis=1)
            for x in (output.action_logits, output.box)
        )
        targets = ("action_labels", "target_box", "mask", "example_id")
        return {"action_logits": logits, "box": box, **{key: batch[key] for key in targets}}

    loaded = {"backbone": tuned} if tuned else {}
    return Task(
        init_params,
        frozen,
        loss,
        predict,
        functools.partial(unread, config),
        loaded=loaded,
        unread=("backbone", "detector") if config.data.feature_cache else (),
    )
