"""Places behind the people: a room, a park, a street, a beach, a gym; pale, so that people stand out.

`background` draws one at the supersampled size; everything about it follows from the generator it is given.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.mini_refava.layout import HEIGHT, WIDTH
from data_pipelines.mini_refava.shapes import SUPERSAMPLE, Colour, shade

HORIZON = 72  # y where the ground begins; the back row stands below it


class _Brush:
    """ImageDraw in frame pixels."""

    def __init__(self, image: Image.Image):
        self._draw = ImageDraw.Draw(image)

    def box(self, x1: float, y1: float, x2: float, y2: float, colour: Colour) -> None:
        s = SUPERSAMPLE
        self._draw.rectangle((x1 * s, y1 * s, x2 * s, y2 * s), fill=colour)

    def oval(self, x1: float, y1: float, x2: float, y2: float, colour: Colour) -> None:
        s = SUPERSAMPLE
        self._draw.ellipse((x1 * s, y1 * s, x2 * s, y2 * s), fill=colour)

    def shape(self, points: list[tuple[float, float]], colour: Colour) -> None:
        self._draw.polygon([(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in points], fill=colour)


def _mix(a: Colour, b: Colour, t: float) -> Colour:
    return tuple(int(p + (q - p) * t) for p, q in zip(a, b, strict=True))  # type: ignore[return-value]


def _fade(brush: _Brush, y1: float, y2: float, top: Colour, bottom: Colour) -> None:
    """Fills a band of rows with a vertical gradient."""
    steps = max(1, int((y2 - y1) * 2))
    for i in range(steps):
        y = y1 + (y2 - y1) * i / steps
        brush.box(-1, y, WIDTH, min(y + 1, y2), _mix(top, bottom, i / steps))


def _choice(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def _clouds(brush: _Brush, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(1, 4))):
        x, y, w = rng.uniform(0, WIDTH), rng.uniform(6, 34), rng.uniform(14, 26)
        for dx, dy, r in ((-0.5, 0.1, 0.32), (0, -0.08, 0.42), (0.45, 0.1, 0.3)):
            brush.oval(
                x + (dx - r) * w,
                y + (dy - r * 0.6) * w,
                x + (dx + r) * w,
                y + (dy + r * 0.6) * w,
                (248, 250, 252),
            )


def _room(brush: _Brush, rng: np.random.Generator) -> None:
    wall = _choice(rng, [(226, 214, 196), (206, 218, 220), (222, 208, 210), (212, 218, 200)])
    floor = _choice(rng, [(196, 166, 132), (178, 152, 126), (188, 180, 170)])
    _fade(brush, 0, HORIZON, shade(wall, 0.94), wall)
    _fade(brush, HORIZON, HEIGHT, shade(floor, 0.88), floor)
    for i, y in enumerate((80, 90, 103, 120)):
        brush.box(0, y, WIDTH, y + 0.4 + 0.1 * i, shade(floor, 0.84))
        for k in range(7):
            seam = (k * 34 + (i % 2) * 17 + 5) % WIDTH
            brush.box(seam, y, seam + 0.5, (90, 103, 120, 144)[i], shade(floor, 0.84))
    brush.box(0, HORIZON - 4, WIDTH, HORIZON, (244, 240, 234))
    x = rng.uniform(12, 60)
    brush.box(x - 3, 9, x + 51, 53, (246, 244, 240))
    _fade_box(brush, x, 12, x + 48, 50, (176, 208, 232), (222, 234, 236))
    brush.oval(x + 4, 38, x + 26, 62, (166, 194, 158))
    brush.box(x - 3, 50, x + 51, 66, wall)
    brush.box(x - 5, 50, x + 53, 54, (246, 244, 240))
    brush.box(x + 23, 12, x + 25, 50, (246, 244, 240))
    curtain = _choice(rng, [(206, 178, 170), (172, 186, 194), (196, 190, 158)])
    brush.shape([(x - 10, 6), (x + 4, 6), (x - 1, 62), (x - 10, 62)], curtain)
    brush.shape([(x + 58, 6), (x + 44, 6), (x + 49, 62), (x + 58, 62)], curtain)
    brush.box(x - 13, 5, x + 61, 7, (140, 118, 98))
    x = rng.uniform(124, 150)
    frame = (150, 122, 92)
    brush.box(x, 16, x + 26, 38, frame)
    _fade_box(brush, x + 2, 18, x + 24, 36, (220, 206, 176), (176, 186, 180))
    brush.shape(
        [(x + 3, 36), (x + 10, 25), (x + 15, 31), (x + 19, 27), (x + 24, 36)], (150, 160, 156)
    )
    rug = _choice(rng, [(204, 190, 178), (180, 192, 196), (198, 184, 196)])
    brush.oval(22, 96, WIDTH - 22, 140, shade(rug, 0.9))
    brush.oval(28, 98, WIDTH - 28, 138, rug)


def _fade_box(
    brush: _Brush, x1: float, y1: float, x2: float, y2: float, top: Colour, bottom: Colour
) -> None:
    steps = max(1, int(y2 - y1))
    for i in range(steps):
        brush.box(x1, y1 + i, x2, min(y1 + i + 1.25, y2), _mix(top, bottom, i / steps))


def _park(brush: _Brush, rng: np.random.Generator) -> None:
    _fade(brush, 0, HORIZON, (168, 206, 234), (228, 238, 238))
    _clouds(brush, rng)
    for _ in range(3):
        x, w = rng.uniform(-20, WIDTH), rng.uniform(70, 130)
        hill = _choice(rng, [(170, 198, 166), (156, 188, 160), (182, 204, 172)])
        brush.oval(x - w / 2, 48, x + w / 2, 110, hill)
    for _ in range(int(rng.integers(3, 6))):
        x, r = rng.uniform(4, WIDTH - 4), rng.uniform(9, 15)
        leaf = _choice(rng, [(122, 164, 118), (138, 172, 118), (112, 154, 124)])
        brush.box(x - 1.6, 52, x + 1.6, 76, (142, 118, 96))
        for dx, dy, k in ((0, -0.5, 1.0), (-0.65, 0.1, 0.72), (0.65, 0.1, 0.72)):
            y = 48 + dy * r
            brush.oval(x + dx * r - r * k, y - r * k, x + dx * r + r * k, y + r * k, leaf)
        brush.oval(x - r * 0.6, 48 - r * 1.25, x + r * 0.3, 48 - r * 0.5, shade(leaf, 1.15))
    _fade(brush, HORIZON, HEIGHT, (176, 202, 142), (150, 188, 120))
    bend = rng.uniform(30, 150)
    brush.shape(
        [(bend - 8, HORIZON), (bend + 8, HORIZON), (bend + 78, HEIGHT), (bend - 60, HEIGHT)],
        (218, 206, 180),
    )
    for _ in range(60):
        x, y = rng.uniform(0, WIDTH), rng.uniform(HORIZON + 4, HEIGHT)
        brush.box(x, y, x + 0.7, y + 1.8, (136, 174, 110))


def _street(brush: _Brush, rng: np.random.Generator) -> None:
    _fade(brush, 0, HORIZON, (180, 206, 226), (232, 234, 230))
    x = -rng.uniform(0, 16)
    while x < WIDTH:
        w, top = rng.uniform(28, 46), rng.uniform(4, 26)
        house = _choice(
            rng,
            [(214, 190, 168), (192, 198, 204), (222, 208, 180), (204, 180, 176), (186, 196, 184)],
        )
        brush.box(x, top, x + w, HORIZON, house)
        brush.box(x - 0.5, top - 2.5, x + w + 0.5, top, shade(house, 0.82))
        columns = int(w // 11)
        for c in range(columns):
            wx = x + (c + 0.5) * w / columns - 3
            for y in np.arange(top + 6, HORIZON - 26, 13):
                brush.box(wx - 0.7, y - 0.7, wx + 6.7, y + 9.2, (240, 238, 232))
                brush.box(
                    wx,
                    y,
                    wx + 6,
                    y + 8.5,
                    _choice(rng, [(158, 182, 198), (172, 192, 204), (236, 222, 176)]),
                )
        awning = _choice(rng, [(206, 150, 140), (150, 176, 190), (164, 184, 150)])
        brush.box(x + 3, HORIZON - 17, x + w - 3, HORIZON, (170, 182, 190))
        brush.shape(
            [
                (x + 3, HORIZON - 19),
                (x + w - 3, HORIZON - 19),
                (x + w - 1, HORIZON - 13),
                (x + 1, HORIZON - 13),
            ],
            awning,
        )
        x += w
    _fade(brush, HORIZON, HEIGHT, (198, 196, 192), (212, 209, 203))
    for y in (79, 88, 100, 116):
        brush.box(0, y, WIDTH, y + 0.5, (182, 180, 176))
    for k in range(-8, 18):
        brush.shape(
            [
                (96 + (k - 5) * 16, HORIZON),
                (96.6 + (k - 5) * 16, HORIZON),
                (97 + (k - 5) * 34, HEIGHT),
                (96 + (k - 5) * 34, HEIGHT),
            ],
            (184, 182, 178),
        )
    brush.box(0, HORIZON, WIDTH, HORIZON + 1.2, (164, 162, 158))


def _beach(brush: _Brush, rng: np.random.Generator) -> None:
    _fade(brush, 0, 50, (150, 200, 234), (226, 240, 244))
    _clouds(brush, rng)
    x = rng.uniform(20, WIDTH - 20)
    brush.oval(x - 8, 6, x + 8, 22, (255, 244, 208))
    _fade(brush, 50, HORIZON, (92, 164, 196), (156, 210, 218))
    for _ in range(14):
        x, y = rng.uniform(0, WIDTH), rng.uniform(53, HORIZON - 4)
        brush.box(x, y, x + rng.uniform(5, 12), y + 0.6, (214, 236, 240))
    x = rng.uniform(20, WIDTH - 40)
    brush.shape([(x, 49), (x + 16, 49), (x + 13, 53), (x + 3, 53)], (244, 244, 240))
    brush.shape([(x + 8, 30), (x + 8, 48), (x + 19, 48)], (250, 250, 250))
    brush.shape([(x + 7, 34), (x + 7, 48), (x - 1, 48)], (232, 226, 216))
    _fade(brush, HORIZON, HEIGHT, (236, 220, 184), (224, 202, 160))
    brush.box(0, HORIZON - 1, WIDTH, HORIZON + 1.5, (246, 248, 244))
    for _ in range(70):
        x, y = rng.uniform(0, WIDTH), rng.uniform(HORIZON + 4, HEIGHT)
        brush.box(x, y, x + 1.2, y + 0.6, (208, 186, 146))


def _gym(brush: _Brush, rng: np.random.Generator) -> None:
    wall = _choice(rng, [(204, 212, 216), (216, 210, 200), (204, 214, 206)])
    _fade(brush, 0, HORIZON, shade(wall, 1.3), wall)
    for k in range(6):
        brush.box(10 + k * 31, 8, 31 + k * 31, 26, (240, 242, 240))
        _fade_box(brush, 11.5 + k * 31, 9.5, 29.5 + k * 31, 24.5, (186, 212, 230), (224, 234, 236))
    x = rng.uniform(10, 140)
    for k in range(7):
        brush.box(x, 34 + k * 5.4, x + 34, 35.8 + k * 5.4, (196, 166, 128))
    brush.box(x - 1.5, 32, x + 1, HORIZON, (172, 140, 104))
    brush.box(x + 33, 32, x + 35.5, HORIZON, (172, 140, 104))
    brush.box(0, HORIZON - 6, WIDTH, HORIZON, shade(wall, 0.8))
    floor = (214, 186, 146)
    _fade(brush, HORIZON, HEIGHT, shade(floor, 0.92), floor)
    for y in (82, 94, 110, 130):
        brush.box(0, y, WIDTH, y + 0.4, shade(floor, 0.88))
    line = _choice(rng, [(238, 232, 220), (150, 176, 196), (196, 148, 136)])
    brush.shape([(0, 112), (WIDTH, 106), (WIDTH, 108.2), (0, 114.4)], line)
    brush.shape([(70, HORIZON), (72, HORIZON), (46, HEIGHT), (42, HEIGHT)], line)


PLACES: dict[str, Callable[[_Brush, np.random.Generator], None]] = {
    "room": _room,
    "park": _park,
    "street": _street,
    "beach": _beach,
    "gym": _gym,
}


def background(place: str, rng: np.random.Generator) -> Image.Image:
    """Draws a place, RGB, `SUPERSAMPLE` times the frame."""
    image = Image.new("RGB", (WIDTH * SUPERSAMPLE, HEIGHT * SUPERSAMPLE))
    PLACES[place](_Brush(image), rng)
    return image
