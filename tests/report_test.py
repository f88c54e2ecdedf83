import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from configs import base
from ravar_jax import overlay, report
from ravar_jax.errors import UserError
from tests import untrained_run


def make_scores(level: float, **more) -> dict:
    scores = {f"test/{metric}": level for metric in report.METRICS}
    scores |= {f"test/prior_{metric}": 0.111 for metric in ("mAP_weighted", "mAP_macro")}
    per_class = {
        "12": {"name": "stand", "positives": 7, "AP": 0.654, "AUROC": None},
        "13": {"name": "swim", "positives": 0, "AP": None, "AUROC": None},
    }
    scores |= {"num_examples": 40, "step": 5, "sentences": "true", "per_class": per_class}
    return scores | more


def make_example(box) -> report.Example:
    labels = np.zeros(80, np.float32)
    labels[11] = 1
    return report.Example(
        frame=np.full((90, 120, 3), 80, np.uint8),
        sentence="the man in a red coat",
        true_box=np.asarray([0.1, 0.1, 0.5, 0.9]),
        box=np.asarray(box),
        labels=labels,
        action_logits=np.linspace(-2, 2, 80),
    )


def test_tables_show_every_kind_of_sentence_and_the_prior(tmp_path):
    beside = {f"test/{m}": 0.888 for m in report.METRICS}
    swapped = make_scores(0.222, sentences="swapped", true_sentences=beside)
    blank = make_scores(0.333, sentences="blank")
    files = {"true": make_scores(0.777), "swapped": swapped, "blank": blank}
    for kind, scores in files.items():
        (tmp_path / f"test_{kind}.json").write_text(json.dumps(scores))
    text = report.markdown(base.get_config(), "corrected", report.read_scores(tmp_path), 8)
    for number in ("0.777", "0.222", "0.888", "0.333", "0.111"):
        assert text.count(f" {number} ") >= 2
    assert "| 12 | stand | 7 | 0.654 | – |" in text
    assert "swim" not in text
    assert report.EXAMPLES_FILE in text


def test_without_evaluations_the_final_metrics_are_reported(tmp_path):
    with pytest.raises(UserError, match="final_metrics.json"):
        report.read_scores(tmp_path)
    (tmp_path / "final_metrics.json").write_text(json.dumps(make_scores(0.5)))
    assert list(report.read_scores(tmp_path)) == ["true"]
    (tmp_path / "test_true.json").write_text("{}")
    with pytest.raises(UserError, match="test_true.json"):
        report.read_scores(tmp_path)


def test_curves_follow_the_logged_values():
    falling = [{"step": step, "train/loss": 1 - step / 100} for step in range(0, 101, 5)]
    picture = np.asarray(report.draw_curves([*falling, {"step": 100, "val/mIoU": 0.5}]))
    rows, columns = np.nonzero((picture[70:355, 70:610] == overlay.PREDICTED).all(-1))
    assert rows[columns < 60].mean() < 60 < 200 < rows[columns > 480].mean()


def test_sheet_draws_truth_and_prediction_of_each_example():
    examples = [make_example((0.2, 0.1, 0.6, 0.9)), make_example((0.6, 0.1, 0.2, 0.9))] * 2
    sheet = report.draw_sheet(examples)
    assert sheet.width > 2 * report.CELL_WIDTH
    array = np.asarray(sheet)
    left, right = array[:440, : sheet.width // 2], array[:440, sheet.width // 2 :]
    for half, predicted_is_drawn in ((left, True), (right, False)):
        assert (half == overlay.TRUE).all(-1).any()
        assert (half == overlay.PREDICTED).all(-1).any() == predicted_is_drawn


def test_command_shows_two_people_of_a_window(repository, tmp_path):
    untrained_run.write_backbone(tmp_path / "backbone")
    config = untrained_run.make_config(
        tmp_path / "backbone", data__data_dir=str(tmp_path / "data"), data__num_clips=6
    )
    config.evaluation.batch_size = 8
    workdir = tmp_path / "run"
    untrained_run.write_run(workdir, config)
    (workdir / "final_metrics.json").write_text(json.dumps(make_scores(0.5)))
    command = [sys.executable, "launch/report.py", "--workdir", str(workdir), "--pairs", "1"]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "2 examples" in (workdir / "report.md").read_text()
    with Image.open(workdir / report.EXAMPLES_FILE) as sheet:
        assert sheet.width > 2 * report.CELL_WIDTH
    assert (workdir / report.CURVES_FILE).exists()
