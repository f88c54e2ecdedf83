"""What a dry run says of annotations: actions, shared movies, size, and too many windows left out."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.refava import prepare, skip_report, survey
from data_pipelines.refava.annotations import FIELDS, read_annotations
from data_pipelines.refava.sources import VideoFolder
from ravar_jax.errors import UserError
from tests.numbered_video import write_video

ROWS = """
train,long,902,0,0.1,0.2,0.5,0.8,11 80,The man in red.
train,long,902,1,0.5,0.2,0.9,0.8,12 80,The woman in blue.
train,gone,902,0,0.1,0.2,0.5,0.8,11,The man in red.
val,long,903,0,0.1,0.2,0.5,0.8,80,The man in red.
test,short,901,0,0.1,0.2,0.5,0.8,,The man in red.
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "annotations").mkdir()
    (folder / "annotations" / "people.csv").write_text(",".join(FIELDS) + ROWS)
    (folder / "videos").mkdir()
    write_video(folder / "videos" / "long.mp4", [number / 25 for number in range(150)])
    write_video(folder / "videos" / "short.mkv", [number / 25 for number in range(50)])
    return folder


def test_survey_counts_actions_and_shared_videos(folder: Path):
    counts = np.zeros(80)
    counts[[10, 79]] = 1, 3
    found = survey.survey(read_annotations(folder / "annotations"), counts)
    assert found["splits"]["train"] == {
        "windows": 2,
        "people": 3,
        "videos": 2,
        "labels": {"11": 2, "12": 1, "80": 2},
    }
    assert found["splits"]["test"]["labels"] == {}
    assert found["videos_in_several_splits"] == {"long": ["train", "val"]}
    assert found["actions_without_example"] == [n for n in range(1, 81) if n not in (11, 12, 80)]
    # Here 0.4, 0.2, 0.4 of 11, 12, 80; there 0.25, 0, 0.75.
    assert found["class_counts"]["distance"] == pytest.approx(0.35)
    assert [each["id"] for each in found["class_counts"]["largest_differences"]][:3] == [80, 12, 11]
    text = survey.describe(found)
    assert "train: 2 videos, 5 labels of 3 actions; 11 sit 2" in text
    assert "warning: video long is in train and val" in text


@pytest.mark.parametrize("wrong", [np.zeros(80), np.ones(79), -np.ones(80), np.array(["a"] * 80)])
def test_wrong_class_counts_are_refused(tmp_path: Path, wrong: np.ndarray):
    np.save(tmp_path / "counts.npy", wrong)
    with pytest.raises(UserError, match=r"counts\.npy: .*expected 80 counts"):
        survey.read_class_counts(str(tmp_path / "counts.npy"))
    with pytest.raises(UserError, match="not a readable"):
        survey.read_class_counts(str(tmp_path / "absent.npy"))


def test_size_is_that_of_the_frames(folder: Path):
    source = VideoFolder(str(folder / "videos"), 900.0, (0, 45), 64)
    annotations = read_annotations(folder / "annotations")
    few, many = (survey.estimate_bytes(annotations, source, kept, 90) for kept in (1, 100))
    assert few is not None
    assert many is not None
    assert many == pytest.approx(100 * few, rel=0.01)
    assert 500 < few < 2 * 64 * 400  # two frames of 64 pixels' height
    empty = VideoFolder(str(folder), 900.0, (0, 45), 64)
    assert survey.estimate_bytes(annotations, empty, 1, 90) is None


def test_too_many_windows_left_out(folder: Path):
    source = VideoFolder(str(folder / "videos"), 900.0, (45,), 64)
    expected = prepare.check(read_annotations(folder / "annotations"), source)
    skip_report.check_skipped(expected, 0.25)
    with pytest.raises(
        UserError, match=r"1 of 4 windows would be left out \(25.0%; 1: no video file\)"
    ):
        skip_report.check_skipped(expected, 0.2)


def test_dry_run_writes_its_report_and_fails_beyond_the_budget(
    folder: Path, tmp_path: Path, repository: Path
):
    command = [sys.executable, "launch/prepare_refava.py", "--dry_run"]
    command += [f"--annotations={folder / 'annotations'}", f"--videos={folder / 'videos'}"]
    command += [f"--data_dir={tmp_path}", "--movie_start_seconds=900"]
    (tmp_path / "ava.csv").write_text("long,0902,0.1,0.2,0.5,0.8,11,0\n")
    (tmp_path / "map.pbtxt").write_text('item { name: "sit" id: 11 }')
    command += [f"--ava_csv={tmp_path / 'ava.csv'}", f"--ava_label_map={tmp_path / 'map.pbtxt'}"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: 1 of 4 windows would be left out")
    assert "AVA's CSVs have 1 of 5 people (1 by person id, 0 by box alone)" in done.stdout
    assert "ids that it lacks, and people who have them: 12 (1), 80 (3)" in done.stdout
    report = json.loads((tmp_path / "refava" / "ava_style" / "report.json").read_text())
    assert report["splits"]["train"]["windows_kept"] == 1
    assert report["survey"]["videos_in_several_splits"] == {"long": ["train", "val"]}
    assert report["survey"]["ava_csv"]["labels_lacking"] == 0
    assert report["survey"]["ava_csv"]["labels_added"] == 1
    assert report["survey"]["ava_label_map"]["ids_not_in_map"] == {"12": 1, "80": 3}
    assert report["annotation_faults"] == []
    assert report["estimated_bytes"] > 1000
    assert [path.name for path in (tmp_path / "refava" / "ava_style").iterdir()] == ["report.json"]
