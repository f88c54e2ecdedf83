import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from data_pipelines.refava import prepare, skip_report
from data_pipelines.refava.annotations import FIELDS, Person, Window, read_annotations
from data_pipelines.refava.refava_dataset_builder import RefavaConfig, describe_input
from data_pipelines.refava.sources import FrameFolder, VideoFolder
from data_pipelines.refava.staging import Chunk, JpegEncoder, Staging, write_shard
from ravar_jax.errors import UsageError, UserError
from tests.numbered_video import number_of, write_video

POSITIONS = (0, 12, 45, 89)
# train: two people of `long`, one each of `gone`, `text` and one past the end; val: a clip shorter than its window;
# test: nothing that can be read.
ROWS = """
train,long,902,1,0.5,0.2,0.9,0.8,12 80,The woman in blue.
train,long,902,0,0.1,0.2,0.5,0.8,11,The man in red.
train,long,903,0,0.1,0.2,0.5,0.8,11,The man in red.
train,long,999,0,0.1,0.2,0.5,0.8,11,The man in red.
train,gone,902,0,0.1,0.2,0.5,0.8,11,The man in red.
train,text,902,0,0.1,0.2,0.5,0.8,11,The man in red.
val,short,901,0,0.1,0.2,0.5,0.8,,The man in red.
test,gone,902,0,0.1,0.2,0.5,0.8,11,The man in red.
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    annotations, videos = folder / "annotations", folder / "videos"
    annotations.mkdir()
    videos.mkdir()
    (annotations / "people.csv").write_text(",".join(FIELDS) + ROWS)
    write_video(videos / "long.mp4", [number / 25 for number in range(150)])
    write_video(videos / "short.mkv", [number / 25 for number in range(50)])
    (videos / "text.mp4").write_text("not a video")
    return folder


def _config(inputs: Path, **changes) -> RefavaConfig:
    values = {
        "name": "ava_style",
        "annotations": str(inputs / "annotations"),
        "videos": str(inputs / "videos"),
        "movie_start_seconds": 900.0,
        "stored_positions": POSITIONS,
        "max_skipped_share": 1.0,
    }
    return RefavaConfig(**{**values, **changes})


def test_built_dataset_holds_the_right_frames_and_people(inputs: Path, tmp_path: Path) -> None:
    config = _config(inputs)
    leftover = tmp_path / ".incomplete_refava_ava_style" / "refava"
    leftover.mkdir(parents=True)
    report = prepare.build(config, epath.Path(tmp_path), None, {"survey": {"as": "given"}})
    final = prepare.dataset_dir(epath.Path(tmp_path), "ava_style")
    assert final == tmp_path / "refava" / "ava_style" / "1.0.0"
    assert os.listdir(tmp_path) == ["refava"]
    assert report == json.loads((final / "report.json").read_text())
    assert report["survey"] == {"as": "given"}
    assert {path.name for path in final.glob("index_*")} == {"index_train.json", "index_val.json"}

    builder = tfds.builder_from_directory(final)
    train = {r["clip_id"].decode(): r for r in tfds.as_numpy(builder.as_dataset("train"))}
    assert sorted(train) == ["long___0902", "long___0903"]
    record = train["long___0903"]
    # Second 903 is 3 s into the file: positions 0, 12, 45, 89 are 1.5, 1.9, 3.0 and 4.467 s, at 25 frames a second.
    assert [number_of(frame) for frame in record["frames"]] == [37, 47, 75, 112]
    assert record["frame_indices"].tolist() == list(POSITIONS)
    assert (record["video_id"], record["key_time"]) == (b"long", 903.0)
    people = train["long___0902"]["people"]
    assert people["person_id"].tolist() == [b"0", b"1"]
    assert people["sentence"].tolist() == [b"The man in red.", b"The woman in blue."]
    np.testing.assert_allclose(
        people["box"], [[0.1, 0.2, 0.5, 0.8], [0.5, 0.2, 0.9, 0.8]], rtol=1e-6
    )
    assert people["labels"].to_list() == [[11], [12, 80]]
    assert train["long___0902"]["detections"]["score"].size == 0
    (short,) = tfds.as_numpy(builder.as_dataset("val"))
    assert [number_of(frame) for frame in short["frames"]] == [0, 0, 25, 49]

    # What was left out, and why.
    counts = {
        name: report["splits"]["train"][name]
        for name in ("windows", "people", "windows_kept", "people_kept")
    }
    assert counts == {"windows": 5, "people": 6, "windows_kept": 2, "people_kept": 3}
    reasons = {
        s["reason"]: s["examples"][0]["clip_id"] for s in report["splits"]["train"]["skipped"]
    }
    assert reasons == {
        "no video file": "gone___0902",
        "window cannot be read": "long___0999",
        "video file cannot be read": "text___0902",
    }
    assert report["splits"]["val"]["windows_with_repeated_frames"] == 1
    # Positions 0 and 12 lie before the first frame and 89 after the last.
    assert report["splits"]["val"]["frames_repeated"] == 3
    assert report["splits"]["test"]["windows_kept"] == 0
    assert (
        "test: skipped 1 windows (1 people), no video file; first gone___0902"
        in skip_report.table(report["splits"])
    )

    # A second run finds it; other input is refused.
    described = describe_input(read_annotations(config.annotations), config)
    assert prepare.finished_report(final, described) == report
    with pytest.raises(UserError, match="short_side was 256, now 128"):
        prepare.finished_report(final, {**described, "short_side": 128})
    (final / "report.json").unlink()
    with pytest.raises(UserError, match=r"without a readable report\.json"):
        prepare.finished_report(final, described)


def _shards(dataset: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(dataset.glob("*.tfrecord*"))}


def test_a_killed_build_goes_on_from_what_is_decoded(
    inputs: Path, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "inputs"
    (folder / "annotations").mkdir(parents=True)
    (folder / "videos").mkdir()
    rows = []
    for number in range(8):
        shutil.copy(inputs / "videos" / "long.mp4", folder / "videos" / f"v{number}.mp4")
        rows += [
            f"train,v{number},{second},0,0.1,0.2,0.5,0.8,11,The man." for second in (901, 902, 903)
        ]
    (folder / "annotations" / "people.csv").write_text("\n".join([",".join(FIELDS), *rows]))
    command = [sys.executable, "launch/prepare_refava.py", f"--data_dir={tmp_path / 'data'}"]
    command += [f"--annotations={folder / 'annotations'}", f"--videos={folder / 'videos'}"]
    command += ["--movie_start_seconds=900", f"--stored_positions={','.join(map(str, POSITIONS))}"]
    # One after the other, so that some are left wherever this runs.
    command += ["--beam_pipeline_options=direct_num_workers=1"]
    process = subprocess.Popen(command, cwd=repository, stderr=subprocess.DEVNULL)
    while not (done := list(tmp_path.glob("data/.incomplete*/.staged*/*.json"))):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = list(tmp_path.glob("data/.incomplete*/.staged*/*.json"))
    assert 0 < len(done) < 8

    stage = Staging.stage

    def noted_stage(self: Staging, chunk: Chunk) -> None:  # Beam calls a copy: note it in a file
        with open(tmp_path / "staged", "a") as file:
            print(chunk.key, file=file)
        stage(self, chunk)

    monkeypatch.setattr(Staging, "stage", noted_stage)
    config = _config(folder)
    report = prepare.build(config, epath.Path(tmp_path / "data"), None, {})
    staged = (tmp_path / "staged").read_text().split()
    assert len(staged) == 8 - len(done)
    assert not {path.stem for path in done} & set(staged)
    assert report["splits"]["train"]["windows_kept"] == 24
    assert os.listdir(tmp_path / "data") == ["refava"]
    prepare.build(config, epath.Path(tmp_path / "straight"), None, {})
    went_on, straight = (
        _shards(tmp_path / name / "refava" / "ava_style" / "1.0.0") for name in ("data", "straight")
    )
    assert went_on == straight != {}


def test_what_was_decoded_is_used_only_where_it_is_whole_and_of_the_same_input(
    inputs: Path, tmp_path: Path
) -> None:
    shutil.copytree(inputs / "videos", tmp_path / "videos")
    videos = VideoFolder(str(tmp_path / "videos"), 900.0, (45,), 256)
    windows = [_window("long", 901), _window("long", 902)]
    staging = Staging(str(tmp_path), videos, 90)
    (chunk,) = staging.chunks(windows)
    assert staging.missing([chunk]) == [chunk]
    staging.stage(chunk)
    staging.discard_doubtful([chunk])
    assert staging.missing([chunk]) == []
    # Any of these makes other bytes.
    changed = _window("long", 902)
    changed = dataclasses.replace(changed, people=(*changed.people, changed.people[0]))
    others = [
        Staging(str(tmp_path), videos, 89).chunks(windows),
        Staging(str(tmp_path), dataclasses.replace(videos, short_side=32), 90).chunks(windows),
        staging.chunks([windows[0], changed]),
    ]
    os.utime(tmp_path / "videos" / "long.mp4", (1, 1))
    others.append(staging.chunks(windows))
    assert len({chunk.key, *(other.key for (other,) in others)}) == 5
    # A file that is not whole, and a window that was left out, are decoded again.
    records = tmp_path / f"{chunk.key}.records"
    records.write_bytes(records.read_bytes()[:-1])
    staging.discard_doubtful([chunk])
    assert staging.missing([chunk]) == [chunk]
    (late,) = staging.chunks([_window("long", 999)])
    staging.stage(late)
    assert staging.missing([late]) == []
    staging.discard_doubtful([late])
    assert staging.missing([late]) == [late]
    # Bytes that changed on the disk do not reach a shard.
    staging.stage(chunk)
    _, staged = staging.read([chunk])
    flipped = bytearray(records.read_bytes())
    flipped[staged[1].offset + 100] ^= 1
    records.write_bytes(flipped)
    with pytest.raises(UserError, match=r"\.records is damaged at byte \d+ \(long___0902\)"):
        write_shard((str(tmp_path / "shard"), staged))
    assert not (tmp_path / "shard").exists()


def test_a_frame_of_two_windows_is_encoded_once() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    a, b, c = frames
    encoder = JpegEncoder(90)
    first, second = encoder.encode([a, a, b]), encoder.encode([b, c])
    assert first[0] is first[1]
    assert first[2] is second[0]
    assert len({*first, *second}) == 3
    assert JpegEncoder(90).encode([c]) == second[1:] != JpegEncoder(50).encode([c])


def test_tfds_build_writes_the_same(inputs: Path, tmp_path: Path, repository: Path) -> None:
    pytest.importorskip("mlcroissant")  # the tfds command needs it
    settings = {"name": "ava_style", "movie_start_seconds": 900, "stored_positions": POSITIONS}
    command = [Path(sys.executable).with_name("tfds"), "build", "data_pipelines/refava"]
    command += ["--config", json.dumps(settings | {"max_skipped_share": 1})]
    command += [f"--manual_dir={inputs}", f"--data_dir={tmp_path / 'tfds'}"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    prepare.build(_config(inputs), epath.Path(tmp_path), None, {})
    built, expected = (
        folder / "refava" / "ava_style" / "1.0.0" for folder in (tmp_path / "tfds", tmp_path)
    )
    assert _shards(built) == _shards(expected) != {}
    reports = [json.loads((folder / "report.json").read_text()) for folder in (built, expected)]
    assert reports[0] == reports[1]
    assert (built / "index_train.json").read_bytes() == (expected / "index_train.json").read_bytes()


def test_a_build_that_fails_leaves_nothing(inputs: Path, tmp_path: Path) -> None:
    # As if every movie went away after the check.
    broken = _config(inputs, videos=str(tmp_path))
    with pytest.raises(
        UserError, match=r"split \w+: none of its \d windows can be read; .*no video file"
    ):
        prepare.build(broken, epath.Path(tmp_path / "data"), None, {})
    assert not (tmp_path / "data" / "refava").exists()


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("runner=Nonsense", "Unexpected pipeline runner: Nonsense"),
        ("runner=no.such.Runner", "No module named"),
        ("direct_num_worker=4", "no option direct_num_worker"),
        ("direct_num_workers=x", "direct_num_workers: invalid int value: 'x'"),
    ],
)
def test_wrong_beam_options_are_refused(word: str, told: str) -> None:
    with pytest.raises(UsageError, match=f"--beam_pipeline_options: .*{told}"):
        prepare.beam_options(["region=r", word])
    assert (
        prepare.beam_options(["direct_num_workers=4"]).get_all_options()["direct_num_workers"] == 4
    )


@pytest.mark.parametrize(
    "wrong",
    [{"short_side": 0}, {"jpeg_quality": 96}, {"stored_positions": [90]}, {"max_skipped_share": 2}],
)
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(wrong))}="):
        RefavaConfig(name="refava", **wrong)


def test_check_counts_what_cannot_be_read(inputs: Path, tmp_path: Path) -> None:
    config = _config(inputs)
    reports = prepare.check(read_annotations(config.annotations), config.source())
    assert {split: report["windows_kept"] for split, report in reports.items()} == {
        "train": 2,
        "val": 1,
        "test": 0,
    }
    reasons = {s["reason"] for s in reports["train"]["skipped"]}
    assert reasons == {"no video file", "key time outside the video", "video file cannot be read"}
    empty = VideoFolder(str(tmp_path), 900.0, POSITIONS, 256)
    reports = prepare.check(read_annotations(config.annotations), empty)
    with pytest.raises(UserError, match="split train: none of its 5 windows can be read"):
        skip_report.check_skipped(reports, 1.0)


def _window(video: str, second: float) -> Window:
    return Window(
        f"{video}___{second:04.0f}", video, second, (Person("0", "A man.", (0, 0, 1, 1), (12,)),)
    )


def test_chunks_hold_one_video_and_every_window_once(tmp_path: Path) -> None:
    staging = Staging(str(tmp_path), VideoFolder(str(tmp_path), 0.0, POSITIONS, 256), 90)
    windows = [_window(video, second) for second in range(100, 0, -1) for video in "ab"]
    made = [chunk.windows for chunk in staging.chunks(windows)]
    assert sorted(w.clip_id for chunk in made for w in chunk) == sorted(w.clip_id for w in windows)
    for chunk in made:
        assert len({window.video_id for window in chunk}) == 1
        assert [w.key_second for w in chunk] == sorted(w.key_second for w in chunk)
    assert len(made) == 8


def test_extracted_frames(tmp_path: Path) -> None:
    folder = tmp_path / "frames" / "movie"
    folder.mkdir(parents=True)
    for number in range(10, 140):
        Image.new("RGB", (64, 32), (number, 0, 0)).save(
            folder / f"image_{number:06d}.jpg", quality=95
        )
    source = FrameFolder(str(tmp_path / "frames"), (0, 12, 45, 89), 16)
    windows = [
        _window("movie", 903),
        _window("movie", 902),
        _window("movie", 910),
        _window("absent", 902),
    ]
    assert {c: p.reason for c, p in source.check("movie", windows[:3]).items()} == {
        "movie___0910": "key time outside the extracted frames"
    }
    assert source.check("absent", windows[3:])["absent___0902"].reason == "no extracted frames"
    first, second, third = source.read("movie", windows[:3])
    # Number n is second 900 + n/30, so 902 is number 60 and its window starts at 15.
    assert [round(float(frame[..., 0].mean())) for frame in first.frames] == pytest.approx(
        [15, 27, 60, 104], abs=2
    )
    assert (first.frames_repeated, first.frames[0].shape) == (0, (16, 32, 3))
    assert [round(float(f[..., 0].mean())) for f in second.frames] == pytest.approx(
        [45, 57, 90, 134], abs=2
    )
    assert third.problem is not None
    before = source.fingerprint("movie", windows[:1])
    assert [name for name, _, _ in before] == [f"image_{n:06d}.jpg" for n in (45, 57, 90, 134)]
    (folder / "image_000060.jpg").write_bytes(b"no picture")
    assert source.fingerprint("movie", windows[:1]) == before  # not one of this window's
    assert source.fingerprint("absent", windows[3:]) == []
    (folder / "image_000057.jpg").unlink()
    assert source.fingerprint("movie", windows[:1]) != before
    first, second, _ = source.read("movie", windows[:3])
    assert (first.problem.reason, second.problem.reason) == (
        "extracted frame cannot be read",
        "extracted frame missing",
    )
    (edge,) = source.read("movie", [_window("movie", 901)])
    # Number 30 is the key frame: 0 and 12 are before the first file, 10.
    assert [round(float(f[..., 0].mean())) for f in edge.frames] == pytest.approx(
        [10, 10, 30, 74], abs=2
    )
    assert edge.frames_repeated == 2


def test_command_refuses_a_pickle_that_runs_code(
    inputs: Path, tmp_path: Path, repository: Path
) -> None:
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    for part in ("label", "keyframe", "description"):
        (tmp_path / f"test_set_{part}_crr_final.pkl").write_bytes(
            pickle.dumps({"a___0902___0": Attack()})
        )
    command = [
        sys.executable,
        "launch/prepare_refava.py",
        f"--annotations={tmp_path}",
        f"--data_dir={tmp_path / 'data'}",
    ]
    command += [f"--videos={inputs / 'videos'}"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "the pickle asks for posix.system" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "data").exists()
