import collections
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import logging

from data_pipelines.refava.annotations import FIELDS, Person, read_annotations
from data_pipelines.refava.pickles import as_list, as_number, read_pickle
from ravar_jax.errors import UserError

BOX = [0.1, 0.2, 0.5, 0.75]


def _parts(*keys: str) -> dict[str, dict[str, Any]]:
    return {
        "label": {key: [12, 80] for key in keys},
        "keyframe": {key: [BOX] for key in keys},
        "description": {key: ["The man in a red shirt."] for key in keys},
    }


def _write(
    folder: Path,
    parts: dict[str, Any],
    split: str = "train",
    pattern: str = "{}_set_{}_crr_final.pkl",
    protocol: int = 4,
) -> Path:
    for part, value in parts.items():
        (folder / pattern.format(split, part)).write_bytes(pickle.dumps(value, protocol=protocol))
    return folder


def _error(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        read_annotations(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_released_layout_is_grouped_into_windows(tmp_path: Path) -> None:
    parts = _parts(
        "b___0903___0", "a___0902___10", "a___0902___2", "a___0904___x___1", "_v____1798___0"
    )
    _write(tmp_path, parts)
    _write(tmp_path, _parts("c___902___0"), split="val")
    found = read_annotations(tmp_path)
    assert found.config_name == "refava"
    assert list(found.splits) == ["train", "val"]
    train = found.splits["train"]
    assert [(w.clip_id, w.video_id, w.key_second) for w in train] == [
        ("_v____1798", "_v_", 1798.0),
        ("a___0902", "a", 902.0),
        ("a___0904", "a", 904.0),
        ("b___0903", "b", 903.0),
    ]
    # By value of the id, not by its letters; the last field of a key is the person.
    assert [[p.person_id for p in w.people] for w in train] == [["0"], ["2", "10"], ["1"], ["0"]]
    assert train[1].people[0] == Person("2", "The man in a red shirt.", tuple(BOX), (12, 80))
    assert found.splits["val"][0].clip_id == "c___0902"


def test_people_with_one_last_field_keep_longer_ids(tmp_path: Path) -> None:
    _write(tmp_path, _parts("a___0902___x___0", "a___0902___y___0"))
    (window,) = read_annotations(tmp_path).splits["train"]
    assert [person.person_id for person in window.people] == ["x___0", "y___0"]


def test_plus_plus_names_and_two_layouts(tmp_path: Path) -> None:
    _write(tmp_path, _parts("a___0902___0"), pattern="{}_{}.pkl")
    assert read_annotations(tmp_path).config_name == "refava_plus_plus"
    _write(tmp_path, _parts("a___0902___0"))
    assert "holds the layouts refava and refava_plus_plus" in _error(tmp_path)


def test_pickles_are_paired_by_key_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(
        logging, "warning", lambda text, *arguments: warnings.append(text % arguments)
    )
    parts = _parts("a___0902___0", "a___0902___1")
    read_annotations(_write(tmp_path, parts))
    assert not warnings
    parts["keyframe"] = {"a___0902___1": [[0.5, 0.5, 1.0, 1.0]], "a___0902___0": [BOX]}
    (window,) = read_annotations(_write(tmp_path, parts)).splits["train"]
    assert [person.box for person in window.people] == [tuple(BOX), (0.5, 0.5, 1.0, 1.0)]
    assert len(warnings) == 1
    assert "train_set_keyframe_crr_final.pkl" in warnings[0]


@pytest.mark.parametrize("part", ["label", "keyframe", "description"])
def test_key_missing_from_one_pickle(tmp_path: Path, part: str) -> None:
    parts = _parts("a___0902___0", "a___0902___1")
    del parts[part]["a___0902___1"]
    message = _error(_write(tmp_path, parts))
    assert f"train_set_{part}_crr_final.pkl: lacks the key 'a___0902___1'" in message


def test_missing_pickle_folder_and_empty_folder(tmp_path: Path) -> None:
    assert "no annotations" in _error(tmp_path)
    assert "no such directory" in _error(tmp_path / "absent")
    _write(tmp_path, _parts("a___0902___0"))
    (tmp_path / "train_set_keyframe_crr_final.pkl").unlink()
    assert "train_set_keyframe_crr_final.pkl: missing" in _error(tmp_path)
    assert "hold no person" in _error(_write(tmp_path, _parts()))


@pytest.mark.parametrize(
    ("part", "value", "told"),
    [
        ("label", [0], "label id 0"),
        ("label", [81], "label id 81"),
        ("label", [12.5], "label id 12.5"),
        ("label", [True], "label id True"),
        ("label", ["12"], "label id '12'"),
        ("label", None, "labels is None"),
        ("keyframe", [[0.5, 0.2, 0.5, 0.75]], "x2 <= x1"),
        ("keyframe", [[0.1, 0.8, 0.5, 0.75]], "y2 <= y1"),
        ("keyframe", [[0.1, 0.2, 0.5, 1.5]], "outside [0, 1]"),
        ("keyframe", [[-0.1, 0.2, 0.5, 0.7]], "outside [0, 1]"),
        ("keyframe", [[0.1, 0.2, float("nan"), 0.75]], "four finite numbers"),
        ("keyframe", [[0.1, 0.2, 0.5]], "four finite numbers"),
        ("keyframe", BOX, "four finite numbers"),
        ("keyframe", [], "four finite numbers"),
        ("description", [" "], "sentence is empty"),
        ("description", [""], "sentence is empty"),
        ("description", [7], "sentence is 7"),
        ("description", [], "sentence is []"),
    ],
)
def test_faults_name_file_record_and_field(
    tmp_path: Path, part: str, value: Any, told: str
) -> None:
    parts = _parts("a___0902___0", "a___0902___1")
    parts[part]["a___0902___1"] = value
    message = _error(_write(tmp_path, parts))
    assert f"train_set_{part}_crr_final.pkl, key 'a___0902___1'" in message
    assert told in message
    parts[part]["a___0902___0"] = value
    assert "(and 1 more faults)" in _error(_write(tmp_path, parts))


@pytest.mark.parametrize("key", ["a", "a___0902", "a___soon___0", "___0902___0", 7])
def test_keys_outside_the_grammar(tmp_path: Path, key: Any) -> None:
    message = _error(_write(tmp_path, _parts(key)))
    assert f"key {key!r}; expected video___second___person" in message


def test_duplicate_people_and_unsafe_names(tmp_path: Path) -> None:
    assert "duplicate" in _error(_write(tmp_path, _parts("a___0902___0", "a___902___0")))
    assert "video is '../a'" in _error(_write(tmp_path, _parts("../a___0902___0")))


@pytest.mark.parametrize("protocol", range(6))
def test_numpy_values_and_sets_read_as_plain_ones(tmp_path: Path, protocol: int) -> None:
    value = {
        "array": np.array([BOX], np.float32),
        "big_endian": np.array([1, 258], ">i4"),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "text": np.array(["The man.", "x"]),
        "objects": np.array([[1, 2], "a", None], dtype=object),
        "number": np.int64(12),
        "half": np.float32(0.5),
        "set": {3, 1},
        "bytes": b"\x00\xff",
        "plain": [None, True, (1, 2.5), "x"],
    }
    path = tmp_path / "value.pkl"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    read = read_pickle(path)
    assert as_list(as_list(read["array"])[0]) == np.float32(BOX).tolist()
    assert as_list(read["big_endian"]) == [1, 258]
    assert as_list(read["fortran"]) == [[0, 1, 2], [3, 4, 5]]
    assert as_list(read["text"]) == ["The man.", "x"]
    assert as_list(read["objects"]) == [[1, 2], "a", None]
    assert (as_number(read["number"]), as_number(read["half"])) == (12.0, 0.5)
    assert (sorted(as_list(read["set"])), read["bytes"], read["plain"]) == (
        [1, 3],
        b"\x00\xff",
        [None, True, (1, 2.5), "x"],
    )


class _Attack:
    def __init__(self, function: Any, *arguments: Any):
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_runs_code_is_refused_unrun(tmp_path: Path, protocol: int) -> None:
    import os

    trace = tmp_path / "ran"
    parts = _parts("a___0902___0")
    parts["keyframe"]["a___0902___0"] = _Attack(os.system, f"touch {trace}")
    message = _error(_write(tmp_path, parts, protocol=protocol))
    assert "train_set_keyframe_crr_final.pkl: refused, the pickle asks for posix.system" in message
    for function in (eval, exec, getattr, bytes, print):
        parts["keyframe"]["a___0902___0"] = _Attack(function, "1")
        assert f".{function.__name__};" in _error(_write(tmp_path, parts, protocol=protocol))
    parts["keyframe"]["a___0902___0"] = collections.OrderedDict(a=1)
    assert "collections.OrderedDict" in _error(_write(tmp_path, parts, protocol=protocol))
    parts["keyframe"]["a___0902___0"] = np.dtype("V8")
    _error(_write(tmp_path, parts, protocol=protocol))
    assert not trace.exists()


def test_a_pickle_cannot_change_what_stands_for_a_global(tmp_path: Path) -> None:
    parts = _parts("a___0902___0")
    path = _write(tmp_path, parts) / "train_set_label_crr_final.pkl"
    whole = path.read_bytes()
    # The global builtins.set, then BUILD with slot state: (None, {"_function": 1}).
    path.write_bytes(b"cbuiltins\nset\n(N}(V_function\nI1\nutb.")
    assert str(path) in _error(tmp_path)
    path.write_bytes(whole)
    set_file = tmp_path / "set.pkl"
    set_file.write_bytes(pickle.dumps({1, 2}, protocol=2))
    assert sorted(as_list(read_pickle(set_file))) == [1, 2]


def test_damaged_pickles_name_the_file(tmp_path: Path) -> None:
    _write(tmp_path, _parts("a___0902___0"))
    path = tmp_path / "train_set_label_crr_final.pkl"
    whole = path.read_bytes()
    for content in (
        whole[:-5],
        whole[: len(whole) // 2],
        b"",
        b"hello\n",
        whole[:10] + b"\xff" * 10,
    ):
        path.write_bytes(content)
        assert str(path) in _error(tmp_path)
    path.write_bytes(pickle.dumps([1, 2]))
    assert "expected a dict of keys, found list" in _error(tmp_path)


ROW = {
    "split": "train",
    "video": "a",
    "second": 12.5,
    "person": "0",
    "x1": 0.1,
    "y1": 0.2,
    "x2": 0.5,
    "y2": 0.75,
    "labels": [80, 12],
    "sentence": "The man, in red.",
}


def _csv(folder: Path, *rows: dict[str, Any], header: str = ",".join(FIELDS)) -> Path:
    lines = [header]
    for row in rows:
        cells = [" ".join(map(str, v)) if isinstance(v, list) else str(v) for v in row.values()]
        lines.append(",".join(f'"{cell}"' for cell in cells))
    (folder / "annotations.csv").write_text("\n".join(lines) + "\n")
    return folder


def _jsonl(folder: Path, *rows: dict[str, Any]) -> Path:
    (folder / "annotations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("write", [_csv, _jsonl])
def test_tables_read_like_pickles(tmp_path: Path, write: Any) -> None:
    found = read_annotations(write(tmp_path, ROW, {**ROW, "split": "test", "second": 3}))
    assert found.config_name == "ava_style"
    (window,) = found.splits["train"]
    assert (window.clip_id, window.key_second) == ("a___0012.500", 12.5)
    assert window.people == (Person("0", "The man, in red.", tuple(BOX), (12, 80)),)
    assert found.splits["test"][0].clip_id == "a___0003"


@pytest.mark.parametrize("write", [_csv, _jsonl])
@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("split", "dev", "split is 'dev'"),
        ("second", "soon", "second is 'soon'"),
        ("second", -1, "second is"),
        ("video", "", "video is empty"),
        ("labels", [81], "label id 81"),
        ("x1", 0.6, "x2 <= x1"),
        ("y2", 1.01, "outside [0, 1]"),
        ("x1", "nan", "four finite numbers"),
        ("sentence", "", "sentence is empty"),
    ],
)
def test_faults_in_tables_name_the_line(
    tmp_path: Path, write: Any, field: str, value: Any, told: str
) -> None:
    message = _error(write(tmp_path, {**ROW, "person": "1"}, {**ROW, field: value}))
    line = 3 if write is _csv else 2
    assert f"line {line}" in message
    assert told in message


def test_tables_that_would_be_read_as_something_else(tmp_path: Path) -> None:
    table = _csv(tmp_path, ROW, {**ROW, "person": "1"}) / "annotations.csv"
    right = table.read_text()
    table.write_text(right.replace('"The man, in red."', "The man, in red."))
    assert "line 2: has more cells than the header" in _error(tmp_path)
    # A quotation mark that is never closed would swallow the second person.
    table.write_text(right.replace('in red."', "in red.", 1).replace('"train"', "train"))
    assert "annotations.csv: cannot be read as text" in _error(tmp_path)
    table.write_text(right.replace("labels,", "labels,x1,", 1))
    assert "line 1: the header repeats x1" in _error(tmp_path)
    table.unlink()
    lines = _jsonl(tmp_path, ROW) / "annotations.jsonl"
    right = lines.read_text()
    lines.write_text(right.replace("in red", "in \\ud800"))
    assert "line 1: sentence holds half a character" in _error(tmp_path)
    lines.write_text(right.replace("12.5", "9" * 5000))
    assert "annotations.jsonl: cannot be read as text" in _error(tmp_path)


def test_malformed_tables(tmp_path: Path) -> None:
    assert "the header lacks sentence" in _error(_csv(tmp_path, header=",".join(FIELDS[:-1])))
    (tmp_path / "annotations.csv").write_text(",".join(FIELDS) + "\ntrain,a,1\n")
    assert "line 2: field person is missing" in _error(tmp_path)
    (tmp_path / "annotations.csv").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as text" in _error(tmp_path)
    (tmp_path / "annotations.csv").unlink()
    (tmp_path / "annotations.jsonl").write_text('{"split": \n')
    assert "line 1: not JSON" in _error(tmp_path)
    (tmp_path / "annotations.jsonl").write_text("[1]\n")
    assert "line 1: expected an object" in _error(tmp_path)


def test_all_faults_can_be_collected(tmp_path: Path) -> None:
    rows = [
        {**ROW, "person": "1", "x2": 1.5},
        {**ROW, "person": "2", "labels": [81]},
        ROW,
        {**ROW, "video": "other", "sentence": " "},
        {**ROW, "split": "val", "y2": 0.0},
    ]
    faults: list[str] = []
    found = read_annotations(_csv(tmp_path, ROW, *rows), faults)
    assert ["is outside [0, 1]" in faults[0], "label id" in faults[1]] == [True, True]
    assert ["duplicate" in faults[2], "sentence is empty" in faults[3]] == [True, True]
    assert len(faults) == 5
    (window,) = found.splits["train"]
    assert [person.person_id for person in window.people] == [ROW["person"]]
    assert list(found.splits) == ["train"]


def test_real_files(shared_dir: Path) -> None:
    found = read_annotations(shared_dir / "real-data" / "official_layout")
    counts = {split: (len(w), sum(len(x.people) for x in w)) for split, w in found.splits.items()}
    assert counts == {"train": (4, 6), "val": (1, 4), "test": (1, 2)}
