"""Test-time corruptions of a window's frames, by name and severity: how robust is a trained run?

"fog:3"        -> `parse_perturbation` -> `Perturbation`
decoded frames -> `perturb`            -> frames of the same kind, resized and normalised as any others

They act on decoded frames of the stored size, uint8 0..255 RGB, before the pixel chain. Lengths in pixels (rain) and
the fineness of fog are therefore relative to the size that the dataset stores. Sentences, boxes, labels and the stored
detections stay as they are; a detector is given the perturbed key frame.

What is random is drawn from the clip's id, name, severity and, but for fog, the frame's position. So all people of a
window see the same frames, a frame is the same in every evaluation clip and for the detector, and nothing depends on
batches, processes or the run. (NumPy keeps its streams within a version.)

Source: the corruptions of the released data set file, never called there (spec section 11), which follow "the
benchmark": Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
ICLR 2019. Where the release cannot be used as it is:

* `gaussian_noise`: the release's standard deviation is 0.2 of 255, which rounding all but removes; ours are the
  benchmark's, 0.08 to 0.38 of 1.
* `motion_blur`: the release drops frames at both ends; here the end frames are repeated, so that every frame has a
  result. Neighbours are the stored frames, in the release all 90 positions: a dataset that stores few blurs over longer
  times.
* `fog`: the release cuts frames to 224; here the fractal has the next power of two of any size, and is cut.
* `rain`: here a drop that is longer than a frame is high is cut, and its pixels are those of the blurred copy.

Values are rounded to the nearest grey level.
"""

import dataclasses
import hashlib
from collections.abc import Iterable

import numpy as np
from ml_collections import ConfigDict

from ravar_jax.errors import UsageError

NUM_SEVERITIES = 5
# By severity, 1 to 5; the functions say what the numbers are.
_PARAMETERS: dict[str, tuple[tuple[float, ...], ...]] = {
    "shot_noise": ((60,), (25,), (12,), (5,), (3,)),
    "gaussian_noise": ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,)),
    "brightness": ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,)),
    "contrast": ((0.5,), (0.4,), (0.3,), (0.2,), (0.1,)),
    "saturation": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    "motion_blur": ((1,), (2,), (3,), (4,), (6,)),
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    "rain": ((770, 10, 0.8), (770, 30, 0.8), (770, 60, 0.7), (500, 60, 0.6), (400, 80, 0.5)),
}
NAMES = tuple(_PARAMETERS)
_RAIN_LEVEL = 220 / 255
_RAIN_SLANT = -1  # columns from the upper to the lower end of a drop


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """A corruption of `NAMES` and its severity, 1 to 5; as text "name:severity"."""

    name: str
    severity: int

    def __str__(self) -> str:
        return f"{self.name}:{self.severity}"


def parse_perturbation(text: str) -> Perturbation:
    """Returns the perturbation that "NAME:SEVERITY" means.

    Raises:
        UsageError: name or severity is unknown; lists the names and the range.
    """
    name, _, severity = text.partition(":")
    severities = [str(number) for number in range(1, NUM_SEVERITIES + 1)]
    if name not in NAMES or severity not in severities:
        raise UsageError(
            f"--perturbation={text}: expected NAME:SEVERITY with a NAME of {', '.join(NAMES)} "
            f"and a SEVERITY of 1..{NUM_SEVERITIES}"
        )
    return Perturbation(name, int(severity))


def check_perturbation(config: ConfigDict, perturbation: Perturbation) -> None:
    """Refuses a perturbation that cannot be applied or would change nothing that the model sees.

    Raises:
        UsageError: naming the config key.
    """
    if config.data.feature_cache:
        raise UsageError(
            f"--perturbation={perturbation}: data.feature_cache={config.data.feature_cache} holds no pixels"
        )
    if config.data.video == "blank":
        raise UsageError(f"--perturbation={perturbation}: the run has data.video=blank")
    if perturbation.name == "motion_blur" and config.data.frames == "still":
        raise UsageError(
            f"--perturbation={perturbation}: the run has data.frames=still, in which nothing moves"
        )


def perturb(
    frames: np.ndarray, perturbation: Perturbation, clip_id: str, positions: Iterable[int]
) -> np.ndarray:
    """Returns frames of a window perturbed, a pure function of the arguments.

    Args:
        frames: uint8 (N, H, W, 3) RGB 0..255; for motion blur all of the window, in order of time.
        perturbation: what to do.
        clip_id: of the window.
        positions: of the N frames in the window, 0..89.

    Returns:
        uint8 (N, H, W, 3) RGB 0..255.
    """
    name = perturbation.name
    parameters = _PARAMETERS[name][perturbation.severity - 1]
    if name == "motion_blur":
        return motion_blur(frames, int(parameters[0]))
    x = frames.astype(np.float32) / 255
    if name == "brightness":
        x = brightness(x, *parameters)
    elif name == "contrast":
        x = contrast(x, *parameters)
    elif name == "saturation":
        x = saturation(x, *parameters)
    elif name == "fog":
        x = fog(x, *parameters, generator=_generator(perturbation, clip_id))
    else:
        generators = [_generator(perturbation, clip_id, int(number)) for number in positions]
        if name == "shot_noise":
            x = shot_noise(x, *parameters, generators=generators)
        elif name == "gaussian_noise":
            x = gaussian_noise(x, *parameters, generators=generators)
        else:
            area, length, darken = parameters
            x = rain(x, int(area), int(length), darken, generators=generators)
    return np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)


def shot_noise(
    x: np.ndarray, photons: float, *, generators: list[np.random.Generator]
) -> np.ndarray:
    """Returns Poisson(x * photons) / photons, of frames float32 (N, H, W, 3) in [0, 1]; not clipped.

    Args:
        x: the frames.
        photons: counted where a channel is 1.
        generators: one a frame.
    """
    counts = [draw.poisson(photons * frame) for draw, frame in zip(generators, x, strict=True)]
    return np.stack(counts).astype(np.float32) / np.float32(photons)


def gaussian_noise(
    x: np.ndarray, deviation: float, *, generators: list[np.random.Generator]
) -> np.ndarray:
    """Returns x + N(0, deviation), of frames float32 (N, H, W, 3) in [0, 1]; not clipped.

    Args:
        x: the frames.
        deviation: standard deviation, where white is 1.
        generators: one a frame.
    """
    noise = [draw.standard_normal(x.shape[1:], np.float32) for draw in generators]
    return x + np.float32(deviation) * np.stack(noise)


def brightness(x: np.ndarray, added: float) -> np.ndarray:
    """Returns frames float32 (..., 3) in [0, 1] with `added` to the V of HSV, clipped.

    V is the largest channel and at fixed hue and saturation all three are proportional to it. Black becomes grey.
    """
    value = x.max(axis=-1, keepdims=True)
    raised = np.minimum(value + np.float32(added), 1)
    factor = raised / np.where(value > 0, value, 1)
    return np.where(value > 0, x * factor, raised)


def contrast(x: np.ndarray, factor: float) -> np.ndarray:
    """Returns (x - m) * factor + m, m being each channel's mean over a frame, of frames float32 (N, H, W, 3)."""
    means = x.mean(axis=(1, 2), keepdims=True)
    return (x - means) * np.float32(factor) + means


def saturation(x: np.ndarray, factor: float, added: float) -> np.ndarray:
    """Returns frames float32 (..., 3) RGB in [0, 1] whose S of HSV is S * factor + added, clipped.

    A channel is V * (1 - S * w) with a weight w in [0, 1] that depends on the hue alone. Grey has no hue and is given
    HSV's 0, red, as in the benchmark; the release, on BGR, would give it blue.
    """
    value = x.max(axis=-1, keepdims=True)
    spread = value - x.min(axis=-1, keepdims=True)
    red = np.asarray([0, 1, 1], np.float32)
    weights = np.where(spread > 0, (value - x) / np.where(spread > 0, spread, 1), red)
    before = spread / np.where(value > 0, value, 1)
    after = np.clip(before * np.float32(factor) + np.float32(added), 0, 1)
    return value * (1 - after * weights)


def motion_blur(frames: np.ndarray, reach: int) -> np.ndarray:
    """Returns, for frame i, the mean of the frames i - reach to i + reach - 1, ends repeated.

    Args:
        frames: uint8 (N, H, W, 3), in order of time.
        reach: half the number of frames in a mean.

    Returns:
        uint8 (N, H, W, 3).
    """
    rows = np.arange(len(frames))
    total = np.zeros(frames.shape, np.uint16)  # 12 frames at most, of 255
    for offset in range(-reach, reach):
        total += frames[np.clip(rows + offset, 0, len(frames) - 1)]
    return ((total + reach) // (2 * reach)).astype(np.uint8)


def fog(
    x: np.ndarray, density: float, decay: float, *, generator: np.random.Generator
) -> np.ndarray:
    """Adds one plasma fractal to all frames and scales each to keep its maximum.

    Args:
        x: frames float32 (N, H, W, 3) in [0, 1].
        density: of the fog, factor of the fractal in [0, 1].
        decay: of the fractal; less is finer.
        generator: of the fractal.

    Returns:
        float32 (N, H, W, 3), (x + density * fractal) * max / (max + density), max over the frame.
    """
    height, width = x.shape[1:3]
    # A side of 1 would be a constant, which has no range to normalise.
    size = max(2, 1 << (max(height, width) - 1).bit_length())
    fractal = plasma_fractal(size, decay, generator)[:height, :width]
    peak = x.max(axis=(1, 2, 3), keepdims=True)
    added = np.float32(density) * fractal[None, :, :, None]
    return (x + added) * (peak / (peak + np.float32(density)))


def plasma_fractal(size: int, decay: float, generator: np.random.Generator) -> np.ndarray:
    """Returns random heights by the diamond-square algorithm on a torus, float32 (size, size), from 0 to 1.

    Every pass doubles the side: the middle of each square is the mean of its corners plus uniform noise, then the
    middle of each edge the mean of its four neighbours plus noise.

    Args:
        size: a power of two, at least 2.
        decay: the noise's amplitude falls by its square in every pass, as the benchmark multiplies it in twice.
        generator: of the noise.
    """
    heights, amplitude = np.zeros((1, 1)), 1.0
    while len(heights) < size:
        noise = generator.uniform(-amplitude, amplitude, (3, *heights.shape))
        right, below = np.roll(heights, -1, 1), np.roll(heights, -1, 0)
        middles = (heights + right + below + np.roll(right, -1, 0)) / 4 + noise[0]
        finer = np.empty((2 * len(heights), 2 * len(heights)))
        finer[::2, ::2], finer[1::2, 1::2] = heights, middles
        finer[::2, 1::2] = (heights + right + middles + np.roll(middles, 1, 0)) / 4 + noise[1]
        finer[1::2, ::2] = (heights + below + middles + np.roll(middles, 1, 1)) / 4 + noise[2]
        heights, amplitude = finer, amplitude / decay**2
    heights -= heights.min()
    return (heights / heights.max()).astype(np.float32)


def rain(
    x: np.ndarray, area: int, length: int, darken: float, *, generators: list[np.random.Generator]
) -> np.ndarray:
    """Draws drops, lines of width 1 seen through a 3x3 blur, and lowers the contrast.

    Args:
        x: frames float32 (N, H, W, 3) in [0, 1].
        area: pixels for each drop; there is at least one.
        length: rows of a drop. One that is longer than the frame is high starts at its upper edge and is cut.
        darken: factor of the contrast, by `contrast`.
        generators: one a frame, of where its drops are.

    Returns:
        float32 (N, H, W, 3).
    """
    height, width = x.shape[1:3]
    masks = [_drops(height, width, area, length, draw) for draw in generators]
    wet = np.stack(masks)[..., None]
    return contrast(np.where(wet, _box_blur(np.where(wet, np.float32(_RAIN_LEVEL), x)), x), darken)


def _drops(
    height: int, width: int, area: int, length: int, generator: np.random.Generator
) -> np.ndarray:
    """Returns which pixels of a frame are on a drop, bool (height, width)."""
    count = max(1, height * width // area)
    # The lower end lies one column to the left, so that starts leave the first column out where there are others.
    columns = generator.integers(min(-_RAIN_SLANT, width - 1), width, (count, 1))
    rows = generator.integers(0, max(1, height - length + 1), (count, 1))
    steps = np.arange(min(length, height))
    rows = rows + steps
    columns = np.maximum(columns + _RAIN_SLANT * (2 * steps >= length), 0)
    mask = np.zeros((height, width), bool)
    mask[rows, columns] = True
    return mask


def _box_blur(x: np.ndarray) -> np.ndarray:
    """Returns the mean of the 3x3 pixels around each, edges repeated, of (N, H, W, 3)."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 9


def _generator(perturbation: Perturbation, clip_id: str, *position: int) -> np.random.Generator:
    """Returns the generator of a window or of one of its frames; not by `hash`, which every process salts."""
    digest = hashlib.sha256(f"{perturbation} {clip_id}".encode()).digest()
    return np.random.default_rng([int.from_bytes(digest, "big"), *position])
