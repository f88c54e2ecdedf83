"""RefAtomNet on MiniRefAVA with the shipped MiniBLIP: what `make quickstart` runs.

    python launch/cache_features.py --config configs/quickstart.py --output data/quickstart_features
    python launch/train.py --config configs/quickstart.py --workdir runs/quickstart \
        --config.data.feature_cache=data/quickstart_features

Without `--config.data.feature_cache` it trains from pixels. Variants, `configs/quickstart.py:NAME`: `text_blind` trains
and evaluates without the sentence, `video_blind` without image tokens and detections, `official` and `paper` with the
arithmetic of those presets (on window frames, which is what MiniRefAVA stores).
"""

from ml_collections import ConfigDict

from configs import base

VARIANTS = ("", "text_blind", "video_blind", "official", "paper")


def get_config(variant: str = "") -> ConfigDict:
    """Returns the quickstart's configuration, or a variant of it."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}, expected one of {', '.join(VARIANTS[1:])}")
    config = base.get_config()
    if variant in base.PRESET_NAMES:
        base.apply_preset(config, variant)
        config.data.frames = "window"
        config.data.pixels = "rgb"
        config.data.train_frames = "uniform"
        config.model.frozen_dropout = "off"

    config.model.width = 96
    # Many scenes and few frames of each: the fusion learns whom a sentence means from the number of people.
    config.data.num_clips = 12000
    config.data.num_frames = 2
    config.data.stored_frames = 3
    config.data.image_size = 96
    config.data.text_length = 24
    config.data.eval_clips = 1
    config.data.sentences = "blank" if variant == "text_blind" else "true"
    config.data.video = "blank" if variant == "video_blind" else "true"

    if variant not in base.PRESET_NAMES:
        # As much as the actions' 5: at 1 the boxes, and with them the actions, come out worse.
        config.loss.box_weight = 5.0

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup = 0.05
    config.optimizer.weight_decay = 0.05

    config.train.steps = 6000
    config.train.batch_size = 64
    config.train.log_every_steps = 100
    config.train.eval_every_steps = 2000
    config.checkpoint.every_steps = 1000
    return config
