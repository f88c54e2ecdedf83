"""Public weight files become the folders that the commands read; anything wrong is one line and leaves nothing."""

import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece

from ravar_jax.backbone import BackboneConfig, encode_text, load_backbone
from ravar_jax.class_names import COCO_NAMES
from ravar_jax.conversion import convert
from ravar_jax.conversion.blip2 import lavis_table
from ravar_jax.conversion.detr import detr_table
from ravar_jax.conversion.mapping import to_torch
from ravar_jax.conversion.weight_files import read_tensors
from ravar_jax.detector import load_detector
from ravar_jax.errors import UserError
from ravar_jax.models.detr import DETR_R50, Detr

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "man", "on", "left"]
SIZES = BackboneConfig(
    image_size=18,
    text_length=10,
    num_query_tokens=3,
    vision={"width": 88, "depth": 2, "num_heads": 1, "mlp_width": 52, "patch_size": 6},
    qformer={
        "width": 64,
        "depth": 2,
        "num_heads": 1,
        "mlp_width": 44,
        "vocab_size": len(WORDS) + 1,
        "max_positions": 10,
    },
)


@pytest.fixture
def vocab_file(tmp_path: Path) -> Path:
    file = tmp_path / "words.txt"
    file.write_text("\n".join(WORDS) + "\n")
    return file


def lavis_tensors() -> dict[str, np.ndarray]:
    params = jax.device_get(SIZES.init(jax.random.key(0)))
    tensors = to_torch(params, lavis_table(2, 2))
    ignored = {
        "temp": np.zeros(()),
        "itm_head.bias": np.zeros(2, np.float32),
        "Qformer.bert.embeddings.position_ids": np.arange(10)[None],
    }
    return {name: np.array(array, order="C") for name, array in (tensors | ignored).items()}


def save_torch(file: Path, tensors: dict[str, np.ndarray]) -> str:
    torch.save({"model": {name: torch.from_numpy(a) for name, a in tensors.items()}}, file)
    return str(file)


@pytest.mark.parametrize("kind", ["torch", "safetensors", "two files"])
def test_blip2_becomes_a_backbone(tmp_path: Path, vocab_file: Path, kind: str) -> None:
    tensors = lavis_tensors()
    if kind == "safetensors":
        files = [str(tmp_path / "x.safetensors")]
        safetensors.numpy.save_file(tensors, files[0])
    elif kind == "two files":
        vision = {name: a for name, a in tensors.items() if name.startswith("visual_encoder.")}
        rest = {name: a for name, a in tensors.items() if name not in vision}
        files = [save_torch(tmp_path / "vit.pth", vision), save_torch(tmp_path / "q.pth", rest)]
    else:
        files = [save_torch(tmp_path / "x.pth", tensors)]
    convert.convert_blip2(read_tensors(files), vocab_file, tmp_path / "out")
    backbone = load_backbone(str(tmp_path / "out"))
    assert backbone.config == SIZES
    jax.tree.map(
        np.testing.assert_array_equal,
        backbone.params,
        jax.device_get(SIZES.init(jax.random.key(0))),
    )
    ids, mask, _ = backbone.tokenizer.encode(["The man on left"], 10)
    assert ids[0].tolist() == [2, 4, 5, 6, 7, 3, 0, 0, 0, 0]
    tokens = encode_text(backbone.config, backbone.params, jnp.asarray(ids), jnp.asarray(mask))
    assert np.isfinite(tokens).all()


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    file = save_torch(tmp_path / "x.pth", {"a": np.array([0.1, 2.0], np.float16)})
    (array,) = read_tensors([file]).values()
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, np.array([0.1, 2.0], np.float16).astype(np.float32))


def test_everything_wrong_is_named_at_once_and_nothing_is_left(
    tmp_path: Path, vocab_file: Path
) -> None:
    tensors = lavis_tensors()
    del tensors["ln_vision.bias"]
    tensors["surprise.weight"] = np.zeros(3, np.float32)
    tensors["visual_encoder.blocks.1.mlp.fc2.bias"] = np.zeros(5, np.float32)
    with pytest.raises(UserError) as caught:
        convert.convert_blip2(tensors, vocab_file, tmp_path / "out")
    for expected in (
        "missing ln_vision.bias",
        "unused surprise.weight",
        "misshapen visual_encoder.blocks.1.mlp.fc2.bias (5,)",
    ):
        assert expected in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["words.txt"]


def test_a_kill_while_writing_leaves_no_whole_looking_folder(
    tmp_path: Path, vocab_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(convert.shutil, "copyfile", fail)
    with pytest.raises(OSError, match="disk full"):
        convert.convert_blip2(lavis_tensors(), vocab_file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["words.txt"]


def test_other_models_and_vocabularies_are_refused(tmp_path: Path, vocab_file: Path) -> None:
    with pytest.raises(UserError, match="not a BLIP-2 first stage: no visual_encoder.cls_token"):
        convert.convert_blip2({"query_embed.weight": np.zeros(1)}, vocab_file, tmp_path / "out")
    vocab_file.write_text("\n".join(WORDS[:-1]))
    with pytest.raises(UserError, match=r"words.txt: 8 ids with \[DEC\], the model has 9"):
        convert.convert_blip2(lavis_tensors(), vocab_file, tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists"), convert.new_folder(tmp_path / "out"):
        pass


class _Code:
    def __reduce__(self) -> tuple:
        return print, ("code ran",)


def test_bad_files_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = save_torch(tmp_path / "good.pth", {"a": np.zeros(1000, np.float32)})
    cases = {"missing.pth": "no such file"}
    (tmp_path / "cut.pth").write_bytes(Path(good).read_bytes()[:700])
    cases["cut.pth"] = "not a PyTorch file of weights alone"
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"a": _Code()}))
    cases["code.pth"] = "not a PyTorch file of weights alone"
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    cases["cut.safetensors"] = "not a readable safetensors file"
    for name, expected in cases.items():
        with pytest.raises(UserError, match=expected) as caught:
            read_tensors([str(tmp_path / name)])
        assert name in str(caught.value)
    assert "code ran" not in capsys.readouterr().out
    with pytest.raises(UserError, match="a is in an earlier file too"):
        read_tensors([good, good])


def test_detr_at_its_size(tmp_path: Path) -> None:
    model = Detr(**DETR_R50)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), shapes)
    tensors = to_torch(params, detr_table((3, 4, 6, 3), 6, 6))
    convert.convert_detr(tensors, tmp_path / "out")
    detector = load_detector(str(tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, detector.params, params)
    assert detector.num_queries == 100
    del tensors["query_embed.weight"]
    with pytest.raises(UserError, match="not a DETR-R50: missing"):
        convert.convert_detr(tensors, tmp_path / "other")


def test_label_table_is_the_mean_of_xlmr_tokens(tmp_path: Path) -> None:
    pieces = tmp_path / "pieces"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(COCO_NAMES), model_prefix=str(pieces), vocab_size=90, minloglevel=2
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=f"{pieces}.model")
    config = transformers.XLMRobertaConfig(
        vocab_size=92,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=36,
        max_position_embeddings=40,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    torch.manual_seed(0)
    model = transformers.XLMRobertaModel(config).eval()
    tensors = {f"roberta.{name}": tensor.numpy() for name, tensor in model.state_dict().items()}
    table = convert.convert_xlmr(tensors, Path(f"{pieces}.model"), tmp_path / "out")
    np.testing.assert_array_equal(np.load(tmp_path / "out/label_table.npy"), table)
    for row in (0, 9, 90):
        pieces_of_name = processor.encode(COCO_NAMES[row])
        ids = [0, *(3 if piece == 0 else piece + 1 for piece in pieces_of_name), 2]
        with torch.no_grad():
            expected = model(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(table[row], expected, atol=1e-5)
