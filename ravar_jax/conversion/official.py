"""The released RefAtomNet checkpoint (spec section 8): a bare state dict of 1,378 tensors, turned into a run's folder.

model.*              -->  backbone/: BLIP-2 as LAVIS names it; what no one reads of it is kept in unread.safetensors
the fusion           -->  checkpoints/0/
detection_model.*    -->  detector/: DETR as its authors name it
                     -->  config.json, label_table.npy
"""

import functools
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ravar_jax import checkpoints, config_check, sharding, train
from ravar_jax.conversion import blip2, convert
from ravar_jax.conversion.fusion import fusion_table
from ravar_jax.conversion.mapping import Params, from_torch
from ravar_jax.conversion.weight_files import LazyTensors
from ravar_jax.errors import UserError
from ravar_jax.optimizer import make_optimizer
from ravar_jax.tasks import ravar
from ravar_jax.train_step import TrainState

EXTRACTOR, DETECTOR = "model.", "detection_model."


def convert_official(
    tensors: LazyTensors,
    vocab_file: pathlib.Path,
    label_table_file: pathlib.Path,
    config: ConfigDict,
    output: pathlib.Path,
) -> None:
    """Writes a run's folder, to evaluate, predict with and train on from.

    Args:
        tensors: of the checkpoint.
        vocab_file: BERT's WordPiece vocabulary, without "[DEC]".
        label_table_file: float32 (91, D), the embeddings of the COCO names (`--source xlmr`).
        config: of the `official` preset; sizes and paths are filled in, in place.
        output: folder to write; must not exist.

    Raises:
        UserError: tensors are missing, unused or misshapen (all of the three models' are named), vocabulary or label
            table do not fit, or `output` exists.
    """
    extractor, detector = (_part(tensors, prefix) for prefix in (EXTRACTOR, DETECTOR))
    fusion = tensors.renamed(lambda name: None if name.startswith((EXTRACTOR, DETECTOR)) else name)
    config.model.update(fusion_sizes(fusion))
    wrong: list[str] = []

    def attempt(read: Any, *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except UserError as error:
            wrong.append(str(error))

    backbone = attempt(convert.blip2_params, extractor, vocab_file)
    fused = attempt(_fusion_params, fusion, config)
    detection = attempt(convert.detr_params, detector)
    if wrong:
        raise UserError("; ".join(wrong))
    label_table = ravar.load_label_table(str(label_table_file), config.model.width)
    config.data.image_size = backbone[0].image_size
    config.data.text_length = backbone[0].text_length
    config.model.detections = "detr"
    with convert.new_folder(output) as folder:
        convert.write_blip2(folder / "backbone", backbone[0], backbone[1], vocab_file, extractor)
        convert.write_model(folder / "detector", detection, convert.DETR_R50)
        shutil.copyfile(label_table_file, folder / "label_table.npy")
        frozen = {"label_table": label_table, "backbone": backbone[1], "detector": detection}
        _write_checkpoint(config, fused, frozen, folder)
        _set_paths(config, output)
        config_check.claim_workdir(folder, config, write=True)


def fusion_sizes(fusion: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Returns the sizes among the keys of a config's `model` section, read off the fusion's tensors.

    Raises:
        UserError: a tensor that tells a size is missing or of an unexpected rank.
    """
    names = ("proj.weight", "proj_box.weight", "agent_box.mlp.fc1.weight")
    pool = "agent_box.attn.pool.2.weight"
    for name in (*names, pool):
        if name not in fusion or fusion[name].ndim != 2:
            found = fusion[name].shape if name in fusion else "missing"
            raise UserError(f"not a RefAtomNet checkpoint: {name} is {found}, expected 2 axes")
    projection, expand_boxes, mlp = (fusion[name].shape for name in names)
    return {
        "width": projection[0],
        "num_agent_tokens": fusion[pool].shape[0] // projection[0],
        "mlp_ratio": mlp[0] // mlp[1],
        "num_query_tokens": expand_boxes[0],
        "num_detections": expand_boxes[1],
    }


def compare_with_public(tensors: LazyTensors, public: LazyTensors) -> str:
    """Says whether the checkpoint's `model.*` are those of a public BLIP-2 (LAVIS's names, in one file or two).

    Raises:
        UserError: the two have no tensor in common.
    """
    extractor, public = _part(tensors, EXTRACTOR), blip2.whole_names(public)
    common = [name for name in extractor if name in public]
    if not common:
        raise UserError("--public_blip2 has none of the checkpoint's tensors model.*")
    differing = [name for name in common if not np.array_equal(extractor[name], public[name])]
    told = f"model.*: {len(differing)} of {len(common)} tensors differ from the public BLIP-2"
    if differing:
        told += f": {', '.join(differing[:5])}{', ...' if len(differing) > 5 else ''}"
    only = len(extractor) - len(common)
    return told + (f"; {only} are not in the public one" if only else "")


def _part(tensors: LazyTensors, prefix: str) -> LazyTensors:
    return tensors.renamed(
        lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None
    )


def _fusion_params(fusion: LazyTensors, config: ConfigDict) -> Params:
    shapes = jax.eval_shape(
        functools.partial(ravar.init_fusion, ravar.build_model(config.model)), jax.random.key(0)
    )
    return from_torch(fusion, fusion_table(), model="RefAtomNet", shapes=shapes)


def _set_paths(config: ConfigDict, folder: pathlib.Path) -> None:
    config.model.backbone = str(folder / "backbone")
    config.model.detector = str(folder / "detector")
    config.model.label_table = str(folder / "label_table.npy")


def _write_checkpoint(
    config: ConfigDict, params: Params, frozen: Params, folder: pathlib.Path
) -> None:
    """Writes the fusion as the run's checkpoint of step 0, with a new optimizer's state."""
    mesh, unread = sharding.make_mesh(config.mesh), functools.partial(ravar.unread, config)
    optimizer = make_optimizer(config.optimizer, config.train.steps, unread)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    with jax.set_mesh(mesh), checkpoints.open_manager(folder, config.checkpoint) as manager:
        checkpoints.save(manager, 0, state, {"frozen": train.frozen_fingerprint(frozen)})
