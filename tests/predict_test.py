import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from ravar_jax import predict
from tests import tiny_detector, untrained_run

WIDTH, HEIGHT, RATE, NUM_FRAMES = 176, 144, 30, 120


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    untrained_run.write_backbone(folder / "backbone")
    untrained_run.write_run(folder / "run", untrained_run.make_config(folder / "backbone"))
    return folder / "run"


@pytest.fixture(scope="module")
def detecting_workdir(tmp_path_factory) -> Path:
    """A run with a detector."""
    folder = tmp_path_factory.mktemp("detecting")
    untrained_run.write_backbone(folder / "backbone")
    tiny_detector.write_detector(folder / "detector")
    config = untrained_run.make_config(folder / "backbone")
    config.update_from_flattened_dict(tiny_detector.settings(folder / "detector"))
    untrained_run.write_run(folder / "run", config)
    return folder / "run"


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    random = np.random.default_rng(0)
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for _ in range(NUM_FRAMES):
            small = Image.fromarray(random.integers(0, 255, (9, 11, 3), np.uint8))
            frame = np.asarray(small.resize((WIDTH, HEIGHT)))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def run_command(repository: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/predict.py", *map(str, arguments)]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)


def test_prediction_lists_ten_actions_and_a_box_clipped_to_the_frame():
    logits = np.linspace(-3, 3, 80).astype(np.float32)
    result = predict.prediction(
        video="a.mp4",
        sentence="the man",
        time_seconds=1.5,
        action_logits=logits,
        box=np.asarray([-0.2, 0.25, 0.5, 1.7], np.float32),
        frame_size=(200, 100),
        detections_source="none",
        frames_repeated=3,
    )
    assert list(result) == [
        "video",
        "sentence",
        "time_seconds",
        "actions",
        "box",
        "box_pixels",
        "detections_source",
        "frames_repeated",
    ]
    assert [row["id"] for row in result["actions"]] == list(range(80, 70, -1))
    assert result["actions"][0]["name"] == "watch (a person)"
    assert result["actions"][0]["probability"] == pytest.approx(1 / (1 + np.exp(-3)), abs=1e-6)
    assert result["box"] == [0.0, 0.25, 0.5, 1.0]
    assert result["box_pixels"] == [0.0, 25.0, 100.0, 100.0]


def test_command_writes_json_picture_and_video(repository, workdir, video, tmp_path):
    sentence = "the man in a red coat"
    output = tmp_path / "out"
    arguments = ("--workdir", workdir, "--video", video, "--sentence", sentence)
    result = run_command(repository, *arguments, "--time", 0.5, "--output", output)
    assert result.returncode == 0, result.stderr
    prediction = json.loads((output / "prediction.json").read_text())
    assert prediction["video"] == str(video)
    assert prediction["sentence"] == sentence
    assert prediction["time_seconds"] == 0.5
    assert prediction["frames_repeated"] == 30  # the window starts a second before the video
    assert prediction["detections_source"].startswith("none:")
    probabilities = [row["probability"] for row in prediction["actions"]]
    assert len(probabilities) == 10
    assert probabilities == sorted(probabilities, reverse=True)
    x1, y1, x2, y2 = prediction["box_pixels"]
    assert 0 <= min(x1, x2) <= max(x1, x2) <= WIDTH
    assert 0 <= min(y1, y2) <= max(y1, y2) <= HEIGHT
    assert Image.open(output / "overlay.png").width >= 640
    with av.open(str(output / "overlay.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 90


def test_prediction_reads_the_frames_that_evaluation_reads(workdir, video):
    """The command's route (decode, resize, batch of one) against the task on frames read independently."""
    from data_pipelines.video_clip import read_evaluation_frames
    from ravar_jax.restore import restore_run

    run = restore_run(workdir)
    clips, key_frame, picture = read_evaluation_frames(run.config, video, 2.0)
    assert key_frame is None
    with av.open(str(video)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    positions = np.floor(np.linspace(0, 89, 8)).astype(int)
    side = run.config.data.image_size
    expected = [
        np.asarray(
            Image.fromarray(frames[60 + p - 45]).resize((side, side), Image.Resampling.BICUBIC)
        )
        for p in positions
    ]
    assert np.array_equal(picture, frames[60])
    assert clips.shape == (1, 8, side, side, 3)
    assert np.abs(clips[0].astype(int) - np.stack(expected)).max() <= 1
    batch, cut = predict.single_batch(run.config, run.tokenizer, clips, "the man " * 20)
    assert cut
    assert (batch["class_ids"] == 91).all()
    logits, box = predict.predict(run.task, run.params, run.frozen, batch)
    assert logits.shape == (80,)
    assert box.shape == (4,)


def test_detector_sees_the_key_frame(detecting_workdir, video):
    from data_pipelines.video_clip import read_evaluation_frames
    from ravar_jax.restore import restore_run

    run = restore_run(detecting_workdir)
    clips, key_frame, picture = read_evaluation_frames(run.config, video, 2.0)
    size = (tiny_detector.WIDTH, tiny_detector.HEIGHT)
    expected = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
    assert np.array_equal(key_frame, np.asarray(expected))

    def logits(frame):
        batch, _ = predict.single_batch(run.config, run.tokenizer, clips, "the man", frame)
        return predict.predict(run.task, run.params, run.frozen, batch)[0]

    assert np.abs(logits(key_frame) - logits(255 - key_frame)).max() > 1e-6


def test_command_says_that_it_detects(repository, detecting_workdir, video, tmp_path):
    arguments = ("--workdir", detecting_workdir, "--video", video, "--sentence", "the man")
    result = run_command(repository, *arguments, "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    prediction = json.loads((tmp_path / "out" / "prediction.json").read_text())
    folder = detecting_workdir.parent / "detector"
    assert prediction["detections_source"] == f"detr: {folder} on the key frame"


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"sentence": "  "}, 1, "--sentence"),
        ({"video": "missing.mp4"}, 1, "missing.mp4"),
        ({"time": "99"}, 1, "clip.mp4"),
        ({"time": "-1"}, 2, "--time"),
        ({"time": "soon"}, 2, "time"),
        ({"workdir": "missing_run"}, 1, "missing_run"),
        ({"sentense": "x"}, 2, "sentense"),
    ],
)
def test_bad_input_gives_one_line(repository, workdir, video, tmp_path, change, code, words):
    values = {"workdir": workdir, "video": video, "sentence": "a man", "output": tmp_path} | change
    flags = [part for name, value in values.items() for part in (f"--{name}", value)]
    result = run_command(repository, *flags)
    assert result.returncode == code, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert words in result.stderr
    assert not list(tmp_path.iterdir())
