"""Damaged annotations, read as `launch/prepare_refava.py` reads them: trials of `fuzz.py`."""

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.refava.annotations import FIELDS, SPLITS, Annotations, read_annotations
from tests.benchmarks.fuzz_damage import Rng, Trial, cut, damage, flip

ROWS = [
    {
        "split": SPLITS[number % 3],
        "video": f"film{number % 4}",
        "second": 902 + number // 2,
        "person": str(number),
        "x1": 0.125,
        "y1": 0.25,
        "x2": 0.5 + number / 64,
        "y2": 0.75,
        "labels": [12, 1 + number],
        "sentence": f"The woman with the café’s tray, number {number}",
    }
    for number in range(16)
]


def write_pickles(folder: Path, protocol: int) -> None:
    parts: dict[str, dict[str, dict[str, Any]]] = {}
    for row in ROWS:
        key = f"{row['video']}___{row['second']:04d}___{row['person']}"
        box = np.array([row[name] for name in ("x1", "y1", "x2", "y2")])
        values = {"label": row["labels"], "keyframe": [box], "description": [row["sentence"]]}
        for part, value in values.items():
            parts.setdefault(row["split"], {}).setdefault(part, {})[key] = value
    for split, of_split in parts.items():
        for part, value in of_split.items():
            file = folder / f"{split}_set_{part}_crr_final.pkl"
            file.write_bytes(pickle.dumps(value, protocol=protocol))


def write_csv(folder: Path) -> None:
    lines = [",".join(FIELDS)]
    for row in ROWS:
        cells = {
            **row,
            "labels": "12 {}".format(row["labels"][1]),
            "sentence": f'"{row["sentence"]}"',
        }
        lines.append(",".join(str(cells[name]) for name in FIELDS))
    (folder / "annotations.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_jsonl(folder: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    (folder / "annotations.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def people_of(annotations: Annotations) -> list[Any]:
    return [
        (split, window.video_id, window.key_second, person)
        for split, windows in annotations.splits.items()
        for window in windows
        for person in window.people
    ]


def compare_people(found: Annotations, original: list[Any], count: int) -> str:
    """Returns the outcome of annotations of which `count` people are expected."""
    people = people_of(found)
    if people == original:
        return "identical"
    for *_, person in people:
        x1, y1, x2, y2 = person.box
        if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 and person.sentence.strip()):
            return "WRONG"
        if not all(1 <= label <= 80 for label in person.labels):
            return "WRONG"
        person.sentence.encode()
    return "as edited" if len(people) == count else "WRONG"


class Code:
    """Pickled, it runs a function when it is read."""

    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def damaged_pickle(intact: Path, how: Callable[[Rng, bytes], bytes] | None) -> Trial:
    """Returns a trial that damages one of the released pickles, or lets it carry code."""
    original = people_of(read_annotations(intact))

    def trial(folder: Path, rng: Rng, number: int) -> str:
        del number
        protocol = int(rng.integers(6))
        write_pickles(folder, protocol)
        files = sorted(folder.glob("*.pkl"))
        file = files[rng.integers(len(files))]
        if how is not None:
            damage(file, how, rng)
            return compare_people(read_annotations(folder), original, len(ROWS))
        trace = folder / "ran"
        calls = (
            (os.system, f"touch {trace}"),
            (open, str(trace), "w"),
            (exec, f"open({str(trace)!r}, 'w')"),
            (os.mkdir, str(trace)),
        )
        value = pickle.loads(file.read_bytes())  # as written above
        value[f"code{rng.integers(3)}"] = Code(*calls[rng.integers(len(calls))])
        file.write_bytes(pickle.dumps(value, protocol=protocol))
        try:
            read_annotations(folder)
        finally:
            if trace.exists():
                raise AssertionError("the pickle's code ran")
        return "WRONG"

    return trial


def edited_table(intact: Path, suffix: str) -> Trial:
    """Returns a trial that edits a CSV or JSONL file."""
    original = people_of(read_annotations(intact))

    def trial(folder: Path, rng: Rng, number: int) -> str:
        del number
        (write_csv if suffix == ".csv" else write_jsonl)(folder)
        file = folder / f"annotations{suffix}"
        damage(file, edit, rng)
        found = read_annotations(folder)
        lines = re.split(r"\r\n|\r|\n", file.read_bytes().decode("utf-8-sig"))
        count = sum(bool(line.strip()) for line in lines) - (suffix == ".csv")
        return compare_people(found, original, count)

    return trial


def edit(rng: Rng, data: bytes) -> bytes:
    """Returns a text file as a slip of the hand, an editor or a bad disk might leave it."""
    text = data.decode()
    lines = text.splitlines(keepends=True)
    place, line = int(rng.integers(len(text))), int(rng.integers(len(lines)))
    match rng.integers(12):
        case 0:
            return cut(rng, data)
        case 1:
            return flip(rng, data)
        case 2:
            return (text[:place] + "\0" * int(rng.integers(1, 9)) + text[place:]).encode()
        case 3:
            return text.encode(("utf-16", "utf-32", "cp1252", "utf-8-sig")[rng.integers(4)])
        case 4:
            return (text[:place] + "9" * 200_000 + text[place:]).encode()
        case 5:  # a field less
            names = [name for name in FIELDS if name in lines[line]] or ["sentence"]
            return text.replace(names[rng.integers(len(names))], "other").encode()
        case 6:
            return (text[:place] + "\",'{}[];\t\r\n"[rng.integers(11)] + text[place:]).encode()
        case 7:
            return "".join([*lines, lines[line]]).encode()
        case 8:
            return "".join(lines[:line] + lines[line + 1 :]).encode()
        case 9:
            return text.replace(",", ";").encode()
        case 10:
            number = ("nan", "1e999", "-1", "true", "null", '"x"', "[]", "{}", "9" * 5000)
            return re.sub(
                r"0\.\d+", number[rng.integers(len(number))], text, count=int(rng.integers(1, 4))
            ).encode()
        case _:
            return text.replace("café", "\\ud800" if rng.integers(2) else "\N{NULL}é").encode()


def make(folder: Path) -> dict[str, tuple[int, Trial]]:
    """Writes the intact files into `folder`; returns kind -> its share of the inputs, and its trial."""
    pickles, table = folder / "pickles", folder / "table"
    for each in (pickles, table):
        each.mkdir()
    write_pickles(pickles, 4)
    write_csv(table)
    return {
        "pickle, cut": (4, damaged_pickle(pickles, cut)),
        "pickle, bits flipped": (8, damaged_pickle(pickles, flip)),
        "pickle with code": (4, damaged_pickle(pickles, None)),
        "CSV, edited": (6, edited_table(table, ".csv")),
        "JSONL, edited": (6, edited_table(table, ".jsonl")),
    }
