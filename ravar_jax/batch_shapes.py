"""The arrays of a batch by their shapes alone (README, "Input contract"): to time and to compile without a data set."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ravar_jax.models.refatomnet import NUM_ACTIONS

MAX_PEOPLE = 4  # of a window in pre-training batches, as many as MiniRefAVA draws


def batch_shapes(
    config: ConfigDict, *, training: bool, features: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns key -> shape and dtype of a global batch of a config's task.

    Args:
        config: of a run.
        training: a batch of training, or of evaluation, which has several clips an example.
        features: cached image and text tokens in place of frames; not for task `pretrain`.
    """
    model, data = config.model, config.data
    rows = config.train.batch_size if training else config.evaluation.batch_size
    shapes: dict[str, tuple[tuple[int, ...], type]] = {
        "mask": ((), jnp.float32),
        "example_id": ((), jnp.int32),
    }
    frames = (data.num_frames, data.image_size, data.image_size, 3)
    people: tuple[int, ...] = ()
    if config.task == "pretrain":
        people = (MAX_PEOPLE,)
        shapes |= {"frames": (frames, jnp.uint8), "person_mask": (people, jnp.float32)}
    else:
        clips = () if training else (data.eval_clips,)
        shapes["boxes"] = ((model.num_detections, 4), jnp.float32)
        shapes["class_ids"] = ((model.num_detections,), jnp.int32)
        if features:
            tokens = (*clips, model.num_query_tokens, model.width)
            shapes["image_tokens"] = (tokens, jnp.float32)
            shapes["text_tokens"] = ((data.text_length, model.width), jnp.float32)
        else:
            shapes["frames"] = ((*clips, *frames), jnp.uint8)
            if model.detections == "detr":
                key_frame = (model.detector_height, model.detector_width, 3)
                shapes["key_frame"] = (key_frame, jnp.uint8)
    shapes["token_ids"] = shapes["attention_mask"] = ((*people, data.text_length), jnp.int32)
    shapes["target_box"] = ((*people, 4), jnp.float32)
    shapes["action_labels"] = ((*people, NUM_ACTIONS), jnp.float32)
    return {
        key: jax.ShapeDtypeStruct((rows, *shape), dtype) for key, (shape, dtype) in shapes.items()
    }
