"""Shapes and their rasterisation: strokes with round joints and rounded polygons, outlined and anti-aliased.

A figure is a list of shapes in frame pixels. `paint` draws them on a canvas that is `SUPERSAMPLE` times larger and is
reduced afterwards; `bounds` gives the exact extent of what `paint` draws, so that boxes need no rendering.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from PIL import ImageDraw

SUPERSAMPLE = 4
_SMOOTH = 7  # polygons of more points are curves: their rim needs no round joints

Point = tuple[float, float]
Colour = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A stroke through points with a radius at each, or a polygon grown by a radius.

    Attributes:
      points: (x, y) in frame pixels, y downwards.
      radii: one radius a point, in pixels; for a polygon the first one rounds every corner.
      colour: RGB fill.
      part: "person", or the name of the thing this is a part of ("chair", "phone", ...).
      filled: True for a polygon, False for a stroke.
      outline: thickness of the darker rim in pixels, 0 for none.
    """

    points: tuple[Point, ...]
    radii: tuple[float, ...]
    colour: Colour
    part: str = "person"
    filled: bool = False
    outline: float = 0.6


def shade(colour: Colour, factor: float) -> Colour:
    """Scales a colour towards black (factor below 1) or towards white (above 1)."""
    if factor <= 1:
        return tuple(int(c * factor) for c in colour)  # type: ignore[return-value]
    return tuple(int(255 - (255 - c) / factor) for c in colour)  # type: ignore[return-value]


def _stroke(
    draw: ImageDraw.ImageDraw, points: Sequence[Point], radii: Sequence[float], colour: Colour
) -> None:
    for (x, y), r in zip(points, radii, strict=True):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    for i in range(len(points) - 1):
        (x0, y0), (x1, y1), r0, r1 = points[i], points[i + 1], radii[i], radii[i + 1]
        length = math.hypot(x1 - x0, y1 - y0)
        if length > 0:
            nx, ny = (y0 - y1) / length, (x1 - x0) / length
            draw.polygon(
                [
                    (x0 + nx * r0, y0 + ny * r0),
                    (x1 + nx * r1, y1 + ny * r1),
                    (x1 - nx * r1, y1 - ny * r1),
                    (x0 - nx * r0, y0 - ny * r0),
                ],
                fill=colour,
            )


def _paint_one(draw: ImageDraw.ImageDraw, shape: Shape, grow: float, colour: Colour) -> None:
    scale = SUPERSAMPLE
    points = [(x * scale, y * scale) for x, y in shape.points]
    if not shape.filled:
        _stroke(draw, points, [(r + grow) * scale for r in shape.radii], colour)
        return
    radius = (shape.radii[0] + grow) * scale
    draw.polygon(points, fill=colour)
    if radius <= 0.5:
        return
    if len(points) > _SMOOTH:
        draw.line([*points, points[0]], fill=colour, width=round(2 * radius))
    else:
        _stroke(draw, [*points, points[0]], [radius] * (len(points) + 1), colour)


def paint(draw: ImageDraw.ImageDraw, shapes: Iterable[Shape]) -> None:
    """Draws shapes in order on a canvas `SUPERSAMPLE` times the frame, each with a rim darker than its fill."""
    for shape in shapes:
        if shape.outline:
            _paint_one(draw, shape, shape.outline, shade(shape.colour, 0.5))
        _paint_one(draw, shape, 0.0, shape.colour)


def bounds(shapes: Iterable[Shape]) -> tuple[float, float, float, float]:
    """Returns x1, y1, x2, y2 in frame pixels of everything that `paint` would cover, rims included."""
    left = top = math.inf
    right = bottom = -math.inf
    for shape in shapes:
        radii = shape.radii if not shape.filled else shape.radii[:1] * len(shape.points)
        for (x, y), r in zip(shape.points, radii, strict=True):
            reach = r + shape.outline
            left, right = min(left, x - reach), max(right, x + reach)
            top, bottom = min(top, y - reach), max(bottom, y + reach)
    return left, top, right, bottom
