"""Things people use: chair, mat, phone, cup, book, ball, parcel.

Objects have a size in pixels, not in parts of the person, so that a child's book is as easy to see as an adult's.
"""

import math
from typing import TYPE_CHECKING

from data_pipelines.mini_refava import people
from data_pipelines.mini_refava.skeleton import Skeleton

if TYPE_CHECKING:
    from data_pipelines.mini_refava.figures import Pen

Point = tuple[float, float]

# COCO ids of the things a detector could find.
COCO_IDS = {"person": 1, "chair": 62, "phone": 77, "cup": 47, "book": 84, "ball": 37, "parcel": 33}

_CHAIR = (122, 88, 60)
_MAT = (176, 160, 140)


def underneath(pen: "Pen", s: Skeleton, pose: str) -> None:
    """Draws what the person sits or lies on."""
    if pose == "sit":
        top = s.seat
        pen.stroke([(-0.10, top), (-0.10, 0.02)], [0.016, 0.016], _CHAIR, "chair", 0.4)
        pen.stroke([(0.13, top), (0.13, 0.02)], [0.016, 0.016], _CHAIR, "chair", 0.4)
        pen.stroke([(-0.12, top), (-0.15, top + 0.30)], [0.02, 0.02], _CHAIR, "chair", 0.4)
        pen.stroke(
            [(-0.11, top - 0.005), (0.15, top - 0.005)], [0.024, 0.024], _CHAIR, "chair", 0.4
        )
    elif pose == "lie":
        pen.stroke([(-0.50, 0.0), (0.42, 0.0)], [0.02, 0.02], _MAT, "mat", 0.4)


def _oriented(center: Point, front: Point, up: Point, unit: float, corners) -> list[Point]:
    """Corners given as (forwards, upwards) pixels around a center, to local units."""
    return [
        (
            center[0] + (front[0] * forwards + up[0] * upwards) / unit,
            center[1] + (front[1] * forwards + up[1] * upwards) / unit,
        )
        for forwards, upwards in corners
    ]


def in_hands(pen: "Pen", s: Skeleton, hand: str, body: people.Body, phase: float) -> None:
    """Draws what lies behind the near hand: book, ball or parcel, and the cup."""
    unit = pen.height
    if hand == "read":
        grip = s.near_arm[2]
        page = 0.6 * math.sin(phase)

        def at(corners) -> list[Point]:
            return _oriented(grip, s.front, s.up, unit, corners)

        pen.polygon(
            at([(-7, 0), (2, -2.5), (11, 0), (11, 11), (2, 8.5), (-7, 11)]),
            0.008,
            body.object_colour,
            "book",
        )
        pen.polygon(at([(-6, 1), (2, -1), (2, 8.5), (-6, 10.4)]), 0.0, (252, 251, 246), "book", 0.3)
        pen.polygon(at([(2, -1), (10, 1), (10, 10.4), (2, 8.5)]), 0.0, (238, 236, 228), "book", 0.3)
        for line in (3.0, 5.2, 7.4):
            pen.stroke(
                at([(-4.6, line), (0.6, line - 1.2 + page)]),
                [0.4 / unit] * 2,
                (150, 150, 158),
                "book",
                0.0,
            )
            pen.stroke(
                at([(3.4, line - 1.2 + page), (8.6, line)]),
                [0.4 / unit] * 2,
                (150, 150, 158),
                "book",
                0.0,
            )
    elif hand == "hold":
        grip = s.near_arm[2]
        center = (grip[0] + s.chest_front[0] * 2.5 / unit, grip[1] + s.chest_front[1] * 2.5 / unit)
        if body.held == "ball":
            pen.stroke([center], [7.0 / unit], body.object_colour, "ball")
            stripe = _oriented(
                center, s.chest_front, s.chest_up, unit, [(-4.5, -3.5), (0, 0.8), (4.5, 4.5)]
            )
            pen.stroke(stripe, [1.0 / unit] * 3, (250, 248, 240), "ball", 0.0)
        else:

            def box(corners) -> list[Point]:
                return _oriented(center, s.chest_front, s.chest_up, unit, corners)

            pen.polygon(box([(-7, -6), (7, -6), (7, 6), (-7, 6)]), 0.008, (204, 160, 104), "parcel")
            pen.stroke(box([(0, -6), (0, 6)]), [1.2 / unit] * 2, body.object_colour, "parcel", 0.0)
            pen.stroke(box([(-7, 1), (7, 1)]), [1.2 / unit] * 2, body.object_colour, "parcel", 0.0)


def over_hands(pen: "Pen", s: Skeleton, hand: str, body: people.Body) -> None:
    """Draws what lies before the near hand: the phone, and the cup."""
    if hand == "drink":
        _cup(pen, s, body)
    if hand != "phone":
        return
    unit = pen.height
    grip = s.near_arm[2]
    corners = [(-2.2, -4.5), (2.2, -4.5), (2.2, 5.5), (-2.2, 5.5)]
    pen.polygon(_oriented(grip, s.front, s.up, unit, corners), 0.012, (28, 28, 34), "phone")
    screen = [(-1.2, -2.5), (1.2, -2.5), (1.2, 4.2), (-1.2, 4.2)]
    pen.polygon(_oriented(grip, s.front, s.up, unit, screen), 0.0, (120, 226, 250), "phone", 0.0)


def _cup(pen: "Pen", s: Skeleton, body: people.Body) -> None:
    unit = pen.height
    grip = s.near_arm[2]
    center = (
        grip[0] - s.front[0] * 0.02 + s.up[0] * 0.04,
        grip[1] - s.front[1] * 0.02 + s.up[1] * 0.04,
    )
    tilt = math.radians(30)  # the cup's mouth turns towards the face
    up = (
        s.up[0] * math.cos(tilt) - s.front[0] * math.sin(tilt),
        s.up[1] * math.cos(tilt) - s.front[1] * math.sin(tilt),
    )
    front = (
        s.front[0] * math.cos(tilt) + s.up[0] * math.sin(tilt),
        s.front[1] * math.cos(tilt) + s.up[1] * math.sin(tilt),
    )

    def at(corners) -> list[Point]:
        return _oriented(center, front, up, unit, corners)

    pen.polygon(at([(-3, -5), (3, -5), (4.4, 5), (-4.4, 5)]), 0.006, (250, 250, 250), "cup")
    pen.polygon(
        at([(-3.4, -2), (3.4, -2), (4.0, 2.4), (-4.0, 2.4)]), 0.0, body.object_colour, "cup", 0.0
    )
