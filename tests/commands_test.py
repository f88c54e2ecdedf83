"""The commands in the order of the quickstart, on a few scenes: what they write, and how they refuse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny_detector
from tests.together import run_together

SMALL = {
    "data.num_clips": 24,
    "train.steps": 4,
    "train.batch_size": 8,
    "train.log_every_steps": 2,
    "train.eval_every_steps": 4,
    "evaluation.batch_size": 8,
    "checkpoint.every_steps": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def run(repository: Path, folder: Path):
    def run(command: str, *arguments: object, code: int = 0) -> str:
        """Runs a command and returns what it printed; fails on another exit code or a traceback."""
        done = subprocess.run(
            [sys.executable, f"launch/{command}.py", *map(str, arguments)],
            cwd=repository,
            capture_output=True,
            text=True,
            timeout=300,
        )
        text = done.stdout + done.stderr
        assert done.returncode == code, text
        assert "Traceback" not in text
        return text

    return run


def config_flags(folder: Path, variant: str = "", **changes: object) -> list[str]:
    values = {**SMALL, "data.data_dir": folder / "data", **changes}
    return [
        f"--config=configs/quickstart.py{variant}",
        *(f"--config.{key}={value}" for key, value in values.items()),
    ]


@pytest.fixture(scope="module")
def workdir(run, folder: Path) -> Path:
    run("cache_features", *config_flags(folder), "--output", folder / "features")
    cached = {"data.feature_cache": folder / "features"}
    run("train", *config_flags(folder, **cached), "--workdir", folder / "run")
    return folder / "run"


def evaluate(run, workdir: Path, sentences: str) -> dict:
    output = workdir / f"test_{sentences}.json"
    arguments = ("--workdir", workdir, "--split", "test", "--sentences", sentences)
    run("evaluate", *arguments, "--output", output)
    return json.loads(output.read_text())


def test_training_writes_its_scores_and_is_not_repeated(run, folder: Path, workdir: Path) -> None:
    final = json.loads((workdir / "final_metrics.json").read_text())
    metrics = ("mIoU", "mAP_weighted", "mAP_macro", "AUROC_weighted", "AUROC_macro")
    assert {f"test/{name}" for name in metrics} <= set(final)
    assert {"test/prior_mAP_weighted", "test/prior_mAP_macro", "per_class"} <= set(final)
    assert (final["step"], final["sentences"], final["num_left_out"]) == (4, "true", 0)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [2, 4]
    cached = {"data.feature_cache": folder / "features"}
    assert "already at step 4" in run(
        "train", *config_flags(folder, **cached), "--workdir", workdir
    )


def test_two_processes_train_as_one(repository: Path, folder: Path, workdir: Path) -> None:
    flags = config_flags(folder, **{"data.feature_cache": folder / "features"})
    command = [sys.executable, "launch/train.py", *flags, f"--workdir={folder / 'two'}"]
    outputs = run_together(command, 2, repository)
    assert "mAP_macro" in outputs[0]  # the table
    assert "mAP_macro" not in outputs[1]

    def logged(run: Path) -> list[dict[str, float]]:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "train/loss" in row]

    one, two = logged(workdir), logged(folder / "two")
    assert [row["step"] for row in two] == [2, 4]
    for key in ("train/loss", "train/grad_norm"):
        expected = [row[key] for row in one]
        assert [row[key] for row in two] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    scores = [
        json.loads((run / "final_metrics.json").read_text()) for run in (workdir, folder / "two")
    ]
    assert scores[0]["num_examples"] == scores[1]["num_examples"]
    assert scores[1]["test/mIoU"] == pytest.approx(scores[0]["test/mIoU"], abs=1e-4)


def test_each_kind_of_sentence_is_scored(run, workdir: Path) -> None:
    scores = {kind: evaluate(run, workdir, kind) for kind in ("true", "swapped", "blank")}
    assert {kind: each["sentences"] for kind, each in scores.items()} == {k: k for k in scores}
    final = json.loads((workdir / "final_metrics.json").read_text())
    assert scores["true"]["test/mAP_macro"] == pytest.approx(final["test/mAP_macro"], abs=1e-6)
    # Nobody of MiniRefAVA is alone, so the true score beside the swapped one is that of all examples.
    beside = scores["swapped"]["true_sentences"]["test/mAP_macro"]
    assert beside == pytest.approx(scores["true"]["test/mAP_macro"], abs=1e-6)
    assert scores["swapped"]["num_left_out"] == 0
    different = {each["test/mAP_macro"] for each in scores.values()}
    assert len(different) == 3


def test_the_report_says_what_the_model_was_given(run, folder: Path, workdir: Path) -> None:
    run("report", "--workdir", workdir, "--pairs", 1)
    report = (workdir / "report.md").read_text()
    assert "Arithmetic: corrected, but data.eval_clips=1, loss.box_weight=5.0." in report
    assert "| with its own sentence |" in report
    cached = {"data.feature_cache": folder / "features", "train.steps": 2}
    twin = folder / "twin"
    run("train", *config_flags(folder, ":text_blind", **cached), "--workdir", twin)
    run("report", "--workdir", twin, "--pairs", 1)
    assert "| without a sentence |" in (twin / "report.md").read_text()
    assert "with its own sentence" not in (twin / "report.md").read_text()


@pytest.mark.parametrize("variant", [":official", ":paper", ":video_blind"])
def test_variants_train(run, folder: Path, workdir: Path, variant: str) -> None:
    cached = {"data.feature_cache": folder / "features", "train.steps": 2}
    run("train", *config_flags(folder, variant, **cached), "--workdir", folder / variant[1:])
    assert (folder / variant[1:] / "final_metrics.json").is_file()


def test_a_detector_runs_in_training_from_pixels(run, folder: Path, workdir: Path) -> None:
    tiny_detector.write_detector(folder / "detector")
    changes = tiny_detector.settings(folder / "detector") | {"train.steps": 2}
    run("train", *config_flags(folder, **changes), "--workdir", folder / "detecting")
    assert (folder / "detecting" / "final_metrics.json").is_file()
    for detector, code in (("", 2), (folder / "nowhere", 1)):
        flags = config_flags(folder, **(changes | {"model.detector": detector}))
        text = run("train", *flags, "--workdir", folder / "elsewhere", code=code)
        assert "model.detector=" in text
        assert len(text.strip().splitlines()) == 1


def test_refusals(run, folder: Path, workdir: Path) -> None:
    elsewhere = ("--workdir", folder / "elsewhere")
    assert "unknown config key data.num_clip " in run(
        "train", "--config=configs/quickstart.py", "--config.data.num_clip=3", *elsewhere, code=2
    )
    assert "train.steps" in run(
        "train", "--config=configs/quickstart.py", "--config.train.steps=many", *elsewhere, code=2
    )
    cached = {"data.feature_cache": folder / "features", "optimizer.learning_rate": 0.5}
    text = run("train", *config_flags(folder, **cached), "--workdir", workdir, code=1)
    assert "optimizer.learning_rate was 0.002 and is now 0.5" in text
    shard = next((folder / "data/mini_refava").rglob("*val.tfrecord*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-40])
    text = run("train", *config_flags(folder), *elsewhere, code=1)
    assert shard.name in text
    shard.write_bytes(whole)
    assert not (folder / "elsewhere").exists()
