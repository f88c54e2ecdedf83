"""A run of the main task with random weights and a tiny random backbone, for tests of what reads a workdir."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import base
from ravar_jax import checkpoints, config_check, sharding
from ravar_jax.backbone import BackboneConfig, save_backbone
from ravar_jax.optimizer import make_optimizer
from ravar_jax.tasks import ravar
from ravar_jax.tokenizer import SentencePieceTokenizer, train_sentencepiece
from ravar_jax.train import frozen_fingerprint
from ravar_jax.train_step import abstract_state

IMAGE_SIZE, TEXT_LENGTH, WIDTH = 24, 16, 16
WORDS = ("the man", "in a red coat", "on the left", "woman", "with a hat", "near the door")


def write_backbone(folder: Path, depth: int = 1) -> None:
    """Writes a random backbone of a few thousand parameters; `depth` is the image encoder's."""
    folder.mkdir(parents=True)
    sentences = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS]
    train_sentencepiece(sentences, 280, folder / "tokenizer.model")
    config = BackboneConfig(
        image_size=IMAGE_SIZE,
        text_length=TEXT_LENGTH,
        num_query_tokens=8,
        vision={
            "width": 16,
            "depth": depth,
            "num_heads": 2,
            "mlp_width": 16,
            "patch_size": 12,
            "stem_widths": (),
        },
        qformer={
            "width": WIDTH,
            "depth": 2,
            "num_heads": 2,
            "mlp_width": 16,
            "vocab_size": SentencePieceTokenizer(folder / "tokenizer.model").vocab_size,
            "max_positions": 32,
            "cross_attention_every": 2,
            "dropout": 0.0,
        },
    )
    params = random_leaves(jax.eval_shape(config.init, jax.random.key(0)))
    save_backbone(folder, config, params, folder / "tokenizer.model")


def write_label_table(file: Path) -> None:
    """Writes random label embeddings, for many tasks in one test file: the text encoder is not run for each."""
    np.save(file, np.random.default_rng(0).standard_normal((91, WIDTH), np.float32))


def random_leaves(tree: Any) -> Any:
    """Returns small random numbers of the tree's shapes; unlike an initialiser, nothing is compiled."""
    random = np.random.default_rng(0)

    def draw(leaf):
        return np.asarray(0.1 * random.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(draw, tree)


def make_config(backbone: Path, **changes) -> ConfigDict:
    """Returns the run's config; `changes` are keys with `__` for the dots."""
    config = base.get_config()
    config.model.update(width=WIDTH, num_query_tokens=8, backbone=str(backbone))
    config.data.update(image_size=IMAGE_SIZE, text_length=TEXT_LENGTH, eval_clips=1)
    flat = {key.replace("__", "."): value for key, value in changes.items()}
    config.update_from_flattened_dict(flat)
    return config


def write_run(workdir: Path, config: ConfigDict, scores: Mapping[int, dict] | None = None) -> None:
    """Writes `config.json` and checkpoints as training would: of step 0, or of every step that has scores."""
    workdir.mkdir(parents=True)
    config_check.claim_workdir(workdir, config, write=True)
    mesh = sharding.make_mesh(config.mesh)
    task = ravar.make_task(config)
    optimizer = make_optimizer(config.optimizer, config.train.steps, task.no_gradient)
    abstract = abstract_state(task, optimizer, mesh)
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    state = jax.device_put(random_leaves(abstract), where)
    meta = {"frozen": frozen_fingerprint(task.frozen)}
    with checkpoints.open_manager(workdir, config.checkpoint) as manager:
        for step, scored in (scores or {0: {}}).items():
            numbered = state.replace(step=state.step + step)
            checkpoints.save(manager, step, numbered, meta, scored)
    (workdir / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/loss": 1.0}) + "\n")
