import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import export as jax_export

from launch import saved_model
from ravar_jax import export, model_card, predict, weights
from ravar_jax.errors import UserError
from ravar_jax.restore import restore_run
from tests import untrained_run

pytestmark = pytest.mark.usefixtures("quick_compilation")

SENTENCES = ("the man", "a woman in a red coat on the left", "the man with a hat near the door")
FRAMES_INPUTS = ["frames", "token_ids", "attention_mask", "boxes", "class_ids"]
TOKEN_INPUTS = ["image_tokens", "text_tokens", "attention_mask", "boxes", "class_ids"]
METRICS = {"test/mIoU": 0.25, "step": 0, "perturbation": None, "per_class": {"1": {"AP": 0.125}}}
# Nothing of ours, and nothing else that JAX and NumPy do without.
BLOCKED = ("ravar_jax", "configs", "data_pipelines", "launch", "flax", "orbax", "optax", "absl")
BLOCKED += ("tensorflow", "ml_collections", "sentencepiece")
CLEAN = f"""
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
sys.argv.pop(0)
runpy.run_path(sys.argv[0])
try:
    import ravar_jax
except ModuleNotFoundError:
    pass
assert "ravar_jax" not in sys.modules
"""


def make_run(folder: Path, **changes) -> Path:
    untrained_run.write_backbone(folder / "backbone")
    config = untrained_run.make_config(folder / "backbone", data__num_frames=3, **changes)
    untrained_run.write_run(folder / "run", config)
    return folder / "run"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("run"))
    (folder / "final_metrics.json").write_text(json.dumps(METRICS))
    return folder


@pytest.fixture(scope="module")
def run(workdir):
    return restore_run(workdir)


@pytest.fixture(scope="module")
def exported(repository, workdir, tmp_path_factory) -> Path:
    """The folder that the command writes."""
    output = tmp_path_factory.mktemp("exported") / "made" / "out"
    result = run_command(repository, "--workdir", workdir, "--output", output, "--saved_model")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "takes frames, token_ids" in result.stdout
    return output


def run_command(repository: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/export.py", *map(str, arguments)]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)


def make_batches(run, rows: int) -> list[dict[str, np.ndarray]]:
    """Returns as many evaluation batches of one example, of `predict.single_batch`, with detections."""
    random = np.random.default_rng(rows)
    size, kept = run.config.data.image_size, run.config.model.num_detections
    batches = []
    for row in range(rows):
        clips = random.integers(0, 256, (1, 3, size, size, 3), np.uint8)
        batch, _ = predict.single_batch(run.config, run.tokenizer, clips, SENTENCES[row])
        batch["boxes"] = random.uniform(0, 1, (1, kept, 4)).astype(np.float32)
        batch["class_ids"] = random.integers(1, 4, (1, kept)).astype(np.int32)
        batches.append(batch)
    return batches


def model_inputs(batches: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the inputs of the exported model, one clip a row."""
    inputs = {name: np.concatenate([b[name] for b in batches]) for name in FRAMES_INPUTS}
    return inputs | {"frames": inputs["frames"][:, 0]}


def own_answer(run, batches: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    rows = [predict.predict(run.task, run.params, run.frozen, batch) for batch in batches]
    return dict(zip(("action_logits", "box"), map(np.stack, zip(*rows, strict=True)), strict=True))


def assert_same(found, expected) -> None:
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_readmes_loader_answers_without_this_package(repository, run, exported, tmp_path, rows):
    blocks = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(), re.DOTALL)
    (loader,) = (block for block in blocks if block.startswith("# load_exported.py\n"))
    assert len(loader.splitlines()) <= 16
    (tmp_path / "load_exported.py").write_text(loader)
    batches = make_batches(run, rows)
    np.savez(tmp_path / "inputs.npz", **model_inputs(batches))
    result = subprocess.run(
        [sys.executable, "-I", "-c", CLEAN, "load_exported.py", exported, "inputs.npz", "out.npz"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    expected = own_answer(run, batches)
    assert_same(np.load(tmp_path / "out.npz"), expected)
    assert expected["action_logits"].shape == (rows, 80)
    for name in FRAMES_INPUTS:
        assert name in result.stdout


PLAIN_TENSORFLOW = """
import sys
import numpy as np
import tensorflow as tf

folder, inputs, outputs = sys.argv[1:]
model = tf.saved_model.load(folder).signatures["serving_default"]
answer = model(**{name: tf.constant(value) for name, value in np.load(inputs).items()})
np.savez(outputs, **{name: value.numpy() for name, value in answer.items()})
assert not {"orbax", "ravar_jax"} & set(sys.modules)
"""


def test_the_saved_model_answers_in_plain_tensorflow(run, exported, tmp_path):
    for rows in (1, 3):
        batches = make_batches(run, rows)
        np.savez(tmp_path / "inputs.npz", **model_inputs(batches))
        files = [exported / "saved_model", "inputs.npz", "out.npz"]
        result = subprocess.run(
            [sys.executable, "-I", "-c", PLAIN_TENSORFLOW, *files],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        assert_same(np.load(tmp_path / "out.npz"), own_answer(run, batches))


def test_a_missing_orbax_export_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--saved_model needs orbax-export: pip install"):
        saved_model.check_installed()


def test_the_folder_holds_what_the_card_says(run, exported):
    names = ["model.jax_export", "model_card.md", "params", "saved_model", "tokenizer.model"]
    assert sorted(path.name for path in exported.iterdir()) == names
    assert [path.name for path in exported.parent.iterdir()] == ["out"]
    model = jax_export.deserialize((exported / "model.jax_export").read_bytes())
    assert model.platforms == ("cpu", "cuda", "tpu")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), run.params)
    hashes = weights.hash_weights(weights.load_params(exported, shapes))
    assert hashes == weights.hash_weights(run.params)
    card = (exported / "model_card.md").read_text()
    for path, value in hashes.items():
        assert re.search(rf"\| `{path}` \| float32 \| .* \| {value} \|", card)
    for name in ("model.jax_export", "tokenizer.model", "saved_model/saved_model.pb"):
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() in card
    assert "| `frames` | uint8 | (b, 3, 24, 24, 3) |" in card
    assert "| `action_logits` | float32 | (b, 80) |" in card
    assert "frames are at 0, 44, 89." in card
    assert "| test/mIoU | 0.2500 |" in card
    assert "0.125" not in card  # not every class's
    ids, mask, _ = run.tokenizer.encode([model_card.EXAMPLE_SENTENCE], run.config.data.text_length)
    assert f"is {ids[0, : mask.sum()].tolist()}." in card
    config = json.loads(re.search(r"```json\n(.*?)```", card, re.DOTALL)[1])
    assert config["model"] == run.config.model.to_dict()


def test_a_large_backbone_stays_outside(run, monkeypatch):
    whole = export.export_model(export.model_function(run))
    monkeypatch.setattr(export, "MAX_BACKBONE_BYTES", 0)
    exported = export.export_model(export.model_function(run))
    assert list(whole.inputs) == FRAMES_INPUTS
    assert list(exported.inputs) == TOKEN_INPUTS
    backbone = sum(leaf.nbytes for leaf in jax.tree.leaves(run.frozen["backbone"]))
    assert len(whole.serialized) - len(exported.serialized) > 0.9 * backbone
    model = jax_export.deserialize(exported.serialized)
    random = np.random.default_rng(0)
    for rows in (1, 2):
        batches = make_batches(run, rows)
        batch = {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
        del batch["frames"], batch["token_ids"]
        batch |= {
            name: random.normal(size=(rows, *exported.inputs[name].shape[1:])).astype(np.float32)
            for name in ("image_tokens", "text_tokens")
        }
        answer = model.call(**{name: batch[name] for name in TOKEN_INPUTS})
        batch["image_tokens"] = batch["image_tokens"][:, None]
        own = jax.jit(run.task.predict)(run.params, run.frozen, batch)
        assert_same(answer, {name: own[name] for name in ("action_logits", "box")})


def test_the_trained_part_of_the_backbone_is_inside(tmp_path):
    changes = {"model__train_qformer": True, "model__text_pooling": "all_positions"}
    run = restore_run(make_run(tmp_path, **changes))
    batches = make_batches(run, 1)
    assert "query_former" in run.params["backbone"]
    model = jax_export.deserialize(export.export_model(export.model_function(run)).serialized)
    assert_same(model.call(**model_inputs(batches)), own_answer(run, batches))


def write(run, workdir: Path, output: Path) -> None:
    clips = [[0, 44, 89]]
    export.write_export(run, workdir, output, arithmetic="corrected", clip_positions=clips)


def test_a_failure_leaves_nothing(run, workdir, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(export, "MAX_WEIGHT_BYTES", 1000)
        with pytest.raises(UserError, match="GB of weights"):
            write(run, workdir, tmp_path / "out")

    def fail(**_):
        raise OSError("disk full")

    monkeypatch.setattr(export, "model_card", fail)
    with pytest.raises(OSError, match="disk full"):
        write(run, workdir, tmp_path / "out")
    (tmp_path / "final_metrics.json").write_text("[]")
    with pytest.raises(UserError, match=r"final_metrics\.json is damaged"):
        write(run, tmp_path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["final_metrics.json"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ("RGB", "by descending score", "None: the run has no `final_metrics.json`")),
        ({"data.pixels": "released"}, ("negatives (255 - value) in BGR order",)),
        ({"model.text_pooling": "all_positions"}, ("a row's answer depends on the others'",)),
        ({"model.detections": "detr"}, ("DETR's of the key frame, in query order",)),
        ({"model.detections": "none"}, ("91 (no object) everywhere",)),
        ({"data.sentences": "blank"}, ("trained without sentences", "[2, 3]")),
        ({"data.video": "blank"}, ("trained without video: it looks at no frames",)),
    ],
)
def test_the_card_says_what_a_run_was_given(run, changes, words):
    def card(config) -> str:
        return model_card.model_card(
            config=config,
            step=3,
            tokenizer=run.tokenizer,
            params=run.params,
            backbone=run.frozen["backbone"],
            label_table=run.frozen["label_table"],
            inputs=dict.fromkeys(FRAMES_INPUTS, np.zeros((2, 3), np.uint8)),
            outputs={},
            calling_convention=10,
            files={"model.jax_export": "12ab", "tokenizer.model": "34cd"},
            metrics={},
            arithmetic="corrected",
            clip_positions=[[0, 44, 89], [1, 45, 89]],
        ).partition("## Config")[0]

    config = run.config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    assert "evaluated on 2 clips a window" in card(config)
    for word in words:
        assert word in card(config)
        assert not changes or word not in card(run.config)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"output": "full"}, 1, "full exists"),
        ({"output": "full/file"}, 1, "full/file exists"),
        ({"workdir": "missing_run"}, 1, "no run in missing_run"),
        ({"workdir": "unfinished"}, 1, "no checkpoint in"),
        ({"workdir": "pretraining"}, 1, "is a run of task pretrain"),
        ({"workdr": "x"}, 2, "--workdr"),
        ({"output": None}, 2, "missing flag --output"),
    ],
)
def test_refusals_are_one_line(repository, workdir, tmp_path, change, code, words):
    config = json.loads((workdir / "config.json").read_text())
    for name, task in (("unfinished", "ravar"), ("pretraining", "pretrain")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"task": task}))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    change = {k: tmp_path / v if v and (tmp_path / v).exists() else v for k, v in change.items()}
    values = {"workdir": workdir, "output": tmp_path / "out"} | change
    flags = [f"--{name}={value}" for name, value in values.items() if value is not None]
    result = run_command(repository, *flags)
    assert result.returncode == code, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert words in result.stderr
    assert sorted(tmp_path.rglob("*")) == before
