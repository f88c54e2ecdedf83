"""Which values a config may have, and what may change on resume."""

import json

import pytest

from configs.base import CHOICES, get_config
from ravar_jax.config_check import (
    check_cacheable,
    check_config,
    check_resume,
    claim_workdir,
    read_config,
)
from ravar_jax.errors import UsageError, UserError


def _config(**changes):
    config = get_config()
    config.update_from_flattened_dict(
        {key.replace("__", "."): value for key, value in changes.items()}
    )
    return config


def test_base_config_is_valid():
    check_config(get_config(), CHOICES, num_devices=8)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("data__frames", "moving", "data.frames='moving': expected one of still, window"),
        ("data__eval_clips", 3, "expected one of 1, 11"),
        ("train__steps", 0, "train.steps=0: expected more than 0"),
        ("train__batch_size", -8, "train.batch_size=-8: expected more than 0"),
        ("train__batch_size", 12, "train.batch_size=12: expected a multiple of 8"),
        ("evaluation__batch_size", 7, "evaluation.batch_size=7: expected a multiple of 8"),
        ("optimizer__learning_rate", float("nan"), "optimizer.learning_rate=nan"),
        ("optimizer__warmup", 1.0, "optimizer.warmup=1.0: expected 0 or more and less than 1"),
        ("data__stored_frames", 91, "expected at most 90"),
        ("loss__box_weight", -1.0, "loss.box_weight=-1.0: expected 0 or more"),
        ("mesh__data", 3, "does not fit 8 devices"),
        ("mesh__fsdp", -1, "at most one size may be -1"),
        ("mesh__tensor", 0, "mesh.tensor=0"),
        ("model__dtype", "int8", "expected float32 or bfloat16"),
        ("model__remat", "blocks", "expected one of none, minimal, full"),
        ("model__detections", "detr", "config key model.detector='': expected a folder"),
        ("model__detector_height", 0, "model.detector_height=0: expected more than 0"),
        ("data__cache_dtype", "float16", "expected one of float32, bfloat16"),
        ("train__micro_batches", 0, "train.micro_batches=0: expected more than 0"),
        ("checkpoint__keep_best", -1, "checkpoint.keep_best=-1: expected 0 or more"),
        ("checkpoint__best_metric", "loss", "expected one of mIoU, mAP_weighted"),
    ],
)
def test_wrong_value_is_named(key, value, expected):
    with pytest.raises(UsageError) as caught:
        check_config(_config(**{key: value}), CHOICES, num_devices=8)
    assert expected in str(caught.value)
    assert key.replace("__", ".") in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train__batch_size": 40}, "train.batch_size=40: expected a multiple of 16, mesh.data x"),
        ({"task": "pretrain"}, "task='pretrain': averages its terms over people"),
        ({"model__text_pooling": "all_positions"}, "would change the loss"),
    ],
)
def test_micro_batches_that_would_not_add_up_are_refused(changes, expected):
    check_config(_config(train__micro_batches=2), CHOICES, num_devices=8)
    with pytest.raises(UsageError) as caught:
        check_config(_config(train__micro_batches=2, **changes), CHOICES, num_devices=8)
    assert expected in str(caught.value)


def test_qformer_is_not_trained_twice():
    both = _config(model__train_backbone=True, model__train_qformer=True)
    with pytest.raises(UsageError, match=r"model.train_qformer=True: model.train_backbone=True"):
        check_config(both, CHOICES, num_devices=8)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model__train_backbone", True),
        ("model__train_qformer", True),
        ("model__frozen_dropout", "on"),
        ("data__train_frames", "random"),
        ("task", "pretrain"),
    ],
)
def test_cache_refuses_what_it_cannot_hold(key, value):
    check_config(_config(**{key: value}), CHOICES, num_devices=8)
    with pytest.raises(UsageError, match=key.replace("__", ".")):
        check_config(_config(data__feature_cache="cache", **{key: value}), CHOICES, num_devices=8)
    with pytest.raises(
        UsageError, match=key.replace("__", ".")
    ):  # what writes the cache asks alone
        check_cacheable(_config(**{key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mesh__fsdp", 2),
        ("checkpoint__every_steps", 7),
        ("train__log_every_steps", 7),
        ("train__eval_every_steps", 7),
        ("data__data_dir", "elsewhere"),
        ("data__feature_cache", "elsewhere"),
        ("model__backbone", "elsewhere"),
        ("model__detector", "elsewhere"),
        ("model__label_table", "elsewhere.npy"),
        ("model__remat", "full"),
        ("model__scan", False),
    ],
)
def test_may_change_on_resume(tmp_path, key, value):
    claim_workdir(tmp_path, get_config(), write=True)
    claim_workdir(tmp_path, _config(**{key: value}), write=True)
    assert read_config(tmp_path) == _config(**{key: value})


@pytest.mark.parametrize(
    ("key", "value", "old"),
    [
        ("seed", 1, 0),
        ("train__steps", 10, 7080),
        ("train__batch_size", 8, 128),
        ("model__aggregation", "x", '"sum"'),
    ],
)
def test_may_not_change_on_resume(tmp_path, key, value, old):
    claim_workdir(tmp_path, get_config(), write=True)
    with pytest.raises(UserError) as caught:
        claim_workdir(tmp_path, _config(**{key: value}), write=True)
    assert f"{key.replace('__', '.')} was {old} and is now {json.dumps(value)}" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert read_config(tmp_path) == get_config()


def test_a_run_older_than_remat_and_scan_goes_on(tmp_path):
    old = get_config()
    with old.unlocked():
        del old.model.remat, old.model.scan
    check_resume(old, get_config(), tmp_path)


def test_key_of_one_config_only():
    new = get_config()
    with new.unlocked():
        new.model.extra = 1
    with pytest.raises(UserError, match=r"model.extra was not set and is now 1"):
        check_resume(get_config(), new, "run")


def test_damaged_or_missing_run(tmp_path):
    with pytest.raises(UserError, match=r"no run in .*config.json is missing"):
        read_config(tmp_path / "none")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is damaged"):
        read_config(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        claim_workdir(tmp_path / "config.json", get_config(), write=True)
