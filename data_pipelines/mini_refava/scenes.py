"""The scenes of MiniRefAVA: sampling (`make_scene`) and drawing (`render`). No TensorFlow here.

`make_scene(seed, split, index)` draws, from a generator keyed by exactly these three, people with looks, bodies and
actions, their places, a sentence and a box for each, and detections. `render` draws one of the 90 positions.
"""

import dataclasses
import functools
import io

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.mini_refava import backgrounds, detections, figures, layout, people, sentences
from data_pipelines.mini_refava.layout import HEIGHT, WIDTH
from data_pipelines.mini_refava.shapes import SUPERSAMPLE, Shape, bounds, paint

SPLITS = ("train", "val", "test")  # the number of a split is part of the key of its scenes
NUM_POSITIONS = figures.NUM_POSITIONS
KEY_POSITION = 45
KEY_TIME = 1.5  # seconds
JPEG_QUALITY = 90
NUM_PEOPLE = ((2, 3, 4), (0.3, 0.4, 0.3))

Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Person:
    """One person of a scene; `box` is x1, y1, x2, y2 as fractions of the frame at the key position."""

    person_id: str
    looks: people.Looks
    body: people.Body
    actions: people.Actions
    spot: layout.Spot
    x: float
    box: Box
    sentence: str
    described_by: tuple[str, ...]  # the keys the sentence uses

    def shapes(self, position: int) -> list[Shape]:
        """Returns what is drawn of this person, in frame pixels."""
        return figures.person_shapes(
            self.looks, self.body, self.actions, self.x, self.spot.ground, self.spot.scale, position
        )


@dataclasses.dataclass(frozen=True)
class Scene:
    """One clip: everything that is drawn and everything that is said about it."""

    clip_id: str
    video_id: str
    place: str
    seed: tuple[int, int, int]
    people: tuple[Person, ...]
    detections: tuple[detections.Detection, ...]

    def facts(self) -> list[sentences.Facts]:
        """Returns what can be said of each person."""
        return _facts([p.looks for p in self.people], [p.spot for p in self.people])


def _facts(looks: list[people.Looks], spots: list[layout.Spot]) -> list[sentences.Facts]:
    one_row = len({spot.row for spot in spots}) == 1
    return [
        sentences.facts(
            look.shirt,
            look.trousers,
            look.hat_kind,
            look.hat_colour,
            look.size,
            spot.rank,
            "same" if one_row else spot.row,
        )
        for look, spot in zip(looks, spots, strict=True)
    ]


def make_scene(seed: int, split: str, index: int) -> Scene:
    """Draws the scene number `index` of a split; the same three arguments always give the same scene."""
    key = (seed, SPLITS.index(split), index)
    rng = np.random.default_rng(key)
    num_people = int(rng.choice(NUM_PEOPLE[0], p=NUM_PEOPLE[1]))
    # Looks, places and actions are drawn one after the other and never redrawn: nothing ties them.
    looks = [people.draw_looks(rng) for _ in range(num_people)]
    actions = [people.draw_actions(rng) for _ in range(num_people)]
    bodies = [people.draw_body(rng, look.size) for look in looks]
    spots = layout.draw_spots(rng, num_people)
    place = list(backgrounds.PLACES)[int(rng.integers(len(backgrounds.PLACES)))]

    extents = []
    for look, body, action, spot in zip(looks, bodies, actions, spots, strict=True):
        shapes = figures.person_shapes(
            look, body, action, 0.0, spot.ground, spot.scale, KEY_POSITION
        )
        extents.append(figures.person_extent(shapes))
    xs = layout.place(rng, spots, extents)
    everyone = _facts(looks, spots)
    members = []
    for i in range(num_people):
        x1, y1, x2, y2 = extents[i]
        description = sentences.describe(rng, i, everyone)
        box = _fractions((x1 + xs[i], y1, x2 + xs[i], y2))
        members.append(
            Person(
                str(i),
                looks[i],
                bodies[i],
                actions[i],
                spots[i],
                xs[i],
                box,
                description.text,
                description.keys,
            )
        )
    things = [thing for person in members for thing in _things(person)]
    found = detections.detect(rng, [person.box for person in members], things)
    name = f"s{seed}_{split}_{index:05d}"
    return Scene(f"mini_refava_{name}", f"{place}_{name}", place, key, tuple(members), found)


def _fractions(extent: Box) -> Box:
    x1, y1, x2, y2 = extent
    box = np.clip([x1 / WIDTH, y1 / HEIGHT, x2 / WIDTH, y2 / HEIGHT], 0.0, 1.0)
    return tuple(float(v) for v in box)  # type: ignore[return-value]


def _things(person: Person) -> list[tuple[str, Box]]:
    shapes = person.shapes(KEY_POSITION)
    names = sorted({shape.part for shape in shapes} - {"person"})
    return [(name, _fractions(bounds(s for s in shapes if s.part == name))) for name in names]


@functools.lru_cache(maxsize=4)
def _backdrop(
    place: str, seed: tuple[int, int, int], shadows: tuple[tuple[float, float, float], ...]
) -> Image.Image:
    """The place with the people's shadows on its ground, `SUPERSAMPLE` times the frame."""
    image = backgrounds.background(place, np.random.default_rng((*seed, 1)))
    mask = Image.new("L", image.size)
    draw = ImageDraw.Draw(mask)
    for x, y, half in shadows:
        draw.ellipse(
            tuple(v * SUPERSAMPLE for v in (x - half, y - 2.6, x + half, y + 2.8)), fill=80
        )
    image.paste((40, 40, 52), (0, 0), mask)
    return image


@functools.lru_cache(maxsize=8)
def _light(seed: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns gain (H, W, 3) and noise (2H, 2W, 1): brightness, warmth, a slope across the frame, grain."""
    rng = np.random.default_rng((*seed, 2))
    brightness, warmth, slope = (
        rng.uniform(0.9, 1.06),
        rng.uniform(-0.035, 0.035),
        rng.uniform(-0.07, 0.07),
    )
    across = np.linspace(-slope, slope, WIDTH, dtype=np.float32)[None, :, None]
    down = np.linspace(0.02, -0.03, HEIGHT, dtype=np.float32)[:, None, None]
    tint = np.asarray([1 + warmth, 1.0, 1 - warmth], np.float32)
    gain = (brightness * (1 + across + down) * tint).astype(np.float32)
    noise = rng.normal(0, rng.uniform(0.8, 2.2), (2 * HEIGHT, 2 * WIDTH, 1)).astype(np.float32)
    return gain, noise


def render(
    scene: Scene, position: int, only: tuple[int, ...] | None = None, grain: bool = True
) -> np.ndarray:
    """Draws one position of a scene.

    Args:
      scene: from `make_scene`.
      position: 0..89 in the window.
      only: numbers of the people to draw (their things too); None draws all. Shadows are always there.
      grain: False leaves light and noise out.

    Returns:
      uint8 (144, 192, 3), RGB.
    """
    shadows = tuple(
        ((p.box[0] + p.box[2]) / 2 * WIDTH, p.spot.ground, (p.box[2] - p.box[0]) * WIDTH * 0.48)
        for p in scene.people
    )
    image = _backdrop(scene.place, scene.seed, shadows).copy()
    draw = ImageDraw.Draw(image)
    # Whoever is nearer is painted later.
    for i in sorted(range(len(scene.people)), key=lambda i: scene.people[i].spot.ground):
        if only is None or i in only:
            paint(draw, scene.people[i].shapes(position))
    frame = np.asarray(image.reduce(SUPERSAMPLE))
    if not grain:
        return frame
    gain, noise = _light(scene.seed)
    dy, dx = np.random.default_rng((*scene.seed, 3, position)).integers((HEIGHT, WIDTH))
    lit = frame * gain + noise[dy : dy + HEIGHT, dx : dx + WIDTH]
    return np.clip(lit + 0.5, 0, 255).astype(np.uint8)


def encode(frame: np.ndarray) -> bytes:
    """Encodes uint8 (H, W, 3) as JPEG without chroma subsampling, which would blur small coloured things."""
    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return stream.getvalue()


def stored_positions(stored_frames: int) -> list[int]:
    """Returns the stored positions, ascending: `stored_frames - 1` evenly spaced ones and the key position.

    When the key position is among the evenly spaced ones, there is one fewer. 90 stores every position.

    Raises:
      ValueError: if `stored_frames` is not in 1..90.
    """
    if not 1 <= stored_frames <= NUM_POSITIONS:
        raise ValueError(f"stored_frames={stored_frames} is not in 1..{NUM_POSITIONS}")
    if stored_frames == NUM_POSITIONS:
        return list(range(NUM_POSITIONS))
    spaced = (
        np.linspace(0, NUM_POSITIONS - 1, stored_frames - 1)
        if stored_frames > 2
        else np.zeros(stored_frames - 1)
    )
    return sorted({int(p) for p in spaced} | {KEY_POSITION})


def split_sizes(num_clips: int) -> dict[str, int]:
    """Returns clips in each split: val is a tenth and test a fifth, rounded down but at least 1, train the rest.

    Raises:
      ValueError: if there are fewer than 3 clips.
    """
    if num_clips < 3:
        raise ValueError(
            f"num_clips={num_clips}: a clip for each of train, val and test makes at least 3"
        )
    val, test = max(1, num_clips // 10), max(1, num_clips // 5)
    return {"train": num_clips - val - test, "val": val, "test": test}
