"""The base configuration: every key that exists, with the full model's sizes and the `corrected` arithmetic.

The other files of this folder start from `get_config()` and override. Presets decide every point on which the
release, the paper and sense disagree (README, "Presets"): `apply_preset(config, "official" | "paper" | "corrected")`.
"""

from ml_collections import ConfigDict

# One row a switch: config key, then its value in `official`, `paper` and `corrected`.
PRESETS = {
    "data.frames": ("still", "window", "window"),
    "data.pixels": ("released", "rgb", "rgb"),
    "data.train_frames": ("head", "uniform", "uniform"),
    "data.eval_clips": (1, 11, 11),
    "model.text_pooling": ("all_positions", "all_positions", "masked"),
    "model.box_conversion": ("swapped", "correct", "correct"),
    "model.detections_kept": ("person_over_100", "all_over_100", "person_masked_mean"),
    "model.cross_softmax": ("singleton", "agents", "agents"),
    "model.aggregation": ("sum", "mean_of_blocks", "sum"),
    "model.frozen_dropout": ("on", "off", "off"),
    "loss.box_weight": (1.0, 5.0, 1.0),
    "loss.action_weight": (5.0, 1.0, 5.0),
    "loss.box_reduction": ("mean", "sum", "mean"),
    "evaluation.iou_gate": ("none", "none", "none"),
    "optimizer.decay_norms": (True, True, False),
    "optimizer.schedule": ("jump", "jump", "continuous"),
}
PRESET_NAMES = ("official", "paper", "corrected")

# What a key with a closed set of values accepts; `ravar_jax/config_check.py` enforces it.
CHOICES = {
    "task": ("ravar", "pretrain"),
    "data.dataset": ("mini_refava", "refava"),
    "data.frames": ("still", "window"),
    "data.pixels": ("released", "rgb"),
    "data.train_frames": ("head", "uniform", "random", "random_segments"),
    "data.eval_clips": (1, 11),
    "data.cache_dtype": ("float32", "bfloat16"),
    "data.sentences": ("true", "blank"),
    "data.video": ("true", "blank"),
    "model.text_pooling": ("all_positions", "masked"),
    "model.box_conversion": ("swapped", "correct"),
    "model.detections_kept": ("person_over_100", "all_over_100", "person_masked_mean"),
    "model.cross_softmax": ("singleton", "agents"),
    "model.aggregation": ("sum", "mean_of_blocks"),
    "model.frozen_dropout": ("on", "off"),
    "model.detections": ("dataset", "detr", "none"),
    "model.remat": ("none", "minimal", "full"),
    "loss.box_reduction": ("mean", "sum"),
    "evaluation.iou_gate": ("none", "0.5"),
    "optimizer.name": ("bert_adam", "adamw"),
    "optimizer.schedule": ("jump", "continuous"),
    "checkpoint.best_metric": (
        "mIoU",
        "mAP_weighted",
        "mAP_macro",
        "AUROC_weighted",
        "AUROC_macro",
    ),
}


def apply_preset(config: ConfigDict, name: str) -> ConfigDict:
    """Sets every switch of `PRESETS` in place to its value under `name` and returns the config."""
    column = PRESET_NAMES.index(name)
    config.update_from_flattened_dict({key: values[column] for key, values in PRESETS.items()})
    return config


def describe_switches(config: ConfigDict) -> str:
    """Returns the preset that a config's switches are closest to, and where they differ from it."""
    set_to = {key: config[key.split(".")[0]][key.split(".")[1]] for key in PRESETS}
    differing = {
        name: [key for key, values in PRESETS.items() if set_to[key] != values[column]]
        for column, name in enumerate(PRESET_NAMES)
    }
    name = min(reversed(PRESET_NAMES), key=lambda name: len(differing[name]))
    changes = ", ".join(f"{key}={set_to[key]}" for key in differing[name])
    return f"{name}, but {changes}" if changes else name


def get_config() -> ConfigDict:
    """Returns the base configuration, locked against unknown keys."""
    config = ConfigDict()
    config.seed = 0  # parameters, dropout, and the order of examples
    config.task = "ravar"  # or "pretrain": train a MiniBLIP backbone

    config.model = ConfigDict()
    config.model.width = 768  # of the fusion; also of its image, text and label tokens
    config.model.num_agent_tokens = 4
    config.model.mlp_ratio = 4
    # image tokens a frame; text and boxes are expanded to as many
    config.model.num_query_tokens = 32
    config.model.num_detections = 100  # rows of the location-semantic stream, padded
    config.model.action_dropout = 0.2  # in the action head
    config.model.text_pooling = "masked"
    config.model.box_conversion = "correct"
    config.model.detections_kept = "person_masked_mean"
    config.model.cross_softmax = "agents"
    config.model.aggregation = "sum"
    config.model.frozen_dropout = "off"
    # where boxes come from: the dataset's records, the detector on the key frame, or "none": every query "no object"
    config.model.detections = "dataset"
    config.model.detector = ""  # folder of the detector's weights, for model.detections=detr
    # of the key frame that the detector sees, pixels; the release's
    config.model.detector_height = 340
    config.model.detector_width = 465
    config.model.backbone = ""  # folder of the backbone's weights; "" is the shipped MiniBLIP
    config.model.train_backbone = False  # train the backbone too (from pixels only)
    # train its Q-Former, query tokens and image norm; the image encoder stays frozen
    config.model.train_qformer = False
    # .npy (91, width) label embeddings; "": by the text encoder of a SentencePiece backbone
    config.model.label_table = ""
    # of the computation; parameters, softmax, norms and losses stay float32
    config.model.dtype = "float32"
    # what of an image encoder's block the backward pass computes again to save memory: "none"; "minimal", all but its
    # dense layers; "full", all
    config.model.remat = "none"
    config.model.scan = True  # compile its blocks as one loop; False: one after the other

    config.data = ConfigDict()
    config.data.dataset = "mini_refava"
    config.data.data_dir = "data"  # where datasets are, and where MiniRefAVA is built on first use
    config.data.seed = 0  # MiniRefAVA: which scenes
    config.data.num_clips = 1000  # MiniRefAVA: windows in all splits together
    # MiniRefAVA: evenly spaced positions and the key frame; 90 stores all
    config.data.stored_frames = 9
    # folder written by launch/cache_features.py; "" trains from pixels
    config.data.feature_cache = ""
    # of the tokens in a cache: bfloat16 halves it; they are read as float32
    config.data.cache_dtype = "float32"
    config.data.num_frames = 8  # frames a clip
    config.data.image_size = 224  # side of the square the frames are resized to
    # token ids a sentence, padded; longer ones are cut, counted and reported
    config.data.text_length = 32
    config.data.frames = "window"
    config.data.pixels = "rgb"
    # "random" draws stored frames anew in every epoch, "random_segments" one from each of num_frames equal parts
    config.data.train_frames = "uniform"
    config.data.eval_clips = 11
    config.data.sentences = "true"  # "blank": train and evaluate without the sentence
    config.data.video = "true"  # "blank": image tokens zero and no detections
    # training from pixels: share of examples seen mirrored, with left and right exchanged in the sentence
    config.data.flip_probability = 0.0
    config.data.crop_min_area = (
        1.0  # least share of the frame that a random crop around the target keeps
    )
    config.data.colour_jitter = (
        0.0  # brightness, contrast and saturation times 1 - this to 1 + this
    )
    config.data.max_bad_records = 0  # unreadable records that are masked out before the run stops

    config.loss = ConfigDict()
    config.loss.box_weight = 1.0
    config.loss.action_weight = 5.0
    config.loss.box_reduction = "mean"

    config.optimizer = ConfigDict()
    config.optimizer.name = "bert_adam"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup = 0.3  # share of the steps
    config.optimizer.schedule = "continuous"
    config.optimizer.weight_decay = 0.2
    config.optimizer.decay_norms = False
    config.optimizer.clip_norm = 1.0  # global norm

    config.train = ConfigDict()
    config.train.steps = 7080
    config.train.batch_size = 128  # global
    # parts that a batch is computed in, one after the other, to fit memory; their gradients are summed
    config.train.micro_batches = 1
    config.train.log_every_steps = 50
    config.train.eval_every_steps = 1000  # on the val split
    config.train.hang_seconds = (
        3600  # without a step for so long the process ends; 0 waits for ever
    )

    config.evaluation = ConfigDict()
    config.evaluation.batch_size = 64
    config.evaluation.iou_gate = "none"

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 500
    config.checkpoint.keep_last = 2
    config.checkpoint.keep_every_steps = 0  # 0: none beyond keep_last
    # so many with the best score on the val split; then every evaluated step is saved. 0: none
    config.checkpoint.keep_best = 0
    config.checkpoint.best_metric = "mAP_macro"  # the score that keep_best goes by
    # go on from the checkpoint before a damaged one, which is moved to WORKDIR/damaged_checkpoints
    config.checkpoint.fall_back = False

    config.mesh = ConfigDict()
    config.mesh.data = -1  # -1: the devices that are left
    config.mesh.fsdp = 1
    config.mesh.tensor = 1
    config.lock()
    return config
