import shutil

import numpy as np
import pytest

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
