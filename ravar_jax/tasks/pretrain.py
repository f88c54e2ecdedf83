"""Pre-training of a MiniBLIP: every described person of a frame is a target of the grounding decoder."""

import os
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from ravar_jax.backbone import BackboneConfig, encode_frames, encode_text, normalize, save_backbone
from ravar_jax.losses import ravar_loss
from ravar_jax.models.grounding_decoder import GroundingDecoder, GroundingOutput
from ravar_jax.models.layers import query_grid
from ravar_jax.tasks.task import Task
from ravar_jax.tokenizer import END, SentencePieceTokenizer, train_sentencepiece

PICTURE_SIDE = 32  # pixels of the reduced frame that the image tokens are to show


def backbone_config(config: Any) -> BackboneConfig:
    """Returns the sizes of the backbone that a pre-training config describes."""
    return BackboneConfig(
        image_size=config.data.image_size,
        text_length=config.data.text_length,
        num_query_tokens=config.model.num_query_tokens,
        vision=config.model.vision.to_dict(),
        qformer=config.model.qformer.to_dict(),
    )


def matching_loss(match_logits: jax.Array, person_mask: jax.Array) -> jax.Array:
    """Returns the cross-entropy of finding each sentence's region among the people of its frame.

    Args:
        match_logits: (B, P, P), sentences against regions.
        person_mask: (B, P), 1 for a person, 0 for padding.
    """
    masked = jnp.where(person_mask[:, None, :] > 0, match_logits, -1e9)
    own = jnp.diagonal(jax.nn.log_softmax(masked), axis1=1, axis2=2)
    return -jnp.sum(jnp.where(person_mask > 0, own, 0.0)) / jnp.maximum(jnp.sum(person_mask), 1.0)


def description_loss(
    word_logits: jax.Array, token_ids: jax.Array, attention_mask: jax.Array, person_mask: jax.Array
) -> jax.Array:
    """Returns the cross-entropy of the words of each person's sentence, in any order, given the person's region.

    Args:
        word_logits: (B, P, V).
        token_ids: (B, P, L).
        attention_mask: (B, P, L) int.
        person_mask: (B, P), 1 for a person, 0 for padding.
    """
    log_probabilities = jnp.take_along_axis(jax.nn.log_softmax(word_logits), token_ids, axis=-1)
    counted = attention_mask * (token_ids > END) * (person_mask > 0)[..., None]
    return -jnp.sum(log_probabilities * counted) / jnp.maximum(jnp.sum(counted), 1)


def place_pictures(frames: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Returns what each image token is to show of its place, (B, N, C): the mean frame, reduced and cut into a grid.

    Args:
        frames: uint8 (B, T, S, S, 3), S a multiple of PICTURE_SIDE.
        grid: rows and columns, N together; both divide PICTURE_SIDE.
    """
    (rows, columns), side = grid, PICTURE_SIDE
    pixels = jnp.mean(normalize(frames), axis=1)
    step = pixels.shape[1] // side
    small = pixels.reshape(-1, side, step, side, step, 3).mean((2, 4))
    cells = small.reshape(-1, rows, side // rows, columns, side // columns, 3)
    return cells.transpose(0, 1, 3, 2, 4, 5).reshape(len(cells), rows * columns, -1)


def make_task(config: Any) -> Task:
    """Builds the task: parameters are {"backbone", "decoder"}, nothing is frozen."""
    sizes = backbone_config(config)
    dtype = jnp.dtype(config.model.dtype)
    decoder = GroundingDecoder(
        **config.model.decoder.to_dict(),
        vocab_size=config.model.qformer.vocab_size,
        num_pixel_values=3 * PICTURE_SIDE**2 // sizes.num_query_tokens,
        dtype=dtype,
    )

    def init_params(rng: jax.Array) -> Any:
        backbone_rng, decoder_rng = jax.random.split(rng)
        tokens = jnp.zeros((1, sizes.num_query_tokens, sizes.width))
        text = jnp.zeros((1, 1, sizes.text_length, sizes.width))
        mask = jnp.ones((1, 1, sizes.text_length), jnp.int32)
        regions = jnp.zeros((1, 1, 4))
        return {
            "backbone": sizes.init(backbone_rng),
            "decoder": decoder.init(decoder_rng, tokens, text, mask, regions)["params"],
        }

    def apply(params: Any, batch: Any) -> GroundingOutput:
        frames, ids, mask = batch["frames"], batch["token_ids"], batch["attention_mask"]
        flat = frames.reshape(-1, *frames.shape[-3:])
        image = encode_frames(sizes, params["backbone"], flat, dtype=dtype)
        image = jnp.mean(image.reshape(*frames.shape[:2], *image.shape[1:]), axis=1)
        rows = (-1, ids.shape[-1])
        text = encode_text(
            sizes, params["backbone"], ids.reshape(rows), mask.reshape(rows), dtype=dtype
        )
        text = text.reshape(*ids.shape, text.shape[-1])
        regions = batch["target_box"]
        output: Any = decoder.apply({"params": params["decoder"]}, image, text, mask, regions)
        return output

    def person_mask(batch: Any) -> jax.Array:
        return batch["person_mask"] * batch["mask"][:, None]

    def loss(
        params: Any, frozen: Any, batch: Any, rng: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del frozen, rng, train  # nothing is frozen and nothing drops out
        output, mask = apply(params, batch), person_mask(batch)

        def terms(action_logits: jax.Array, box_weight: float) -> tuple[jax.Array, dict]:
            return ravar_loss(
                action_logits,
                output.box,
                batch["action_labels"],
                batch["target_box"],
                mask,
                box_weight=box_weight,
                action_weight=config.loss.action_weight,
                box_reduction=config.loss.box_reduction,
            )

        sentence_loss, metrics = terms(output.action_logits, config.loss.box_weight)
        region_loss, region_metrics = terms(output.region_logits, 0.0)
        match_loss = matching_loss(output.match_logits, mask)
        word_loss = description_loss(
            output.word_logits, batch["token_ids"], batch["attention_mask"], mask
        )
        pictures = place_pictures(batch["frames"], query_grid(sizes.num_query_tokens))
        squares = jnp.mean(jnp.square(output.pixels - pictures), axis=(1, 2))
        pixel_loss = jnp.sum(squares * batch["mask"]) / jnp.maximum(jnp.sum(batch["mask"]), 1.0)
        metrics |= {
            "region_action_loss": region_metrics["action_loss"],
            "match_loss": match_loss,
            "word_loss": word_loss,
            "pixel_loss": pixel_loss,
        }
        total = sentence_loss + region_loss
        total += config.loss.match_weight * match_loss + config.loss.word_weight * word_loss
        total += config.loss.pixel_weight * pixel_loss
        return total, metrics

    def predict(params: Any, frozen: Any, batch: Any) -> dict[str, jax.Array]:
        """One row a person; `example_id` is that of the window."""
        del frozen
        output = apply(params, batch)
        action_logits = output.action_logits
        people = batch["person_mask"].shape[1]
        return {
            "action_logits": action_logits.reshape(-1, action_logits.shape[-1]),
            "box": output.box.reshape(-1, 4),
            "action_labels": batch["action_labels"].reshape(-1, action_logits.shape[-1]),
            "target_box": batch["target_box"].reshape(-1, 4),
            "mask": person_mask(batch).reshape(-1),
            "example_id": jnp.repeat(batch["example_id"], people),
        }

    return Task(init_params, {}, loss, predict, lambda path: False)


def own_tokenizer(
    workdir: os.PathLike | str, config: Any, sentences: Iterable[str]
) -> SentencePieceTokenizer:
    """Returns the run's tokenizer, which its first start trains on `sentences` into `workdir/tokenizer.model`."""
    file = pathlib.Path(workdir) / "tokenizer.model"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(".tokenizer.model.tmp")
        train_sentencepiece(sentences, config.model.qformer.vocab_size, partial)
        partial.replace(file)
    return SentencePieceTokenizer(file)


def export_backbone(params: Any, config: Any, workdir: os.PathLike | str) -> None:
    """Writes the trained backbone, without the decoder, as `workdir/backbone`, which `model.backbone` can name."""
    workdir = pathlib.Path(workdir)
    tokenizer_file = workdir / "tokenizer.model"
    save_backbone(workdir / "backbone", backbone_config(config), params["backbone"], tokenizer_file)
