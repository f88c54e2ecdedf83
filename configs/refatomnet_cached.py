r"""The model and recipe of `configs/refatomnet.py`, trained from features that are computed once.

    python launch/cache_features.py --config configs/refatomnet_cached.py --output data/refatomnet_features
    python launch/train.py --config configs/refatomnet_cached.py --workdir runs/refatomnet_cached

Weights and data set as there. All of RefAVA's features take about 25 GB; --config.data.cache_dtype=bfloat16, given to
both commands, halves that. The variant `paper` can be cached; `official` draws other features in every step and cannot.
"""

from ml_collections import ConfigDict

from configs import refatomnet


def get_config(variant: str = "") -> ConfigDict:
    """Returns the full model's configuration, or a variant of it, with the cache's folder."""
    config = refatomnet.get_config(variant)
    config.data.feature_cache = "data/refatomnet_features"
    return config
