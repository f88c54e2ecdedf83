"""Where people are: order from left to right, row, and positions that keep them apart.

Order and rows are drawn first and never depend on looks or actions. Only the exact x is then searched for, so that
nobody is hidden by much; rows alternate, so that a place exists for every combination of poses.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

WIDTH, HEIGHT = 192, 144
ROW_GROUND = {"front": 139.0, "back": 93.0}
ROW_SCALE = {"front": 1.0, "back": 0.92}
MIN_GAP = 15.0  # pixels between the middles of neighbours, so that "left of" is plain to see
MARGIN = 3.0
_TRIALS = 400

Extent = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Spot:
    """A person's place: rank from the left, row, and y of the ground."""

    rank: int
    row: str
    ground: float

    @property
    def scale(self) -> float:
        """Factor on the height, for the depth."""
        return ROW_SCALE[self.row]


def draw_spots(rng: np.random.Generator, num_people: int) -> list[Spot]:
    """Draws the order and the rows: any rows for two people, alternating ones for more."""
    ranks = rng.permutation(num_people)
    if num_people == 2:
        rows = [("front", "back")[int(rng.integers(2))] for _ in range(2)]
    else:
        first = int(rng.integers(2))
        rows = [("front", "back")[(first + k) % 2] for k in range(num_people)]
    jitter = rng.uniform(-3, 3, num_people)
    return [
        Spot(int(rank), rows[rank], ROW_GROUND[rows[rank]] + float(jitter[rank])) for rank in ranks
    ]


def place(
    rng: np.random.Generator, spots: Sequence[Spot], extents: Sequence[Extent]
) -> list[float]:
    """Returns the x of every person such that the ranks hold and boxes overlap little.

    Args:
      rng: source of the candidates.
      spots: place of every person.
      extents: x1, y1, x2, y2 in pixels of every person drawn at x = 0 on its ground.

    Returns:
      x in pixels for each, in the order given. The best of a fixed number of candidates; in about 1 clip of 100
      other boxes still cover more than 0.15 of somebody's (tests/mini_refava_test.py measures it).
    """
    order = np.argsort([spot.rank for spot in spots])
    boxes = np.asarray(extents, np.float64)[order]
    grounds = np.asarray([spots[i].ground for i in order])
    left, right = boxes[:, 0], boxes[:, 2]
    widths = right - left
    slack = WIDTH - 2 * MARGIN
    # Candidates: random cut points of the width, weighted by how wide each person is.
    shares = rng.gamma(6.0, 1.0, (_TRIALS, len(spots))) * (widths + 14.0)
    stops = np.cumsum(shares, axis=1) / shares.sum(axis=1, keepdims=True) * slack + MARGIN
    starts = np.concatenate([np.full((_TRIALS, 1), MARGIN), stops[:, :-1]], axis=1)
    lead = rng.uniform(0, 1, (_TRIALS, len(spots)))
    x1 = starts + lead * (stops - starts - widths)
    x1 = np.clip(x1, MARGIN, WIDTH - MARGIN - widths)
    cost = _cost(x1, x1 + widths, boxes[:, 1], boxes[:, 3], grounds)
    good = np.flatnonzero(cost <= 0.03)
    best = int(good[0]) if good.size else int(np.argmin(cost))
    xs = np.empty(len(spots))
    xs[order] = x1[best] - left
    return [float(x) for x in xs]


def _cost(
    x1: np.ndarray, x2: np.ndarray, y1: np.ndarray, y2: np.ndarray, grounds: np.ndarray
) -> np.ndarray:
    """Returns for every candidate the largest hidden share of a box, plus 1 for each place word that would not hold."""
    middles = (x1 + x2) / 2
    cost = np.zeros(len(x1))
    for i in range(x1.shape[1] - 1):
        cost += middles[:, i + 1] - middles[:, i] < MIN_GAP
    cost += middles[:, 0] > WIDTH * 0.44  # the leftmost is on the left, the rightmost on the right
    cost += middles[:, -1] < WIDTH * 0.56
    for behind in range(x1.shape[1]):
        area = (x2[:, behind] - x1[:, behind]) * (y2[behind] - y1[behind])
        hidden = np.zeros(len(x1))
        for before in range(x1.shape[1]):
            if before != behind and grounds[before] >= grounds[behind]:
                across = np.minimum(x2[:, behind], x2[:, before]) - np.maximum(
                    x1[:, behind], x1[:, before]
                )
                down = min(y2[behind], y2[before]) - max(y1[behind], y1[before])
                hidden += np.maximum(across, 0) * max(down, 0)
        cost = np.maximum(cost, np.floor(cost) + np.minimum(hidden / area, 0.999))
    return cost
