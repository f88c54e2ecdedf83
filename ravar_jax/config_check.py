"""Refuses a config that cannot work, and a workdir that belongs to another config, before anything is computed."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from ravar_jax.errors import UsageError, UserError

_POSITIVE = (
    "model.width",
    "model.num_agent_tokens",
    "model.mlp_ratio",
    "model.num_query_tokens",
    "model.num_detections",
    "model.detector_height",
    "model.detector_width",
    "data.num_clips",
    "data.stored_frames",
    "data.num_frames",
    "data.image_size",
    "optimizer.learning_rate",
    "optimizer.clip_norm",
    "train.steps",
    "train.batch_size",
    "train.micro_batches",
    "train.log_every_steps",
    "train.eval_every_steps",
    "evaluation.batch_size",
    "checkpoint.every_steps",
    "checkpoint.keep_last",
)
_NOT_NEGATIVE = (
    "seed",
    "data.seed",
    "data.max_bad_records",
    "train.hang_seconds",
    "loss.box_weight",
    "loss.action_weight",
    "optimizer.weight_decay",
    "checkpoint.keep_every_steps",
    "checkpoint.keep_best",
)
_BELOW_ONE = ("optimizer.warmup", "model.action_dropout", "data.colour_jitter")
_POSITIONS = ("data.stored_frames", "data.num_frames")
_MAY_DIFFER_ON_RESUME = (
    "train.log_every_steps",
    "train.eval_every_steps",
    "train.hang_seconds",
    "data.data_dir",
    "data.feature_cache",
    "model.backbone",
    "model.detector",
    "model.label_table",
    "model.remat",
    "model.scan",
)
# Why features of such a config are not the same in every epoch.
_CANNOT_BE_CACHED = (
    ("task", "pretrain", "trains the backbone"),
    ("model.train_backbone", True, "changes the features"),
    ("model.train_qformer", True, "changes the features"),
    ("model.frozen_dropout", "on", "draws other features in every step"),
    ("data.train_frames", "random", "draws other frames in every epoch"),
    ("data.train_frames", "random_segments", "draws other frames in every epoch"),
)
# Why the mean loss of such a config is not the mean over the parts of its batch, weighted by their examples.
_CANNOT_BE_PARTED = (
    ("task", "pretrain", "averages its terms over people, words and tokens"),
    ("model.text_pooling", "all_positions", "pads every sentence to the longest of its batch"),
)
# What changes the pixels of training examples, and the value that does not.
_AUGMENTATION_OFF = {
    "data.flip_probability": 0.0,
    "data.crop_min_area": 1.0,
    "data.colour_jitter": 0.0,
}
_SECTIONS_THAT_MAY_DIFFER = ("mesh.", "checkpoint.")


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"a.b": value} with the values as JSON gives them back."""
    if isinstance(config, ConfigDict):
        config = config.to_dict()
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()})
        else:
            flat[key] = json.loads(json.dumps(value))
    return flat


def check_config(
    config: ConfigDict, choices: Mapping[str, Sequence[Any]], num_devices: int
) -> None:
    """Checks the values of a config, keys and types being right; keys of another task's models may be absent.

    Args:
        config: The config.
        choices: For each key with a closed set of values, that set (`configs.base.CHOICES`).
        num_devices: Devices of all processes together.

    Raises:
        UsageError: naming the first wrong key, its value and what was expected.
    """
    flat = flatten(config)

    def require(test: Callable[[Any], bool], keys: Sequence[str], expected: str) -> None:
        for key in keys:
            if key in flat:
                _require(test(flat[key]), flat, key, expected)

    for key, accepted in choices.items():
        require(accepted.__contains__, (key,), f"expected one of {', '.join(map(str, accepted))}")
    require(lambda value: math.isfinite(value) and value > 0, _POSITIVE, "expected more than 0")
    require(lambda value: math.isfinite(value) and value >= 0, _NOT_NEGATIVE, "expected 0 or more")
    require(lambda value: 0 <= value < 1, _BELOW_ONE, "expected 0 or more and less than 1")
    require(lambda value: value >= 3, ("data.text_length",), "expected 3 or more: two are special")
    require(lambda value: value <= 90, _POSITIONS, "expected at most 90, the positions of a window")
    require(("float32", "bfloat16").__contains__, ("model.dtype",), "expected float32 or bfloat16")
    share = "expected a share, 0 to 1"
    require(lambda value: 0 <= value <= 1, ("data.flip_probability",), share)
    require(
        lambda value: 0 < value <= 1, ("data.crop_min_area",), "expected more than 0, at most 1"
    )
    if flat["task"] == "pretrain":
        for key, off in _AUGMENTATION_OFF.items():
            require(off.__eq__, (key,), "task=pretrain shows windows as they are stored")
    if flat["model.detections"] == "detr":
        folder = "expected a folder of launch/convert_weights.py --source detr, for model.detections=detr"
        require(bool, ("model.detector",), folder)
    if flat.get("model.train_backbone"):
        of_all = "model.train_backbone=True trains it already; set one of the two"
        require(lambda value: not value, ("model.train_qformer",), of_all)
    if flat["data.feature_cache"]:
        check_cacheable(config)
    if flat["train.micro_batches"] > 1:
        for key, value, reason in _CANNOT_BE_PARTED:
            split = f"{reason}, so train.micro_batches={flat['train.micro_batches']} would change the loss"
            _require(flat.get(key) != value, flat, key, split)
    _check_mesh(flat, num_devices)


def check_cacheable(config: ConfigDict) -> None:
    """Refuses a config whose features cannot be computed once.

    Raises:
        UsageError: naming the key, its value and the reason.
    """
    flat = flatten(config)
    for key, value, reason in _CANNOT_BE_CACHED:
        _require(
            flat.get(key) != value, flat, key, f"{reason}, so data.feature_cache cannot be used"
        )
    for key, off in _AUGMENTATION_OFF.items():
        _require(
            flat[key] == off, flat, key, "augments pixels, so data.feature_cache cannot be used"
        )


def check_resume(
    old: Mapping[str, Any], new: Mapping[str, Any], workdir: os.PathLike | str
) -> None:
    """Refuses to go on in a workdir whose run had another config.

    Args:
        old: The run's config (`config.json`).
        new: The config of this start.
        workdir: Named in the message.

    Raises:
        UserError: naming every key that differs and may not, with its old and its new value.
    """
    before, after = flatten(old), flatten(new)
    changes = [
        f"{key} was {json.dumps(before[key]) if key in before else 'not set'} and is now "
        f"{json.dumps(after[key]) if key in after else 'not set'}"
        for key in sorted(before.keys() | after.keys())
        if key not in _MAY_DIFFER_ON_RESUME
        and not key.startswith(_SECTIONS_THAT_MAY_DIFFER)
        and (key not in before or key not in after or before[key] != after[key])
    ]
    if changes:
        raise UserError(
            f"{workdir} holds a run of another config: {'; '.join(changes)} (use another --workdir)"
        )


def claim_workdir(workdir: os.PathLike | str, config: ConfigDict, *, write: bool) -> None:
    """Creates the workdir with its `config.json`, or checks that the run in it had this config.

    Args:
        workdir: The run's folder.
        config: The config of this start.
        write: Whether this process writes (process 0).

    Raises:
        UserError: if the workdir is of another config, or is not a folder that can be used.
    """
    folder = epath.Path(workdir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir {workdir} is a file, not a folder")
    if (folder / "config.json").exists():
        check_resume(read_config(folder), config, workdir)
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")


def read_config(workdir: os.PathLike | str) -> ConfigDict:
    """Returns the config of the run in `workdir`.

    Raises:
        UserError: if there is no run, or its `config.json` is damaged.
    """
    file = epath.Path(workdir) / "config.json"
    if not file.exists():
        raise UserError(f"no run in {workdir}: {file} is missing")
    try:
        return ConfigDict(json.loads(file.read_text())).lock()
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged: {error}") from error


def write_atomically(file: epath.Path, text: str) -> None:
    """Writes `file` so that a kill at any moment leaves either the old or the new content."""
    temporary = file.parent / f".{file.name}.tmp"
    temporary.write_text(text)
    temporary.replace(file)


def _check_mesh(flat: dict[str, Any], num_devices: int) -> None:
    sizes = {key: flat[key] for key in ("mesh.data", "mesh.fsdp", "mesh.tensor")}
    for key, size in sizes.items():
        _require(
            size == -1 or size > 0,
            flat,
            key,
            "expected a positive size, or -1 for the devices that are left",
        )
    shape = ", ".join(f"{key}={size}" for key, size in sizes.items())
    free = [key for key, size in sizes.items() if size == -1]
    taken = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or num_devices % taken or (not free and taken != num_devices):
        raise UsageError(f"{shape} does not fit {num_devices} devices (at most one size may be -1)")
    if free:
        sizes[free[0]] = num_devices // taken
    shards = sizes["mesh.data"] * sizes["mesh.fsdp"]
    parts = shards * flat["train.micro_batches"]
    by_micro = " x train.micro_batches" * (flat["train.micro_batches"] > 1)
    for key, multiple, more in (
        ("train.batch_size", parts, by_micro),
        ("evaluation.batch_size", shards, ""),
    ):
        expected = f"expected a multiple of {multiple}, mesh.data x mesh.fsdp{more}"
        _require(flat[key] % multiple == 0, flat, key, expected)


def _require(fact: bool, flat: dict[str, Any], key: str, expected: str) -> None:
    if not fact:
        raise UsageError(f"config key {key}={flat[key]!r}: {expected}")
