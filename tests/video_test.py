import json
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data_pipelines import schema, video
from ravar_jax.errors import UserError
from tests.numbered_video import HEIGHT, WIDTH, number_of, write_audio, write_video

POSITIONS = range(90)


def _nearest(times: list[float], key_time: float) -> list[int]:
    wanted = key_time + (np.arange(90) - 45) / 30
    # Between two equally near frames the earlier one.
    return [int(np.argmin(np.round(np.abs(np.array(times) - time), 3))) for time in wanted]


@pytest.mark.parametrize(
    ("suffix", "rate"),
    [
        (".mp4", Fraction(24)),
        (".mp4", Fraction(25)),
        (".mp4", Fraction(30000, 1001)),
        (".mkv", Fraction(30)),
        (".mkv", Fraction(12)),
        (".avi", Fraction(25)),
        (".avi", Fraction(60)),
    ],
)
def test_window_shows_the_frames_nearest_in_time(
    tmp_path: Path, rate: Fraction, suffix: str
) -> None:
    times = [float(number / rate) for number in range(int(5 * rate))]
    path = write_video(tmp_path / f"v{suffix}", times, rate=rate)
    frames, info = video.read_window(path, 2.5)
    assert [number_of(frame) for frame in frames] == [n % 256 for n in _nearest(times, 2.5)]
    assert info.frames_repeated == 0
    assert info.size == (WIDTH, HEIGHT)
    assert info.frame_rate == pytest.approx(float(rate), rel=1e-2)
    assert info.duration == pytest.approx(5.0, abs=0.1)


def test_variable_frame_rate_is_read_by_time_stamp(tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.15, 0.9, 1.0, 1.02, 1.6, 1.61, 2.9, 3.0, 3.05, 3.5, 4.0]
    path = write_video(tmp_path / "v.mkv", times, rate=30)
    frames, _ = video.read_window(path, 2.0)
    assert [number_of(frame) for frame in frames] == _nearest(times, 2.0)


def test_short_video_repeats_the_ends_and_says_so(tmp_path: Path) -> None:
    times = [number / 30 for number in range(30)]
    frames, info = video.read_window(write_video(tmp_path / "v.mp4", times, rate=30), 0.5)
    # The key frame is number 15, so 30 positions lie before the first frame and 30 after the last.
    assert [number_of(frame) for frame in frames] == [0] * 30 + list(range(30)) + [29] * 30
    assert info.frames_repeated == 60


def test_many_windows_of_a_long_video_with_seeking(tmp_path: Path) -> None:
    times = [number / 4 for number in range(250)]  # 62 s
    path = write_video(tmp_path / "v.mp4", times, rate=4)
    key_times = [0.0, 1.0, 2.0, 30.0, 31.0, 60.0]
    windows = list(video.read_windows(path, key_times, [0, 45, 89]))
    assert [window.key_time for window in windows] == key_times
    for window in windows:
        shown = [number_of(frame) for frame in window.frames]
        assert shown == [_nearest(times, window.key_time)[position] for position in (0, 45, 89)]
        assert not window.problem


def test_neighbours_share_their_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", [number / 30 for number in range(200)], rate=30)
    first, second, far = video.read_windows(path, [2.0, 3.0, 5.5])
    assert all(b is a for a, b in zip(first.frames[30:], second.frames, strict=False))
    for window in (first, second, far):
        alone, _ = video.read_window(path, window.key_time)
        assert [number_of(frame) for frame in window.frames] == [number_of(f) for f in alone]
    assert not {id(frame) for frame in first.frames} & {id(frame) for frame in far.frames}


def test_seeking_reads_what_decoding_from_the_start_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = [number / 5 for number in range(150)]  # 30 s
    path = write_video(tmp_path / "v.mkv", times, rate=5)
    expected = [number_of(frame) for frame in video.read_window(path, 25.0)[0]]
    source = video._WORKER.read_text()
    assert "_SEEK_GAP = 8.0" in source
    worker = tmp_path / "worker.py"
    worker.write_text(source.replace("_SEEK_GAP = 8.0", "_SEEK_GAP = 1e9"))
    monkeypatch.setattr(video, "_WORKER", worker)
    assert (
        [number_of(frame) for frame in video.read_window(path, 25.0)[0]]
        == expected
        == _nearest(times, 25.0)
    )


def test_short_side_scales_down_only(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", [number / 25 for number in range(25)])
    (frame,), info = video.read_window(path, 0.5, [45], short_side=32)
    assert (frame.shape, frame.dtype, info.size) == ((32, 64, 3), np.uint8, (WIDTH, HEIGHT))
    (frame,), _ = video.read_window(path, 0.5, [45], short_side=256)
    assert frame.shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("codec", ["ffv1", "mjpeg"])
def test_odd_sizes(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "v.mkv"
    picture = np.zeros((57, 101, 3), np.uint8)
    picture[:, 60:] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = (
            101,
            57,
            "yuvj420p" if codec == "mjpeg" else "yuv420p",
        )
        for _ in range(25):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    (frame,), info = video.read_window(path, 0.5, [45])
    assert (frame.shape, info.size) == ((57, 101, 3), (101, 57))
    assert (
        np.abs(frame[:, [5, 50, 70, 95]].astype(int).mean(axis=(0, 2)) - [0, 0, 255, 255]).max() < 6
    )
    (frame,), _ = video.read_window(path, 0.5, [45], short_side=31)
    assert frame.shape == (31, 55, 3)
    assert (
        np.abs(frame[:, [3, 27, 38, 51]].astype(int).mean(axis=(0, 2)) - [0, 0, 255, 255]).max() < 6
    )


def test_rotation_is_applied(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", [0.0, 1.0, 2.0], rate=1)
    content = bytearray(path.read_bytes())
    # As a phone held upright writes it: the track header's matrix turns the picture by 90 degrees clockwise.
    matrix = content.index(b"tkhd") + 44
    content[matrix : matrix + 36] = struct.pack(
        ">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30
    )
    path.write_bytes(content)
    (frame,), info = video.read_window(path, 1.0, [45])
    assert frame.shape == (WIDTH, HEIGHT, 3)
    assert info.size == video.probe(path).size == (HEIGHT, WIDTH)
    # Number 1 is white in the leftmost stripe, which turns to the top.
    assert frame[4].mean() > 200
    assert frame[-4].mean() < 50


def _expect_error(path: Path, part: str, key_time: float = 0.5) -> None:
    with pytest.raises(UserError) as error:
        video.read_window(path, key_time)
    assert str(path) in str(error.value)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_video_have_one_line(tmp_path: Path) -> None:
    _expect_error(tmp_path / "missing.mp4", "no such video file")
    _expect_error(tmp_path, "not a file")
    empty, text, playlist = tmp_path / "empty.mp4", tmp_path / "text.mp4", tmp_path / "playlist.mp4"
    empty.touch()
    _expect_error(empty, "empty (0 bytes)")
    text.write_text("A sentence about a person.\n" * 50)
    _expect_error(text, "not a video")
    # A list of other files, which would be read as the video that it names.
    write_video(tmp_path / "v.mp4", [number / 25 for number in range(25)])
    playlist.write_text("ffconcat version 1.0\nfile v.mp4\n")
    _expect_error(playlist, "not a video")
    _expect_error(write_audio(tmp_path / "audio.mp4"), "audio only")
    _expect_error(write_audio(tmp_path / "audio.mkv"), "audio only")


def test_truncated_files(tmp_path: Path) -> None:
    times = [number / 25 for number in range(200)]  # 8 s
    whole = write_video(tmp_path / "whole.mkv", times).read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole[: len(whole) // 2])
    frames, info = video.read_window(cut, 1.5)  # before the cut
    assert [number_of(frame) for frame in frames] == _nearest(times, 1.5)
    assert info.duration == pytest.approx(8.0, abs=0.1)
    _expect_error(cut, "breaks off", key_time=7.0)
    windows = list(video.read_windows(cut, [1.5, 7.0]))
    assert [bool(window.problem) for window in windows] == [False, True]
    # So is an AVI's index; without it the duration that FFmpeg tells shrinks with the file.
    whole = write_video(tmp_path / "whole.avi", times).read_bytes()
    cut = tmp_path / "cut.avi"
    cut.write_bytes(whole[: len(whole) * 3 // 4])
    assert [number_of(frame) for frame in video.read_window(cut, 1.5)[0]] == _nearest(times, 1.5)
    _expect_error(cut, "of 8.00 s (truncated?)", key_time=6.0)
    # An mp4's table of contents is at its end.
    whole = write_video(tmp_path / "whole.mp4", times).read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) // 2])
    _expect_error(cut, "not a video, or damaged")


def test_key_time_outside_the_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", [number / 25 for number in range(50)])
    _expect_error(path, "ends at 2.00 s, before the wanted time 3.00 s", key_time=3.0)
    _expect_error(path, "starts after the wanted time -1.00 s", key_time=-1.0)
    video.read_window(path, 2.0)


def test_limits_and_crashes_have_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "v.mp4", [number / 25 for number in range(50)])
    with monkeypatch.context() as patch:
        patch.setattr(video, "_MAX_PIXELS", 1000)
        _expect_error(path, "at most 1000 pixels")
    with monkeypatch.context() as patch:
        patch.setattr(video, "_MAX_FRAMES", 10)
        _expect_error(path, "more than 10 decoded frames")
    with pytest.raises(UserError, match=r"took longer than 0\.001 s"):
        video.probe(path, timeout_seconds=0.001)
    crashing = tmp_path / "worker.py"
    crashing.write_text("import os; os.abort()")
    monkeypatch.setattr(video, "_WORKER", crashing)
    _expect_error(path, "the decoder process ended with code -6")


def test_constants_are_the_schema_s() -> None:
    assert (video.NUM_POSITIONS, video.KEY_POSITION, video.FRAMES_PER_SECOND) == (
        schema.NUM_POSITIONS,
        schema.KEY_POSITION,
        schema.FRAMES_PER_SECOND,
    )


def test_module_needs_no_tensorflow(repository: Path) -> None:
    code = "import sys, data_pipelines.video; sys.exit('tensorflow' in sys.modules or 'av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repository).returncode == 0


def test_real_key_frames_are_found_by_time(shared_dir: Path) -> None:
    folder = shared_dir / "real-data" / "videos"
    entries = {
        entry["file"]: entry for entry in json.loads((folder / "instances.json").read_text())
    }
    for name in (
        "videos/bedroom.mp4",
        "videos/store_aisle.mp4",
        "videos/sign_eat.mkv",
        "videos/car.mp4",
    ):
        entry = entries[name]
        path = folder.parent / name
        (frame,), _ = video.read_window(path, entry["key_frame"] / entry["fps"], [45])
        with av.open(str(path)) as container:
            counted = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        differences = [np.abs(frame.astype(int) - other).mean() for other in counted]
        assert int(np.argmin(differences)) == entry["key_frame"], name
        assert min(differences) < 1.0
