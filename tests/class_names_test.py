import re

from ravar_jax.class_names import AVA_ACTIONS, COCO_NAMES


def test_ids_and_rows_are_complete():
    assert list(AVA_ACTIONS) == list(range(1, 81))
    assert len(set(AVA_ACTIONS.values())) == 80
    assert len(COCO_NAMES) == len(set(COCO_NAMES)) == 91
    assert (COCO_NAMES[0], COCO_NAMES[89], COCO_NAMES[90]) == ("person", "toothbrush", "None")


def test_ava_actions_equal_the_published_list(shared_dir):
    text = (shared_dir / "real-data/ava/ava_action_list_v2.2.pbtxt").read_text()
    published = {int(i): name for name, i in re.findall(r'name: "(.*)"\s*label_id: (\d+)', text)}
    assert published == AVA_ACTIONS


def test_coco_names_equal_the_released_rows(shared_dir):
    text = (shared_dir / "real-data/refatomnet/label_names.txt").read_text()
    assert tuple(text.splitlines()) == COCO_NAMES
