import av
import numpy as np
import pytest
from PIL import Image

from ravar_jax import overlay

ACTIONS = [("stand", 0.97), ("ride (e.g., a bike, a car, a horse)", 0.5), ("listen", 0.0)]
SENTENCE = "the man with glasses and a black t-shirt at the front desk on the right"


def has_color(image: Image.Image, color: overlay.Color) -> np.ndarray:
    return (np.asarray(image) == color).all(-1)


@pytest.mark.parametrize(("width", "height"), [(176, 144), (480, 270), (1280, 720), (1920, 1080)])
def test_overlay_keeps_the_shape_of_the_frame_and_is_wide_enough_for_text(width, height):
    frame = np.full((height, width, 3), 90, np.uint8)
    image = overlay.draw_prediction(frame, SENTENCE, (0.25, 0.5, 0.75, 0.9), ACTIONS)
    assert image.width == max(width, overlay.MIN_WIDTH)
    picture_height = round(height * image.width / width)
    assert picture_height + 40 < image.height < 2 * picture_height
    rows, columns = np.nonzero(has_color(image, overlay.PREDICTED)[:picture_height])
    scale = image.width
    assert columns.min() == pytest.approx(0.25 * scale, abs=4)
    assert columns.max() == pytest.approx(0.75 * scale, abs=4)
    assert rows.max() == pytest.approx(0.9 * picture_height, abs=4)


def test_bars_are_as_long_as_probabilities():
    panel = overlay.draw_panel("a", [("x", 1.0), ("y", 0.5), ("z", 0.0)], 1000)
    lengths = has_color(panel, overlay.PREDICTED).sum(1)
    full = lengths.max()
    assert {0, full} <= set(lengths.tolist())
    assert any(abs(length - full / 2) <= 2 for length in lengths)


@pytest.mark.parametrize("box", [(0.8, 0.2, 0.3, 0.9), (-1, -1, -0.5, -0.5), (0.5, 0.5, 0.5, 0.5)])
def test_inverted_and_outside_boxes_are_not_drawn(box):
    frame = np.zeros((144, 176, 3), np.uint8)
    picture = overlay.draw_boxes(frame, [overlay.DrawnBox(box, tag="x")])
    assert not has_color(picture, overlay.PREDICTED).any()


def test_a_box_over_the_edge_is_clipped_to_the_picture():
    frame = np.zeros((480, 640, 3), np.uint8)
    picture = overlay.draw_boxes(frame, [overlay.DrawnBox((-0.5, -0.5, 1.5, 1.5), tag="x" * 300)])
    assert has_color(picture, overlay.PREDICTED)[:, -3:].any()


def test_wrapping_keeps_every_character_and_the_width():
    text_font = overlay.font(20)
    text = SENTENCE + " " + "x" * 200
    lines = overlay.wrap(text, 150, text_font)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert max(text_font.getlength(line) for line in lines) <= 150


def test_video_has_every_frame(tmp_path):
    images = [Image.new("RGB", (65, 49), (10 * i, 0, 0)) for i in range(7)]
    overlay.write_video(tmp_path / "x.mp4", images, 30.0)
    with av.open(str(tmp_path / "x.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        frames = list(container.decode(stream))
    assert len(frames) == 7
    assert (frames[0].width, frames[0].height) == (64, 48)
