"""Where the joints of a person are at a moment, from pose, hand action and phase of the motion.

Local coordinates: x forwards (the way the person faces), y upwards from the ground, in units of the person's height.
Limb angles are in degrees from straight down, positive forwards. Motion is periodic, small, and shaped so that every
single moment already shows the pose: the model averages frames over time and must not need their order.
"""

import dataclasses
import math

Point = tuple[float, float]
Limb = tuple[Point, Point, Point]

TORSO = 0.26
THIGH = 0.225
SHIN = 0.22
UPPER_ARM = 0.165
FOREARM = 0.155
SOLE = 0.035  # from ankle to ground


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """Joints in local coordinates; `up` and `front` are the head's unit axes, `chest_front` the torso's."""

    hip: Point
    shoulder: Point
    head: Point
    up: Point
    front: Point
    chest_front: Point
    chest_up: Point
    near_leg: Limb  # hip, knee, ankle
    far_leg: Limb
    near_arm: Limb  # shoulder, elbow, hand
    far_arm: Limb
    seat: float  # height of the seat's top, 0 when not on one


@dataclasses.dataclass(frozen=True)
class _Stance:
    """Angles of a pose: legs as (thigh, shin), arms as (upper arm, forearm), in degrees from straight down."""

    lean: float
    near_leg: tuple[float, float]
    far_leg: tuple[float, float]
    near_arm: tuple[float, float]
    far_arm: tuple[float, float]
    neck: float = 0.0  # tilt of the head against the torso, forwards
    lift: float = 0.0  # of the feet above the ground
    hip_height: float | None = None  # None: as the lower foot touches the ground


def _direction(degrees: float) -> Point:
    radians = math.radians(degrees)
    return math.sin(radians), -math.cos(radians)


def _along(start: Point, direction: Point, length: float) -> Point:
    return start[0] + direction[0] * length, start[1] + direction[1] * length


def _from(origin: Point, front: Point, up: Point, forwards: float, upwards: float) -> Point:
    return (
        origin[0] + front[0] * forwards + up[0] * upwards,
        origin[1] + front[1] * forwards + up[1] * upwards,
    )


def _reach(shoulder: Point, hand: Point, bend: float) -> Limb:
    """Two-link inverse kinematics; `bend` 1 puts the elbow to the right of the way to the hand, -1 to the left."""
    dx, dy = hand[0] - shoulder[0], hand[1] - shoulder[1]
    distance = min(max(math.hypot(dx, dy), 0.02), (UPPER_ARM + FOREARM) * 0.995)
    ux, uy = dx / math.hypot(dx, dy), dy / math.hypot(dx, dy)
    along = (distance**2 + UPPER_ARM**2 - FOREARM**2) / (2 * distance)
    aside = bend * math.sqrt(max(UPPER_ARM**2 - along**2, 0.0))
    elbow = (shoulder[0] + ux * along + uy * aside, shoulder[1] + uy * along - ux * aside)
    return shoulder, elbow, (shoulder[0] + ux * distance, shoulder[1] + uy * distance)


def _stance(pose: str, phase: float) -> _Stance:
    wave = math.sin(phase)
    if pose == "stand":
        return _Stance(1.5 * wave, (4, 2), (-5, -7), (-6, 8 + 3 * wave), (6, 20))
    if pose == "walk":
        # Mostly at full stride: legs side by side would look like standing.
        stride = math.tanh(10 * wave)

        def leg(s: float) -> tuple[float, float]:
            return 34 * s, 34 * s - 14 * (1 - s)

        return _Stance(
            7,
            leg(stride),
            leg(-stride),
            (-38 * stride, -38 * stride + 25),
            (38 * stride, 38 * stride + 25),
        )
    if pose == "sit":
        return _Stance(-4 + 2 * wave, (86, 4 + 3 * wave), (82, 14 - 3 * wave), (25, 62), (32, 70))
    if pose == "bend":
        lean = 82 + 9 * wave
        return _Stance(lean, (-6, -2), (2, 6), (4 + 6 * wave, 12), (14 - 6 * wave, 20), neck=-18)
    if pose == "jump":
        lift = 0.17 + 0.05 * wave
        return _Stance(
            8,
            (62 + 6 * wave, -42),
            (18, -78 - 6 * wave),
            (-60 + 8 * wave, -80),
            (70 + 8 * wave, 110),
            lift=lift,
        )
    if pose == "lie":
        return _Stance(
            -86, (97, 62 + 3 * wave), (93, 84), (80, 95), (80, 95), neck=14, hip_height=0.085
        )
    raise ValueError(f"pose={pose!r} is not one of the poses")


def _hands(
    hand: str, s: "_Frame", phase: float, radius: float
) -> tuple[Point | None, Point | None, float]:
    """Returns where near and far hand must be (None: as the stance says) and the bend of the near elbow."""
    wave = math.sin(phase)
    if hand == "phone":
        return _from(s.head, s.front, s.up, -0.02, -0.05 + 0.006 * wave), None, -1.0
    if hand == "drink":
        return _from(s.head, s.front, s.up, radius + 0.085, -0.5 * radius + 0.015 * wave), None, 1.0
    if hand == "hold":
        low = -0.14 + 0.012 * wave
        return (
            _from(s.shoulder, s.chest_front, s.chest_up, 0.21, low),
            _from(s.shoulder, s.chest_front, s.chest_up, 0.25, low + 0.02),
            1.0,
        )
    if hand == "read":
        low = -0.05 - radius + 0.008 * wave
        return (
            _from(s.head, s.front, s.up, 0.24, low),
            _from(s.head, s.front, s.up, 0.27, low + 0.02),
            1.0,
        )
    return None, None, 1.0


@dataclasses.dataclass(frozen=True)
class _Frame:
    shoulder: Point
    head: Point
    up: Point
    front: Point
    chest_up: Point
    chest_front: Point


def skeleton(pose: str, hand: str, phase: float, head_radius: float) -> Skeleton:
    """Returns the joints at a phase (radians) of the motion; `head_radius` is in units of the height."""
    stance = _stance(pose, phase)
    near_leg, far_leg = _leg(stance.near_leg), _leg(stance.far_leg)
    lowest = min(near_leg[2][1], far_leg[2][1])
    height = stance.hip_height if stance.hip_height is not None else SOLE - lowest + stance.lift
    near_leg, far_leg = _raised(near_leg, height), _raised(far_leg, height)

    hip = (0.0, height)
    chest_up, chest_front = _axes(stance.lean)
    shoulder = _along(hip, chest_up, TORSO)
    tilt = {"read": 14.0, "drink": -10.0}.get(hand, 0.0) if pose != "bend" else 0.0
    up, front = _axes(stance.lean + stance.neck + tilt)
    head = _from(shoulder, front, up, 0.015, 0.035 + head_radius)
    frame = _Frame(shoulder, head, up, front, chest_up, chest_front)

    arm_start = _from(shoulder, chest_front, chest_up, 0.0, -0.03)
    near_hand, far_hand, bend = _hands(hand, frame, phase, head_radius)
    near_arm = _hanging(arm_start, stance.near_arm)
    far_arm = _hanging(arm_start, stance.far_arm)
    if hand == "wave":
        # In the world's frame, so that it is up for every pose; the forearm swings.
        stretch = 1.35 + 8 * (head_radius - 0.105)  # clear of a child's larger head
        near_arm = _hanging(
            arm_start, (160 if pose == "lie" else 118, 170 + 22 * math.sin(phase)), stretch
        )
    if hand == "phone" and pose == "lie":
        bend = 1.0  # the other way is into the ground
    if near_hand is not None:
        near_arm = _reach(arm_start, near_hand, bend)
    if far_hand is not None:
        far_arm = _reach(arm_start, far_hand, bend)
    seat = height - 0.075 if pose == "sit" else 0.0
    return Skeleton(
        hip=hip,
        shoulder=shoulder,
        head=head,
        up=up,
        front=front,
        chest_front=chest_front,
        chest_up=chest_up,
        near_leg=near_leg,
        far_leg=far_leg,
        near_arm=near_arm,
        far_arm=far_arm,
        seat=seat,
    )


def _leg(angles: tuple[float, float]) -> Limb:
    """Hip, knee and ankle of a leg that hangs from the origin."""
    knee = _along((0.0, 0.0), _direction(angles[0]), THIGH)
    return (0.0, 0.0), knee, _along(knee, _direction(angles[1]), SHIN)


def _raised(limb: Limb, height: float) -> Limb:
    (x0, y0), (x1, y1), (x2, y2) = limb
    return (x0, y0 + height), (x1, y1 + height), (x2, y2 + height)


def _axes(lean: float) -> tuple[Point, Point]:
    """Returns the up and the front axis of something that leans forwards by an angle in degrees."""
    radians = math.radians(lean)
    return (math.sin(radians), math.cos(radians)), (math.cos(radians), -math.sin(radians))


def _hanging(shoulder: Point, angles: tuple[float, float], stretch: float = 1.0) -> Limb:
    elbow = _along(shoulder, _direction(angles[0]), UPPER_ARM * stretch)
    return shoulder, elbow, _along(elbow, _direction(angles[1]), FOREARM * stretch)
