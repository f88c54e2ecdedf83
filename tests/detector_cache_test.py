"""Detections in the feature cache: what is computed once a window is what the step would compute from pixels."""

import io
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines import input_pipeline
from data_pipelines.feature_cache_writer import write_cache
from ravar_jax.backbone import load_backbone
from ravar_jax.errors import UserError
from ravar_jax.tasks import ravar
from tests import tiny_dataset, tiny_detector, untrained_run

UNUSED = tiny_dataset.WordTokenizer()  # cached ids come from the backbone's own


def picture(rng: np.random.Generator) -> io.BytesIO:
    buffer = io.BytesIO()
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    coarse.resize((48, 36)).save(buffer, "JPEG")
    return io.BytesIO(buffer.getvalue())


def write_dataset(data_dir: Path) -> None:
    """As `tiny_dataset`, but no two frames are alike, so that no two windows have the same detections."""
    rng = np.random.default_rng(0)
    folder = data_dir / "refava" / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    for split, people in tiny_dataset.SPLITS.items():
        records = [tiny_dataset.record(f"{split}{i}", n) for i, n in enumerate(people)]
        for record in records:
            record["frames"] = [picture(rng) for _ in record["frames"]]
        tiny_dataset.write_split(folder, split, records)
    (folder / "dataset_info.json").write_text(json.dumps({"splits": []}))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a dataset, a backbone, a detector and their cache."""
    folder = tmp_path_factory.mktemp("made")
    write_dataset(folder)
    untrained_run.write_backbone(folder / "backbone")
    tiny_detector.write_detector(folder / "detector")
    write_cache(pixel_config(folder), folder / "cache", report=lambda line: None)
    return folder


def pixel_config(folder: Path) -> Any:
    config = untrained_run.make_config(
        folder / "backbone",
        data__dataset="refava",
        data__data_dir=str(folder),
        train__batch_size=4,
        evaluation__batch_size=4,
    )
    config.update_from_flattened_dict(tiny_detector.settings(folder / "detector"))
    return config


@pytest.fixture
def config(made: Path) -> Any:
    config = pixel_config(made)
    config.data.feature_cache = str(made / "cache")
    return config


def train(config: Any, tokenizer: Any = UNUSED) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(input_pipeline.train_batches(config, tokenizer, 0), 3))


def test_training_and_evaluation_equal_those_from_pixels(made: Path, config: Any) -> None:
    pixels = pixel_config(made)
    tokenizer = load_backbone(pixels.model.backbone).tokenizer
    task = ravar.make_task(config)
    params = task.init_params(jax.random.key(0))

    @jax.jit
    def loss_and_gradient(batch: Any) -> Any:
        compute = lambda params: task.loss(params, task.frozen, batch, jax.random.key(1), True)[0]  # noqa: E731
        return jax.value_and_grad(compute)(params)

    cached, seen = train(config), train(pixels, tokenizer)
    for ours, theirs in zip(cached, seen, strict=True):
        assert "key_frame" not in ours
        assert (theirs["class_ids"] == 91).all()  # nothing but the key frame tells
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
            loss_and_gradient(ours),
            loss_and_gradient(theirs),
        )
    boxes = np.concatenate([batch["boxes"] for batch in cached])
    assert len(np.unique(boxes, axis=0)) == len(tiny_dataset.PEOPLE)  # one for every window
    assert 1 in np.concatenate([batch["class_ids"] for batch in cached])

    predict = jax.jit(task.predict)
    ours, theirs = (
        [
            predict(params, task.frozen, batch)
            for batch in input_pipeline.eval_batches(each, tokenizer, "test")
        ]
        for each in (config, pixels)
    )
    for left, right in zip(ours, theirs, strict=True):
        real = np.asarray(left["mask"]) == 1
        for key in ("action_logits", "box"):
            np.testing.assert_allclose(left[key][real], right[key][real], atol=1e-5)


def test_blank_video_reads_no_detections(config: Any) -> None:
    config.data.video = "blank"
    for batch in train(config):
        assert (batch["class_ids"] == 91).all()
        assert not batch["boxes"].any()


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("model.detector_height", 22, r"model\.detector_height \(21 in the cache, now 22\)"),
        ("model.detector_width", 22, r"model\.detector_width"),
        ("model.detections", "dataset", r"model\.detections \(detr in the cache, now dataset\)"),
        ("data.frames", "still", r"detector's position \(\[45\] in the cache, now \[0\]\)"),
    ],
)
def test_cache_of_other_settings_is_refused(config: Any, key: str, value: Any, named: str) -> None:
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=named):
        train(config)


def test_cache_of_another_detector_is_refused(config: Any, made: Path, tmp_path: Path) -> None:
    tiny_detector.write_detector(tmp_path / "detector", seed=1)
    config.model.detector = str(tmp_path / "detector")
    with pytest.raises(UserError, match="of the frozen weights, the first detector/"):
        train(config)
    config.data.feature_cache = ""
    with pytest.raises(UserError, match="holds another cache: .*the first detector/"):
        write_cache(config, made / "cache")
