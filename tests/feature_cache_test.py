import functools
import itertools
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines import feature_cache, input_pipeline
from data_pipelines.feature_cache_writer import write_cache
from ravar_jax.backbone import encode_frames, encode_text, load_backbone
from ravar_jax.errors import UsageError, UserError
from tests import tiny_dataset
from tests.tiny_cache import pixel_config, write_backbone

UNUSED = tiny_dataset.WordTokenizer()  # cached ids come from the backbone's own
KEYS = ("boxes", "class_ids", "target_box", "action_labels", "mask", "example_id")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with a dataset, a backbone and their cache of two evaluation clips."""
    folder = tmp_path_factory.mktemp("made")
    tiny_dataset.write_dataset(folder)
    write_backbone(folder / "backbone", seed=0)
    write_cache(pixel_config(folder), folder / "cache", batch_size=24, report=lambda line: None)
    return folder


@pytest.fixture
def config(made):
    config = pixel_config(made)
    config.data.feature_cache = str(made / "cache")
    return config


def train(config, steps=3):
    return list(itertools.islice(input_pipeline.train_batches(config, UNUSED, 0), steps))


def test_cached_batches_equal_features_of_pixel_batches(made, config):
    backbone = load_backbone(config.model.backbone)
    pixels = pixel_config(made)
    for shown in ("true", "swapped", "blank"):
        cached = list(input_pipeline.eval_batches(config, UNUSED, "test", shown))
        seen = list(input_pipeline.eval_batches(pixels, backbone.tokenizer, "test", shown))
        compare(backbone, cached, seen)
    stream = input_pipeline.train_batches(pixels, backbone.tokenizer, 0)
    compare(backbone, train(config), list(itertools.islice(stream, 3)))


def encode_frames_jit(backbone, frames):
    return jax.jit(functools.partial(encode_frames, backbone.config))(backbone.params, frames)


def encode_text_jit(backbone, ids, mask):
    return jax.jit(functools.partial(encode_text, backbone.config))(backbone.params, ids, mask)


def compare(backbone, cached, seen):
    assert len(cached) == len(seen)
    for ours, theirs in zip(cached, seen, strict=True):
        for key in (*KEYS, "token_ids", "attention_mask"):
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)
        frames, real = theirs["frames"], theirs["mask"] == 1
        tokens = encode_frames_jit(backbone, frames.reshape(-1, 8, 8, 3))
        means = np.reshape(tokens, (*frames.shape[:-3], 3, 8)).mean(axis=-3)
        assert ours["image_tokens"].shape == means.shape
        np.testing.assert_allclose(ours["image_tokens"][real], means[real], atol=1e-5)
        text = encode_text_jit(backbone, theirs["token_ids"], theirs["attention_mask"])
        np.testing.assert_allclose(ours["text_tokens"], text, atol=1e-5)


def test_twins_read_the_same_cache(config):
    config.data.video = "blank"
    batch = train(config)[0]
    assert not batch["image_tokens"].any()
    assert (batch["class_ids"] == 91).all()
    config.data.sentences = "blank"
    assert len(np.unique(train(config)[0]["text_tokens"], axis=0)) == 1


def test_sentences_are_encoded_once(config, made):
    text = input_pipeline.load_index(made / "cache", feature_cache.TEXT_SPLIT)
    people = sum(map(sum, tiny_dataset.SPLITS.values()))
    assert text.num_windows == people + 1  # all sentences differ; one more is the blank one


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("data.image_size", 16, r"data\.image_size \(8 in the cache, now 16\)"),
        ("data.text_length", 10, r"data\.text_length"),
        ("data.pixels", "released", r"data\.pixels"),
        ("data.frames", "still", "training positions"),
        ("data.num_frames", 4, "evaluation positions"),
        ("data.eval_clips", 11, "evaluation positions"),
        ("model.dtype", "bfloat16", r"model\.dtype"),
        (
            "data.cache_dtype",
            "bfloat16",
            r"data\.cache_dtype \(float32 in the cache, now bfloat16\)",
        ),
        ("data.dataset", "mini_refava", r"data\.dataset"),
    ],
)
def test_cache_of_another_config_is_refused(config, key, value, named):
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=named):
        train(config)


def test_cache_of_other_weights_or_data_is_refused(config, made, tmp_path):
    write_backbone(tmp_path / "backbone", seed=1)
    config.model.backbone = str(tmp_path / "backbone")
    with pytest.raises(UserError, match="of the frozen weights, the first "):
        train(config)
    config.model.backbone = str(made / "backbone")
    folder = tiny_dataset.write_dataset(tmp_path)
    tiny_dataset.write_split(folder, "val", [tiny_dataset.record("other", 2)] * 2)
    config.data.data_dir = str(tmp_path)
    with pytest.raises(UserError, match="dataset fingerprint"):
        train(config)


def test_cache_is_enough_without_its_dataset(config, tmp_path):
    config.data.data_dir = str(tmp_path)
    assert train(config, 1)[0]["mask"].all()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.train_backbone", True),
        ("model.train_qformer", True),
        ("data.train_frames", "random"),
        ("data.train_frames", "random_segments"),
        ("model.frozen_dropout", "on"),
    ],
)
def test_what_cannot_be_cached_is_refused(config, made, tmp_path, key, value):
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UsageError, match=key):
        train(config)
    with pytest.raises(UsageError, match=key):
        write_cache(config, tmp_path / "cache")


def test_bfloat16_cache_is_half_as_large_and_reads_as_rounded_float32(config, made, tmp_path):
    whole = train(config) + list(input_pipeline.eval_batches(config, UNUSED, "test"))
    config.data.cache_dtype = "bfloat16"
    write_cache(config, tmp_path / "cache", batch_size=24, report=lambda line: None)
    config.data.feature_cache = str(tmp_path / "cache")
    rounded = train(config) + list(input_pipeline.eval_batches(config, UNUSED, "test"))
    for ours, theirs in zip(rounded, whole, strict=True):
        for key in ("image_tokens", "text_tokens"):
            assert ours[key].dtype == np.float32
            np.testing.assert_array_equal(
                ours[key], theirs[key].astype(jnp.bfloat16).astype(np.float32), err_msg=key
            )
            assert (ours[key] != theirs[key]).any()
        np.testing.assert_array_equal(ours["boxes"], theirs["boxes"])
    keys = {
        json.loads((folder / "cache" / "cache.json").read_text())["key"]
        for folder in (made, tmp_path)
    }
    assert len(keys) == 2
    sizes = [
        len(
            feature_cache.parse_features(
                input_pipeline.load_index(folder / "cache", "val").read(0), ""
            )["train_tokens"][0]
        )
        for folder in (tmp_path, made)
    ]
    assert sizes[1] == 2 * sizes[0]


def test_missing_or_edited_cache_is_refused(config, made, tmp_path):
    config.data.feature_cache = str(tmp_path)
    with pytest.raises(UserError, match=r"holds no cache\.json"):
        train(config)
    copy = shutil.copytree(made / "cache", tmp_path / "copy")
    content = json.loads((copy / "cache.json").read_text())
    content["content"]["data.pixels"] = "released"
    (copy / "cache.json").write_text(json.dumps(content))
    config.data.feature_cache = str(copy)
    with pytest.raises(UserError, match="changed by hand"):
        train(config)


def test_existing_output_is_kept_or_refused(made, tmp_path):
    config = pixel_config(made)
    lines: list[str] = []
    before = (made / "cache" / "cache.json").read_bytes()
    write_cache(config, made / "cache", report=lines.append)
    assert "already complete" in lines[-1]
    config.data.pixels = "released"
    with pytest.raises(UserError, match=r"holds another cache: data\.pixels"):
        write_cache(config, made / "cache")
    assert (made / "cache" / "cache.json").read_bytes() == before
    (tmp_path / "other").write_text("")
    with pytest.raises(UserError, match="exists and is not a feature cache"):
        write_cache(config, tmp_path)


def test_failed_write_leaves_nothing(made, tmp_path):
    config = pixel_config(made)
    config.data.train_frames = "head"
    with pytest.raises(UserError, match="needs position 1"):
        write_cache(config, tmp_path / "cache", report=lambda line: None)
    assert not list(tmp_path.iterdir())


def test_unreadable_record_keeps_its_place_in_the_cache(made, tmp_path):
    folder = tiny_dataset.write_dataset(tmp_path)
    shutil.copytree(made / "backbone", tmp_path / "backbone")
    index = input_pipeline.load_index(folder, "train")
    path = folder / index.files[0]
    data = bytearray(path.read_bytes())
    data[index.offsets[1] + 5] ^= 4
    path.write_bytes(data)
    config = pixel_config(tmp_path)
    with pytest.raises(UserError, match=r"clip train1.*checksum"):
        write_cache(config, tmp_path / "cache", report=lambda line: None)
    config.data.max_bad_records = 1
    write_cache(config, tmp_path / "cache", report=lambda line: None)
    config.data.feature_cache = str(tmp_path / "cache")
    batches = list(input_pipeline.eval_batches(config, UNUSED, "train"))
    ids, masks = (np.concatenate([b[key] for b in batches]) for key in ("example_id", "mask"))
    assert ids.tolist() == list(range(sum(tiny_dataset.PEOPLE)))
    assert ids[masks == 0].tolist() == [2]


def test_command_writes_the_same_cache(made, tmp_path, repository):
    flags = ["--config=configs/base.py", f"--output={tmp_path / 'cache'}", "--batch_size=32"]
    config = pixel_config(made)
    for key in ("dataset", "data_dir", "image_size", "text_length", "eval_clips"):
        flags.append(f"--config.data.{key}={config.data[key]}")
    for key in ("backbone", "num_query_tokens", "width"):
        flags.append(f"--config.model.{key}={config.model[key]}")
    command = [sys.executable, "launch/cache_features.py", *flags]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "frames/s" in done.stderr
    key = json.loads((made / "cache" / "cache.json").read_text())["key"]
    assert key in done.stdout
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["key"] == key
