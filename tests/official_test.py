"""A checkpoint in the release's layout becomes a run's folder, and comes back bit for bit."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base
from ravar_jax import config_check
from ravar_jax.conversion import back, convert, official
from ravar_jax.conversion.detr import depths_of, detr_table
from ravar_jax.conversion.fusion import fusion_table
from ravar_jax.conversion.mapping import to_torch
from ravar_jax.conversion.weight_files import LazyTensors, read_tensors, write_torch
from ravar_jax.errors import UserError
from ravar_jax.models.detr import Detr
from ravar_jax.restore import restore_run
from ravar_jax.tasks import ravar
from tests.convert_weights_test import SIZES, WORDS, lavis_tensors
from tests.tiny_detector import QUERIES
from tests.tiny_detector import SIZES as SIZES_OF_DETECTOR

pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def small_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "DETR_R50", SIZES_OF_DETECTOR)


def make_config() -> ConfigDict:
    config = base.apply_preset(base.get_config(), "official")
    config.data.dataset = "refava"
    return config


def released_layout() -> dict[str, np.ndarray]:
    config = make_config()
    config.model.update(width=64, num_query_tokens=3, num_detections=QUERIES)
    fusion = ravar.init_fusion(ravar.build_model(config.model), jax.random.key(1))
    detector = Detr(**SIZES_OF_DETECTOR).init(jax.random.key(2), jnp.zeros((1, 64, 64, 3)))[
        "params"
    ]
    parts = {
        "": to_torch(jax.device_get(fusion), fusion_table()),
        "model.": lavis_tensors(),
        "detection_model.": to_torch(
            jax.device_get(detector), detr_table(*depths_of(SIZES_OF_DETECTOR))
        ),
    }
    return {
        prefix + name: np.array(array, order="C")
        for prefix, tensors in parts.items()
        for name, array in tensors.items()
    }


def lazy(tensors: dict[str, np.ndarray]) -> LazyTensors:
    return LazyTensors({name: lambda array=array: array for name, array in tensors.items()})


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """The vocabulary and the label table."""
    vocab, table = tmp_path / "words.txt", tmp_path / "table.npy"
    vocab.write_text("\n".join(WORDS) + "\n")
    np.save(table, np.random.default_rng(0).normal(size=(91, 64)).astype(np.float32))
    return vocab, table


def test_round_trip_gives_every_tensor_bit_for_bit(
    tmp_path: Path, files: tuple[Path, Path]
) -> None:
    tensors = released_layout()
    write_torch(tmp_path / "pytorch_model.bin.9", tensors, None)
    read = read_tensors([str(tmp_path / "pytorch_model.bin.9")])
    official.convert_official(read, *files, make_config(), tmp_path / "run")
    config = config_check.read_config(tmp_path / "run")
    assert config.model.width == 64
    assert config.model.num_detections == QUERIES
    assert config.data.image_size == SIZES.image_size
    assert base.describe_switches(config) == "official"
    assert restore_run(tmp_path / "run").step == 0

    line = back.write_back("official", tmp_path / "run", tmp_path / "back")
    assert line.endswith(f"{len(tensors)} tensors")
    again = read_tensors([str(tmp_path / "back" / back.FILE)])
    assert set(again) == set(tensors)
    for name, array in tensors.items():
        assert again[name].dtype == array.dtype, name
        np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_everything_wrong_in_all_three_models_is_named(
    tmp_path: Path, files: tuple[Path, Path]
) -> None:
    tensors = released_layout()
    for name in ("model.ln_vision.bias", "detection_model.input_proj.bias", "proj_sem.weight"):
        del tensors[name]
    tensors["bbox_regression_head.0.weight"] = np.zeros((2, 2), np.float32)  # spelt rightly
    with pytest.raises(UserError) as caught:
        official.convert_official(lazy(tensors), *files, make_config(), tmp_path / "run")
    for expected in (
        "missing ln_vision.bias",
        "missing input_proj.bias",
        "missing proj_sem.weight",
        "unused bbox_regression_head.0.weight",
    ):
        assert expected in str(caught.value)
    assert not (tmp_path / "run").exists()
    del tensors["proj.weight"]
    with pytest.raises(UserError, match="not a RefAtomNet checkpoint: proj.weight is missing"):
        official.convert_official(lazy(tensors), *files, make_config(), tmp_path / "run")


def test_difference_from_the_public_blip2_is_told() -> None:
    tensors = released_layout()
    public = lavis_tensors()
    vision = {
        name.removeprefix("visual_encoder."): array
        for name, array in public.items()
        if name.startswith("visual_encoder.")
    }
    # As published: the image encoder bare, with one block more and a head.
    vision |= {"blocks.2.norm1.weight": np.zeros(88, np.float32), "norm.weight": np.zeros(88)}
    rest = {name: array for name, array in public.items() if not name.startswith("visual_")}
    same = official.compare_with_public(lazy(tensors), lazy(rest | vision))
    assert same.startswith("model.*: 0 of ")
    assert "not in the public one" not in same
    tensors["model.ln_vision.bias"] = tensors["model.ln_vision.bias"] + 1
    told = official.compare_with_public(lazy(tensors), lazy(rest | vision))
    assert told.startswith("model.*: 1 of ")
    assert told.endswith("ln_vision.bias")
    with pytest.raises(UserError, match="none of the checkpoint's tensors"):
        official.compare_with_public(lazy(tensors), lazy({"a": np.zeros(1)}))
