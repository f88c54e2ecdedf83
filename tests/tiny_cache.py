"""What a cache of the tiny dataset needs: a random backbone of 8x8 pixels, and the config that reads with it."""

import jax

from ravar_jax.backbone import BackboneConfig, save_backbone
from ravar_jax.tokenizer import SentencePieceTokenizer, train_sentencepiece
from tests import tiny_dataset

LAYERS = {"width": 8, "depth": 2, "num_heads": 2, "mlp_width": 8}


def write_backbone(folder, seed):
    folder.mkdir(parents=True)
    tokenizer = folder / "tokenizer.model"
    people = [f"person {n} of train{m} val{m} test{m}" for n in range(20) for m in range(9)]
    train_sentencepiece(people, 300, tokenizer)
    config = BackboneConfig(
        image_size=8,
        text_length=12,
        num_query_tokens=3,
        vision=LAYERS | {"patch_size": 4},
        qformer=LAYERS
        | {"vocab_size": SentencePieceTokenizer(tokenizer).vocab_size, "max_positions": 12},
    )
    save_backbone(folder, config, jax.jit(config.init)(jax.random.key(seed)), tokenizer)


def pixel_config(folder):
    config = tiny_dataset.make_config(folder)
    config.model.backbone = str(folder / "backbone")
    config.model.num_query_tokens = 3
    config.model.width = 8
    config.data.text_length = 12
    return config
