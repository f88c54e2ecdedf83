"""The files of `configs/`: they load, they pass the check, and the full model is the full model."""

import jax
import jax.numpy as jnp
import pytest

from configs import mini_blip, own_clips, quickstart, refatomnet, refatomnet_cached
from configs.base import CHOICES, PRESETS, apply_preset
from ravar_jax.config_check import check_config, flatten
from ravar_jax.errors import UsageError, UserError
from ravar_jax.tasks import ravar

FUSION = 27_293_236  # parameters, spec section 5


@pytest.mark.parametrize("variant", quickstart.VARIANTS)
def test_quickstart_variants_are_valid(variant):
    check_config(quickstart.get_config(variant), CHOICES, num_devices=8)


@pytest.mark.parametrize("variant", refatomnet.VARIANTS)
def test_refatomnet_variants_are_valid(variant):
    config = refatomnet.get_config(variant)
    check_config(config, CHOICES, num_devices=8)
    preset = apply_preset(config.copy_and_resolve_references(), variant or "corrected")
    assert preset == config


@pytest.mark.parametrize("config", [mini_blip.get_config(), own_clips.get_config()])
def test_other_configs_are_valid(config):
    check_config(config, CHOICES, num_devices=8)


@pytest.mark.parametrize("file", [refatomnet, refatomnet_cached])
def test_unknown_variant_is_refused(file):
    with pytest.raises(ValueError, match="'offical', expected one of official, paper"):
        file.get_config("offical")


def test_refatomnet_has_the_released_sizes():
    config = refatomnet.get_config()
    sizes = (config.data.image_size, config.data.text_length, config.train.batch_size)
    assert sizes == (224, 32, 128)
    assert (config.model.dtype, config.data.dataset) == ("bfloat16", "refava")
    inputs = [
        jnp.zeros((1, 32, 768)),
        jnp.zeros((1, 32, 768)),
        jnp.ones((1, 32), jnp.int32),
        jnp.zeros((1, 100, 4)),
        jnp.ones((1, 100), jnp.int32),
        jnp.zeros((91, 768)),
    ]
    params = jax.eval_shape(ravar.build_model(config.model).init, jax.random.key(0), *inputs)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == FUSION


@pytest.mark.parametrize("variant", ["", "paper"])
def test_cached_refatomnet_differs_by_its_cache_alone(variant):
    pixels, cached = (flatten(file.get_config(variant)) for file in (refatomnet, refatomnet_cached))
    check_config(refatomnet_cached.get_config(variant), CHOICES, num_devices=8)
    assert [key for key in pixels if pixels[key] != cached[key]] == ["data.feature_cache"]
    assert cached["data.feature_cache"]


def test_official_features_cannot_be_cached():
    assert PRESETS["model.frozen_dropout"][0] == "on"
    with pytest.raises(UsageError, match="model.frozen_dropout='on': draws other features"):
        check_config(refatomnet_cached.get_config("official"), CHOICES, num_devices=8)


def test_missing_weights_are_named_with_what_makes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = refatomnet.get_config()
    with pytest.raises(UserError, match=r"model.label_table=weights/xlmr.*--source xlmr"):
        ravar.make_task(config)
    config.model.label_table = ""
    with pytest.raises(UserError, match=r"model.backbone=weights/blip2.*--source blip2"):
        ravar.make_task(config)
