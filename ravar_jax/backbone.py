"""The frozen backbone as a folder: weights, sizes and tokenizer, and the two functions that encode with it.

folder/config.json         the sizes of a `models.blip2.Blip2`, and the frames and sentences it takes
folder/model.safetensors   its parameters, keys are '/'-joined paths; or folder/params/, an orbax checkpoint of them
folder/tokenizer.model     SentencePiece; or folder/vocab.txt, BERT's WordPiece vocabulary
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from ravar_jax.errors import UserError
from ravar_jax.models.blip2 import Blip2
from ravar_jax.tokenizer import SentencePieceTokenizer, Tokenizer
from ravar_jax.weights import differences, hash_weights, load_params
from ravar_jax.wordpiece import WordPieceTokenizer

SHIPPED = pathlib.Path(__file__).parent / "mini_blip"

# CLIP's statistics, RGB; the release applies them in stored channel order (spec 2.4).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """A backbone's sizes; lists, as JSON has them, become tuples, which Flax needs to hash a module.

    Attributes:
        image_size: S, side of the frames in pixels.
        text_length: longest sentence in ids that it was trained on.
        num_query_tokens: N, image tokens a frame.
        vision: attributes of `models.vision_transformer.VisionTransformer`.
        qformer: attributes of `models.qformer.QFormer`.
    """

    image_size: int
    text_length: int
    num_query_tokens: int
    vision: dict[str, Any]
    qformer: dict[str, Any]

    def __post_init__(self) -> None:
        """Makes sizes that were read from a file equal to the same ones in a config."""
        for name in ("vision", "qformer"):
            attributes = getattr(self, name).items()
            tupled = {key: tuple(v) if isinstance(v, list) else v for key, v in attributes}
            object.__setattr__(self, name, tupled)

    @property
    def width(self) -> int:
        """D of image and text tokens."""
        return self.qformer["width"]

    def check_inputs(self, image_size: int, text_length: int) -> None:
        """Refuses frames (pixels of a side) or sentences (ids) of a size that the backbone does not take.

        Raises:
            UserError: naming the config key.
        """
        if image_size != self.image_size:
            raise UserError(
                f"data.image_size={image_size}, but the backbone takes {self.image_size}"
            )
        if text_length > self.qformer["max_positions"]:
            raise UserError(
                f"data.text_length={text_length}, but the backbone has {self.qformer['max_positions']} positions"
            )

    def compiled_as(self, model: Any) -> "BackboneConfig":
        """Returns the sizes with what the `model` section of a config says of the image encoder's program.

        A run that is older than `model.remat` or `model.scan` has neither.
        """
        program = {key: model[key] for key in ("remat", "scan") if key in model}
        return dataclasses.replace(self, vision=self.vision | program)

    def module(self, dtype: jnp.dtype = jnp.float32) -> Blip2:
        """Returns the Flax module with these sizes."""
        return Blip2(self.vision, self.qformer, self.num_query_tokens, dtype)

    def init(self, rng: jax.Array) -> Any:
        """Returns new parameters."""
        pixels = jnp.zeros((1, self.image_size, self.image_size, 3))
        ids = jnp.zeros((1, self.text_length), jnp.int32)
        return self.module().init(rng, pixels, ids, ids)["params"]

    def param_shapes(self) -> Any:
        """Returns the parameters as `ShapeDtypeStruct`s."""
        return jax.eval_shape(self.init, jax.random.key(0))


# BLIP-2's first stage with ViT-g, as LAVIS publishes it; 1.17 billion parameters.
BLIP2 = BackboneConfig(
    image_size=224,
    text_length=32,
    num_query_tokens=32,
    vision={"width": 1408, "depth": 39, "num_heads": 16, "mlp_width": 6144, "patch_size": 14},
    qformer={
        "width": 768,
        "depth": 12,
        "num_heads": 12,
        "mlp_width": 3072,
        "vocab_size": 30523,
        "max_positions": 512,
    },
)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A loaded backbone: its sizes, its parameters (nested dict of float32 arrays) and its tokenizer."""

    config: BackboneConfig
    params: Any
    tokenizer: Tokenizer

    @functools.cached_property
    def weight_hashes(self) -> dict[str, str]:
        """SHA-256 of every parameter, by its path."""
        return hash_weights(self.params)


def _folder(folder: str) -> pathlib.Path:
    return pathlib.Path(folder) if folder else SHIPPED


def load_sizes(folder: str = "") -> BackboneConfig:
    """Reads a backbone's sizes from its folder, without its weights; "" is the shipped MiniBLIP.

    Raises:
        UserError: the file is missing or not of a backbone.
    """
    file = _folder(folder) / "config.json"
    try:
        return BackboneConfig(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: not a backbone's sizes: {error}") from error


def load_backbone(folder: str = "") -> Backbone:
    """Loads a backbone from its folder; "" is the shipped MiniBLIP.

    Raises:
        UserError: if a file is missing or unreadable, or the parameters are not those of the stated sizes.
    """
    path = _folder(folder)
    if not path.is_dir():
        raise UserError(
            f"model.backbone={folder}: no such folder; launch/convert_weights.py --source blip2 writes BLIP-2's"
        )
    config = load_sizes(folder)
    shapes = config.param_shapes()
    if (path / "params").exists():
        params = load_params(path, shapes)
    else:
        params = _load_safetensors(path / "model.safetensors", shapes)
    vocab_size = config.qformer["vocab_size"]
    if (path / "vocab.txt").exists():
        return Backbone(config, params, WordPieceTokenizer(path / "vocab.txt", vocab_size))
    tokenizer = SentencePieceTokenizer(path / "tokenizer.model")
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"{path / 'tokenizer.model'}: {tokenizer.vocab_size} ids, the model has {vocab_size}"
        )
    return Backbone(config, params, tokenizer)


def _load_safetensors(file: pathlib.Path, shapes: Any) -> Any:
    try:
        flat = safetensors.numpy.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{file}: not readable: {error}") from error
    expected = traverse_util.flatten_dict(shapes, sep="/")
    wrong = differences(
        {key: array.shape for key, array in flat.items()},
        {key: leaf.shape for key, leaf in expected.items()},
    )
    if wrong:
        raise UserError(f"{file}: {'; '.join(wrong)}")
    return traverse_util.unflatten_dict(flat, sep="/")


def save_backbone(
    folder: str | pathlib.Path, config: BackboneConfig, params: Any, tokenizer_file: pathlib.Path
) -> None:
    """Writes a backbone's folder; `load_backbone` reads it back bit for bit."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    flat = {key: np.ascontiguousarray(value) for key, value in flat.items()}
    safetensors.numpy.save_file(flat, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    if tokenizer_file.resolve() != (folder / "tokenizer.model").resolve():
        (folder / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())


def normalize(frames: jax.Array) -> jax.Array:
    """Maps uint8 frames (..., H, W, 3) to float32 with CLIP's mean and standard deviation taken out."""
    scale = jnp.asarray([1 / (255 * s) for s in STD], jnp.float32)
    offset = jnp.asarray([m / s for m, s in zip(MEAN, STD, strict=True)], jnp.float32)
    broadcast = (1,) * (frames.ndim - 1) + (3,)
    return frames.astype(jnp.float32) * scale.reshape(broadcast) - offset.reshape(broadcast)


def encode_frames(
    config: BackboneConfig,
    params: Any,
    frames: jax.Array,
    *,
    dtype: jnp.dtype = jnp.float32,
    dropout_rng: jax.Array | None = None,
) -> jax.Array:
    """Returns image tokens (n, N, D) float32 of uint8 frames (n, S, S, 3); jittable.

    With `dropout_rng`, the Q-Former's dropout is on, as the release leaves it (Q13).
    """
    tokens: Any = config.module(dtype).apply(
        {"params": params},
        normalize(frames),
        dropout_rng is None,
        method="encode_image",
        rngs=_rngs(dropout_rng),
    )
    return tokens


def encode_text(
    config: BackboneConfig,
    params: Any,
    token_ids: jax.Array,
    attention_mask: jax.Array,
    *,
    dtype: jnp.dtype = jnp.float32,
    dropout_rng: jax.Array | None = None,
) -> jax.Array:
    """Returns text tokens (n, L, D) float32 of token ids and mask (n, L); jittable."""
    tokens: Any = config.module(dtype).apply(
        {"params": params},
        token_ids,
        attention_mask,
        dropout_rng is None,
        method="encode_text",
        rngs=_rngs(dropout_rng),
    )
    return tokens


def _rngs(dropout_rng: jax.Array | None) -> dict[str, jax.Array]:
    return {} if dropout_rng is None else {"dropout": dropout_rng}
