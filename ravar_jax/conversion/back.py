"""The folders that this project reads, turned back into PyTorch files.

A checkpoint that was converted and is written back unchanged holds the same tensors, bit for bit.
"""

import dataclasses
import pathlib

import jax
import numpy as np
import safetensors.numpy

from ravar_jax.backbone import Backbone, load_backbone
from ravar_jax.conversion import blip2, detr
from ravar_jax.conversion.convert import UNREAD, new_folder
from ravar_jax.conversion.fusion import fusion_table
from ravar_jax.conversion.mapping import to_torch
from ravar_jax.conversion.official import DETECTOR, EXTRACTOR
from ravar_jax.conversion.weight_files import write_torch
from ravar_jax.detector import Detector, load_detector
from ravar_jax.errors import UserError
from ravar_jax.restore import restore_run

FILE = "pytorch_model.bin"


def write_back(source: str, folder: pathlib.Path, output: pathlib.Path) -> str:
    """Writes `output/pytorch_model.bin` and says what it holds.

    Args:
        source: `official`, `blip2` or `detr`: whose names.
        folder: a run's, a backbone's or a detector's.
        output: folder to write; must not exist.

    Raises:
        UserError: `folder` is not what `source` says, or `output` exists.
    """
    if source == "official":
        tensors = official_tensors(folder)
    elif source == "blip2":
        tensors = blip2_tensors(load_backbone(str(folder)), folder)
    else:
        tensors = detr_tensors(load_detector(str(folder)))
    with new_folder(output) as partial:
        write_torch(partial / FILE, tensors, None if source == "official" else "model")
    return f"wrote {output / FILE}: {len(tensors)} tensors"


def blip2_tensors(backbone: Backbone, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns LAVIS's tensors of a backbone, and those that `folder` keeps of the file it was converted from.

    Raises:
        UserError: it is not a BLIP-2.
    """
    vision, qformer = backbone.config.vision, backbone.config.qformer
    if vision.get("stem_widths"):
        raise UserError(f"{folder} has a convolutional stem, which BLIP-2 has not")
    tensors = to_torch(backbone.params, blip2.lavis_table(vision["depth"], qformer["depth"]))
    if (folder / UNREAD).exists():
        tensors |= safetensors.numpy.load_file(folder / UNREAD)
    return tensors


def detr_tensors(detector: Detector) -> dict[str, np.ndarray]:
    """Returns the tensors of a detector, as DETR's authors name them."""
    return to_torch(detector.params, detr.detr_table(*detr.depths_of(detector.sizes)))


def official_tensors(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a run's latest checkpoint, as the release names them.

    A run on the shipped MiniBLIP gives none of `model.*`, one that has no detector none of `detection_model.*`.

    Raises:
        UserError: as `restore_run` and `blip2_tensors` do.
    """
    run = restore_run(workdir)
    model = run.config.model
    tensors = to_torch(jax.device_get(run.params), fusion_table())
    if model.backbone:
        backbone = load_backbone(model.backbone)
        if "backbone" in run.params:
            trained = jax.device_get(run.params["backbone"])  # all of it, or the Q-Former
            backbone = dataclasses.replace(backbone, params={**backbone.params, **trained})
        extractor = blip2_tensors(backbone, pathlib.Path(model.backbone))
        tensors |= {EXTRACTOR + name: array for name, array in extractor.items()}
    if model.detections == "detr":
        detector = detr_tensors(load_detector(model.detector))
        tensors |= {DETECTOR + name: array for name, array in detector.items()}
    return tensors
