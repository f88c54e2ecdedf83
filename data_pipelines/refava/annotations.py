"""Annotations of RefAVA, RefAVA++ or one's own videos -> windows with their described people.

`read_annotations` finds in one folder either the released pickles (three for each split, aligned by key) or CSV/JSONL
files, checks every field, and groups the people by video and second. The layouts are in this folder's README.
"""

import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import reprlib
from collections.abc import Iterator
from typing import Any

from absl import logging
from etils import epath

from data_pipelines.refava.pickles import as_list, as_number, read_pickle
from ravar_jax.class_names import AVA_ACTIONS
from ravar_jax.errors import UserError

SPLITS = ("train", "val", "test")
FIELDS = ("split", "video", "second", "person", "x1", "y1", "x2", "y2", "labels", "sentence")
PARTS = ("label", "keyframe", "description")
PICKLE_NAMES = {
    "refava": "{split}_set_{part}_crr_final.pkl",
    "refava_plus_plus": "{split}_{part}.pkl",
}
# video ___ second [ ___ anything ] ___ person; a video's name may itself end in "_".
_KEY = re.compile(r"(?P<video>.+?)___(?P<second>\d{1,9})___(?P<person>.+)", re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")  # cannot be written as UTF-8
_repr = (
    reprlib.repr
)  # shortens: a crafted pickle of a few bytes can have a value that prints as gigabytes
_BOX_SLACK = 1e-6  # beyond [0, 1]: rounding of float32 coordinates


@dataclasses.dataclass(frozen=True)
class Person:
    """One described person of a window."""

    person_id: str
    sentence: str
    box: tuple[
        float, float, float, float
    ]  # x1, y1, x2, y2 at the key frame, fractions of width and height
    labels: tuple[int, ...]  # AVA ids 1..80, ascending


@dataclasses.dataclass(frozen=True)
class Window:
    """Three seconds of a video around a key time."""

    clip_id: str  # video___second, the second as four digits
    video_id: str
    key_second: float  # on the clock of the annotations: AVA counts from the start of the movie
    people: tuple[Person, ...]  # by person id, numbers in order of value


@dataclasses.dataclass(frozen=True)
class Annotations:
    """Everything found in a folder."""

    config_name: str  # refava, refava_plus_plus or ava_style
    splits: dict[str, tuple[Window, ...]]  # windows by video and second
    sha256: str  # of the files' names and bytes


@dataclasses.dataclass(frozen=True)
class _Row:
    """One person as read; `where` says for each field which file and record messages name."""

    where: dict[str, str]
    split: str
    video: str
    second: float
    person: str
    box: Any
    labels: Any
    sentence: Any


def read_annotations(
    folder_name: str | os.PathLike, faults: list[str] | None = None
) -> Annotations:
    """Reads and checks a folder of annotations.

    Args:
        folder_name: The folder.
        faults: Where given, a line for every fault of a person is added to it, and these people are left out.

    Raises:
        UserError: One line naming the file, the record and the field of the first fault and counting the others; or
            that the folder holds no annotations or those of more than one layout.
    """
    folder = epath.Path(folder_name)
    if not folder.is_dir():
        raise UserError(f"--annotations {folder}: no such directory")
    pickles = {name: _pickle_files(folder, pattern) for name, pattern in PICKLE_NAMES.items()}
    tables = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".csv", ".jsonl"))
    found = [name for name, files in pickles.items() if files] + (["ava_style"] if tables else [])
    if not found:
        expected = PICKLE_NAMES["refava"].format(split="train", part="label")
        raise UserError(
            f"--annotations {folder}: no annotations; expected {expected} and its like, *.csv or *.jsonl"
        )
    if len(found) > 1:
        raise UserError(
            f"--annotations {folder}: holds the layouts {' and '.join(found)}; expected one of them"
        )
    stop, faults = faults is None, [] if faults is None else faults
    if tables:
        files, rows = tables, [row for table in tables for row in _table_rows(table, faults)]
    else:
        files = [path for parts in pickles[found[0]].values() for path in parts.values()]
        rows = [
            r
            for split, parts in pickles[found[0]].items()
            for r in _pickle_rows(split, parts, faults)
        ]
    splits = _group(rows, faults)
    if faults and (stop or not splits):
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise UserError(faults[0] + more)
    if not splits:
        raise UserError(f"--annotations {folder}: the files hold no person")
    return Annotations(found[0], splits, _hash(files))


def _hash(files: list[epath.Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _pickle_files(folder: epath.Path, pattern: str) -> dict[str, dict[str, epath.Path]]:
    """Returns {split: {part: path}} of the splits that are there."""
    found: dict[str, dict[str, epath.Path]] = {}
    for split in SPLITS:
        paths = {part: folder / pattern.format(split=split, part=part) for part in PARTS}
        present = [part for part in PARTS if paths[part].exists()]
        if present and len(present) < len(PARTS):
            missing = next(part for part in PARTS if part not in present)
            raise UserError(f"{paths[missing]}: missing, while {paths[present[0]].name} is there")
        if present:
            found[split] = paths
    return found


def _pickle_rows(split: str, paths: dict[str, epath.Path], faults: list[str]) -> Iterator[_Row]:
    parts = {}
    for part, path in paths.items():
        parts[part] = read_pickle(path)
        if not isinstance(parts[part], dict):
            raise UserError(f"{path}: expected a dict of keys, found {type(parts[part]).__name__}")
    labels, keyframes, descriptions = (parts[part] for part in PARTS)
    for part in ("keyframe", "description"):
        for one, other in (("label", part), (part, "label")):
            lacking = [key for key in parts[one] if key not in parts[other]]
            if lacking:
                raise UserError(
                    f"{paths[other]}: lacks the key {_key_name(lacking[0])} of {paths[one].name} ({len(lacking)} keys)"
                )
        # The released loader pairs by position; where the orders differ it pairs wrongly.
        if list(parts[part]) != list(labels):
            logging.warning(
                "%s: order of keys differs from %s; paired by key", paths[part], paths["label"].name
            )
    for key, label_list in labels.items():
        match = _KEY.fullmatch(key) if isinstance(key, str) else None
        if match is None:
            faults.append(
                f"{paths['label']}: key {_key_name(key)}; expected video___second___person"
            )
            continue
        boxes, sentences = as_list(keyframes[key]), as_list(descriptions[key])
        # Only the first box and the first sentence count, as released.
        box = as_list(boxes[0]) if boxes else None
        sentence = sentences[0] if sentences else descriptions[key]
        where = {
            "key": f"{paths['label']}, key {key!r}",
            "box": f"{paths['keyframe']}, key {key!r}",
            "labels": f"{paths['label']}, key {key!r}",
            "sentence": f"{paths['description']}, key {key!r}",
        }
        second, person = float(match["second"]), match["person"]
        yield _Row(where, split, match["video"], second, person, box, label_list, sentence)


def _key_name(key: Any) -> str:
    return repr(key[:200]) if isinstance(key, str) else _repr(key)


def _table_rows(path: epath.Path, faults: list[str]) -> Iterator[_Row]:
    for number, fields in _read_table(path):
        record = f"{path}, line {number}"
        missing = [name for name in FIELDS if fields.get(name) is None]
        if missing:
            faults.append(f"{record}: field {missing[0]} is missing; expected {','.join(FIELDS)}")
            continue
        second = _parsed_number(fields["second"])
        if second is None or second < 0:
            faults.append(
                f"{record}: second is {fields['second']!r}; expected a number of seconds from 0 on"
            )
            continue
        box = [_parsed_number(fields[name]) for name in ("x1", "y1", "x2", "y2")]
        labels = fields["labels"]
        if isinstance(labels, str):  # CSV: ids with spaces, commas or semicolons between
            labels = [_parsed_number(word) for word in re.split(r"[\s,;]+", labels.strip()) if word]
        strings = {name: str(fields[name]).strip() for name in ("split", "video", "person")}
        if empty := [name for name, value in strings.items() if not value]:
            faults.append(f"{record}: {empty[0]} is empty")
            continue
        where = dict.fromkeys(("key", "box", "labels", "sentence"), record)
        yield _Row(
            where, box=box, labels=labels, sentence=fields["sentence"], second=second, **strings
        )


def _read_table(path: epath.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, fields) of a CSV file with a header, or of a JSONL file."""
    try:
        with io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="") as file:
            if path.suffix.lower() == ".csv":
                # Strict: a stray quotation mark must not swallow the lines after it.
                reader = csv.DictReader(file, strict=True)
                header = list(reader.fieldnames or [])
                for name in FIELDS:
                    if header.count(name) != 1:
                        problem = "lacks" if name not in header else "repeats"
                        raise UserError(
                            f"{path}, line 1: the header {problem} {name}; expected {','.join(FIELDS)}"
                        )
                for fields in reader:
                    if None in fields:
                        raise UserError(
                            f"{path}, line {reader.line_num}: has more cells than the header; a text with commas needs "
                            "quotation marks"
                        )
                    yield reader.line_num, fields
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    fields = json.loads(line)
                    if not isinstance(fields, dict):
                        raise UserError(f"{path}, line {number}: expected an object")
                    yield number, fields
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: not JSON ({error.msg})") from error
    # A ValueError is of text that is not UTF-8, or of a JSON number of thousands of digits.
    except (ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from error


def _parsed_number(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return None
        return number if math.isfinite(number) else None
    return as_number(value)


def _group(rows: list[_Row], faults: list[str]) -> dict[str, tuple[Window, ...]]:
    """Returns the windows of the splits; people with a fault, and windows and splits without people, are left out."""
    windows: dict[str, dict[tuple[str, float], dict[str, tuple[_Row, Person]]]] = {}
    for row in rows:
        person = _checked(row, faults)
        if row.split not in SPLITS:
            faults.append(
                f"{row.where['key']}: split is {row.split!r}; expected {', '.join(SPLITS)}"
            )
        people = windows.setdefault(row.split, {}).setdefault((row.video, row.second), {})
        if row.person in people:
            first = people[row.person][0].where["key"]
            faults.append(
                f"{row.where['key']}: person {row.person!r} of this video and second is a duplicate of {first}"
            )
        elif person:
            people[row.person] = row, person
    return {
        split: tuple(
            Window(clip_name(video, second), video, second, _named(people))
            for (video, second), people in sorted(windows[split].items())
            if people
        )
        for split in SPLITS
        if any(windows.get(split, {}).values())
    }


def clip_name(video: str, second: float) -> str:
    """Returns a window's id: `video___0902`, or `video___0902.500` where the second is not whole."""
    return f"{video}___{int(second):04d}" if second == int(second) else f"{video}___{second:08.3f}"


def _named(people: dict[str, tuple[_Row, Person]]) -> tuple[Person, ...]:
    """Orders the people of a window by id and shortens ids.

    The person is the last field of a key; what stands before it is kept only where it is needed to tell two apart.
    """
    last = [name.rpartition("___")[2] for name in people]
    if len(set(last)) == len(last):
        renamed = [
            dataclasses.replace(p, person_id=name)
            for name, (_, p) in zip(last, people.values(), strict=True)
        ]
    else:
        renamed = [person for _, person in people.values()]
    return tuple(sorted(renamed, key=lambda person: _id_order(person.person_id)))


def _id_order(person_id: str) -> tuple:
    return (0, int(person_id), person_id) if person_id.isdecimal() else (1, 0, person_id)


def _checked(row: _Row, faults: list[str]) -> Person | None:
    """Returns the person of a row; None, and lines in `faults`, for faults in its fields."""
    found = len(faults)
    for field, text in (("video", row.video), ("person", row.person), ("sentence", row.sentence)):
        if isinstance(text, str) and _SURROGATE.search(text):
            place = row.where["sentence" if field == "sentence" else "key"]
            faults.append(f"{place}: {field} holds half a character (a lone surrogate)")
    if row.video in (".", "..") or any(character in row.video for character in "/\\\0"):
        faults.append(
            f"{row.where['key']}: video is {row.video!r}; expected the name of a file or folder"
        )
    box = (
        []
        if row.box is None
        else [number for number in map(as_number, row.box) if number is not None]
    )
    if len(box) != 4 or len(row.box) != 4:
        faults.append(
            f"{row.where['box']}: box is {_repr(row.box)}; expected four finite numbers x1, y1, x2, y2"
        )
    elif min(box) < -_BOX_SLACK or max(box) > 1.0 + _BOX_SLACK:
        faults.append(
            f"{row.where['box']}: box {box} is outside [0, 1]; expected fractions of width and height"
        )
    elif box[2] <= box[0] or box[3] <= box[1]:
        faults.append(f"{row.where['box']}: box {box} has x2 <= x1 or y2 <= y1")
    values = as_list(row.labels)
    if values is None:
        faults.append(
            f"{row.where['labels']}: labels is {_repr(row.labels)}; expected a list of AVA ids"
        )
    labels = set()
    for value in values or []:
        number = as_number(value)
        if number is None or number not in AVA_ACTIONS:
            faults.append(
                f"{row.where['labels']}: label id {_repr(value)}; expected whole numbers 1..{len(AVA_ACTIONS)}"
            )
            break
        labels.add(int(number))
    if not isinstance(row.sentence, str):
        faults.append(f"{row.where['sentence']}: sentence is {_repr(row.sentence)}; expected text")
    elif not row.sentence.strip():
        faults.append(f"{row.where['sentence']}: sentence is empty")
    if len(faults) > found:
        return None
    x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in box)
    return Person(row.person, row.sentence, (x1, y1, x2, y2), tuple(sorted(labels)))
