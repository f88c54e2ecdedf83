"""Pre-trains MiniBLIP, the small frozen backbone that ships in `ravar_jax/mini_blip/`.

    python launch/train.py --config configs/mini_blip.py --workdir runs/mini_blip_encoder
    python launch/train.py --config configs/mini_blip.py:qformer --workdir runs/mini_blip

The second freezes the image encoder of the first (`model.backbone`) and teaches the Q-Former anew, see
`ravar_jax/tasks/pretrain.py`. Both see MiniRefAVA scenes of seed 1; the quickstart's are of seed 0. The result is
`runs/mini_blip/backbone/`.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(stage: str = "") -> ConfigDict:
    """Returns the configuration of the first stage, or of the second, "qformer"."""
    if stage not in ("", "qformer"):
        raise ValueError(f"variant {stage!r}, expected qformer")
    config = base.get_config()
    config.seed = 1
    config.task = "pretrain"

    # The fusion that is taught along with the backbone, and thrown away: what `base` says, made small.
    config.model.width = 96
    config.model.num_detections = 4  # the people of a clip, by their true boxes
    config.model.detections = "none"
    backbone = {
        "vision": {
            "width": 96,  # as the Q-Former's: see `look_at_own_place` in `ravar_jax/tasks/pretrain.py`
            "depth": 3,
            "num_heads": 4,
            "mlp_width": 240,
            "patch_size": 12,
            "stem_widths": (16, 32),
        },
        "qformer": {
            "width": 96,
            "depth": 3,
            "num_heads": 4,
            "mlp_width": 192,
            "vocab_size": 512,
            "max_positions": 128,
            "cross_attention_every": 2,
            "dropout": 0.1,
        },
        "decoder": {"mlp_width": 192},
    }
    with config.unlocked():
        config.model.update(backbone)
        for key in (  # of runs on a backbone that exists, and on a detector
            "train_backbone",
            "train_qformer",
            "label_table",
            "frozen_dropout",
            "detector",
            "detector_height",
            "detector_width",
        ):
            del config.model[key]

    config.data.seed = 1
    config.data.num_clips = (
        24000  # many scenes, two frames each: the same few would be learnt by heart
    )
    config.data.stored_frames = 2
    config.data.num_frames = 1
    config.data.train_frames = "random"
    config.data.image_size = 96
    config.data.text_length = 24
    config.data.eval_clips = 1

    config.loss.box_weight = 30.0
    config.loss.action_weight = 200.0
    with config.unlocked():
        config.loss.match_weight = 2.0  # of finding the tokens that a sentence means
        # of guessing each word from its neighbours and the person's tokens
        config.loss.word_weight = 20.0
        config.loss.fusion_box_weight = 200.0  # the fusion's; `action_weight` is shared

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1.2e-3  # the fusion is stuck for long at 2e-3
    config.optimizer.warmup = 0.05
    config.optimizer.weight_decay = 0.02

    config.train.steps = 10000
    config.train.batch_size = 32
    config.train.log_every_steps = 50
    config.train.eval_every_steps = 5000
    config.checkpoint.every_steps = 500
    config.evaluation.batch_size = 32

    if stage == "qformer":
        config.model.backbone = "runs/mini_blip_encoder/backbone"
        config.train.steps = 11000
    return config
