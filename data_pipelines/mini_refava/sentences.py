"""Sentences that single out one person by looks and place, and say nothing of what the person does.

A description is a set of keys (`shirt`, `trousers`, `hat`, `hat_kind`, `size`, `place`, `depth`). It singles a person
out when no other person of the clip has the same values at all its keys: sentences are made only from such sets.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

Facts = Mapping[str, str]

_PLACES = {
    (0, 2): ("on the left", "on the left side", "at the left"),
    (1, 2): ("on the right", "on the right side", "at the right"),
    (0, 3): ("on the left", "on the far left", "at the left end"),
    (1, 3): ("in the middle", "in the centre", "between the others"),
    (2, 3): ("on the right", "on the far right", "at the right end"),
    (0, 4): ("on the far left", "at the left end", "leftmost of all"),
    (1, 4): ("second from the left", "second one from the left"),
    (2, 4): ("second from the right", "second one from the right"),
    (3, 4): ("on the far right", "at the right end", "rightmost of all"),
}
_DEPTHS = {
    "front": ("in the foreground", "closer to the camera", "in front"),
    "back": ("in the background", "further from the camera", "at the back"),
}
_NOUNS = {"child": ("child", "kid", "small person"), "adult": ("adult", "grown-up", "tall person")}
_OPENINGS = (
    "the",
    "the",
    "the",
    "find the",
    "look at the",
    "focus on the",
    "i mean the",
    "follow the",
    "only the",
)


@dataclasses.dataclass(frozen=True)
class Description:
    """A sentence and the keys it uses."""

    text: str
    keys: tuple[str, ...]


def facts(
    shirt: str, trousers: str, hat_kind: str, hat_colour: str, size: str, rank: int, depth: str
) -> Facts:
    """Returns what can be said of a person; `rank` counts from the left, `depth` is "front", "back" or "same"."""
    return {
        "shirt": shirt,
        "trousers": trousers,
        "hat_kind": hat_kind,
        "hat": f"{hat_kind} {hat_colour}",
        "size": size,
        "place": str(rank),
        "depth": depth,
    }


def singles_out(person: int, everyone: Sequence[Facts], keys: Sequence[str]) -> bool:
    """Whether the values at `keys` are those of this person and of nobody else."""
    return not any(
        all(other[key] == everyone[person][key] for key in keys)
        for i, other in enumerate(everyone)
        if i != person
    )


def _usable_keys(facts_of_person: Facts) -> list[str]:
    keys = ["shirt", "trousers", "hat_kind", "hat", "size", "place", "depth"]
    if facts_of_person["hat_kind"] == "none":
        keys.remove("hat")  # says the same as hat_kind
    if facts_of_person["depth"] == "same":
        keys.remove("depth")
    return keys


def choose_keys(
    rng: np.random.Generator, person: int, everyone: Sequence[Facts]
) -> tuple[str, ...]:
    """Draws a smallest sufficient set of keys, mostly with one or two more that are true and not needed.

    People say more than they must, and first of all where someone is; there are at most three keys, so that sentences
    stay short.
    """
    keys = _usable_keys(everyone[person])
    sufficient: list[tuple[str, ...]] = []
    for size in (1, 2, 3):
        for subset in itertools.combinations(keys, size):
            if "hat" in subset and "hat_kind" in subset:
                continue
            if any(set(smaller) <= set(subset) for smaller in sufficient):
                continue
            if singles_out(person, everyone, subset):
                sufficient.append(subset)
    by_looks = [subset for subset in sufficient if subset != ("place",)]
    chosen: tuple[str, ...] = ("place",)
    if by_looks and rng.random() >= 0.18:
        chosen = by_looks[int(rng.integers(len(by_looks)))]
    if "place" not in chosen and len(chosen) < 3 and rng.random() < 0.5:
        chosen = (*chosen, "place")
    for _ in range(int(rng.choice(3, p=(0.3, 0.4, 0.3)))):
        more = [k for k in keys if k not in chosen and not ({k, *chosen} >= {"hat", "hat_kind"})]
        if more and len(chosen) < 3:
            chosen = (*chosen, more[int(rng.integers(len(more)))])
    return chosen


def describe(rng: np.random.Generator, person: int, everyone: Sequence[Facts]) -> Description:
    """Draws a sentence that singles out one person of a clip.

    Args:
      rng: the only source of chance.
      person: index into `everyone`.
      everyone: the facts of all people of the clip.
    """
    keys = choose_keys(rng, person, everyone)
    return Description(phrase(rng, everyone[person], keys, len(everyone)), tuple(sorted(keys)))


def phrase(rng: np.random.Generator, values: Facts, keys: Sequence[str], num_people: int) -> str:
    """Words for the values at `keys`, in one of many wordings."""

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    noun = (
        pick(_NOUNS[values["size"]])
        if "size" in keys
        else pick(("person", "person", "one", "figure"))
    )
    adjective = ""
    clothes: list[str] = []
    if "shirt" in keys:
        clothes.append(f"{values['shirt']} {pick(('shirt', 'shirt', 'top'))}")
    if "trousers" in keys:
        clothes.append(f"{values['trousers']} {pick(('trousers', 'trousers', 'pants'))}")
    if "hat" in keys:
        kind, colour = values["hat"].split()
        clothes.append(f"{colour} {_hat(pick, kind)}")
    elif "hat_kind" in keys and values["hat_kind"] != "none":
        clothes.append(_hat(pick, values["hat_kind"]))
    elif "hat_kind" in keys:
        if rng.random() < 0.5:
            adjective = pick(("bareheaded ", "hatless "))
        else:
            clothes.append("")  # placed below
    bare = "" in clothes
    clothes = [c for c in clothes if c]
    rng.shuffle(clothes)

    parts: list[str] = []
    if clothes:
        words = [c if c.split()[-1] in ("trousers", "pants") else f"a {c}" for c in clothes]
        listed = words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
        wears: tuple[str, ...] = ("in", "with", "wearing", "who wears")
        if "shirt" in keys:
            wears = (*wears, "dressed in")
        parts.append(f"{pick(wears)} {listed}")
    if bare:
        parts.append(pick(("without a hat", "with nothing on the head")))
    where: list[str] = []
    if "place" in keys:
        where.append(pick(_PLACES[int(values["place"]), num_people]))
    if "depth" in keys:
        where.append(pick(_DEPTHS[values["depth"]]))
    rng.shuffle(where)
    parts = where + parts if rng.random() < 0.35 else parts + where
    return " ".join([pick(_OPENINGS), f"{adjective}{noun}", *parts])


def _hat(pick, kind: str) -> str:
    return (
        pick(("cap", "baseball cap"))
        if kind == "cap"
        else pick(("wide-brimmed hat", "sun hat", "broad-brimmed hat"))
    )
