"""Augmented views: what is painted in the frames is where the boxes say, and the sentence follows."""

import io
import json

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from configs import base
from data_pipelines import input_pipeline
from data_pipelines.augmentation import (
    Augmentation,
    View,
    configured_augmentation,
    mirror_sentence,
)
from data_pipelines.preprocess import show_frames
from ravar_jax import config_check
from ravar_jax.errors import UsageError
from tests import tiny_dataset

TARGET = np.array([0.25, 0.5, 0.5, 0.75], np.float32)
ALL = Augmentation(flip_probability=0.5, crop_min_area=0.3, colour_jitter=0.4, seed=0)
SENTENCE = "the man on the left"


def painted(box: np.ndarray, height: int = 120, width: int = 160) -> np.ndarray:
    """A black frame, white inside a box of x1, y1, x2, y2."""
    frame = np.zeros((1, height, width, 3), np.uint8)
    x1, x2 = (round(float(x) * width) for x in box[[0, 2]])
    y1, y2 = (round(float(y) * height) for y in box[[1, 3]])
    frame[:, y1:y2, x1:x2] = 255
    return frame


def box_seen(frame: np.ndarray) -> list[float]:
    """Where a frame is bright, x1, y1, x2, y2 in fractions."""
    rows, columns = np.nonzero(frame.mean(axis=-1) > 100)
    height, width = frame.shape[:2]
    return [
        columns.min() / width,
        rows.min() / height,
        (columns.max() + 1) / width,
        (rows.max() + 1) / height,
    ]


def test_the_target_is_whole_and_where_the_box_says():
    views = [ALL.draw(0, number, TARGET, SENTENCE) for number in range(200)]
    for view in views:
        shown = view.mirror(show_frames(painted(TARGET), "rgb", 200, 200, view.crop))[0]
        box = view.corners(TARGET)
        assert box_seen(shown) == pytest.approx(box.tolist(), abs=0.02)
        # Nothing of it is cut off: its size on screen is its size in the frame over that of the crop.
        x1, y1, x2, y2 = view.crop
        assert box[2] - box[0] == pytest.approx(0.25 / (x2 - x1), abs=1e-5)
        assert box[3] - box[1] == pytest.approx(0.25 / (y2 - y1), abs=1e-5)
        assert (x2 - x1) * (y2 - y1) > 0.29
    assert 60 < sum(view.mirrored for view in views) < 140
    areas = [(v.crop[2] - v.crop[0]) * (v.crop[3] - v.crop[1]) for v in views]
    assert min(areas) < 0.4
    assert max(areas) > 0.9


def test_a_target_larger_than_the_crop_stays_whole():
    wide = np.array([0.01, 0.4, 0.99, 0.6], np.float32)
    for number in range(50):
        x1, y1, x2, y2 = ALL.draw(0, number, wide, SENTENCE).crop
        assert x1 <= 0.0101
        assert x2 >= 0.9899
        assert 0 <= y1 <= 0.4001
        assert 0.5999 <= y2 <= 1


def test_detections_follow_and_those_out_of_sight_go():
    view = View(crop=(0.2, 0.4, 0.6, 0.8), mirrored=True)
    boxes = np.array([[0.375, 0.625, 0.25, 0.25], [0.9, 0.9, 0.1, 0.1]], np.float32)
    seen, class_ids, scores = view.detections(boxes, np.array([1, 5]), np.array([0.9, 0.8]))
    assert class_ids.tolist() == [1]
    assert scores.tolist() == [0.9]
    # The first is the target, as centre and size.
    x1, y1, x2, y2 = view.corners(TARGET)
    assert seen[0].tolist() == pytest.approx([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])
    cut, _, _ = view.detections(
        np.array([[0.2, 0.5, 0.2, 0.1]], np.float32), np.array([1]), np.array([1.0])
    )
    assert cut[0].tolist() == pytest.approx([0.875, 0.25, 0.25, 0.25], abs=1e-6)


def test_as_stored_changes_no_bit():
    view, generator = View(), np.random.default_rng(0)
    boxes = generator.uniform(size=(9, 4)).astype(np.float32)
    frames = generator.integers(0, 256, (2, 5, 7, 3), np.uint8)
    ids, scores = np.arange(9), np.arange(9.0)
    np.testing.assert_array_equal(view.corners(boxes), boxes)
    for after, before in zip(
        view.detections(boxes, ids, scores), (boxes, ids, scores), strict=True
    ):
        np.testing.assert_array_equal(after, before)
    np.testing.assert_array_equal(view.mirror(view.recolour(frames)), frames)
    assert view.sentence("left") == "left"


def test_colours_are_pillows_and_one_for_all_frames():
    view = View(factors=(1.3, 0.7, 0.5))
    frames = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 3), np.uint8)
    image = ImageEnhance.Brightness(Image.fromarray(frames[1])).enhance(1.3)
    image = ImageEnhance.Color(ImageEnhance.Contrast(image).enhance(0.7)).enhance(0.5)
    np.testing.assert_array_equal(view.recolour(frames)[1], np.asarray(image))
    factors = np.array([ALL.draw(0, number, TARGET, "").factors for number in range(300)])
    assert factors.min() > 0.6
    assert factors.max() < 1.4
    assert np.abs(factors.mean(axis=0) - 1).max() < 0.05
    assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.2


def test_views_depend_on_seed_epoch_and_example_alone():
    again = Augmentation(0.5, 0.3, 0.4, seed=0)
    assert again.draw(3, 7, TARGET, SENTENCE) == ALL.draw(3, 7, TARGET, SENTENCE)
    others = [ALL.draw(4, 7, TARGET, SENTENCE), ALL.draw(3, 8, TARGET, SENTENCE)]
    others.append(Augmentation(0.5, 0.3, 0.4, seed=1).draw(3, 7, TARGET, SENTENCE))
    assert all(other.crop != ALL.draw(3, 7, TARGET, SENTENCE).crop for other in others)
    # What one setting draws does not depend on another.
    only_crop = Augmentation(0.0, 0.3, 0.0, seed=0).draw(3, 7, TARGET, SENTENCE)
    assert only_crop.crop == ALL.draw(3, 7, TARGET, SENTENCE).crop


@pytest.mark.parametrize(
    ("sentence", "mirrored"),
    [
        ("The man on the LEFT", "The man on the RIGHT"),
        ("the leftmost woman, right-hand side", "the rightmost woman, left-hand side"),
        ("second from the right, his left arm up", "second from the left, his right arm up"),
        ("Right of the door, looking left", "Left of the door, looking right"),
        ("the woman's right shoulder", "the woman's left shoulder"),
        ("a man in a bright shirt, leftover food", "a man in a bright shirt, leftover food"),
        ("the man right behind her", None),
        ("the one who left", None),
        ("the man on the left who is right in front", None),
        ("", ""),
    ],
)
def test_left_and_right_are_exchanged_where_they_are_sides(sentence, mirrored):
    assert mirror_sentence(sentence) == mirrored
    flips = [Augmentation(1.0, 1.0, 0.0, 0).draw(0, n, TARGET, sentence).mirrored for n in range(9)]
    assert flips == [mirrored is not None] * 9


def test_sentences_of_mini_refava_can_all_be_mirrored():
    from data_pipelines.mini_refava import scenes

    spoken = 0
    for number in range(80):
        for person in scenes.make_scene(0, "train", number).people:
            mirrored = mirror_sentence(person.sentence)
            assert mirrored is not None, person.sentence
            assert mirror_sentence(mirrored) == person.sentence
            spoken += mirrored != person.sentence
    assert spoken > 20


def picture(target: np.ndarray) -> io.BytesIO:
    buffer = io.BytesIO()
    Image.fromarray(painted(target, 48, 64)[0]).save(buffer, "JPEG", quality=95)
    buffer.seek(0)
    return buffer


def make_config(folder):
    config = tiny_dataset.make_config(folder)
    config.data.image_size = 64
    config.model.num_detections = 3
    config.data.flip_probability = 0.5
    config.data.crop_min_area = 0.4
    return config


def test_training_reads_views_and_evaluation_does_not(tmp_path):
    folder = tmp_path / "refava" / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    first = {"box": TARGET, "sentence": "the man to the left"}
    for split in tiny_dataset.SPLITS:
        record = tiny_dataset.record("clip", 1, **first)
        record["frames"] = [picture(TARGET) for _ in tiny_dataset.POSITIONS]
        tiny_dataset.write_split(folder, split, [record], shards=1)
    (folder / "dataset_info.json").write_text(json.dumps({"splits": []}))
    config, tokenizer = make_config(tmp_path), tiny_dataset.WordTokenizer()
    left, right = (
        tokenizer.encode([f"the man to the {side}"], config.data.text_length)[0][0].tolist()
        for side in ("left", "right")
    )
    batches = input_pipeline.train_batches(config, tokenizer, 0)
    boxes = []
    for batch in (next(batches) for _ in range(5)):
        for row in range(4):
            box = batch["target_box"][row]
            for frame in batch["frames"][row]:
                assert box_seen(frame) == pytest.approx(box.tolist(), abs=0.04)
            words = batch["token_ids"][row].tolist()
            assert words in (left, right)
            boxes.append(tuple(box.tolist()))
    assert len(set(boxes)) == 20
    evaluated = next(input_pipeline.eval_batches(config, tokenizer, "val"))
    np.testing.assert_array_equal(evaluated["target_box"][0], TARGET)
    resumed = next(input_pipeline.train_batches(config, tokenizer, 4))
    np.testing.assert_array_equal(resumed["frames"], batch["frames"])
    np.testing.assert_array_equal(resumed["target_box"], batch["target_box"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data.flip_probability": 1.5}, "data.flip_probability"),
        ({"data.crop_min_area": 0.0}, "data.crop_min_area"),
        ({"data.colour_jitter": 1.0}, "data.colour_jitter"),
        ({"data.colour_jitter": 0.1, "task": "pretrain"}, "data.colour_jitter"),
        ({"data.flip_probability": 0.5, "data.feature_cache": "x"}, "augments pixels"),
    ],
)
def test_what_cannot_be_is_refused(changes, told):
    config = base.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UsageError, match=told):
        config_check.check_config(config, base.CHOICES, 1)


def test_nothing_is_augmented_by_default():
    assert configured_augmentation(base.get_config()) is None
