"""The golden check passes on our files, and fails on corrupted ones, and unknown ones."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import golden_check

GOLDEN = Path(__file__).parent / "golden"


def run(capsys, *files):
    """Returns the exit code and the result lines."""
    code = golden_check.main([str(file) for file in files])
    lines = capsys.readouterr().out.splitlines()
    return code, [line for line in lines if not line.startswith("#")]


def failed(lines):
    return [line.split()[0] for line in lines if line.endswith("FAIL")]


def copy_with(source, target, **changed):
    """Writes a copy of a golden file with some arrays replaced; None drops one."""
    with np.load(source) as file:
        arrays = {**{key: file[key] for key in file.files}, **changed}
    np.savez(target, **{key: array for key, array in arrays.items() if array is not None})
    return target


def changed(source, key, amount, index=-1):
    """Returns `key`'s array with one entry moved by `amount`."""
    with np.load(source) as file:
        array = np.array(file[key])
    array.flat[index] += amount
    return {key: array}


@pytest.mark.parametrize("name", ["bertadam", "metrics", "refatomnet_a", "refatomnet_b"])
def test_our_files_are_ok(capsys, name):
    code, lines = run(capsys, GOLDEN / f"{name}.npz")
    assert code == 0, lines
    assert lines
    for line in lines:
        _, error, tolerance, verdict = line.split()
        assert verdict == "ok"
        assert 0 <= float(error) <= float(tolerance)
    if name.startswith("refatomnet"):
        quantities = [line.split()[0] for line in lines]
        assert_all_63_gradients(quantities)


def assert_all_63_gradients(quantities):
    kinds: dict[str, list[str]] = {kind: [] for kind in ("grad_norm", "grad_head", "grad_absent")}
    for quantity in quantities:
        kind, _, tensor = quantity.partition("/")
        if kind in kinds:
            kinds[kind].append(tensor)
    assert len(kinds["grad_norm"]) == 55
    assert kinds["grad_norm"] == kinds["grad_head"]
    parts = ("attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    leaves = ("weight", "bias")
    unread = {f"agent_box.{part}.{leaf}" for part in parts for leaf in leaves}
    assert set(kinds["grad_absent"]) == unread


def test_corrupted_fusion_values_fail_each_by_name(capsys, tmp_path):
    source = GOLDEN / "refatomnet_b.npz"
    norm, head = "grad_norm/proj_sem.weight", "grad_head/agent_semantic.attn.qkv.weight"
    corrupted = copy_with(
        source,
        tmp_path / "any_name.npz",
        **changed(source, "logits", 2e-4),
        **changed(source, "agent_temporal/agent_tokens", np.nan),
        **changed(source, norm, 1e-4),
        **changed(source, head, 0.1),
        # A gradient that must then be exactly zero, and is not.
        **dict.fromkeys(("grad_norm/proj.bias", "grad_head/proj.bias")),
    )
    code, lines = run(capsys, corrupted)
    assert code == 1
    assert failed(lines) == [
        "logits",
        "agent_temporal/agent_tokens",
        "grad_absent/proj.bias",
        norm,
        head,
    ]


@pytest.mark.parametrize(
    ("name", "key", "amount"),
    [
        ("bertadam", "kernel", 2e-6),
        ("bertadam", "bias", 2e-6),
        ("metrics", "iou", 1e-3),
        ("metrics", "map_weighted", 2e-6),
        ("metrics", "auroc_macro", 2e-6),
    ],
)
def test_a_corrupted_value_fails(capsys, tmp_path, name, key, amount):
    source = GOLDEN / f"{name}.npz"
    corrupted = copy_with(source, tmp_path / "x.npz", **changed(source, key, amount))
    code, lines = run(capsys, corrupted)
    assert code == 1
    assert key in failed(lines)


def test_one_bad_file_among_good_ones_sets_the_exit_code(capsys, tmp_path):
    source = GOLDEN / "bertadam.npz"
    corrupted = copy_with(source, tmp_path / "x.npz", **changed(source, "bias", 1.0))
    code, lines = run(capsys, corrupted, source)
    assert code == 1
    assert len(lines) == 4


def test_unknown_and_unreadable_files_give_one_line(capsys, tmp_path):
    np.savez(tmp_path / "unknown.npz", a=np.zeros(2))
    np.savez(tmp_path / "objects.npz", a=np.array([{}], object), allow_pickle=True)
    np.save(tmp_path / "array.npy", np.zeros(2))
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_bytes(b"")
    whole = (GOLDEN / "metrics.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    damaged = bytearray(whole)
    damaged[200:400] = bytes(200)
    (tmp_path / "damaged.npz").write_bytes(damaged)
    copy_with(GOLDEN / "bertadam.npz", tmp_path / "partial.npz", weight_decay=None)
    copy_with(
        GOLDEN / "bertadam.npz", tmp_path / "shape.npz", grad_bias=np.zeros((40, 3), np.float32)
    )
    sizes: dict[str, Any] = dict.fromkeys(("vit", "query_output", "text_output"), np.zeros(2))
    np.savez(tmp_path / "no_sizes.npz", seed=0, text_ids=np.zeros(2), config="{'dim': 8", **sizes)
    shutil.copy(GOLDEN / "README.md", tmp_path / "README.md")
    for file in [*sorted(tmp_path.iterdir()), tmp_path / "missing.npz", tmp_path]:
        code, lines = run(capsys, file)
        assert code == 1
        assert len(lines) == 1, (file, lines)
        assert lines[0].startswith(f"FAIL {file}: ")


def test_preprocessing(capsys, shared_dir, tmp_path):
    source = shared_dir / "golden/preprocess.npz"
    code, lines = run(capsys, source)
    assert code == 0, lines
    corrupted = copy_with(source, tmp_path / "x.npz", **changed(source, "clip_input", 0.05))
    code, lines = run(capsys, corrupted)
    assert code == 1
    assert failed(lines) == ["clip_input"]


def test_detector(capsys, shared_dir, tmp_path):
    source = shared_dir / "golden/detr.npz"
    corrupted = copy_with(
        source,
        tmp_path / "x.npz",
        **changed(source, "pred_boxes", 2e-4),
        **changed(source, "c5_slice", 2e-4),
    )
    code, lines = run(capsys, corrupted)
    assert code == 1
    assert [line.split()[0] for line in lines] == [
        "c5_mean",
        "c5_slice",
        "pred_logits",
        "pred_boxes",
    ]
    assert failed(lines) == ["c5_slice", "pred_boxes"]


def test_blip2(capsys, shared_dir, tmp_path):
    source = shared_dir / "golden/blip2.npz"
    code, lines = run(capsys, source)
    assert code == 0, lines
    assert [line.split()[0] for line in lines] == [
        "vit",
        "ln_vision",
        "query_output",
        "text_output",
    ]
    corrupted = copy_with(source, tmp_path / "x.npz", **changed(source, "query_output", 2e-4))
    code, lines = run(capsys, corrupted)
    assert code == 1
    assert failed(lines) == ["query_output"]
