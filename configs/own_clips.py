"""The small model on clips of your own, prepared by launch/prepare_refava.py: a start to adapt.

    python launch/prepare_refava.py --annotations ANNOTATIONS --videos VIDEOS --data_dir data
    python launch/cache_features.py --config configs/own_clips.py --output data/own_features
    python launch/train.py --config configs/own_clips.py --workdir runs/own \
        --config.data.feature_cache=data/own_features

MiniBLIP has seen drawn scenes only, so on real video this learns the clips it is given and little more; the detector
is off because it needs weights of its own: --config.model.detections=detr --config.model.detector=weights/detr.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    """Returns the configuration for prepared clips."""
    config = quickstart.get_config()
    config.data.dataset = "refava"
    config.data.num_frames = 8
    # MiniBLIP's vocabulary is small: real sentences fall into short pieces
    config.data.text_length = 96
    config.model.detections = "none"

    config.train.steps = 400
    config.train.batch_size = 16
    config.train.log_every_steps = 20
    config.train.eval_every_steps = 200
    config.checkpoint.every_steps = 200
    return config
