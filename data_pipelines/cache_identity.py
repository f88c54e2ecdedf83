"""What a feature cache depends on, as its `cache.json` holds it, and whether a cache fits a config."""

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from data_pipelines.dataset_folder import dataset_identity, existing_dataset_folder
from data_pipelines.frame_sampling import evaluation_sampler, key_frame_sampler, training_sampler
from data_pipelines.record_index import list_splits, load_index
from ravar_jax import config_check
from ravar_jax.backbone import Backbone, load_backbone
from ravar_jax.detector import Detector, load_detector
from ravar_jax.errors import UserError

CACHE_VERSION = 1
FINGERPRINT = "dataset fingerprint"


def cache_content(
    config: ConfigDict, weight_hashes: Mapping[str, str], tokenizer_hash: str
) -> dict[str, Any]:
    """Returns all that cached features depend on, but for the dataset's fingerprint, by config key where there is one.

    `data.sentences` and `data.video` are applied when the cache is read and do not count; neither does
    `model.detections=none`, for which a cache made with `dataset` serves.

    Args:
        config: of the cache.
        weight_hashes: of `frozen_hashes`.
        tokenizer_hash: of the backbone.
    """
    content = {
        "cache version": CACHE_VERSION,
        **dataset_identity(config),
        "data.text_length": config.data.text_length,
        "data.image_size": config.data.image_size,
        "data.pixels": config.data.pixels,
        "training positions": training_sampler(config).clips.tolist(),
        "evaluation positions": evaluation_sampler(config).clips.tolist(),
        "data.cache_dtype": config.data.cache_dtype,
        "model.dtype": config.model.dtype,
        "model.detections": "dataset",
        "tokenizer": tokenizer_hash,
        "weights": dict(weight_hashes),
    }
    if config.model.detections == "detr":
        content |= {
            "model.detections": "detr",
            "model.detector_height": config.model.detector_height,
            "model.detector_width": config.model.detector_width,
            "detector's position": key_frame_sampler(config).positions.tolist(),
        }
    return content


def frozen_hashes(backbone: Backbone, detector: Detector | None) -> dict[str, str]:
    """Returns the hash of every frozen weight by its path, the detector's under `detector/`."""
    found = {} if detector is None else detector.weight_hashes
    return backbone.weight_hashes | {f"detector/{path}": digest for path, digest in found.items()}


def dataset_fingerprint(folder: epath.Path) -> str:
    """Returns the SHA-256 of the fingerprints of all splits of a dataset."""
    splits = {split: load_index(folder, split).fingerprint for split in list_splits(folder)}
    return content_key(splits)


def content_key(content: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of the canonical JSON of `content`, hexadecimal."""
    return hashlib.sha256(
        json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns one phrase for each key whose value in a cache (`old`) is not that of a config (`new`)."""
    phrases = []
    for key in sorted(set(old) | set(new)):
        if old.get(key) == new.get(key):
            continue
        if key == "weights":
            leaves = [
                leaf for leaf in old[key] | new[key] if old[key].get(leaf) != new[key].get(leaf)
            ]
            phrases.append(f"{len(leaves)} of the frozen weights, the first {leaves[0]}")
        else:
            phrases.append(f"{key} ({old.get(key)} in the cache, now {new.get(key)})")
    return phrases


def check_content(folder: epath.Path, old: Mapping[str, Any], config: ConfigDict) -> None:
    """Refuses the cache in `folder`, of content `old`, where it is not that of a config.

    Raises:
        UserError: naming everything that differs.
    """
    detector = config.model.detector if config.model.detections == "detr" else ""
    new = cache_content(config, *_loaded_hashes(config.model.backbone, detector))
    dataset = existing_dataset_folder(config)
    new[FINGERPRINT] = dataset_fingerprint(dataset) if dataset else old.get(FINGERPRINT)
    if phrases := differences(old, new):
        raise UserError(
            f"feature cache {folder} does not fit: {'; '.join(phrases)}; write another with launch/cache_features.py"
        )


def read_description(folder: epath.Path) -> dict[str, Any]:
    """Returns the content of `cache.json`; raises UserError where it is absent or altered."""
    path = folder / "cache.json"
    if not path.exists():
        raise UserError(
            f"data.feature_cache={folder} holds no cache.json; write it with launch/cache_features.py"
        )
    try:
        description = json.loads(path.read_bytes())
        intact = description.pop("checksum") == content_key(description)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a cache's description: {type(error).__name__}") from error
    if not intact:
        raise UserError(f"{path} is damaged or was changed by hand: its checksum is another")
    return description


def write_description(folder: epath.Path, description: Mapping[str, Any]) -> None:
    """Writes `cache.json` with the checksum of all that it says."""
    checked = {**description, "checksum": content_key(description)}
    text = json.dumps(checked, indent=1, sort_keys=True) + "\n"
    config_check.write_atomically(folder / "cache.json", text)


@functools.lru_cache(maxsize=2)
def _loaded_hashes(backbone_folder: str, detector_folder: str) -> tuple[dict[str, str], str]:
    """Returns the hashes of the weights and of the tokenizer; hashing a full backbone takes seconds."""
    backbone = load_backbone(backbone_folder)
    detector = load_detector(detector_folder) if detector_folder else None
    return frozen_hashes(backbone, detector), backbone.tokenizer.sha256
