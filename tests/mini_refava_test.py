"""MiniRefAVA: scenes are a function of their key, say nothing they must not say, and become records that parse back."""

import collections
import io
import itertools
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from scipy import stats

from data_pipelines import schema
from data_pipelines.mini_refava import contact_sheet, layout, people, scenes, sentences, worker
from data_pipelines.mini_refava import mini_refava_dataset_builder as builder_module
from ravar_jax.errors import UsageError

NUM_CLIPS = 2000
ATTRIBUTES = ("shirt", "trousers", "hat_kind", "hat_colour", "size", "rank", "row")
# Anything that would name or hint an action or an object of one.
ACTION_WORDS = re.compile(
    r"\b(stand|sit|seat|walk|strid|run|jump|leap|lie|lying|laid|sleep|bend|bent|bow|stoop|wav|drink|cup|read|book|phone"
    r"|call|talk|hold|held|carr|ball|parcel|box|chair|mat|hand|arm|ground|air|doing|who is)\w*"
)


@pytest.fixture(scope="module")
def many() -> list[scenes.Scene]:
    return [scenes.make_scene(0, "train", i) for i in range(NUM_CLIPS)]


def everyone(many: list[scenes.Scene]) -> list[scenes.Person]:
    return [person for scene in many for person in scene.people]


def attribute(person: scenes.Person, name: str) -> str:
    return str(getattr(person.spot if name in ("rank", "row") else person.looks, name))


def cramers_v(pairs: list[tuple[str, str]]) -> tuple[float, float]:
    """Bias-corrected Cramer's V of two categorical variables and the p value of independence."""
    rows, columns = sorted({a for a, _ in pairs}), sorted({b for _, b in pairs})
    counts = collections.Counter(pairs)
    table = np.array([[counts[a, b] for b in columns] for a in rows])
    test = stats.chi2_contingency(table)
    r, k, n = len(rows), len(columns), len(pairs)
    phi2 = max(0.0, test.statistic / n - (r - 1) * (k - 1) / (n - 1))
    return float(np.sqrt(phi2 / min(r - 1, k - 1))), float(test.pvalue)


def content(scene: scenes.Scene) -> tuple:
    return tuple((p.looks, p.body, p.actions, p.spot, p.x) for p in scene.people)


def test_constants_are_those_of_the_record():
    assert (scenes.NUM_POSITIONS, scenes.KEY_POSITION) == (
        schema.NUM_POSITIONS,
        schema.KEY_POSITION,
    )
    assert scenes.KEY_TIME == schema.KEY_POSITION / schema.FRAMES_PER_SECOND


def test_a_scene_is_a_function_of_its_key():
    assert scenes.make_scene(3, "val", 7) == scenes.make_scene(3, "val", 7)
    scene = scenes.make_scene(3, "val", 7)
    first = scenes.render(scene, 45)
    scenes.render(scenes.make_scene(3, "val", 8), 45)
    np.testing.assert_array_equal(first, scenes.render(scene, 45))
    assert first.shape == (144, 192, 3)
    assert first.dtype == np.uint8
    others = [
        scenes.make_scene(4, "val", 7),
        scenes.make_scene(3, "test", 7),
        scenes.make_scene(3, "val", 8),
    ]
    assert all(content(scene) != content(other) for other in others)


def test_splits_share_no_scene():
    seen = [
        {content(scenes.make_scene(seed, split, i)) for i in range(150)}
        for seed, split in itertools.product((0, 1), scenes.SPLITS)
    ]
    assert len(set.union(*seen)) == 6 * 150


def test_split_sizes():
    assert scenes.split_sizes(1000) == {"train": 700, "val": 100, "test": 200}
    assert scenes.split_sizes(3) == {"train": 1, "val": 1, "test": 1}
    assert sum(scenes.split_sizes(1234).values()) == 1234


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (1, [45]),
        (2, [0, 45]),
        (3, [0, 45, 89]),
        (9, [0, 12, 25, 38, 45, 50, 63, 76, 89]),
        (90, list(range(90))),
    ],
)
def test_stored_positions(stored: int, expected: list[int]):
    assert scenes.stored_positions(stored) == expected


def test_stored_positions_are_ascending_and_hold_the_key():
    for stored in range(1, 91):
        positions = scenes.stored_positions(stored)
        assert positions == sorted(set(positions))
        assert 45 in positions
        assert stored - 1 <= len(positions) <= stored


def test_labels_differ_and_no_class_dominates(many: list[scenes.Scene]):
    differ = [len({p.actions.labels for p in scene.people}) == len(scene.people) for scene in many]
    assert np.mean(differ) >= 0.8
    labels = collections.Counter(label for p in everyone(many) for label in p.actions.labels)
    assert set(labels) == set(people.ACTION_NAMES)
    shares = np.array(list(labels.values())) / len(everyone(many))
    assert len(labels) >= 8
    assert shares.max() < 0.25
    assert 0.1 < shares.mean() < 0.25
    assert {len(scene.people) for scene in many} == {2, 3, 4}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_and_places_are_independent_of_actions(many: list[scenes.Scene], name: str):
    for action in ("pose", "hand"):
        v, p_value = cramers_v(
            [(attribute(p, name), getattr(p.actions, action)) for p in everyone(many)]
        )
        assert v < 0.04, (name, action, v)
        assert p_value > 1e-3, (name, action, p_value)


def test_backgrounds_are_independent_of_actions(many: list[scenes.Scene]):
    for action in ("pose", "hand"):
        pairs = [(scene.place, getattr(p.actions, action)) for scene in many for p in scene.people]
        v, p_value = cramers_v(pairs)
        assert v < 0.04, (action, v)
        assert p_value > 1e-3, (action, p_value)


def test_attributes_are_independent_of_each_other(many: list[scenes.Scene]):
    for a, b in itertools.combinations(("shirt", "trousers", "hat_kind", "size", "row"), 2):
        assert cramers_v([(attribute(p, a), attribute(p, b)) for p in everyone(many)])[0] < 0.04


def test_no_word_of_a_sentence_tells_the_action(many: list[scenes.Scene]):
    words = collections.Counter(word for p in everyone(many) for word in set(p.sentence.split()))
    total = len(everyone(many))
    for word in (w for w, count in words.items() if 100 <= count <= total - 100):
        for action in ("pose", "hand"):
            pairs = [
                (str(word in p.sentence.split()), getattr(p.actions, action))
                for p in everyone(many)
            ]
            assert cramers_v(pairs)[0] < 0.06, (word, action)


def test_sentences_name_no_action(many: list[scenes.Scene]):
    named = [p.sentence for p in everyone(many) if ACTION_WORDS.search(p.sentence)]
    assert not named
    for options in (
        *sentences._PLACES.values(),
        *sentences._DEPTHS.values(),
        *sentences._NOUNS.values(),
    ):
        assert not any(ACTION_WORDS.search(option) for option in options)


def test_sentences_single_out_one_person_and_vary(many: list[scenes.Scene]):
    for scene in many:
        facts = scene.facts()
        for i, person in enumerate(scene.people):
            assert person.described_by
            said = {key: facts[i][key] for key in person.described_by}
            fitting = [k for k, f in enumerate(facts) if said.items() <= f.items()]
            assert fitting == [i], person.sentence
        assert len({p.sentence for p in scene.people}) == len(scene.people)
    by_place = np.mean(["place" in p.described_by for p in everyone(many)])
    assert 0.6 < by_place < 0.75  # often, as people do, but looks alone must do for many
    texts = [p.sentence for p in everyone(many)]
    assert len(set(texts)) > len(texts) * 0.6
    assert max(len(text.split()) for text in texts) <= 24


def test_sentences_are_true(many: list[scenes.Scene]):
    """Reads the words back: every colour stands before its garment, and the garment's colour is the person's."""
    for person in everyone(many):
        text, looks = person.sentence, person.looks
        for colour, garment in re.findall(r"(\w+) (shirt|top|trousers|pants)\b", text):
            assert colour == (looks.shirt if garment in ("shirt", "top") else looks.trousers)
        for colour in re.findall(r"(\w+) (?:baseball )?cap\b", text):
            assert looks.hat_kind == "cap"
            assert colour in ("a", "baseball", looks.hat_colour)
        for colour in re.findall(r"(\w+) (?:wide-brimmed|broad-brimmed|sun) hat\b", text):
            assert looks.hat_kind == "brim"
            assert colour in ("a", looks.hat_colour)
        if re.search(r"hatless|bareheaded|without a hat|nothing on the head", text):
            assert looks.hat_kind == "none"
        assert ("child" in text or "kid" in text or "small" in text) <= (looks.size == "child")
        assert ("adult" in text or "grown-up" in text or "tall" in text) <= (looks.size == "adult")


def test_place_words_hold(many: list[scenes.Scene]):
    for scene in many:
        ordered = sorted(scene.people, key=lambda p: p.spot.rank)
        middles = [(p.box[0] + p.box[2]) / 2 * layout.WIDTH for p in ordered]
        assert np.diff(middles).min() >= layout.MIN_GAP - 0.01
        assert middles[0] < layout.WIDTH / 2 < middles[-1]
        rows = {
            row: [p.spot.ground for p in scene.people if p.spot.row == row]
            for row in ("front", "back")
        }
        if rows["front"] and rows["back"]:
            assert min(rows["front"]) - max(rows["back"]) > 20


def test_boxes_are_valid(many: list[scenes.Scene]):
    boxes = np.array([p.box for p in everyone(many)])
    assert (boxes >= 0).all()
    assert (boxes <= 1).all()
    size = (boxes[:, 2:] - boxes[:, :2]) * (layout.WIDTH, layout.HEIGHT)
    assert size.min() > 10


def _changed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(int) - b.astype(int)).sum(axis=-1) > 24


def test_boxes_are_tight_around_what_is_drawn():
    checked = 0
    for index in range(40):
        scene = scenes.make_scene(5, "test", index)
        empty = scenes.render(scene, 45, only=(), grain=False)
        for i, person in enumerate(scene.people):
            drawn = _changed(scenes.render(scene, 45, only=(i,), grain=False), empty)
            rows, columns = np.nonzero(drawn)
            seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            box = np.array(person.box) * (192, 144, 192, 144)
            if {shape.part for shape in person.shapes(45)} == {"person"}:
                np.testing.assert_allclose(box, seen, atol=1.6)
                checked += 1
            else:  # chair and objects lie outside the person's box
                assert (box[:2] >= seen[:2] - 1.6).all()
                assert (box[2:] <= seen[2:] + 1.6).all()
    assert checked > 10


def test_nobody_is_hidden():
    for index in range(25):
        scene = scenes.make_scene(6, "test", index)
        full = scenes.render(scene, 45, grain=False)
        empty = scenes.render(scene, 45, only=(), grain=False)
        for i in range(len(scene.people)):
            others = tuple(k for k in range(len(scene.people)) if k != i)
            alone = _changed(scenes.render(scene, 45, only=(i,), grain=False), empty).sum()
            visible = _changed(full, scenes.render(scene, 45, only=others, grain=False)).sum()
            assert visible >= 0.8 * alone


def _largest_covered_share(scene: scenes.Scene) -> float:
    """Returns how much of somebody's box is covered by the boxes of those in front, at most."""
    worst = 0.0
    for person in scene.people:
        x1, y1, x2, y2 = person.box
        covered = 0.0
        for other in scene.people:
            if other is not person and other.spot.ground >= person.spot.ground:
                across = min(x2, other.box[2]) - max(x1, other.box[0])
                down = min(y2, other.box[3]) - max(y1, other.box[1])
                covered += max(across, 0.0) * max(down, 0.0)
        worst = max(worst, covered / ((x2 - x1) * (y2 - y1)))
    return worst


def test_boxes_seldom_cover_one_another(many: list[scenes.Scene]):
    assert np.mean([_largest_covered_share(scene) > 0.15 for scene in many]) < 0.02


def test_people_stay_where_the_box_says(many: list[scenes.Scene]):
    from data_pipelines.mini_refava import figures

    for scene in many[:40]:
        for person in scene.people:
            for position in range(0, 90, 5):
                x1, _, x2, y2 = figures.person_extent(person.shapes(position))
                assert abs((x1 + x2) / 2 / 192 - (person.box[0] + person.box[2]) / 2) < 0.05
                assert abs(y2 / 144 - person.box[3]) < 0.06


def test_detections_have_a_detectors_faults(many: list[scenes.Scene]):
    found = people_found = 0
    for scene in many:
        scores = [d.score for d in scene.detections]
        assert scores == sorted(scores, reverse=True)
        for d in scene.detections:
            cx, cy, w, h = d.box
            assert min(cx - w / 2, cy - h / 2) >= -1e-9
            assert max(cx + w / 2, cy + h / 2) <= 1 + 1e-9
            assert 1 <= d.class_id <= 90
            assert 0 < d.score < 1
        corners = [
            (
                d.box[0] - d.box[2] / 2,
                d.box[1] - d.box[3] / 2,
                d.box[0] + d.box[2] / 2,
                d.box[1] + d.box[3] / 2,
            )
            for d in scene.detections
            if d.class_id == 1 and d.score > 0.7
        ]
        for person in scene.people:
            people_found += 1
            found += any(np.abs(np.subtract(c, person.box)).max() < 0.12 for c in corners)
    assert 0.06 < 1 - found / people_found < 0.14
    assert {d.class_id for scene in many for d in scene.detections} > {1, 33, 37, 47, 62, 77, 84}


def test_rendering_does_not_depend_on_the_number_of_workers():
    one = list(worker.rendered_clips(0, "val", 3, 2, num_workers=1))
    assert one == list(worker.rendered_clips(0, "val", 3, 2, num_workers=2))
    assert one[2] == worker.clip_record(0, "val", 2, 2)


def test_a_worker_that_fails_stops_the_build(capfd: pytest.CaptureFixture[str]):
    with pytest.raises(RuntimeError, match="ended before clip 0 of val"):
        list(worker.rendered_clips(0, "val", 2, 91))
    assert "stored_frames=91" in capfd.readouterr().err


def test_the_worker_needs_no_tensorflow():
    code = "import sys; sys.modules['tensorflow'] = sys.modules['tensorflow_datasets'] = None; "
    code += "from data_pipelines.mini_refava import worker; print(worker.clip_record(0, 'val', 0, 1)['clip_id'])"
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "mini_refava_s0_val_00000"


def test_records_parse_back(tmp_path, capsys: pytest.CaptureFixture[str]):
    folder = builder_module.build(str(tmp_path), seed=2, num_clips=10, stored_frames=3)
    assert folder == str(tmp_path / "mini_refava" / "seed2_clips10_frames3" / "1.3.0")
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(lines) == 2
    assert "10 clips of 3 frames" in lines[0]
    builder = tfds.builder_from_directory(folder)
    assert {k: v.num_examples for k, v in builder.info.splits.items()} == {
        "train": 7,
        "val": 1,
        "test": 2,
    }

    clip_ids = set()
    for split in scenes.SPLITS:
        decoders = {"frames": tfds.decode.SkipDecoding()}
        for record in builder.as_dataset(split=split, decoders=decoders).as_numpy_iterator():
            index = int(record["clip_id"].decode().rsplit("_", 1)[1])
            scene = scenes.make_scene(2, split, index)
            clip_ids.add(record["clip_id"].decode())
            assert (
                record["clip_id"].decode() == f"mini_refava_s2_{split}_{index:05d}" == scene.clip_id
            )
            assert record["frame_indices"].tolist() == [0, 45, 89]
            assert record["key_time"] == np.float32(1.5)
            frame = np.asarray(Image.open(io.BytesIO(record["frames"][1])))
            assert np.abs(frame.astype(int) - scenes.render(scene, 45)).mean() < 3
            assert [s.decode() for s in record["people"]["sentence"]] == [
                p.sentence for p in scene.people
            ]
            assert [list(v) for v in record["people"]["labels"]] == [
                list(p.actions.labels) for p in scene.people
            ]
            np.testing.assert_allclose(
                record["people"]["box"], [p.box for p in scene.people], atol=1e-6
            )
            assert record["detections"]["class_id"].tolist() == [
                d.class_id for d in scene.detections
            ]
    assert len(clip_ids) == 10

    file = next(tmp_path.rglob("*.tfrecord*"))
    before = file.stat().st_mtime_ns
    assert builder_module.build(str(tmp_path), seed=2, num_clips=10, stored_frames=3) == folder
    assert file.stat().st_mtime_ns == before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("numbers", "key"),
    [
        ((-1, 10, 9), "data.seed=-1"),
        ((0, 2, 9), "data.num_clips=2"),
        ((0, 10, 91), "data.stored_frames=91"),
    ],
)
def test_numbers_out_of_range_are_named(tmp_path, numbers: tuple[int, int, int], key: str):
    with pytest.raises(UsageError, match=re.escape(key)):
        builder_module.build(str(tmp_path), *numbers)
    assert not any(tmp_path.iterdir())


def test_contact_sheet_shows_every_clip():
    sheet = np.asarray(contact_sheet.contact_sheet(0, "test"))
    assert sheet.shape[1] == 3 * (2 * 192 + contact_sheet.GAP) + contact_sheet.GAP
    assert sheet.std() > 20
