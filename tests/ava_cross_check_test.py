import csv
from pathlib import Path

import pytest

from data_pipelines.refava import ava_cross_check
from data_pipelines.refava.annotations import FIELDS, read_annotations
from ravar_jax.errors import UserError

# As AVA has them: a person a box, several rows for several actions, not always in order.
AVA = """\
m,0902,0.100,0.200,0.500,0.800,80,7
m,0902,0.100,0.200,0.500,0.800,11,7
m,0902,0.500,0.200,0.900,0.800,12,8
m,0902,0.000,0.000,0.100,0.100,12,9
m,0903,0.100,0.200,0.500,0.800,11,7
m,0903,0.500,0.200,0.900,0.800,12,8
"""
PEOPLE = """
train,m,902,7,0.1,0.2,0.5,0.8,11 80,The same as in AVA.
train,m,902,3,0.5,0.2,0.85,0.8,12,Another id and a narrower box.
train,m,903,7,0.1,0.2,0.5,0.8,11 17,One action more.
train,m,903,8,0.1,0.7,0.4,0.9,12,That person's id but another place.
val,m,904,7,0.1,0.2,0.5,0.8,11,A second that AVA lacks.
"""


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    folder = tmp_path / "annotations"
    folder.mkdir()
    (folder / "people.csv").write_text(",".join(FIELDS) + PEOPLE)
    return folder


def test_people_boxes_and_actions_are_compared(annotations: Path, tmp_path: Path) -> None:
    (tmp_path / "ava.csv").write_text(AVA)
    ava = ava_cross_check.read_ava_csvs([str(tmp_path / "ava.csv")])
    found = ava_cross_check.compare_people(read_annotations(annotations), ava)
    examples = found.pop("examples")
    assert found == {
        "people": 5,
        "found_by_id": 2,
        "found_by_box": 1,
        "missing": 2,
        "window_missing": 1,
        "boxes_differ": 1,
        "labels_differ": 1,
        "labels_lacking": 0,
        "labels_added": 1,
        "ava_people_not_described": 2,  # 9 of second 902; 8 of 903, whose box is elsewhere
    }
    assert examples["boxes_differ"] == [
        "m___0902, person 3: [0.5, 0.2, 0.85, 0.8], AVA [0.5, 0.2, 0.9, 0.8]"
    ]
    assert examples["labels_differ"] == ["m___0903, person 7: [11, 17], AVA [11]"]
    assert examples["missing"][0] == "m___0903, person 8: box [0.1, 0.7, 0.4, 0.9]"


def test_a_person_of_ava_is_given_once(tmp_path: Path) -> None:
    rows = "".join(f"\ntrain,m,902,{n},0.1,0.2,0.5,0.{8 + n},11 80,Two of one." for n in (0, 1))
    (tmp_path / "people.csv").write_text(",".join(FIELDS) + rows)
    (tmp_path / "ava.txt").write_text(AVA)
    ava = ava_cross_check.read_ava_csvs([str(tmp_path / "ava.txt")])
    found = ava_cross_check.compare_people(read_annotations(tmp_path), ava)
    assert (found["found_by_box"], found["missing"], found["boxes_differ"]) == (1, 1, 0)


@pytest.mark.parametrize(
    "form",
    [
        'item {{ name: "{}" id: {} }}\n',
        'label {{\n name: "{}"\n label_id: {}\n label_type: X\n}}\n',
    ],
)
def test_label_map(annotations: Path, tmp_path: Path, form: str) -> None:
    file = tmp_path / "map.pbtxt"
    file.write_text(form.format("sit", 11) + form.format("stands", 12) + form.format("jump", 17))
    names = ava_cross_check.read_label_map(str(file))
    assert names == {11: "sit", 12: "stands", 17: "jump"}
    found = ava_cross_check.compare_label_map(read_annotations(annotations), names)
    assert found["ids_not_in_map"] == {"80": 1}
    assert found["names_differ"]["12"] == ["stand", "stands"]
    assert "11" not in found["names_differ"]
    assert "80 (1)" in ava_cross_check.describe_label_map(found)


@pytest.mark.parametrize(
    "row",
    [
        "m,0902",
        "m,0902,0.1,0.2,0.5,0.8,81,7",
        "m,0902,0.1,nan,0.5,0.8,11,7",
        "m,x,0.1,0,0.5,0.8,11",
    ],
)
def test_wrong_files_have_one_line(tmp_path: Path, row: str) -> None:
    file = tmp_path / "ava.csv"
    file.write_text(AVA + row)
    with pytest.raises(UserError, match=r"--ava_csv .*ava\.csv, line 7: expected video,second"):
        ava_cross_check.read_ava_csvs([str(file)])
    with pytest.raises(UserError, match=r"ava\.csv: expected blocks"):
        ava_cross_check.read_label_map(str(file))
    file.write_text("m," + "0" * 200_000)
    with pytest.raises(UserError, match=r"--ava_csv .*cannot be read as CSV \(field larger"):
        ava_cross_check.read_ava_csvs([str(file)])
    with pytest.raises(UserError, match=r"--ava_csv absent"):
        ava_cross_check.read_ava_csvs(["absent"])


def test_real_files(shared_dir: Path, tmp_path: Path) -> None:
    folder = shared_dir / "real-data" / "ava"
    slice_file = folder / "ava_val_v2.2_slice.csv"
    people: dict[tuple, list[str]] = {}
    for video, second, *box, action, person in csv.reader(slice_file.read_text().splitlines()):
        people.setdefault((video, second, person, *box), []).append(action)
    rows = [
        ["val", video, second, person, *box, " ".join(actions), "A person."]
        for (video, second, person, *box), actions in people.items()
    ]
    lines = [",".join(FIELDS), *(",".join(row) for row in rows)]
    (tmp_path / "people.csv").write_text("\n".join(lines))
    annotations = read_annotations(tmp_path)
    found = ava_cross_check.compare_people(
        annotations, ava_cross_check.read_ava_csvs([str(slice_file)])
    )
    assert found["found_by_id"] == found["people"] == len(rows) > 50
    assert not found["examples"]
    for name, count in (("", 80), ("_for_activitynet_2019", 60)):
        names = ava_cross_check.read_label_map(str(folder / f"ava_action_list_v2.2{name}.pbtxt"))
        assert len(names) == count
        assert not ava_cross_check.compare_label_map(annotations, names)["names_differ"]
