"""A backbone's folder and its tokenizer."""

from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from ravar_jax import backbone as backbones
from ravar_jax.errors import UserError
from ravar_jax.tokenizer import SentencePieceTokenizer
from tests.untrained_run import TEXT_LENGTH, write_backbone


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_backbone(tmp_path / "weights")
    return tmp_path / "weights"


def test_saved_backbone_loads_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    first = backbones.load_backbone(str(folder))
    backbones.save_backbone(
        tmp_path / "copy", first.config, first.params, folder / "tokenizer.model"
    )
    second = backbones.load_backbone(str(tmp_path / "copy"))
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert first.weight_hashes == second.weight_hashes
    assert first.tokenizer.sha256 == second.tokenizer.sha256


def test_one_changed_weight_changes_its_hash_alone(folder: Path) -> None:
    first = backbones.load_backbone(str(folder))
    before = first.weight_hashes
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["query_tokens"][0, 0, 0] += 1e-6
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    after = backbones.load_backbone(str(folder)).weight_hashes
    assert [key for key in before if before[key] != after[key]] == ["query_tokens"]


def test_every_wrong_tensor_is_named_at_once(folder: Path) -> None:
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["surplus"] = tensors.pop("query_tokens")
    tensors["vision_norm/bias"] = tensors["vision_norm/bias"][:-1]
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError) as error:
        backbones.load_backbone(str(folder))
    for part in ("missing query_tokens", "unknown surplus", "vision_norm/bias is (15,)"):
        assert part in str(error.value)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.model"])
def test_damaged_or_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).write_bytes(b"\x08nonsense")
    with pytest.raises(UserError, match=file):
        backbones.load_backbone(str(folder))
    (folder / file).unlink()
    with pytest.raises(UserError, match=file):
        backbones.load_backbone(str(folder))


def test_shipped_mini_blip_is_small_and_loads() -> None:
    backbone = backbones.load_backbone()
    assert sum(leaf.size for leaf in jax.tree.leaves(backbone.params)) <= 1_000_000
    assert sum(file.stat().st_size for file in backbones.SHIPPED.iterdir()) <= 4 * 2**20
    ids, _, cut = backbone.tokenizer.encode(["the person in a red shirt on the left"], 24)
    assert cut == 0
    assert ids.max() < backbone.tokenizer.vocab_size


def test_normalization_takes_out_clips_statistics() -> None:
    frames = np.array([[[[255, 0, 51]]]], np.uint8)
    expected = [
        (1 - 0.48145466) / 0.26862954,
        -0.4578275 / 0.26130258,
        (0.2 - 0.40821073) / 0.27577711,
    ]
    np.testing.assert_allclose(backbones.normalize(frames)[0, 0, 0], expected, rtol=1e-5)


def test_sentences_are_padded_masked_and_cut(folder: Path) -> None:
    tokenizer = SentencePieceTokenizer(folder / "tokenizer.model")
    ids, mask, cut = tokenizer.encode(["the man", "", "é " * 50], TEXT_LENGTH)
    assert ids.shape == mask.shape == (3, TEXT_LENGTH)
    assert ids.dtype == np.int32
    assert cut == 1
    assert list(ids[1, :3]) == [2, 3, 0]
    assert mask[1].sum() == 2
    assert mask[2].all()
    assert ids[2, -1] == 3
    assert np.all((ids == 0) == (mask == 0))
    assert 1 not in ids  # bytes stand in for unknown characters
    upper, _, _ = tokenizer.encode(["THE MAN"], TEXT_LENGTH)
    np.testing.assert_array_equal(upper[0], ids[0])
