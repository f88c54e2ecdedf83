"""The frozen detector: its folder, its arithmetic, and what the step does with it."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ravar_jax.detector import detect, load_detector
from ravar_jax.errors import UserError
from ravar_jax.models.detr import Detr
from ravar_jax.restore import restore_run
from ravar_jax.tasks import ravar
from tests import tiny_detector, untrained_run
from tests.tiny_detector import HEIGHT, QUERIES, SIZES, WIDTH, write_detector

ROWS, FRAMES = 3, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a backbone, label embeddings and a detector."""
    folder = tmp_path_factory.mktemp("models")
    untrained_run.write_backbone(folder / "backbone")
    untrained_run.write_label_table(folder / "labels.npy")
    write_detector(folder / "detector")
    return folder


class Compiled:
    """A task and new parameters; each of its functions is compiled once for the arrays of a batch."""

    def __init__(self, task: Any):
        self.params = untrained_run.random_leaves(
            jax.eval_shape(task.init_params, jax.random.key(0))
        )
        self.frozen = task.frozen
        self._loss = jax.jit(task.loss, static_argnums=4)
        self._predict = jax.jit(task.predict)

    def loss(self, batch: dict[str, Any], train: bool = True) -> float:
        return float(self._loss(self.params, self.frozen, batch, jax.random.key(1), train)[0])

    def predict(self, batch: dict[str, Any]) -> np.ndarray:
        """Returns logits and boxes (B, 84); the one clip of the batch is the evaluation clip."""
        batch = batch | {"frames": batch["frames"][:, None]}
        output = self._predict(self.params, self.frozen, batch)
        return np.concatenate([output["action_logits"], output["box"]], axis=1)


@pytest.fixture(scope="module")
def compiled(folder: Path) -> Compiled:
    """The task with the detector in its key frames."""
    return Compiled(ravar.make_task(make_config(folder)))


def make_config(folder: Path, **changes: Any) -> Any:
    config = untrained_run.make_config(folder / "backbone", data__num_frames=FRAMES)
    config.model.label_table = str(folder / "labels.npy")
    config.update_from_flattened_dict(tiny_detector.settings(folder / "detector"))
    flat = {key.replace("__", "."): value for key, value in changes.items()}
    config.update_from_flattened_dict(flat)
    return config


def random_key_frames(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (ROWS, HEIGHT, WIDTH, 3), np.uint8)


def make_batch() -> dict[str, np.ndarray]:
    """A training batch from pixels, as the pipeline gives it: key frames, and rows of no object."""
    rng = np.random.default_rng(0)
    side, length = untrained_run.IMAGE_SIZE, untrained_run.TEXT_LENGTH
    return {
        "frames": rng.integers(0, 256, (ROWS, FRAMES, side, side, 3), np.uint8),
        "key_frame": random_key_frames(),
        "token_ids": rng.integers(4, 200, (ROWS, length), np.int32),
        "attention_mask": np.ones((ROWS, length), np.int32),
        "boxes": np.zeros((ROWS, QUERIES, 4), np.float32),
        "class_ids": np.full((ROWS, QUERIES), 91, np.int32),
        "target_box": rng.uniform(0, 1, (ROWS, 4)).astype(np.float32),
        "action_labels": (rng.uniform(size=(ROWS, 80)) < 0.1).astype(np.float32),
        "mask": np.ones(ROWS, np.float32),
        "example_id": np.arange(ROWS, dtype=np.int32),
    }


def without_key_frames(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: array for key, array in batch.items() if key != "key_frame"}


@pytest.mark.parametrize("pixels", ["rgb", "released"])
def test_every_query_is_a_detection_in_its_order(folder: Path, pixels: str) -> None:
    detector, frames = load_detector(str(folder / "detector")), random_key_frames()
    taken = frames / 255
    if pixels == "rgb":
        taken = (taken - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    expected: Any = jax.jit(Detr(**SIZES).apply)({"params": detector.params}, np.float32(taken))
    run = jax.jit(functools.partial(detect, detector.sizes, pixels=pixels))
    found = run(detector.params, frames)
    np.testing.assert_array_equal(found.class_ids, np.argmax(expected.class_logits, axis=-1))
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-5)
    # A detector that always says the same would make every test of this file easy.
    assert {1, 91} <= set(np.ravel(found.class_ids))
    assert np.std(found.boxes, axis=0).max() > 1e-2


def test_one_changed_weight_changes_its_hash_alone(folder: Path) -> None:
    first, second = (load_detector(str(folder / "detector")) for _ in range(2))
    second.params["query_embedding"] = second.params["query_embedding"] + np.float32(1e-3)
    before, after = first.weight_hashes, second.weight_hashes
    assert [key for key in before if before[key] != after[key]] == ["query_embedding"]


def test_a_folder_that_is_no_detector_is_one_line(folder: Path, tmp_path: Path) -> None:
    write_detector(tmp_path / "classes", num_classes=11)
    for name in ("sizes", "cut", "bare"):
        shutil.copytree(folder / "detector", tmp_path / name)
    sizes = json.loads((tmp_path / "sizes" / "config.json").read_text())
    (tmp_path / "sizes" / "config.json").write_text(json.dumps(sizes | {"num_queries": 8}))
    (tmp_path / "cut" / "config.json").write_text("{")
    shutil.rmtree(tmp_path / "bare" / "params")
    cases = {
        tmp_path / "missing": "config.json is not of a detector .*No such file",
        folder / "backbone": "config.json is not of a detector .*unexpected keyword",
        tmp_path / "cut": "config.json is not of a detector",
        tmp_path / "classes": "11 classes, expected 92",
        tmp_path / "sizes": r"query_embedding is \(7, 20\), expected \(8, 20\)",
        tmp_path / "bare": "params is missing",
    }
    for path, words in cases.items():
        with pytest.raises(UserError, match=words) as caught:
            load_detector(str(path))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_other_number_of_queries_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="model.num_detections=9, but the detector has 7 queries"):
        ravar.make_task(make_config(folder, model__num_detections=9))


@pytest.mark.usefixtures("quick_compilation")
def test_the_step_detects_in_key_frames(folder: Path, compiled: Compiled) -> None:
    detector, batch = load_detector(str(folder / "detector")), make_batch()
    found = jax.jit(functools.partial(detect, detector.sizes, pixels="rgb"))(
        detector.params, batch["key_frame"]
    )
    blind = without_key_frames(batch)
    given = blind | {"boxes": np.asarray(found.boxes), "class_ids": np.asarray(found.class_ids)}
    ours = compiled.predict(batch)
    np.testing.assert_allclose(ours, compiled.predict(given), atol=1e-5)
    assert np.abs(ours - compiled.predict(blind)).max() > 1e-3
    assert abs(compiled.loss(batch) - compiled.loss(given)) < 1e-5
    assert abs(compiled.loss(batch) - compiled.loss(blind)) > 1e-4


@pytest.mark.usefixtures("quick_compilation")
def test_the_detector_is_frozen(folder: Path, compiled: Compiled) -> None:
    task, batch = ravar.make_task(make_config(folder)), make_batch()
    params, frozen = compiled.params, compiled.frozen
    assert "detector" not in params

    def loss(projection: Any, detector: Any) -> jax.Array:
        ours = {**params, "project_detections": projection}
        return task.loss(ours, {**frozen, "detector": detector}, batch, jax.random.key(1), True)[0]

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    of_projection, of_detector = gradient(params["project_detections"], frozen["detector"])
    assert np.any(of_projection["kernel"][:4])  # the loss does depend on what was detected
    for path, leaf in jax.tree.leaves_with_path(of_detector):
        assert not np.any(leaf), path


@pytest.mark.usefixtures("quick_compilation")
def test_blank_video_has_no_detections(folder: Path) -> None:
    blank = Compiled(ravar.make_task(make_config(folder, data__video="blank")))
    batch = make_batch()
    ours = blank.predict(batch)
    other = batch | {"key_frame": random_key_frames(seed=1)}
    np.testing.assert_array_equal(ours, blank.predict(other))
    np.testing.assert_allclose(ours, blank.predict(without_key_frames(batch)), atol=1e-6)


@pytest.mark.usefixtures("quick_compilation")
def test_released_dropout_perturbs_the_detections_while_training(
    folder: Path, compiled: Compiled
) -> None:
    """The backbone of these tests has no dropout, so what changes is the detector's."""
    released = Compiled(ravar.make_task(make_config(folder, model__frozen_dropout="on")))
    batch = make_batch()

    def change(batch: dict[str, np.ndarray], train: bool) -> float:
        return abs(compiled.loss(batch, train) - released.loss(batch, train))

    assert change(batch, True) > 1e-4
    assert change(without_key_frames(batch), True) < 1e-5
    assert change(batch, False) < 1e-5


@pytest.mark.usefixtures("quick_compilation")
def test_a_run_goes_on_only_with_the_detector_that_it_was_trained_with(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "detector", tmp_path / "detector")
    config = make_config(folder, model__detector=str(tmp_path / "detector"))
    untrained_run.write_run(tmp_path / "run", config)
    assert "detector" in restore_run(tmp_path / "run").frozen
    shutil.rmtree(tmp_path / "detector")
    write_detector(tmp_path / "detector", seed=1)
    with pytest.raises(UserError, match=r"other frozen weights .*model\.detector.*: detector/"):
        restore_run(tmp_path / "run")
