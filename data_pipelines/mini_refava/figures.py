"""Draws a person: joints become shapes, dressed, with head, hat and whatever is in the hands or under the body.

`person_shapes` returns shapes in frame pixels in painting order. Parts that are not the person ("chair", "mat" and the
objects) carry their name, so that the person's box leaves them out and the detections can use them.
"""

import math
from collections.abc import Sequence

from data_pipelines.mini_refava import people, props
from data_pipelines.mini_refava.shapes import Shape, bounds, shade
from data_pipelines.mini_refava.skeleton import SOLE, Skeleton, skeleton

FAR = 0.78  # far limbs are darker
NUM_POSITIONS = 90

Point = tuple[float, float]


class Pen:
    """Collects shapes given in local units and stores them in frame pixels."""

    def __init__(self, x: float, ground: float, height: float, facing: int):
        self.shapes: list[Shape] = []
        self.height = height
        self._x, self._ground, self._facing = x, ground, facing

    def to_frame(self, point: Point) -> Point:
        """Local coordinates to frame pixels."""
        return self._x + self._facing * point[0] * self.height, self._ground - point[
            1
        ] * self.height

    def stroke(
        self,
        points: Sequence[Point],
        radii: Sequence[float],
        colour,
        part: str = "person",
        outline: float = 0.6,
    ) -> None:
        """Adds a stroke with round joints; radii in local units."""
        self.shapes.append(
            Shape(
                tuple(self.to_frame(p) for p in points),
                tuple(r * self.height for r in radii),
                colour,
                part,
                False,
                outline,
            )
        )

    def polygon(
        self,
        points: Sequence[Point],
        radius: float,
        colour,
        part: str = "person",
        outline: float = 0.6,
    ) -> None:
        """Adds a polygon grown by a radius in local units."""
        self.shapes.append(
            Shape(
                tuple(self.to_frame(p) for p in points),
                (radius * self.height,),
                colour,
                part,
                True,
                outline,
            )
        )


def _arc(
    center: Point,
    front: Point,
    up: Point,
    radius: float,
    start: float,
    stop: float,
    squash: float = 1.0,
) -> list[Point]:
    """Points of an arc; angles in degrees from `front` towards `up`."""
    points = []
    for i in range(9):
        angle = math.radians(start + (stop - start) * i / 8)
        forwards, upwards = radius * math.cos(angle), squash * radius * math.sin(angle)
        points.append(
            (
                center[0] + front[0] * forwards + up[0] * upwards,
                center[1] + front[1] * forwards + up[1] * upwards,
            )
        )
    return points


def _leg(pen: Pen, leg: Sequence[Point], colour, shoe) -> None:
    hip, knee, ankle = leg
    length = math.hypot(ankle[0] - knee[0], ankle[1] - knee[1])
    along = ((ankle[0] - knee[0]) / length, (ankle[1] - knee[1]) / length)
    toe_way = (-along[1], along[0])  # a quarter turn forwards
    heel = (ankle[0] + along[0] * (SOLE - 0.028), ankle[1] + along[1] * (SOLE - 0.028))
    toe = (heel[0] + toe_way[0] * 0.07, heel[1] + toe_way[1] * 0.07)
    pen.stroke([heel, toe], [0.03, 0.024], shoe)
    pen.stroke([hip, knee, ankle], [0.062, 0.05, 0.04], colour)


def _arm(pen: Pen, arm: Sequence[Point], sleeve, skin, palm: float = 0.042) -> None:
    shoulder, elbow, hand = arm
    pen.stroke([hand], [palm], skin)
    pen.stroke(
        [
            shoulder,
            elbow,
            (elbow[0] + (hand[0] - elbow[0]) * 0.72, elbow[1] + (hand[1] - elbow[1]) * 0.72),
        ],
        [0.046, 0.042, 0.036],
        sleeve,
    )


def _head(pen: Pen, s: Skeleton, looks: people.Looks, body: people.Body, radius: float) -> None:
    def at(forwards: float, upwards: float) -> Point:
        return (
            s.head[0] + (s.front[0] * forwards + s.up[0] * upwards) * radius,
            s.head[1] + (s.front[1] * forwards + s.up[1] * upwards) * radius,
        )

    if body.hair_style == "long":
        pen.stroke([at(-0.55, 0.2), at(-0.75, -0.9)], [radius * 0.55, radius * 0.4], body.hair)
    elif body.hair_style == "bun" and looks.hat_kind == "none":
        pen.stroke([at(-0.75, 0.85)], [radius * 0.42], body.hair)
    pen.stroke([s.shoulder, at(-0.1, -0.5)], [0.045, 0.045], shade(body.skin, 0.9), outline=0.0)
    pen.stroke([s.head], [radius], body.skin)
    # Hair: a cap over the top and the back of the head.
    pen.polygon(_arc(s.head, s.front, s.up, radius * 0.97, 50, 215), 0.008, body.hair, outline=0.3)
    pen.stroke([at(0.52, 0.02)], [radius * 0.13], (40, 30, 30), outline=0.0)
    pen.stroke(
        [at(0.42, -0.48), at(0.72, -0.42)], [radius * 0.06] * 2, shade(body.skin, 0.55), outline=0.0
    )
    if looks.hat_kind == "none":
        return
    colour = people.HAT_COLOURS[looks.hat_colour]
    # Hats are larger than life: they must be told apart, colour and kind, when frames are made 96 pixels wide.
    if looks.hat_kind == "cap":
        pen.stroke(
            [at(0.6, 0.42), at(2.2, 0.3)], [radius * 0.3, radius * 0.24], shade(colour, 0.82)
        )
        pen.polygon(_arc(at(0, 0.25), s.front, s.up, radius * 1.3, 0, 180, 1.1), 0.008, colour)
    else:
        crown = [at(-1.0, 0.5), at(1.0, 0.5), at(0.8, 1.9), at(-0.8, 1.9)]
        pen.polygon(crown, 0.012, colour)
        band = [at(-1.0, 0.62), at(1.0, 0.62), at(0.96, 0.88), at(-0.96, 0.88)]
        pen.polygon(band, 0.0, shade(colour, 0.6), outline=0.0)
        pen.stroke(
            [at(-2.1, 0.34), at(0, 0.5), at(2.1, 0.34)],
            [radius * 0.2, radius * 0.3, radius * 0.2],
            colour,
        )


def person_shapes(
    looks: people.Looks,
    body: people.Body,
    actions: people.Actions,
    x: float,
    ground: float,
    scale: float,
    position: int,
) -> list[Shape]:
    """Returns the shapes of one person and the things that belong to it, in painting order.

    Args:
      looks: what may be described of the person.
      body: what is drawn and never described, the height among it.
      actions: what the person does.
      x: of the hip, in frame pixels.
      ground: y of the ground under the person, in frame pixels.
      scale: of the height, for the depth in the scene.
      position: of the frame in the window, 0..89.
    """
    phase = body.phase + 2 * math.pi * body.cycles * position / NUM_POSITIONS
    radius = 0.105 if looks.size == "adult" else 0.14
    s = skeleton(actions.pose, actions.hand, phase, radius)
    pen = Pen(x, ground, body.height * scale, body.facing)
    shirt = people.SHIRT_COLOURS[looks.shirt]
    trousers = people.TROUSER_COLOURS[looks.trousers]
    shoe = (70, 58, 52)

    props.underneath(pen, s, actions.pose)
    _arm(pen, s.far_arm, shade(shirt, FAR), shade(body.skin, FAR))
    _leg(pen, s.far_leg, shade(trousers, FAR), shade(shoe, FAR))
    _leg(pen, s.near_leg, trousers, shoe)
    belly = (s.hip[0] + s.chest_up[0] * 0.05, s.hip[1] + s.chest_up[1] * 0.05)
    chest = (s.shoulder[0] - s.chest_up[0] * 0.05, s.shoulder[1] - s.chest_up[1] * 0.05)
    pen.stroke([belly, chest], [0.085, 0.092], shirt)
    _head(pen, s, looks, body, radius)
    props.in_hands(pen, s, actions.hand, body, phase)
    _arm(pen, s.near_arm, shade(shirt, 0.93), body.skin, 0.056 if actions.hand == "wave" else 0.042)
    props.over_hands(pen, s, actions.hand, body)
    return pen.shapes


def person_extent(shapes: Sequence[Shape]) -> tuple[float, float, float, float]:
    """Returns x1, y1, x2, y2 in frame pixels of the person alone, without chair, mat or objects."""
    return bounds(shape for shape in shapes if shape.part == "person")
