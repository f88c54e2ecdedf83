"""Pre-training of a MiniBLIP in two stages, taught by models that are thrown away afterwards: decoders and a fusion.

In the first stage, everything is trained. Grounding decoders teach every patch and image token the person at its place;
a fusion, a RefAtomNet that answers every sentence of a frame, teaches image and text tokens to be of use together.

In the second, as in BLIP-2's own, the image encoder of the first is frozen and only the Q-Former learns, now from the
fusion alone (`model.backbone` names the first stage's result): image tokens that need not tell of their own places are
sooner of use to a new fusion.
"""

import os
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from ravar_jax.backbone import (
    BackboneConfig,
    encode_text,
    load_backbone,
    normalize,
    save_backbone,
)
from ravar_jax.errors import UsageError, UserError
from ravar_jax.losses import ravar_loss
from ravar_jax.models.grounding_decoder import GroundingDecoder, GroundingOutput, token_owners
from ravar_jax.models.layers import query_grid
from ravar_jax.models.refatomnet import (
    NO_OBJECT_CLASS,
    NUM_ACTIONS,
    NUM_LABELS,
    PERSON_CLASS,
    RefAtomNetOutput,
)
from ravar_jax.tasks.ravar import build_model, init_fusion, unread
from ravar_jax.tasks.task import Task
from ravar_jax.tokenizer import END, SentencePieceTokenizer, train_sentencepiece

OWN_PLACE = 3.0  # how much sharper than a random start's the first attention is


def backbone_config(config: Any) -> BackboneConfig:
    """Returns the sizes of the backbone that a pre-training config describes."""
    return BackboneConfig(
        image_size=config.data.image_size,
        text_length=config.data.text_length,
        num_query_tokens=config.model.num_query_tokens,
        vision=config.model.vision.to_dict(),
        qformer=config.model.qformer.to_dict(),
    )


def matching_loss(match_logits: jax.Array, owners: jax.Array, person_mask: jax.Array) -> jax.Array:
    """Returns the cross-entropy of finding, among all tokens of a frame, one of those of the person a sentence means.

    Args:
        match_logits: (B, P, N), sentences against image tokens.
        owners: (B, P, N) bool, of `token_owners`.
        person_mask: (B, P), 1 for a person, 0 for padding.
    """
    log_probabilities = jax.nn.log_softmax(match_logits)
    own = jax.nn.logsumexp(jnp.where(owners, log_probabilities, -1e9), axis=-1)
    return -jnp.sum(jnp.where(person_mask > 0, own, 0.0)) / jnp.maximum(jnp.sum(person_mask), 1.0)


def word_loss(
    word_logits: jax.Array, token_ids: jax.Array, attention_mask: jax.Array, person_mask: jax.Array
) -> jax.Array:
    """Returns the cross-entropy of the words of the people's sentences.

    Args:
        word_logits: (B, P, L, V).
        token_ids: (B, P, L).
        attention_mask: (B, P, L) int.
        person_mask: (B, P), 1 for a person, 0 for padding.
    """
    right = jnp.take_along_axis(word_logits, token_ids[..., None], axis=-1)[..., 0]
    counted = attention_mask * (token_ids > END) * (person_mask > 0)[..., None]
    surprise = jax.nn.logsumexp(word_logits, axis=-1) - right
    return jnp.sum(surprise * counted) / jnp.maximum(jnp.sum(counted), 1)


def look_at_own_place(params: Any) -> Any:
    """Returns new backbone parameters whose query tokens attend to the patches at their own places.

    Query tokens and patches of one width start from the same codes of their places, so with keys that are a multiple
    of the queries each is most like the other at the same place.
    """
    params = jax.tree.map(lambda leaf: leaf, params)  # new dicts, the same arrays
    for layer in params["query_former"].values():
        if "cross_attention" in layer:
            cross = layer["cross_attention"]
            cross["key"]["kernel"] = OWN_PLACE * cross["query"]["kernel"]
    return params


def make_task(config: Any) -> Task:
    """Builds the task: parameters are {"backbone", "decoder", "patch_decoder", "fusion"}, nothing is frozen.

    With `model.backbone`, that backbone's image encoder is frozen, "backbone" starts from the rest of it, and there are
    no decoders.

    Raises:
        UsageError: `model.backbone` is of other sizes, or as `build_task`.
        UserError: `model.backbone` cannot be loaded.
    """
    if not config.model.backbone:
        return build_task(config, None)
    first_stage = load_backbone(config.model.backbone)
    if first_stage.config != backbone_config(config):
        raise UsageError(
            f"model.backbone={config.model.backbone} is of other sizes than the config"
        )
    return build_task(config, first_stage.params)


def build_task(config: Any, first_stage: Any) -> Task:
    """Builds the task on the parameters of a first stage: arrays, `ShapeDtypeStruct`s to compile only, or None.

    Raises:
        UsageError: image encoder, Q-Former and fusion differ in width.
    """
    sizes = backbone_config(config).compiled_as(config.model)
    fusion = build_model(config.model)
    for key, width in (
        ("model.vision.width", sizes.vision["width"]),
        ("model.width", fusion.width),
    ):
        if width != sizes.width:
            raise UsageError(f"{key}={width} differs from model.qformer.width={sizes.width}")
    dtype = jnp.dtype(config.model.dtype)
    module = sizes.module(dtype)
    side = sizes.image_size // sizes.vision["patch_size"]
    # Patches are taught as the image tokens are: through the Q-Former alone, they learn many times slower.
    grids = {"decoder": query_grid(sizes.num_query_tokens), "patch_decoder": (side, side)}
    if first_stage is not None:
        grids = {}
    decoders = {
        name: GroundingDecoder(config.model.decoder.mlp_width, sizes.qformer["vocab_size"], dtype)
        for name in grids
    }
    label_table = jnp.zeros((NUM_LABELS, sizes.width))  # all detections are people
    frozen: dict[str, Any] = {}
    loaded: dict[str, Any] = {}
    if first_stage is not None:
        image_encoder = ("visual_encoder", "vision_norm")
        frozen["backbone"] = {name: first_stage[name] for name in image_encoder}
        loaded["backbone"] = {
            name: part for name, part in first_stage.items() if name not in image_encoder
        }

    def init_params(rng: jax.Array) -> Any:
        backbone_rng, fusion_rng, *rngs = jax.random.split(rng, 2 + len(grids))
        params = {"fusion": init_fusion(fusion, fusion_rng)}
        if first_stage is None:
            params["backbone"] = look_at_own_place(sizes.init(backbone_rng))
        for (name, (rows, columns)), key in zip(grids.items(), rngs, strict=True):
            tokens = jnp.zeros((1, rows * columns, sizes.width))
            text = jnp.zeros((1, 1, sizes.text_length, sizes.width))
            ids = jnp.ones((1, 1, sizes.text_length), jnp.int32)
            owners = jnp.ones((1, 1, rows * columns), bool)
            params[name] = decoders[name].init(key, tokens, text, ids, ids, owners)["params"]
        return params

    def encode(params: Any, frozen: Any, batch: Any) -> tuple[dict[str, jax.Array], jax.Array]:
        """Returns the tokens that each decoder reads (B, N, D), means over frames, and text tokens (B, P, L, D)."""
        frames, ids, mask = batch["frames"], batch["token_ids"], batch["attention_mask"]
        backbone = {**params["backbone"], **frozen.get("backbone", {})}
        variables = {"params": backbone}
        pixels = normalize(frames.reshape(-1, *frames.shape[-3:]))
        features: Any = module.apply(variables, pixels, method="encode_patches")
        queried: Any = module.apply(variables, features, method="query_image")
        seen = {
            name: jnp.mean(tokens.reshape(*frames.shape[:2], *tokens.shape[1:]), axis=1)
            for name, tokens in (("decoder", queried), ("patch_decoder", features[:, 1:]))
        }
        rows = (-1, ids.shape[-1])
        text = encode_text(sizes, backbone, ids.reshape(rows), mask.reshape(rows), dtype=dtype)
        return seen, text.reshape(*ids.shape, text.shape[-1])

    def decode(
        name: str, params: Any, batch: Any, tokens: jax.Array, text: jax.Array, owners: jax.Array
    ) -> GroundingOutput:
        ids, mask = batch["token_ids"], batch["attention_mask"]
        output: Any = decoders[name].apply(
            {"params": params[name]}, tokens, text, ids, mask, owners
        )
        return output

    def fuse(
        params: Any, batch: Any, tokens: jax.Array, text: jax.Array, rng: jax.Array, train: bool
    ) -> RefAtomNetOutput:
        """Asks the fusion every sentence; leading axis B * P. The people's boxes stand for detections."""
        people = text.shape[1]
        corners = batch["target_box"]
        boxes = jnp.concatenate(
            [(corners[..., :2] + corners[..., 2:]) / 2, corners[..., 2:] - corners[..., :2]], -1
        )
        class_ids = jnp.where(person_mask(batch) > 0, PERSON_CLASS, NO_OBJECT_CLASS)
        output: Any = fusion.apply(
            {"params": params["fusion"]},
            jnp.repeat(tokens, people, axis=0),
            text.reshape(-1, *text.shape[2:]),
            batch["attention_mask"].reshape(-1, text.shape[2]),
            jnp.repeat(boxes, people, axis=0),
            jnp.repeat(class_ids, people, axis=0),
            label_table,
            train=train,
            rngs={"dropout": rng},
        )
        return output

    def person_mask(batch: Any) -> jax.Array:
        return batch["person_mask"] * batch["mask"][:, None]

    def grounding_loss(
        output: GroundingOutput, owners: jax.Array, batch: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        mask, pairs = person_mask(batch), owners.shape
        # Every token answers for every person, and is asked about its own.
        loss, metrics = ravar_loss(
            jnp.broadcast_to(output.action_logits[:, None], (*pairs, NUM_ACTIONS)),
            jnp.broadcast_to(output.box[:, None], (*pairs, 4)),
            jnp.broadcast_to(batch["action_labels"][:, :, None], (*pairs, NUM_ACTIONS)),
            jnp.broadcast_to(batch["target_box"][:, :, None], (*pairs, 4)),
            owners,
            box_weight=config.loss.box_weight,
            action_weight=config.loss.action_weight,
            box_reduction=config.loss.box_reduction,
        )
        match = matching_loss(output.match_logits, owners, mask)
        word = word_loss(output.word_logits, batch["token_ids"], batch["attention_mask"], mask)
        loss += config.loss.match_weight * match + config.loss.word_weight * word
        return loss, metrics | {"match_loss": match, "word_loss": word}

    def loss(
        params: Any, frozen: Any, batch: Any, rng: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        seen, text = encode(params, frozen, batch)
        total = jnp.zeros(())
        metrics: dict[str, jax.Array] = {}
        for name, grid in grids.items():
            owners = token_owners(batch["target_box"], person_mask(batch), grid)
            output = decode(name, params, batch, seen[name], text, owners)
            term, terms = grounding_loss(output, owners, batch)
            total += term
            prefix = name.removesuffix("decoder")
            metrics |= {prefix + key: value for key, value in terms.items()}
        answer = fuse(params, batch, seen["decoder"], text, rng, train)
        term, terms = ravar_loss(
            answer.action_logits,
            answer.box,
            batch["action_labels"].reshape(-1, NUM_ACTIONS),
            batch["target_box"].reshape(-1, 4),
            person_mask(batch).reshape(-1),
            box_weight=config.loss.fusion_box_weight,
            action_weight=config.loss.action_weight,
            box_reduction=config.loss.box_reduction,
        )
        return total + term, metrics | {f"fusion_{key}": value for key, value in terms.items()}

    def predict(params: Any, frozen: Any, batch: Any) -> dict[str, jax.Array]:
        """One row a person: the fusion's answers; `example_id` is that of the window."""
        seen, text = encode(params, frozen, batch)
        mask = person_mask(batch)
        answer = fuse(params, batch, seen["decoder"], text, jax.random.key(0), train=False)
        return {
            "action_logits": answer.action_logits,
            "box": answer.box,
            "action_labels": batch["action_labels"].reshape(-1, NUM_ACTIONS),
            "target_box": batch["target_box"].reshape(-1, 4),
            "mask": mask.reshape(-1),
            "example_id": jnp.repeat(batch["example_id"], mask.shape[1]),
        }

    def no_gradient(path: str) -> bool:
        return path.startswith("fusion/") and unread(config, path.removeprefix("fusion/"))

    return Task(init_params, frozen, loss, predict, no_gradient, loaded=loaded)


def own_tokenizer(
    workdir: os.PathLike | str, config: Any, sentences: Iterable[str]
) -> SentencePieceTokenizer:
    """Returns the run's tokenizer, `workdir/tokenizer.model`: its first start trains it on `sentences`.

    With `model.backbone`, it is that backbone's.

    Raises:
        UserError: the sentences are too few for the vocabulary, or the file there is of another size.
    """
    file = pathlib.Path(workdir) / "tokenizer.model"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(".tokenizer.model.tmp")
        if config.model.backbone:
            shutil.copyfile(pathlib.Path(config.model.backbone) / file.name, partial)
        else:
            train_sentencepiece(sentences, config.model.qformer.vocab_size, partial)
        partial.replace(file)
    tokenizer = SentencePieceTokenizer(file)
    if tokenizer.vocab_size != config.model.qformer.vocab_size:
        raise UserError(
            f"{file} has {tokenizer.vocab_size} ids, model.qformer.vocab_size={config.model.qformer.vocab_size}"
        )
    return tokenizer


def export_backbone(backbone: Any, config: Any, workdir: os.PathLike | str) -> None:
    """Writes the trained backbone's parameters as `workdir/backbone`, which `model.backbone` can name."""
    workdir = pathlib.Path(workdir)
    tokenizer_file = workdir / "tokenizer.model"
    save_backbone(workdir / "backbone", backbone_config(config), backbone, tokenizer_file)
