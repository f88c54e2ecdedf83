"""Draws predictions: the person's box on the frame, the sentence and the top actions in a panel below.

    frame (H, W, 3), box --scale, outline, tag--> picture
    sentence, actions --wrapped text, probability bars--> panel
    picture over panel --> image; many frames with one panel --> H.264 video

Only Pillow draws; PyAV encodes. Sizes follow the picture's width, so that text is legible from 176x144 to 1920x1080.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_WIDTH = 640  # narrower frames are enlarged to this, or text would not fit
BACKGROUND = (24, 26, 31)
TEXT = (240, 240, 240)
FAINT = (150, 155, 165)
BAR = (60, 65, 75)
PREDICTED = (255, 176, 32)
TRUE = (64, 220, 120)

Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Action = tuple[str, float]


@dataclass(frozen=True)
class DrawnBox:
    """A box to draw.

    Attributes:
        corners: x1, y1, x2, y2 as fractions of the frame; parts outside are clipped, inverted boxes not drawn.
        color: RGB of its outline.
        tag: text beside it; "" draws none.
    """

    corners: Sequence[float] | np.ndarray
    color: Color = PREDICTED
    tag: str = ""


def font(size: float) -> Font:
    """Returns Pillow's own scalable font at `size` pixels, the same on every machine."""
    return ImageFont.load_default(max(9, round(size)))


def wrap(text: str, width: float, text_font: Font) -> list[str]:
    """Breaks `text` into lines of at most `width` pixels, between words where it can."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        candidate = f"{line} {word}".strip()
        if text_font.getlength(candidate) <= width:
            line = candidate
            continue
        if line:
            lines.append(line)
        while text_font.getlength(word) > width and len(word) > 1:  # one word wider than a line
            cut = next(
                n
                for n in range(len(word) - 1, 0, -1)
                if n == 1 or text_font.getlength(word[:n]) <= width
            )
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    return [*lines, line] if line else lines


def shorten(text: str, width: float, text_font: Font) -> str:
    """Returns `text`, cut with an ellipsis if it is wider than `width` pixels."""
    if text_font.getlength(text) <= width:
        return text
    while text and text_font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def draw_boxes(
    frame: np.ndarray, boxes: Sequence[DrawnBox], width: int | None = None
) -> Image.Image:
    """Returns the frame with boxes drawn on it.

    Args:
        frame: (H, W, 3) uint8 RGB.
        boxes: drawn in order, the last on top.
        width: of the result; None keeps the frame's, but enlarges it to at least `MIN_WIDTH`.
    """
    height, frame_width = frame.shape[:2]
    width = width or max(frame_width, MIN_WIDTH)
    size = (width, max(1, round(height * width / frame_width)))
    picture = Image.fromarray(frame)
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    stroke = max(2, round(min(size) / 160))
    for box in boxes:
        corners = np.clip(np.asarray(box.corners, np.float64), 0.0, 1.0)
        x1, y1, x2, y2 = (corners * [*size, *size]).tolist()
        if x2 - x1 < 1 or y2 - y1 < 1:
            continue
        x2, y2 = min(x2, size[0] - 1), min(y2, size[1] - 1)
        # A dark line outside and inside keeps the outline visible on any picture.
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=BACKGROUND, width=stroke + 2)
        draw.rectangle((x1, y1, x2, y2), outline=box.color, width=stroke)
        if box.tag:
            _draw_tag(draw, box, (x1, y1), size)
    return picture


def _draw_tag(
    draw: ImageDraw.ImageDraw,
    box: DrawnBox,
    corner: tuple[float, float],
    size: tuple[int, int],
) -> None:
    """Writes the tag above the box, or inside its top edge where there is no room above."""
    left, top = corner
    tag_font = font(min(size) / 26)
    text = shorten(box.tag, size[0] - 12, tag_font)
    text_width, line = tag_font.getlength(text), _line_height(tag_font)
    x = min(max(0.0, left), max(0.0, size[0] - text_width - 8))
    y = top - line - 2 if top >= line + 2 else top + 2
    draw.rectangle((x, y, x + text_width + 8, y + line), fill=box.color)
    draw.text((x + 4, y + line / 2), text, fill=BACKGROUND, font=tag_font, anchor="lm")


def _line_height(text_font: Font) -> int:
    _, _, _, bottom = text_font.getbbox("Ägjy|")
    return round(bottom * 1.25)


def draw_panel(
    sentence: str,
    actions: Sequence[Action],
    width: int,
    *,
    note: str = "",
    marked: Collection[str] = (),
) -> Image.Image:
    """Returns the panel: the sentence in quotes on the left, actions with their bars on the right.

    Args:
        sentence: wrapped to the left half.
        actions: (name, probability in [0, 1]), one bar each, in order.
        width: of the panel, in pixels.
        note: text under the sentence, in the color of what is true.
        marked: names of actions whose bars have that color too.
    """
    pad = round(width / 40)
    column = (width - 3 * pad) / 2
    text_font, small = font(width / 36), font(width / 46)
    line, row = _line_height(text_font), _line_height(small)
    lines = [(text, text_font, line, TEXT) for text in wrap(f"“{sentence}”", column, text_font)]
    lines += [(text, small, row, TRUE) for text in wrap(note, column, small)]
    height = 2 * pad + max(sum(step for _, _, step, _ in lines), row * len(actions))
    panel = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(panel)
    y = pad
    for text, its_font, step, color in lines:
        draw.text((pad, y), text, fill=color, font=its_font)
        y += step

    left = 2 * pad + column
    bar_left = left + column * 0.58
    bar_right = left + column - small.getlength("0.00") - pad / 2
    for index, (name, probability) in enumerate(actions):
        middle = pad + row * (index + 0.5)
        top, bottom = middle - row * 0.26, middle + row * 0.26
        label = shorten(name, column * 0.58 - pad / 2, small)
        draw.text((left, middle), label, fill=TEXT, font=small, anchor="lm")
        draw.rectangle((bar_left, top, bar_right, bottom), fill=BAR)
        filled = bar_left + (bar_right - bar_left) * float(np.clip(probability, 0, 1))
        if filled - bar_left >= 1:
            color = TRUE if name in marked else PREDICTED
            draw.rectangle((bar_left, top, filled, bottom), fill=color)
        number = f"{probability:.2f}"
        draw.text((left + column, middle), number, fill=TEXT, font=small, anchor="rm")
    return panel


def stack(picture: Image.Image, panel: Image.Image) -> Image.Image:
    """Returns `picture` above `panel`; both of one width."""
    result = Image.new("RGB", (picture.width, picture.height + panel.height), BACKGROUND)
    result.paste(picture, (0, 0))
    result.paste(panel, (0, picture.height))
    return result


def draw_prediction(
    frame: np.ndarray, sentence: str, box: Sequence[float], actions: Sequence[Action]
) -> Image.Image:
    """Returns the overlay of one frame (H, W, 3) uint8 RGB: box (fractions), sentence, actions."""
    tag = f"{actions[0][0]} {actions[0][1]:.2f}" if actions else ""
    picture = draw_boxes(frame, [DrawnBox(box, PREDICTED, tag)])
    return stack(picture, draw_panel(sentence, actions, picture.width))


def can_write_video() -> bool:
    """Tells whether this PyAV has an H.264 encoder."""
    return "libx264" in av.codecs_available


def write_video(path: Path, images: Iterable[Image.Image], frames_per_second: float) -> None:
    """Writes equally sized images as H.264; an odd last row or column is cut, as the codec needs even sizes."""
    with av.open(str(path), mode="w") as container:
        stream = None
        for image in images:
            width, height = image.width // 2 * 2, image.height // 2 * 2
            if stream is None:
                rate = Fraction(frames_per_second).limit_denominator(1001)
                stream = container.add_stream("libx264", rate=rate)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.options = {"crf": "20"}
            array = np.asarray(image)[:height, :width]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        if stream is None:
            raise ValueError("no image to write")
        container.mux(stream.encode(None))
