"""Perturbations against independent computations, what they depend on, and the command that scores under them."""

import colorsys
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines import input_pipeline, perturbations
from data_pipelines.feature_cache_writer import write_cache
from data_pipelines.perturbations import NAMES, Perturbation, parse_perturbation, perturb
from data_pipelines.record_index import load_index
from data_pipelines.records import decode_frames, parse_window
from ravar_jax.errors import UsageError
from tests import detector_cache_test, tiny_dataset, tiny_detector, untrained_run

TOKENIZER = tiny_dataset.WordTokenizer()
EVERY = [Perturbation(name, severity) for name in NAMES for severity in range(1, 6)]


def pictures(count: int = 4, height: int = 37, width: int = 50) -> np.ndarray:
    """Smooth coloured frames, each unlike the others."""
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 256, (count, 5, 6, 3), np.uint8)
    shape = (width, height)
    return np.stack([np.asarray(Image.fromarray(each).resize(shape)) for each in coarse])


def run(text: str, frames: np.ndarray, clip_id: str = "a", positions: Any = None) -> np.ndarray:
    positions = range(len(frames)) if positions is None else positions
    return perturb(frames, parse_perturbation(text), clip_id, positions)


def flat(level: int, count: int = 1, side: int = 64) -> np.ndarray:
    return np.full((count, side, side, 3), level, np.uint8)


def in_hsv(pixel: tuple[int, int, int], change: Any) -> list[int]:
    h, s, v = colorsys.rgb_to_hsv(*(channel / 255 for channel in pixel))
    return [round(255 * channel) for channel in colorsys.hsv_to_rgb(*change(h, s, v))]


PIXELS = [(200, 30, 90), (10, 20, 30), (0, 0, 0), (255, 255, 255), (90, 90, 90), (250, 5, 0)]


@pytest.mark.parametrize("severity", range(1, 6))
def test_brightness_raises_v_of_hsv(severity: int) -> None:
    changed = run(f"brightness:{severity}", np.array([[PIXELS]], np.uint8))
    expected = [in_hsv(p, lambda h, s, v: (h, s, min(1, v + 0.1 * severity))) for p in PIXELS]
    np.testing.assert_allclose(changed[0, 0].astype(int), expected, atol=1)


@pytest.mark.parametrize(
    ("severity", "factor", "added"),
    [(1, 0.3, 0), (2, 0.1, 0), (3, 2, 0), (4, 5, 0.1), (5, 20, 0.2)],
)
def test_saturation_changes_s_of_hsv(severity: int, factor: float, added: float) -> None:
    changed = run(f"saturation:{severity}", np.array([[PIXELS]], np.uint8))
    expected = [in_hsv(p, lambda h, s, v: (h, min(1, s * factor + added), v)) for p in PIXELS]
    np.testing.assert_allclose(changed[0, 0].astype(int), expected, atol=1)


def test_contrast_shrinks_each_channel_around_its_mean_over_the_frame() -> None:
    # Means 100, 60, 50 of the first frame; the second is flat.
    first = [[[80, 20, 50], [120, 100, 50]]]
    frames = np.array([first, [[[7, 8, 9]] * 2]], np.uint8)
    assert run("contrast:1", frames).tolist()[0] == [[[90, 40, 50], [110, 80, 50]]]
    changed = run("contrast:5", frames)
    assert changed.tolist() == [[[[98, 56, 50], [102, 64, 50]]], [[[7, 8, 9]] * 2]]


def test_motion_blur_is_the_mean_of_neighbours_with_repeated_ends() -> None:
    levels = np.array([0, 30, 90, 180, 250])
    frames = np.stack([flat(level)[0] for level in levels])
    assert run("motion_blur:1", frames)[:, 0, 0, 0].tolist() == [0, 15, 60, 135, 215]
    # Frames 0 0 | 0 30 90 180 250 | 250: means of i-2 .. i+1, halves rounded up.
    assert run("motion_blur:2", frames)[:, 5, 5, 1].tolist() == [8, 30, 75, 138, 193]
    padded = np.pad(levels, (6, 5), mode="edge")
    means = [padded[i : i + 12].mean() for i in range(5)]
    assert (
        run("motion_blur:5", frames)[:, 9, 9, 2].tolist() == np.floor(np.add(means, 0.5)).tolist()
    )
    white = flat(255, 13)
    assert (run("motion_blur:5", white) == white).all()  # sums beyond a byte


@pytest.mark.parametrize(("severity", "photons"), [(1, 60), (2, 25), (3, 12), (4, 5), (5, 3)])
def test_shot_noise_has_a_photon_counts_mean_and_variance(severity: int, photons: int) -> None:
    level = 51  # 0.2: clipping at 1 is rare
    noisy = run(f"shot_noise:{severity}", flat(level, side=128)) / 255
    assert noisy.mean() == pytest.approx(0.2, abs=0.01)
    assert noisy.var() == pytest.approx(0.2 / photons, rel=0.08)
    steps = np.unique(np.rint(noisy * photons * 100) / 100)
    assert np.abs(steps - np.rint(steps)).max() < 0.5 * photons / 255 + 0.01  # whole photons
    assert not run(f"shot_noise:{severity}", flat(0)).any()


@pytest.mark.parametrize(
    ("severity", "deviation"), [(1, 0.08), (2, 0.12), (3, 0.18), (4, 0.26), (5, 0.38)]
)
def test_gaussian_noise_has_the_benchmarks_deviation(severity: int, deviation: float) -> None:
    noisy = run(f"gaussian_noise:{severity}", flat(128, side=128)) / 255
    assert noisy.mean() == pytest.approx(128 / 255, abs=0.01)
    # Of a normal distribution, 68.27% lie within one deviation, clipped or not.
    within = np.abs(noisy - 128 / 255) < deviation
    assert within.mean() == pytest.approx(0.6827, abs=0.02)


def test_fog_adds_one_fractal_to_all_frames_and_scales_to_the_maximum() -> None:
    fogged = run("fog:3", np.stack([flat(102)[0], flat(204)[0]])) / 255
    fractals = []
    for frame, level in zip(fogged, (0.4, 0.8), strict=True):
        # Solved for the fractal: (level + 2.5 f) * level / (level + 2.5) = frame
        fractals.append((frame * (level + 2.5) / level - level) / 2.5)
    np.testing.assert_allclose(fractals[0], fractals[1], atol=0.01)
    np.testing.assert_allclose(fractals[0][..., 0], fractals[0][..., 2], atol=1e-6)
    assert fractals[0].min() == pytest.approx(0, abs=0.01)
    assert fractals[0].max() == pytest.approx(1, abs=0.01)
    assert fractals[0].std() > 0.1
    assert not run("fog:3", flat(0)).any()


def test_the_fractal_is_diamond_square_on_a_torus() -> None:
    size, decay = 8, 1.7
    rng = np.random.default_rng(5)
    heights, amplitude, step = {(0, 0): 0.0}, 1.0, size
    while step > 1:
        cells, half = size // step, step // 2
        noise = rng.uniform(-amplitude, amplitude, (3, cells, cells))
        # Middles of squares, then of horizontal edges, then of vertical ones.
        passes = (
            (half, half, ((1, 1), (1, -1))),
            (0, half, ((1, 0), (0, 1))),
            (half, 0, ((1, 0), (0, 1))),
        )
        for number, (down, right, directions) in enumerate(passes):
            for i in range(cells):
                for j in range(cells):
                    y, x = i * step + down, j * step + right
                    around = [
                        heights[(y + sign * dy * half) % size, (x + sign * dx * half) % size]
                        for dy, dx in directions
                        for sign in (1, -1)
                    ]
                    heights[y, x] = sum(around) / 4 + noise[number, i, j]
        amplitude, step = amplitude / decay**2, half
    expected = np.array([[heights[y, x] for x in range(size)] for y in range(size)])
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    made = perturbations.plasma_fractal(size, decay, np.random.default_rng(5))
    np.testing.assert_allclose(made, expected, atol=1e-6)


def test_rain_draws_slanted_lines_of_the_drops_length() -> None:
    # One drop: between 770 and 1540 pixels. A wet pixel is 1/3 of 220 and 2/3 of 0, but for the ends.
    x = np.zeros((1, 60, 20, 3), np.float32)
    wet = perturbations.rain(x, 770, 30, 1.0, generators=[np.random.default_rng(0)])[0, ..., 0]
    rows, columns = np.nonzero(wet)
    assert rows.tolist() == list(range(rows[0], rows[0] + 30))
    assert columns.tolist() == [columns[0]] * 15 + [columns[0] - 1] * 15
    assert wet[rows[5], columns[5]] == pytest.approx(220 / 255 / 3)
    # The drops of other frames are elsewhere, and the contrast falls by the factor.
    rng = np.random.default_rng(0)
    x = rng.random((2, 60, 70, 3), np.float32)
    dry = [perturbations.rain(x, 770, 10, c, generators=[rng, rng]) for c in (1.0, 0.5)]
    assert dry[1].std() < 0.6 * dry[0].std()
    rained = run("rain:1", flat(255, 2))
    assert (rained[0] != rained[1]).any()
    assert (flat(0, 1, 100) != run("rain:5", flat(0, 1, 100))).mean() > 0.1


@pytest.mark.parametrize("perturbation", EVERY, ids=str)
def test_same_shape_and_type_and_result_on_every_call(perturbation: Perturbation) -> None:
    frames = pictures()
    before = frames.copy()
    changed = perturb(frames, perturbation, "a", range(4))
    assert (changed.shape, changed.dtype) == (frames.shape, np.uint8)
    assert (changed != frames).any()
    assert (frames == before).all()
    assert (perturb(frames, perturbation, "a", range(4)) == changed).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 7), (3, 33, 5), (2, 9, 130)])
def test_any_size_and_number_of_frames(name: str, shape: tuple[int, int, int]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    for severity in (1, 5):
        assert run(f"{name}:{severity}", frames).shape == frames.shape
    if name == "motion_blur" and len(frames) == 1:
        assert (run("motion_blur:5", frames) == frames).all()


@pytest.mark.parametrize("name", NAMES)
def test_severity_5_changes_more_than_1(name: str) -> None:
    # Muted, as film is: on vivid colours, losing them (severity 1) is as much as more of them (5).
    frames = 60 + pictures(count=8, height=90, width=120) // 3
    change = {}
    for severity in (1, 5):
        text = f"{name}:{severity}"
        made = [
            run(text, frames, clip_id) for clip_id in "abcde"
        ]  # a fractal has much chance in it
        change[severity] = np.abs(np.stack(made) - frames.astype(float)).mean()
    assert change[5] > 1.2 * change[1]


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_of_clip_name_severity_and_position(name: str) -> None:
    frames, text = pictures(), f"{name}:2"
    together = run(text, frames)
    draws = name in ("shot_noise", "gaussian_noise", "fog", "rain")
    assert (run(text, frames, clip_id="b") != together).any() == draws
    if name != "motion_blur":
        alone = run(text, frames[2:3], positions=[2])
        assert (alone == together[2:3]).all()
        moved = run(text, frames[2:3], positions=[3])
        assert (moved != alone).any() == (draws and name != "fog")


def test_the_same_in_another_process(repository: Path) -> None:
    code = (
        "import numpy as np\n"
        "from data_pipelines.perturbations import parse_perturbation, perturb\n"
        "x = np.full((1, 5, 4, 3), 99, np.uint8)\n"
        "print(perturb(x, parse_perturbation('shot_noise:3'), 'clip', [45]).ravel().tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    ours = run("shot_noise:3", np.full((1, 5, 4, 3), 99, np.uint8), "clip", [45])
    assert json.loads(done.stdout) == ours.ravel().tolist()


@pytest.mark.parametrize(
    "text", ["", "snow:3", "fog", "fog:", "fog:0", "fog:6", "fog:1.5", "fog:3:1", "3"]
)
def test_a_wrong_text_is_refused_with_the_names_and_the_range(text: str) -> None:
    with pytest.raises(UsageError, match="shot_noise, .*, rain .*1..5"):
        parse_perturbation(text)
    assert str(parse_perturbation("fog:3")) == "fog:3"


# Below: batches and the command, on a dataset of noise pictures of 48x36, 9 frames a window.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("perturbations")
    detector_cache_test.write_dataset(made)
    untrained_run.write_backbone(made / "backbone")
    return made


def pixel_config(folder: Path, **changes: object) -> Any:
    values = {
        "data__dataset": "refava",
        "data__data_dir": str(folder),
        "evaluation__batch_size": 8,
        **changes,
    }
    return untrained_run.make_config(folder / "backbone", **values)


def rows(config: Any, text: str | None, **arguments: Any) -> dict[int, dict[str, np.ndarray]]:
    """The real rows of the test split by example."""
    perturbation = parse_perturbation(text) if text else None
    found = {}
    for batch in input_pipeline.eval_batches(
        config, TOKENIZER, "test", perturbation=perturbation, **arguments
    ):
        for row, example in enumerate(batch["example_id"]):
            if example >= 0:
                found[int(example)] = {key: values[row] for key, values in batch.items()}
    return found


def test_batches_do_not_depend_on_their_size_or_on_processes(folder: Path) -> None:
    whole = rows(pixel_config(folder), "shot_noise:3")
    assert sorted(whole) == list(range(6))
    small = pixel_config(folder, evaluation__batch_size=2)
    parts = [rows(small, "shot_noise:3", process_index=p, process_count=2) for p in (0, 1)]
    assert sorted([*parts[0], *parts[1]]) == list(range(6))
    for example, row in (parts[0] | parts[1]).items():
        for key, values in row.items():
            np.testing.assert_array_equal(values, whole[example][key])
    assert (whole[0]["frames"] == whole[1]["frames"]).all()  # two people of a window
    clean = rows(pixel_config(folder), None)
    assert (whole[0]["frames"] != clean[0]["frames"]).any()
    changed = {key for key in clean[0] if (whole[0][key] != clean[0][key]).any()}
    assert changed == {"frames"}  # the dataset's detections stay


@pytest.mark.parametrize("text", ["contrast:5", "motion_blur:2"])
def test_frames_are_perturbed_before_they_are_resized_and_negated(folder: Path, text: str) -> None:
    config = pixel_config(folder, data__pixels="released", data__num_frames=2)
    config.update_from_flattened_dict(
        tiny_detector.settings(folder / "detector") | {"data.eval_clips": 1}
    )
    row = rows(config, text)[0]
    index = load_index(folder / "refava" / "tiny" / "1.0.0", "test")
    window = parse_window(index.read(0), "window 0")
    stored = np.asarray(window.frame_indices)
    changed = run(text, decode_frames(window, stored), window.clip_id, stored)
    by_position = dict(zip(stored.tolist(), changed, strict=True))

    def shown(position: int, height: int, width: int) -> np.ndarray:
        negative = (256 - by_position[position][..., ::-1].astype(int)) % 256
        picture = Image.fromarray(negative.astype(np.uint8))
        return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))

    side = untrained_run.IMAGE_SIZE
    expected = np.stack([shown(position, side, side) for position in (0, 89)])
    np.testing.assert_array_equal(row["frames"][0], expected)
    # Neighbours of the key frame for the detector too, whatever the clips read.
    key = shown(45, tiny_detector.HEIGHT, tiny_detector.WIDTH)
    np.testing.assert_array_equal(row["key_frame"], key)


def test_what_would_change_nothing_is_refused(folder: Path) -> None:
    for changes, text, named in (
        ({"data__video": "blank"}, "fog:1", "data.video=blank"),
        ({"data__frames": "still"}, "motion_blur:1", "data.frames=still"),
        ({"data__feature_cache": "cache"}, "fog:1", "data.feature_cache=cache"),
    ):
        with pytest.raises(UsageError, match=named):
            rows(pixel_config(folder, **changes), text)


def evaluate(repository: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/evaluate.py", *map(str, arguments)]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)


def test_a_run_of_a_cache_is_scored_from_perturbed_pixels(repository: Path, folder: Path) -> None:
    write_cache(pixel_config(folder), folder / "cache", report=lambda line: None)
    cached = pixel_config(folder, data__feature_cache=str(folder / "cache"))
    untrained_run.write_run(folder / "run", cached)
    output = folder / "scores.json"
    flags = ("--workdir", folder / "run", "--split", "test", "--output", output)
    results = {}
    for text in (None, "gaussian_noise:5"):
        chosen = () if text is None else ("--perturbation", text)
        done = evaluate(repository, *flags, *chosen)
        assert done.returncode == 0, done.stdout + done.stderr
        said = [line for line in done.stdout.splitlines() if "holds no pixels" in line]
        assert len(said) == (text is not None)
        results[text] = json.loads(output.read_text())
        assert results[text]["perturbation"] == text
        assert results[text]["num_examples"] == 6
    clean, noisy = results.values()
    # Of six examples a single score may be the same by chance.
    scores = [key for key, value in clean.items() if key.startswith("test/") and value is not None]
    assert [noisy[key] for key in scores] != [clean[key] for key in scores]
    wrong = evaluate(repository, *flags, "--perturbation", "fog:9")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: --perturbation=fog:9: expected NAME:SEVERITY")
    assert len(wrong.stderr.splitlines()) == 1
