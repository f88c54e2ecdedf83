import itertools
import shutil

import numpy as np
import pytest

from data_pipelines import input_pipeline
from data_pipelines.frame_sampling import evaluation_sampler, training_sampler
from ravar_jax.errors import UsageError, UserError
from tests import tiny_dataset

TOKENIZER = tiny_dataset.WordTokenizer()
NUM_EXAMPLES = sum(tiny_dataset.PEOPLE)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny_dataset.write_dataset(folder)
    return folder


@pytest.fixture
def config(data_dir):
    return tiny_dataset.make_config(data_dir)


def take(batches, count):
    return list(itertools.islice(batches, count))


def train(config, steps, start=0, **process):
    return take(input_pipeline.train_batches(config, TOKENIZER, start, **process), steps)


def evaluate(config, split="test", **options):
    return list(input_pipeline.eval_batches(config, TOKENIZER, split, **options))


def joined(batches, key):
    return np.concatenate([batch[key] for batch in batches])


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for left, right in zip(ours, theirs, strict=True):
        assert left.keys() == right.keys()
        for key in left:
            np.testing.assert_array_equal(left[key], right[key], err_msg=key)


def positions_of(frames):
    """The positions that the grey levels of flat frames (..., T, S, S, 3) tell."""
    return (frames[..., 0, 0, 0].astype(int) - 16) // 2


def test_batch_has_the_contract_keys_dtypes_and_shapes(config):
    (batch,) = train(config, 1)
    assert {key: (value.dtype.name, value.shape) for key, value in batch.items()} == {
        "frames": ("uint8", (4, 8, 8, 8, 3)),
        "token_ids": ("int32", (4, 8)),
        "attention_mask": ("int32", (4, 8)),
        "boxes": ("float32", (4, 100, 4)),
        "class_ids": ("int32", (4, 100)),
        "target_box": ("float32", (4, 4)),
        "action_labels": ("float32", (4, 80)),
        "mask": ("float32", (4,)),
        "example_id": ("int32", (4,)),
    }
    config.data.eval_clips = 11
    config.data.frames = "still"
    assert evaluate(config)[0]["frames"].shape == (4, 11, 8, 8, 8, 3)


def test_an_example_is_the_person_that_its_number_says(config):
    for batch in evaluate(config, "train"):
        names = input_pipeline.describe_examples(config, "train", batch["example_id"])
        for row, name in enumerate(names):
            clip, person = name.split("/")
            sentence = TOKENIZER.encode([f"person {person} of {clip}"], 8)[0][0]
            assert batch["token_ids"][row].tolist() == sentence.tolist()
            assert batch["target_box"][row, 2] == pytest.approx(0.2 + 0.1 * (int(person) - 9))
            assert batch["action_labels"][row, int(person) - 9] == 1
            assert batch["class_ids"][row, :4].tolist() == [3, 2, 1, 91]


def test_every_epoch_holds_each_example_once_in_its_own_order(config):
    epochs = joined(train(config, 9), "example_id").reshape(3, NUM_EXAMPLES)
    for epoch in epochs:
        assert sorted(epoch) == list(range(NUM_EXAMPLES))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    config.seed = 1
    assert joined(train(config, 3), "example_id").tolist() != epochs[0].tolist()


@pytest.mark.parametrize("policy", ["uniform", "random"])
def test_resume_from_any_step_is_identical(config, policy):
    config.train.batch_size = 5  # does not divide the 12 examples: batches cross epochs
    config.data.train_frames = policy
    config.data.num_frames = 4 if policy == "random" else 8
    straight = train(config, 8)
    for start in (1, 2, 5):
        assert_same(train(config, 8 - start, start), straight[start:])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_global_batches(config, processes):
    shares = [
        train(config, 4, process_index=index, process_count=processes) for index in range(processes)
    ]
    for step, whole in enumerate(train(config, 4)):
        joined_shares = {
            key: np.concatenate([share[step][key] for share in shares]) for key in whole
        }
        assert_same([joined_shares], [whole])


def test_run_goes_on_from_any_step_on_any_number_of_processes(config):
    config.train.batch_size = 8  # 12 examples: batches cross epochs
    config.data.train_frames, config.data.num_frames = "random", 4
    config.data.flip_probability, config.data.crop_min_area = 0.5, 0.5
    config.data.colour_jitter = 0.2
    straight = train(config, 5)
    for start, processes in ((1, 2), (2, 4), (3, 8), (4, 2)):
        shares = [
            train(config, 5 - start, start, process_index=index, process_count=processes)
            for index in range(processes)
        ]
        whole = [
            {key: np.concatenate([share[step][key] for share in shares]) for key in straight[0]}
            for step in range(5 - start)
        ]
        assert_same(whole, straight[start:])


def test_batch_that_cannot_be_shared_is_refused(config):
    with pytest.raises(UsageError, match=r"train\.batch_size=4 .* 3 processes"):
        train(config, 1, process_index=0, process_count=3)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_evaluation_counts_each_example_once(config, processes):
    shares = [
        evaluate(config, process_index=index, process_count=processes) for index in range(processes)
    ]
    assert {len(share) for share in shares} == {2}  # 6 examples in global batches of 4
    mask = np.concatenate([joined(share, "mask") for share in shares])
    ids = np.concatenate([joined(share, "example_id") for share in shares])
    assert mask.sum() == input_pipeline.split_size(config, "test") == 6
    assert sorted(ids[mask == 1]) == list(range(6))
    attention = np.concatenate([joined(share, "attention_mask") for share in shares])
    assert attention.sum(axis=1).min() >= 2  # padding too has something to attend to


def test_swapped_sentences_come_from_the_next_person_in_number_order(config):
    batches = input_pipeline.eval_batches(config, TOKENIZER, "test", "swapped")
    assert batches.num_left_out == 1
    rows = list(batches)
    ids, mask = joined(rows, "example_id"), joined(rows, "mask")
    assert ids[mask == 1].tolist() == [0, 1, 3, 4, 5]  # example 2 is alone in its window
    given = ["person 10 of test0", "person 9 of test0"]
    given += ["person 10 of test2", "person 11 of test2", "person 9 of test2"]
    expected = TOKENIZER.encode(given, 8)[0]
    np.testing.assert_array_equal(joined(rows, "token_ids")[mask == 1], expected)
    same = evaluate(config, only_shared_windows=True)
    np.testing.assert_array_equal(joined(same, "example_id"), ids)
    np.testing.assert_array_equal(joined(same, "target_box"), joined(rows, "target_box"))


def test_blank_sentences_and_blank_video(config):
    blank = TOKENIZER.encode([""], 8)[0][0]
    assert (joined(evaluate(config, sentences="blank"), "token_ids") == blank).all()
    config.data.sentences = "blank"
    assert (joined(train(config, 1), "token_ids") == blank).all()
    config.data.video = "blank"
    (batch,) = train(config, 1)
    assert not batch["frames"].any()
    assert not batch["boxes"].any()
    assert (batch["class_ids"] == 91).all()


def test_detections_none_makes_every_row_no_object(config):
    config.model.detections = "none"
    assert (train(config, 1)[0]["class_ids"] == 91).all()


def with_detector(config):
    config.model.detections = "detr"
    config.model.detector_height, config.model.detector_width = 20, 30
    return config


def test_the_detector_gets_the_key_frame_in_its_own_size(config):
    for batch in (*train(with_detector(config), 1), *evaluate(config)):
        real = batch["mask"] == 1
        assert batch["key_frame"].dtype == np.uint8
        assert batch["key_frame"].shape == (4, 20, 30, 3)
        assert (batch["key_frame"][real] == 16 + 2 * 45).all()  # position 45
        assert not batch["key_frame"][~real].any()
        assert (batch["class_ids"] == 91).all()  # the stored ones are not shown
    config.data.pixels = "released"
    assert (train(config, 1)[0]["key_frame"] == 256 - (16 + 2 * 45)).all()
    config.data.video = "blank"
    assert not train(config, 1)[0]["key_frame"].any()


def test_released_key_frame_is_the_still(config):
    with_detector(config).data.frames = "still"
    assert (train(config, 1)[0]["key_frame"] == 16).all()


def test_key_frame_that_is_not_stored_is_refused_at_start(config, tmp_path):
    folder = tiny_dataset.write_dataset(tmp_path)
    records = [tiny_dataset.record("a", 1, tiny_dataset.UNIFORM)] * 2
    tiny_dataset.write_split(folder, "train", records)
    config.data.data_dir = str(tmp_path)
    input_pipeline.train_batches(config, TOKENIZER, 0)
    with pytest.raises(
        UserError, match=r"model\.detections=detr needs position 45, .* stores 0, 12"
    ):
        input_pipeline.train_batches(with_detector(config), TOKENIZER, 0)


def test_positions_of_the_policies(config):
    assert training_sampler(config).clips.tolist() == list(tiny_dataset.UNIFORM)
    config.data.train_frames = "head"
    assert training_sampler(config).clips.tolist() == list(range(8))
    config.data.eval_clips = 11
    clips = evaluation_sampler(config).clips
    assert clips[0].tolist() == list(tiny_dataset.UNIFORM)
    assert clips[5].tolist() == [5, 17, 29, 41, 53, 65, 77, 89]
    assert clips[10].tolist() == [10, 21, 32, 43, 55, 66, 77, 89]
    config.data.frames = "still"
    assert not evaluation_sampler(config).clips.any()
    assert not training_sampler(config).clips.any()


def test_frames_are_those_of_the_policy(config):
    (batch,) = train(config, 1)
    assert (positions_of(batch["frames"]) == tiny_dataset.UNIFORM).all()
    assert (positions_of(evaluate(config)[0]["frames"]) == [tiny_dataset.UNIFORM]).all()
    config.data.frames = "still"
    assert (positions_of(train(config, 1)[0]["frames"]) == 0).all()


def test_random_frames_are_stored_distinct_and_drawn_anew(config):
    config.data.train_frames = "random"
    config.data.num_frames = 4
    batches = train(config, 6)
    drawn = positions_of(joined(batches, "frames"))
    assert set(drawn.ravel()) <= set(tiny_dataset.POSITIONS)
    assert (np.diff(drawn) > 0).all()
    ids = joined(batches, "example_id")
    again = {number: drawn[ids == number] for number in range(NUM_EXAMPLES)}
    assert any((first != second).any() for first, second in again.values())


def test_random_segments_are_drawn_one_from_each_part_of_the_window(config, tmp_path):
    config.data.train_frames = "random_segments"
    folder = tiny_dataset.write_dataset(tmp_path)
    stored = tuple(range(0, 90, 3))
    tiny_dataset.write_split(
        folder, "train", [tiny_dataset.record(f"c{n}", 4, stored) for n in range(3)]
    )
    config.data.data_dir = str(tmp_path)
    straight = train(config, 6)
    drawn = positions_of(joined(straight, "frames"))
    assert set(drawn.ravel()) <= set(stored)
    assert (drawn * 8 // 90 == np.arange(8)).all()
    assert len(np.unique(drawn, axis=0)) == len(drawn)
    assert_same(train(config, 2, 4), straight[4:])
    tiny_dataset.write_split(folder, "train", [tiny_dataset.record("c", 1, tuple(range(8)))] * 2)
    (folder / "index_train.json").unlink()
    with pytest.raises(UserError, match="needs a stored position in each of 8 parts of the window"):
        train(config, 1)


def test_released_pixels_are_negatives(config):
    config.data.frames = "still"
    config.data.pixels = "released"
    assert (train(config, 1)[0]["frames"] == 256 - 16).all()


def test_position_that_is_not_stored_is_refused_at_start(config):
    config.data.train_frames = "head"
    with pytest.raises(UserError, match=r"train_frames=head .* needs position 1, .* stores 0, 12"):
        input_pipeline.train_batches(config, TOKENIZER, 0)
    config.data.train_frames = "random"
    config.data.num_frames = 10
    with pytest.raises(UserError, match="needs 10 stored positions"):
        input_pipeline.train_batches(config, TOKENIZER, 0)


def test_truncated_sentences_are_counted_and_warned_about(config, caplog):
    config.data.text_length = 4
    batches = input_pipeline.train_batches(config, TOKENIZER, 0)
    take(batches, 8)
    assert batches.num_truncated == NUM_EXAMPLES
    assert caplog.text.count("longer than data.text_length=4") == 1


def flip_a_bit(data_dir, clip):
    folder = data_dir / "refava" / "tiny" / "1.0.0"
    from data_pipelines.record_index import load_index

    index = load_index(folder, "train")
    number = index.clip_ids.index(clip)
    path = folder / index.files[index.file_numbers[number]]
    data = bytearray(path.read_bytes())
    data[index.offsets[number] + 5] ^= 4
    path.write_bytes(data)


def test_unreadable_record_is_named_or_masked_within_the_budget(config, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    flip_a_bit(tmp_path / "data", "train2")
    config.data.data_dir = str(tmp_path / "data")
    with pytest.raises(
        UserError, match=r"tfrecord-00000-of-00002, record at byte \d+ \(clip train2"
    ):
        train(config, 9)
    config.data.max_bad_records = 1
    batches = input_pipeline.train_batches(config, TOKENIZER, 0)
    rows = take(batches, 3)
    ids, mask = joined(rows, "example_id"), joined(rows, "mask")
    assert sorted(ids) == list(range(NUM_EXAMPLES))  # the order is that of an intact dataset
    assert sorted(ids[mask == 0]) == [3, 4, 5]
    assert not joined(rows, "frames")[mask == 0].any()
    assert batches.num_bad_records == 1


def test_records_of_a_cut_shard_or_another_schema_are_masked(config, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    folder = tmp_path / "data" / "refava" / "tiny" / "1.0.0"
    config.data.data_dir = str(tmp_path / "data")
    wrong_label = [tiny_dataset.record("train3", 2), tiny_dataset.record("train4", 4, labels=[81])]
    tiny_dataset.write_records(folder / "refava-train.tfrecord-00001-of-00002", wrong_label)
    (folder / "index_train.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"clip train4\): person '9': field 'labels' holds 81"):
        train(config, 9)
    cut = folder / "refava-train.tfrecord-00000-of-00002"
    cut.write_bytes(cut.read_bytes()[:-99])
    with pytest.raises(UserError, match="of-00002 is truncated"):
        train(config, 9)
    config.data.max_bad_records = 2
    batches = input_pipeline.train_batches(config, TOKENIZER, 0)
    rows = take(batches, 3)
    ids, mask = joined(rows, "example_id"), joined(rows, "mask")
    assert sorted(ids) == list(range(NUM_EXAMPLES))
    assert sorted(ids[mask == 0]) == [3, 4, 5, 8, 9, 10, 11]
    assert batches.num_bad_records == 2


def test_missing_refava_names_the_command_that_makes_it(config, tmp_path):
    config.data.data_dir = str(tmp_path)
    with pytest.raises(UserError, match=r"launch/prepare_refava\.py"):
        input_pipeline.split_size(config, "train")


def test_newest_version_of_refava_is_read(config, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    newer = tmp_path / "data" / "refava" / "tiny" / "1.10.0"
    shutil.copytree(newer.with_name("1.0.0"), newer)
    shutil.copytree(newer, newer.with_name("1.9.0"))
    tiny_dataset.write_split(newer, "val", [tiny_dataset.record("only", 4)] * 2)
    config.data.data_dir = str(tmp_path / "data")
    (newer / "index_val.json").unlink(missing_ok=True)
    assert input_pipeline.split_size(config, "val") == 8


def test_pretraining_rows_are_windows_with_padded_people(config):
    config.task = "pretrain"
    config.data.train_frames = "random"
    config.data.num_frames = 1
    assert input_pipeline.split_size(config, "train") == 5
    batches = take(input_pipeline.pretrain_batches(config, TOKENIZER, 0), 5)
    ids = joined(batches, "example_id")
    assert sorted(ids[:5]) == list(range(5))
    people = joined(batches, "person_mask").sum(axis=1)
    assert people.tolist() == [tiny_dataset.PEOPLE[number] for number in ids]
    assert batches[0]["frames"].shape == (4, 1, 8, 8, 3)
    assert batches[0]["action_labels"].shape == (4, 4, 80)
    again = take(input_pipeline.pretrain_batches(config, TOKENIZER, 3), 2)
    assert_same(again, batches[3:])
    rows = list(input_pipeline.pretrain_eval_batches(config, TOKENIZER, "test"))
    assert joined(rows, "mask").sum() == 3
    sentences = list(input_pipeline.training_sentences(config))
    assert len(sentences) == NUM_EXAMPLES
