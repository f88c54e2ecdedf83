"""Random views of a training example: mirrored, cropped, recoloured; frames, boxes and sentence change together.

config + (seed, epoch, example) -> `Augmentation.draw` -> `View` -> frames, boxes in corners or centres, sentence

A view is a pure function of the config and of (seed, epoch, example), so a resumed run, on any number of processes,
sees the same. All frames of an example, the detector's key frame among them, are seen in one view. The release has no
augmentation; everything here is off by default.
"""

import dataclasses
import math
import re

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance

from data_pipelines.preprocess import WHOLE, Crop

_STREAM = 1  # keeps the draws apart from those of frame positions, which have the same key
_ASPECTS = (3 / 4, 4 / 3)  # of a crop, relative to the frame's


@dataclasses.dataclass(frozen=True)
class View:
    """How an example is seen.

    Attributes:
        crop: x1, y1, x2, y2, fractions of the stored frame.
        mirrored: whether left and right are exchanged, after the crop.
        factors: of brightness, contrast and saturation; 1 leaves them.
    """

    crop: Crop = WHOLE
    mirrored: bool = False
    factors: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def moves(self) -> bool:
        """Whether anything is elsewhere than in the stored frame."""
        return self.mirrored or self.crop != WHOLE

    def recolour(self, frames: np.ndarray) -> np.ndarray:
        """Returns frames uint8 (N, H, W, 3) RGB in other light; all in the same."""
        if self.factors == (1.0, 1.0, 1.0):
            return frames
        changed = np.empty_like(frames)
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for row, frame in enumerate(frames):
            image = Image.fromarray(frame)
            for enhancer, factor in zip(enhancers, self.factors, strict=True):
                image = enhancer(image).enhance(factor)
            changed[row] = np.asarray(image)
        return changed

    def mirror(self, frames: np.ndarray) -> np.ndarray:
        """Returns frames (..., W, 3), their columns in reverse if the view is mirrored."""
        return np.ascontiguousarray(frames[..., ::-1, :]) if self.mirrored else frames

    def corners(self, boxes: np.ndarray) -> np.ndarray:
        """Maps boxes float32 (..., 4) x1, y1, x2, y2, from fractions of the stored frame to fractions of the view.

        What lies outside is clipped: such a box has no width or no height left.
        """
        if not self.moves:
            return boxes
        left, upper, right, lower = self.crop
        origin = np.asarray([left, upper, left, upper], np.float32)
        size = np.asarray([right - left, lower - upper] * 2, np.float32)
        seen = np.clip((boxes - origin) / size, 0.0, 1.0)
        if self.mirrored:
            seen = np.stack(
                [1 - seen[..., 2], seen[..., 1], 1 - seen[..., 0], seen[..., 3]], axis=-1
            )
        return seen.astype(np.float32)

    def detections(
        self, boxes: np.ndarray, class_ids: np.ndarray, scores: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the detections of which something is seen, boxes float32 (K, 4) as cx, cy, w, h before and after."""
        if not self.moves:  # the same to the bit
            return boxes, class_ids, scores
        centres, half = boxes[:, :2], boxes[:, 2:] / 2
        seen = self.corners(np.concatenate([centres - half, centres + half], axis=1))
        sizes = seen[:, 2:] - seen[:, :2]
        kept = (sizes > 0).all(axis=1)
        centred = np.concatenate([(seen[:, :2] + seen[:, 2:]) / 2, sizes], axis=1)
        return centred[kept], class_ids[kept], scores[kept]

    def sentence(self, text: str) -> str:
        """Returns a sentence with left and right exchanged if the view is mirrored, which `draw` has checked."""
        mirrored = mirror_sentence(text) if self.mirrored else text
        assert mirrored is not None
        return mirrored


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What views are drawn from (`data.flip_probability`, `data.crop_min_area`, `data.colour_jitter`).

    Attributes:
        flip_probability: of a mirrored view; a sentence whose left or right may not be a side is never mirrored.
        crop_min_area: least share of the frame that a crop keeps, 1 crops nothing. The target stays whole; other
            people may be cut off, and with them what "second from the left" counts.
        colour_jitter: brightness, contrast and saturation are multiplied by 1 minus to 1 plus this.
        seed: of the run.
    """

    flip_probability: float
    crop_min_area: float
    colour_jitter: float
    seed: int

    def draw(self, epoch: int, example: int, target_box: np.ndarray, sentence: str) -> View:
        """Returns the view of an example.

        Args:
            epoch: of the run.
            example: its number in file order.
            target_box: float32 (4,), x1, y1, x2, y2, fractions of the stored frame.
            sentence: that the example comes with.
        """
        draw = np.random.default_rng([self.seed, epoch, example, _STREAM])
        # Always the same numbers are drawn, so that one setting does not change what another draws.
        flip, area, aspect, x, y = draw.uniform(size=5)
        factors = 1 + self.colour_jitter * draw.uniform(-1, 1, 3)
        return View(
            crop=self._crop(area, aspect, x, y, [float(value) for value in target_box]),
            mirrored=bool(flip < self.flip_probability) and mirror_sentence(sentence) is not None,
            factors=(float(factors[0]), float(factors[1]), float(factors[2])),
        )

    def _crop(self, area: float, aspect: float, x: float, y: float, target: list[float]) -> Crop:
        """Returns a crop around the target from uniform numbers in [0, 1)."""
        if self.crop_min_area == 1:
            return WHOLE
        share = self.crop_min_area + (1 - self.crop_min_area) * area
        low, high = map(math.log, _ASPECTS)
        ratio = math.exp(low + (high - low) * aspect)
        left, right = _interval(math.sqrt(share * ratio), x, target[0], target[2])
        upper, lower = _interval(math.sqrt(share / ratio), y, target[1], target[3])
        return left, upper, right, lower


def _interval(length: float, place: float, first: float, last: float) -> tuple[float, float]:
    """Returns an interval in [0, 1] of about this length that holds first..last, `place` in [0, 1) along its room."""
    length = min(max(length, last - first), 1.0)
    lowest, highest = max(0.0, last - length), min(first, 1.0 - length)
    start = lowest + place * max(highest - lowest, 0.0)
    return start, min(start + length, 1.0)


def configured_augmentation(config: ConfigDict) -> Augmentation | None:
    """Returns the augmentation of a config's training examples; None where nothing would change."""
    data = config.data
    augmentation = Augmentation(
        data.flip_probability, data.crop_min_area, data.colour_jitter, config.seed
    )
    off = Augmentation(0.0, 1.0, 0.0, config.seed)
    return None if augmentation == off else augmentation


_SIDE = re.compile(r"\b(left|right)((?:[- ]?(?:most|hand(?:ed)?|wards?|side))?)\b", re.IGNORECASE)
# Words that make "left" or "right" a side, as in "the man to the left" or "her right arm". Elsewhere they may be
# something else, as in "right behind him" or "the one who left".
_BEFORE = re.compile(
    r"\b(the|his|her|their|its|your|my|our|far|a|second|third|last|first|top|bottom|upper|lower|front|back|from|at|on|"
    r"facing|turned|turns|turning|looks|looking|leans|leaning|extreme|most|screen|center|centre|middle|\w+'s)[ -]$",
    re.IGNORECASE,
)
_AFTER = re.compile(
    r"^[ -](arm|hand|leg|foot|eye|ear|shoulder|knee|elbow|cheek|wrist|corner|end|edge|half|part|of|one|person|man|"
    r"woman|boy|girl|child|figure|lane|wall|window|door|seat|chair)s?\b",
    re.IGNORECASE,
)


def mirror_sentence(text: str) -> str | None:
    """Returns a sentence with left and right exchanged; None where one of them may not be a side.

    >>> mirror_sentence("The leftmost man, to the Right of her")
    'The rightmost man, to the Left of her'
    >>> mirror_sentence("the man right behind her") is None
    True
    """
    for found in _SIDE.finditer(text):
        around = _BEFORE.search(text[: found.start()]) or _AFTER.search(text[found.end() :])
        if not found[2] and not around:
            return None

    def other(found: re.Match[str]) -> str:
        word = found[1]
        swapped = "right" if word.lower() == "left" else "left"
        if word.isupper():
            swapped = swapped.upper()
        elif word[0].isupper():
            swapped = swapped.capitalize()
        return swapped + found[2]

    return _SIDE.sub(other, text)
