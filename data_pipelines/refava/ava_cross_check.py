"""Annotations beside AVA's own files: which people, boxes and actions of AVA's CSVs they have, which ids its label map.

AVA's CSVs have no header; a row is one action of one person: video, second, x1, y1, x2, y2, action id, and from version
2.2 on the person's id. Label maps have blocks `item { name: "..." id: 1 }` or `label { name: "..." label_id: 1 }`.
"""

import collections
import csv
import dataclasses
import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from data_pipelines.refava.annotations import Annotations, Person
from ravar_jax.class_names import AVA_ACTIONS
from ravar_jax.errors import UserError

_SAME_PERSON_IOU = 0.5
_SAME_BOX = 0.01  # of any coordinate; AVA's have three digits
_NUM_EXAMPLES = 5
_COUNTS = (
    "people",
    "found_by_id",
    "found_by_box",
    "missing",
    "window_missing",
    "boxes_differ",
    "labels_differ",
    "labels_lacking",
    "labels_added",
    "ava_people_not_described",
)

Box = tuple[float, float, float, float]


@dataclasses.dataclass
class _AvaPerson:
    person_id: str  # "" where the file has none
    box: Box
    labels: set[int]


AvaPeople = dict[tuple[str, float], list[_AvaPerson]]  # by video and second


def read_ava_csvs(files: Sequence[str]) -> AvaPeople:
    """Returns the people of AVA's CSV files.

    Raises:
        UserError: A file cannot be read or a row is not AVA's; names file and line.
    """
    people: dict[tuple[str, float], dict[tuple[str, Box], _AvaPerson]] = {}
    for name in files:
        try:
            rows = list(csv.reader(io.StringIO(_text("--ava_csv", name))))
        except csv.Error as error:
            raise UserError(f"--ava_csv {name}: cannot be read as CSV ({error})") from error
        for number, row in enumerate(rows, start=1):
            numbers = [_finite(cell) for cell in row[1:7]]
            if len(row) not in (7, 8) or None in numbers or numbers[5] not in AVA_ACTIONS:
                raise UserError(
                    f"--ava_csv {name}, line {number}: expected video,second,x1,y1,x2,y2,action id[,person id]"
                )
            second, x1, y1, x2, y2, action = (number for number in numbers if number is not None)
            box, person = (x1, y1, x2, y2), row[7] if len(row) == 8 else ""
            of_window = people.setdefault((row[0], second), {})
            of_window.setdefault((person, box), _AvaPerson(person, box, set())).labels.add(
                int(action)
            )
    return {window: list(of_window.values()) for window, of_window in people.items()}


def read_label_map(file: str) -> dict[int, str]:
    """Returns the names by id of one of AVA's .pbtxt files.

    Raises:
        UserError: It cannot be read, or holds no label.
    """
    names = {}
    for block in re.findall(
        r"\b(?:item|label)\s*\{(.*?)\}", _text("--ava_label_map", file), re.DOTALL
    ):
        name = re.search(r'\bname:\s*"([^"]*)"', block)
        number = re.search(r"\b(?:label_)?id:\s*(\d+)", block)
        if not name or not number:
            raise UserError(
                f"--ava_label_map {file}: a block without name or id: {block.strip()!r}"
            )
        names[int(number[1])] = name[1]
    if not names:
        raise UserError(f'--ava_label_map {file}: expected blocks item {{ name: "..." id: 1 }}')
    return names


def compare_people(annotations: Annotations, ava: AvaPeople) -> dict[str, Any]:
    """Returns how annotations and AVA's people differ.

    A person is found by the person's id where the boxes overlap (IoU 0.5 or more), else by the box alone.

    Returns:
        Numbers of people `people`, `found_by_id`, `found_by_box`, `missing` (of these `window_missing`, where AVA has
        nobody in that second); of those found `boxes_differ` (a coordinate by more than 0.01) and `labels_differ` (of
        these `labels_lacking`, without an action that AVA has, and `labels_added`); `ava_people_not_described` in the
        same windows; and `examples`, the first five of each kind.
    """
    counts = dict.fromkeys(_COUNTS, 0)
    examples: dict[str, list[str]] = collections.defaultdict(list)

    def note(kind: str, text: str) -> None:
        counts[kind] += 1
        if len(examples[kind]) < _NUM_EXAMPLES:
            examples[kind].append(text)

    for windows in annotations.splits.values():
        for window in windows:
            there = list(ava.get((window.video_id, window.key_second), []))
            if not there:
                counts["window_missing"] += len(window.people)
            counts["people"] += len(window.people)
            for person, other in _pair(window.people, there):
                who = f"{window.clip_id}, person {person.person_id}"
                if other is None:
                    note("missing", f"{who}: box {_rounded(person.box)}")
                    continue
                there.remove(other)
                counts[
                    "found_by_id" if person.person_id == other.person_id else "found_by_box"
                ] += 1
                if max(abs(a - b) for a, b in zip(person.box, other.box, strict=True)) > _SAME_BOX:
                    note(
                        "boxes_differ", f"{who}: {_rounded(person.box)}, AVA {_rounded(other.box)}"
                    )
                if set(person.labels) != other.labels:
                    note(
                        "labels_differ", f"{who}: {list(person.labels)}, AVA {sorted(other.labels)}"
                    )
                    counts["labels_lacking"] += bool(other.labels - set(person.labels))
                    counts["labels_added"] += bool(set(person.labels) - other.labels)
            counts["ava_people_not_described"] += len(there)
    return counts | {"examples": dict(examples)}


def compare_label_map(annotations: Annotations, names: dict[int, str]) -> dict[str, Any]:
    """Returns the ids that people have and the map lacks, {id: people}, and ids whose names differ from ours."""
    used = collections.Counter(
        label
        for windows in annotations.splits.values()
        for window in windows
        for person in window.people
        for label in person.labels
    )
    return {
        "ids": len(names),
        "ids_not_in_map": {str(label): used[label] for label in sorted(set(used) - set(names))},
        "names_differ": {
            str(number): [AVA_ACTIONS.get(number, ""), name]
            for number, name in sorted(names.items())
            if AVA_ACTIONS.get(number) != name
        },
    }


def describe_people(found: dict[str, Any]) -> str:
    """Returns the result of `compare_people` as text."""
    same = found["found_by_id"] + found["found_by_box"]
    lines = [
        f"AVA's CSVs have {same} of {found['people']} people ({found['found_by_id']} by person id, "
        f"{found['found_by_box']} by box alone), {found['ava_people_not_described']} more in the same windows; "
        f"{found['window_missing']} people are in windows that they lack"
    ]
    told = {
        "missing": "people missing in AVA's CSVs",
        "boxes_differ": "boxes differ",
        "labels_differ": f"people differ in actions ({found['labels_lacking']} lack some, "
        f"{found['labels_added']} add some)",
    }
    lines += [
        f"warning: {found[kind]} {text}; first {found['examples'][kind][0]}"
        for kind, text in told.items()
        if found[kind]
    ]
    return "\n".join(lines)


def describe_label_map(found: dict[str, Any]) -> str:
    """Returns the result of `compare_label_map` as text."""
    lines = [f"AVA's label map has {found['ids']} ids"]
    if lacking := found["ids_not_in_map"]:
        named = ", ".join(f"{label} ({people})" for label, people in lacking.items())
        lines.append(f"warning: ids that it lacks, and people who have them: {named}")
    for number, (ours, theirs) in found["names_differ"].items():
        lines.append(
            f"warning: id {number} is {theirs!r} there, {ours!r} in ravar_jax/class_names.py"
        )
    return "\n".join(lines)


def _pair(
    people: Iterable[Person], there: Sequence[_AvaPerson]
) -> list[tuple[Person, _AvaPerson | None]]:
    """Gives each person at most one of AVA's, first by id and then, best overlap first, by box."""
    pairs = [
        (person.person_id != other.person_id, -iou, number, position)
        for number, person in enumerate(people)
        for position, other in enumerate(there)
        if (iou := _iou(person.box, other.box)) >= _SAME_PERSON_IOU
    ]
    taken: dict[int, int] = {}
    for _, _, number, position in sorted(pairs):
        if number not in taken and position not in taken.values():
            taken[number] = position
    return [
        (person, there[taken[number]] if number in taken else None)
        for number, person in enumerate(people)
    ]


def _iou(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return both / (areas - both) if both else 0.0


def _rounded(box: Box) -> list[float]:
    return [round(value, 3) for value in box]


def _finite(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _text(flag: str, file: str) -> str:
    try:
        return epath.Path(file).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{flag} {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {file}: not text ({error})") from error
