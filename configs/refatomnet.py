r"""RefAtomNet as released, 1.24 billion parameters of which the fusion's 27 million are trained, from pixels.

    python launch/convert_weights.py --source blip2 --input FILE --vocab vocab.txt --output weights/blip2
    python launch/convert_weights.py --source detr --input detr-r50-e632da11.pth --output weights/detr
    python launch/convert_weights.py --source xlmr --input FILE --vocab MODEL --output weights/xlmr
    python launch/prepare_refava.py --annotations ANNOTATIONS --videos VIDEOS --data_dir data
    python launch/train.py --config configs/refatomnet.py --workdir runs/refatomnet \
        --config.model.backbone=weights/blip2 --config.model.detector=weights/detr \
        --config.model.label_table=weights/xlmr/label_table.npy

The three paths are the defaults. With --config.model.train_qformer=True the Q-Former is trained too. Variants,
`configs/refatomnet.py:NAME`: `official` and `paper`, the arithmetic of those presets; without one it is `corrected`.
"""

from ml_collections import ConfigDict

from configs import base

VARIANTS = ("", "official", "paper")


def get_config(variant: str = "") -> ConfigDict:
    """Returns the full model's configuration, or a variant of it."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}, expected one of {', '.join(VARIANTS[1:])}")
    config = base.get_config()  # its sizes and recipe are the full model's
    base.apply_preset(config, variant or "corrected")
    config.model.backbone = "weights/blip2"
    config.model.label_table = "weights/xlmr/label_table.npy"
    config.model.detections = "detr"  # prepared RefAVA holds none
    config.model.detector = "weights/detr"
    config.model.dtype = "bfloat16"
    config.data.dataset = "refava"
    # An evaluation clip is as many frames as a training clip, and an example has up to 11 of them.
    config.evaluation.batch_size = 16
    return config
