import shutil

import numpy as np
import pytest

from data_pipelines.quiet_tensorflow import tf
from data_pipelines.record_index import BadRecordError, load_index, write_index
from data_pipelines.records import Person, Window, parse_window
from ravar_jax.errors import UserError
from tests import tiny_dataset


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tiny_dataset.write_dataset(tmp_path_factory.mktemp("data"))
    write_index(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


def shard(folder, split="train", number=0):
    return folder / f"refava-{split}.tfrecord-{number:05}-of-00002"


def test_counts_and_reads_every_record(folder):
    index = load_index(folder, "train")
    assert index.num_windows == len(tiny_dataset.PEOPLE)
    assert index.num_examples == sum(tiny_dataset.PEOPLE)
    assert index.examples[:4].tolist() == [[0, 0], [0, 1], [1, 0], [2, 0]]
    for number, people in enumerate(tiny_dataset.PEOPLE):
        window = parse_window(index.read(number), index.where(number))
        assert window.clip_id == index.clip_ids[number] == f"train{number}"
        assert len(window.people) == people
        assert index.stored_positions(number) == window.frame_indices == tiny_dataset.POSITIONS


def test_fields_survive_the_schema(folder):
    index = load_index(folder, "train")
    person = parse_window(index.read(2), "r").people[1]
    assert person.person_id == "10"
    assert person.sentence == "person 10 of train2"
    assert person.labels == (2, 80)
    assert person.box.tolist() == pytest.approx([0.1, 0.1, 0.3, 0.5])


def test_index_is_written_when_absent_and_kept(folder):
    path = folder / "index_val.json"
    before = path.read_bytes()
    path.unlink()
    assert load_index(folder, "val").num_examples == 3
    assert path.read_bytes() == before


def test_fingerprint_tells_content_apart(folder):
    before = load_index(folder, "train").fingerprint
    assert load_index(folder, "val").fingerprint != before
    tiny_dataset.write_split(folder, "train", [tiny_dataset.record("other", 2)] * 2)
    write_index(folder)
    assert load_index(folder, "train").fingerprint != before


def test_missing_shard_is_named(folder):
    shard(folder, number=1).unlink()
    with pytest.raises(UserError, match=r"refava-train\.tfrecord-00001-of-00002 is missing"):
        load_index(folder, "train")
    (folder / "index_train.json").unlink()
    with pytest.raises(UserError, match=r"refava-train\.tfrecord-00001-of-00002 is missing"):
        load_index(folder, "train")


@pytest.mark.parametrize("indexed", [True, False])
def test_truncated_shard_is_named_at_open(folder, indexed):
    path = shard(folder)
    path.write_bytes(path.read_bytes()[:-7])
    if not indexed:
        (folder / "index_train.json").unlink()
    with pytest.raises(UserError, match=r"train\.tfrecord-00000-of-00002 is truncated"):
        load_index(folder, "train")


def test_shard_that_lost_whole_records_is_noticed_when_indexing(folder):
    tiny_dataset.write_records(shard(folder), [tiny_dataset.record("train0", 2)])
    info = '{"splits": [{"name": "train", "shardLengths": ["3", "2"]}]}'
    (folder / "dataset_info.json").write_text(info)
    with pytest.raises(UserError, match="holds 1 records, but dataset_info.json says 3"):
        write_index(folder)


def test_flipped_bit_fails_the_checksum(folder):
    index = load_index(folder, "train")
    path, data = shard(folder), bytearray(shard(folder).read_bytes())
    data[index.offsets[1] + index.lengths[1] // 2] ^= 1
    path.write_bytes(data)
    index.read(0)
    with pytest.raises(BadRecordError, match=rf"byte {index.offsets[1] - 12} .*train1.*checksum"):
        index.read(1)
    (folder / "index_train.json").unlink()
    with pytest.raises(UserError, match=r"train\.tfrecord-00000-of-00002 .*damaged"):
        load_index(folder, "train")


def test_damaged_index_is_named(folder):
    path = folder / "index_train.json"
    right = path.read_bytes()
    for wrong, told in (
        (right.replace(b'"num_people":[2', b'"num_people":[3'), "index_train.json is damaged"),
        (right.replace(b"train0", b"train9"), "index_train.json is damaged"),
        (right[:-9], "index_train.json is not an index"),
        (b"[]", "index_train.json is not an index"),
        (b"\xff", "index_train.json is not an index"),
    ):
        assert wrong != right
        path.write_bytes(wrong)
        with pytest.raises(UserError, match=told):
            load_index(folder, "train")


def test_cut_shard_opens_where_the_budget_covers_what_it_lost(folder):
    path = shard(folder)
    path.write_bytes(path.read_bytes()[: load_index(folder, "train").offsets[1] + 9])
    with pytest.raises(
        UserError, match=r"is truncated: .* 2 records lost, data\.max_bad_records=1"
    ):
        load_index(folder, "train", max_bad_records=1)
    index = load_index(folder, "train", max_bad_records=2)
    index.read(0)
    for lost in (1, 2):
        with pytest.raises(BadRecordError, match="the file ends inside it"):
            index.read(lost)


@pytest.mark.parametrize("payload", [b"\xff\xff no message", None])
def test_record_that_is_no_window_cannot_be_indexed(tmp_path, payload):
    tiny_dataset.write_split(tmp_path, "train", [tiny_dataset.record("c", 2)], shards=1)
    file = tmp_path / "refava-train.tfrecord-00000-of-00001"
    if payload is None:
        example = tf.train.Example.FromString(load_index(tmp_path, "train").read(0))
        del example.features.feature["people/person_id"].bytes_list.value[0]
        payload = example.SerializeToString()
    with tf.io.TFRecordWriter(str(file)) as writer:
        writer.write(payload)
    with pytest.raises(UserError, match=r"of-00001, record at byte 0: (is not a|its people and)"):
        write_index(tmp_path)


@pytest.mark.parametrize(
    ("field", "kind", "values", "told"),
    [
        ("clip_id", "bytes", [], "field 'clip_id' is empty"),
        ("clip_id", "int64", [1], "field 'clip_id' does not hold bytes"),
        ("people/sentence", "bytes", [b"\xff", b"x"], "field 'people/sentence' is not UTF-8"),
        ("people/box", "int64", [0] * 8, "field 'people/box' does not hold floats"),
        ("people/labels/ragged_row_lengths_0", "int64", [4, -1], "is negative"),
        ("detections/class_id", "int64", [1, 2, 91], "'detections/class_id' holds 91"),
        ("detections/box", "float", [0.5] * 11 + [1.5], "'detections/box' holds 1.5"),
        ("frame_indices", "int64", [0, 12], "field 'frames' has 9 values, expected 2"),
        ("frame_indices", "int64", list(range(88, 97)), "not ascending positions"),
        ("frame_indices", "int64", [1, 0, *range(2, 9)], "not ascending positions"),
    ],
)
def test_field_of_another_schema_is_named(folder, field, kind, values, told):
    example = tf.train.Example.FromString(load_index(folder, "train").read(0))
    example.features.feature[field].Clear()
    getattr(example.features.feature[field], f"{kind}_list").value.extend(values)
    with pytest.raises(BadRecordError, match=f"here: .*{told}"):
        parse_window(example.SerializeToString(), "here")


def test_missing_folder_and_split_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        load_index(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match="no split 'dev'; it has: test, train, val"):
        load_index(folder, "dev")


@pytest.mark.parametrize(
    ("ids", "following"),
    [
        (("10", "2", "1"), ("1", "10", "2")),  # as numbers: 1, 2, 10
        (("10", "2", "1", "b"), ("2", "b", "10", "1")),  # as text, where one is no number
        (("7",), ("7",)),
    ],
)
def test_next_person_is_cyclic_in_id_order(ids, following):
    people = tuple(Person(each, "s", np.zeros(4), ()) for each in ids)
    empty = np.zeros(0)
    window = Window("here", "c", people, (), (), empty, empty, empty)
    assert tuple(ids[window.next_person(row)] for row in range(len(ids))) == following


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ({"labels": [81]}, "person '9': field 'labels' holds 81"),
        ({"labels": [0]}, "field 'labels' holds 0"),
        ({"box": [0.5, 0.1, 0.5, 0.2]}, "field 'box' is"),
        ({"box": [0.5, 0.1, 1.5, 0.2]}, "field 'box' is"),
        ({"box": [float("nan"), 0.1, 0.5, 0.2]}, "field 'box' is"),
        ({"sentence": "  "}, "field 'sentence' is empty"),
    ],
)
def test_bad_field_is_named(tmp_path, first, expected):
    tiny_dataset.write_split(tmp_path, "train", [tiny_dataset.record("c", 2, **first)], shards=1)
    index = load_index(tmp_path, "train")
    with pytest.raises(UserError, match=rf"byte 0 \(clip c\): .*{expected}"):
        parse_window(index.read(0), index.where(0))
