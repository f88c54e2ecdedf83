"""Detections with a detector's faults: jitter, misses, duplicates and things that are not there.

Everyone of a clip is treated alike, so detections never tell whom a sentence means.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines.mini_refava.props import COCO_IDS

MISS_PERSON = 0.10
MISS_THING = 0.35
DUPLICATE = 0.08
FALSE_POSITIVES = 0.8  # mean number in a clip
# What a detector sees where there is nothing: COCO ids.
_IMAGINED = (1, 1, 1, 15, 27, 31, 33, 44, 47, 62, 64, 77, 84)


@dataclasses.dataclass(frozen=True)
class Detection:
    """One detection: cx, cy, w, h as fractions of the frame, COCO id, score."""

    box: tuple[float, float, float, float]
    class_id: int
    score: float


def _from_corners(corners: Sequence[float], class_id: int, score: float) -> Detection | None:
    x1, y1, x2, y2 = np.clip(corners, 0.0, 1.0)
    if x2 - x1 < 0.01 or y2 - y1 < 0.01:
        return None
    box = ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)
    return Detection(tuple(float(v) for v in box), class_id, float(score))  # type: ignore[arg-type]


def detect(
    rng: np.random.Generator,
    people: Sequence[Sequence[float]],
    things: Sequence[tuple[str, Sequence[float]]],
    coco_ids: Mapping[str, int] = COCO_IDS,
) -> tuple[Detection, ...]:
    """Returns what a detector would say, by descending score.

    Args:
      rng: the only source of chance.
      people: boxes x1, y1, x2, y2 as fractions of the frame.
      things: names (keys of `coco_ids`) and boxes of chairs and objects.
      coco_ids: COCO id of each name.
    """
    found: list[Detection | None] = []

    def see(corners: Sequence[float], class_id: int, noise: float, low: float, high: float) -> None:
        x1, y1, x2, y2 = corners
        sides = np.asarray([x2 - x1, y2 - y1, x2 - x1, y2 - y1])
        shaken = np.asarray(corners) + rng.normal(0, noise, 4) * sides
        found.append(_from_corners(shaken, class_id, rng.uniform(low, high)))

    for corners in people:
        if rng.random() >= MISS_PERSON:
            see(corners, COCO_IDS["person"], 0.035, 0.72, 0.995)
        if rng.random() < DUPLICATE:
            see(corners, COCO_IDS["person"], 0.15, 0.3, 0.6)
    for name, corners in things:
        if name in coco_ids and rng.random() >= MISS_THING:
            see(corners, coco_ids[name], 0.08, 0.4, 0.95)
    for _ in range(int(rng.poisson(FALSE_POSITIVES))):
        width, height = rng.uniform(0.05, 0.25), rng.uniform(0.08, 0.4)
        x, y = rng.uniform(0, 1 - width), rng.uniform(0.2, 1 - height)
        class_id = _IMAGINED[int(rng.integers(len(_IMAGINED)))]
        found.append(_from_corners((x, y, x + width, y + height), class_id, rng.uniform(0.25, 0.6)))
    return tuple(sorted((d for d in found if d is not None), key=lambda d: -d.score))
