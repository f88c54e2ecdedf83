"""What a person of MiniRefAVA can look like and do: the closed sets everything else draws from.

Looks (shirt, trousers, hat, size) are what sentences may mention; actions (one pose, at most one hand action) are what
the labels say. The two are drawn independently of each other and of the place, person by person, so that neither the
sentence alone nor the video alone tells what the person meant is doing. Action ids and names are AVA v2.2's.
"""

import dataclasses

import numpy as np

Colour = tuple[int, int, int]

SHIRT_COLOURS: dict[str, Colour] = {
    "red": (211, 47, 47),
    "yellow": (247, 205, 47),
    "green": (47, 153, 76),
    "blue": (42, 98, 214),
    "purple": (142, 68, 182),
    "white": (243, 243, 240),
    "black": (44, 45, 52),
}
TROUSER_COLOURS: dict[str, Colour] = {
    "red": (186, 40, 44),
    "green": (44, 130, 70),
    "blue": (46, 84, 170),
    "white": (234, 233, 228),
    "black": (40, 40, 46),
    "brown": (129, 84, 48),
}
HAT_COLOURS: dict[str, Colour] = {
    "red": (214, 40, 44),
    "yellow": (246, 200, 52),
    "green": (38, 140, 72),
    "blue": (38, 88, 200),
    "white": (246, 245, 240),
    "black": (38, 38, 44),
}
HAT_KINDS = ("none", "cap", "brim")
SIZES = ("child", "adult")

# Never described, so that people look like people.
SKIN_COLOURS: tuple[Colour, ...] = (
    (250, 214, 184),
    (233, 186, 147),
    (198, 142, 102),
    (146, 98, 68),
    (104, 68, 48),
)
HAIR_COLOURS: tuple[Colour, ...] = (
    (46, 34, 28),
    (92, 58, 34),
    (158, 104, 52),
    (214, 170, 96),
    (120, 116, 114),
)
HAIR_STYLES = ("short", "long", "bun")

POSES: dict[str, int] = {"bend": 1, "jump": 7, "lie": 8, "sit": 11, "stand": 12, "walk": 14}
HANDS: dict[str, int] = {"phone": 15, "hold": 17, "drink": 27, "read": 48, "wave": 69}
ACTION_NAMES: dict[int, str] = {
    1: "bend/bow (at the waist)",
    7: "jump/leap",
    8: "lie/sleep",
    11: "sit",
    12: "stand",
    14: "walk",
    15: "answer phone",
    17: "carry/hold (an object)",
    27: "drink",
    48: "read",
    69: "hand wave",
}


@dataclasses.dataclass(frozen=True)
class Looks:
    """What a sentence may mention of a person, besides the place."""

    shirt: str
    trousers: str
    hat_kind: str  # one of HAT_KINDS
    hat_colour: str  # "none" without a hat
    size: str  # one of SIZES


@dataclasses.dataclass(frozen=True)
class Body:
    """What is drawn but never described."""

    skin: Colour
    hair: Colour
    hair_style: str
    held: str  # what "hold" holds: "ball" or "parcel"
    object_colour: Colour
    facing: int  # 1: to the right, -1: to the left
    height: float  # pixels from sole to crown, upright
    cycles: int  # of the motion in the window
    phase: float  # of the motion, in radians


@dataclasses.dataclass(frozen=True)
class Actions:
    """What a person does: one pose and at most one hand action."""

    pose: str
    hand: str  # "none" or a key of HANDS

    @property
    def labels(self) -> tuple[int, ...]:
        """AVA ids, ascending."""
        ids = [POSES[self.pose]]
        if self.hand != "none":
            ids.append(HANDS[self.hand])
        return tuple(sorted(ids))


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def draw_looks(rng: np.random.Generator) -> Looks:
    """Draws looks, every attribute independently."""
    hat_kind = _pick(rng, HAT_KINDS)
    hat_colour = _pick(rng, list(HAT_COLOURS))
    return Looks(
        shirt=_pick(rng, list(SHIRT_COLOURS)),
        trousers=_pick(rng, list(TROUSER_COLOURS)),
        hat_kind=hat_kind,
        hat_colour=hat_colour if hat_kind != "none" else "none",
        size=SIZES[int(rng.random() < 0.6)],
    )


def draw_actions(rng: np.random.Generator) -> Actions:
    """Draws a pose and, independently, a hand action or none, all equally likely."""
    return Actions(pose=_pick(rng, list(POSES)), hand=_pick(rng, ["none", *HANDS]))


OBJECT_COLOURS: tuple[Colour, ...] = ((232, 92, 40), (24, 150, 168), (226, 74, 140), (250, 190, 40))


def draw_body(rng: np.random.Generator, size: str) -> Body:
    """Draws what is never described; only the height depends on the size that may be described."""
    return Body(
        skin=_pick(rng, SKIN_COLOURS),
        hair=_pick(rng, HAIR_COLOURS),
        hair_style=_pick(rng, HAIR_STYLES),
        held=_pick(rng, ("ball", "parcel")),
        object_colour=_pick(rng, OBJECT_COLOURS),
        facing=_pick(rng, (-1, 1)),
        height=float(rng.uniform(76, 82) if size == "adult" else rng.uniform(54, 58)),
        cycles=int(rng.integers(2, 5)),
        phase=float(rng.uniform(0, 2 * np.pi)),
    )
