import numpy as np
import pytest

from data_pipelines import preprocess


def cubic(x):
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def resize_axis(pixels, axis, size):
    """One antialiased bicubic pass in float64, rounded to grey levels: what the release's resize computes."""
    scale = pixels.shape[axis] / size
    stretch = max(scale, 1.0)
    weights = np.zeros((size, pixels.shape[axis]))
    for out in range(size):
        centre = (out + 0.5) * scale
        for source in range(pixels.shape[axis]):
            weights[out, source] = cubic((source + 0.5 - centre) / stretch)
        weights[out] /= weights[out].sum()
    resized = np.tensordot(weights, pixels.astype(np.float64), (1, axis))
    return np.clip(np.floor(np.moveaxis(resized, 0, axis) + 0.5), 0, 255)


@pytest.mark.parametrize("source", [(13, 17), (64, 48), (9, 31)])
@pytest.mark.parametrize("target", [(20, 7), (8, 8), (37, 41)])
def test_resize_is_two_rounded_bicubic_passes_width_first(source, target):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, *source, 3), dtype=np.uint8)
    ours = preprocess.resize_bicubic(images, *target)
    expected = resize_axis(resize_axis(images, 2, target[1]), 1, target[0])
    assert ours.dtype == np.uint8
    assert np.abs(ours - expected).max() <= 1


def test_released_pixels_are_bgr_negatives():
    frames = np.array([[[0, 1, 255]]], np.uint8)
    assert preprocess.released_pixels(frames).tolist() == [[[1, 255, 0]]]


def test_detections_are_sorted_cut_and_padded():
    boxes = np.arange(12, dtype=np.float32).reshape(3, 4) / 12
    scores, class_ids = np.array([0.1, 0.9, 0.5], np.float32), np.array([1, 2, 3])
    padded, ids = preprocess.pad_detections(boxes, class_ids, scores, 5)
    assert ids.tolist() == [2, 3, 1, 91, 91]
    assert padded[:3].tolist() == boxes[[1, 2, 0]].tolist()
    assert not padded[3:].any()
    assert preprocess.pad_detections(boxes, class_ids, scores, 2)[1].tolist() == [2, 3]


def test_multi_hot_puts_class_k_in_column_k_minus_1():
    assert np.flatnonzero(preprocess.multi_hot((1, 80))).tolist() == [0, 79]
