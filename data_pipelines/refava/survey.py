"""What annotations hold, beyond whether they can be read: actions, movies that splits share, the size to expect."""

import collections
import itertools
from typing import Any

import numpy as np

from data_pipelines.refava.annotations import Annotations, Window
from data_pipelines.refava.sources import FrameFolder, VideoFolder
from data_pipelines.refava.staging import JpegEncoder, make_record
from ravar_jax.class_names import AVA_ACTIONS
from ravar_jax.errors import UserError

_SAMPLED_WINDOWS = 3
_NUM_DIFFERENCES = 5


def survey(annotations: Annotations, class_counts: np.ndarray | None = None) -> dict[str, Any]:
    """Returns what the splits hold.

    Args:
        annotations: of `read_annotations`.
        class_counts: float (80,), how often each action is annotated in a train split to compare with; or None.

    Returns:
        `splits`: for each split `windows`, `people`, `videos` and `labels`, {AVA id: people};
        `videos_in_several_splits`, {video: splits}; `actions_without_example`, ids that no split has. With
        `class_counts` also `class_counts`: the total variation distance of the two distributions, 0 to 1, and the
        actions that differ most, as shares of all labels.
    """
    splits: dict[str, dict[str, Any]] = {}
    of_video: dict[str, set[str]] = collections.defaultdict(set)
    for split, windows in annotations.splits.items():
        labels = collections.Counter(
            label for window in windows for person in window.people for label in person.labels
        )
        splits[split] = {
            "windows": len(windows),
            "people": sum(len(window.people) for window in windows),
            "videos": len({window.video_id for window in windows}),
            "labels": {str(label): labels[label] for label in sorted(labels)},
        }
        for window in windows:
            of_video[window.video_id].add(split)
    present = {int(label) for split in splits.values() for label in split["labels"]}
    found: dict[str, Any] = {
        "splits": splits,
        "videos_in_several_splits": {
            video: sorted(names) for video, names in sorted(of_video.items()) if len(names) > 1
        },
        "actions_without_example": sorted(set(AVA_ACTIONS) - present),
    }
    if class_counts is not None:
        found["class_counts"] = _compare(
            splits.get("train", {"labels": {}})["labels"], class_counts
        )
    return found


def read_class_counts(file: str) -> np.ndarray:
    """Returns the counts in a .npy file, float64 (80,), as RefAVA's release has them (dataloaders/label_num.npy).

    Raises:
        UserError: it is not such a file.
    """
    try:
        counts = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--class_counts {file}: not a readable .npy file") from error
    numbers = counts.shape == (len(AVA_ACTIONS),) and np.issubdtype(counts.dtype, np.number)
    if not numbers or not (counts >= 0).all() or not counts.sum() > 0:
        raise UserError(
            f"--class_counts {file}: {counts.dtype} of shape {counts.shape}, expected {len(AVA_ACTIONS)} counts"
        )
    return counts.astype(np.float64)


def describe(found: dict[str, Any]) -> str:
    """Returns a survey as text."""
    lines = []
    for split, held in found["splits"].items():
        total = sum(held["labels"].values())
        common = sorted(held["labels"].items(), key=lambda item: -item[1])[:5]
        named = ", ".join(f"{label} {AVA_ACTIONS[int(label)]} {count}" for label, count in common)
        lines.append(
            f"{split}: {held['videos']} videos, {total} labels of {len(held['labels'])} actions; {named}"
        )
    if missing := found["actions_without_example"]:
        lines.append(f"actions without an example: {', '.join(map(str, missing))}")
    for video, names in itertools.islice(found["videos_in_several_splits"].items(), 5):
        lines.append(f"warning: video {video} is in {' and '.join(names)}")
    more = len(found["videos_in_several_splits"]) - 5
    if more > 0:
        lines.append(f"warning: {more} more videos are in several splits")
    if compared := found.get("class_counts"):
        named = ", ".join(
            f"{each['id']} {AVA_ACTIONS[each['id']]} {each['here']:.1%} ({each['there']:.1%})"
            for each in compared["largest_differences"]
        )
        lines.append(
            f"labels of train against --class_counts: distance {compared['distance']:.3f}; {named}"
        )
    return "\n".join(lines)


def estimate_bytes(
    annotations: Annotations, source: VideoFolder | FrameFolder, kept: int, jpeg_quality: int
) -> int | None:
    """Returns about how many bytes the dataset's frames will take, from windows of a few videos.

    None if none of them can be read.

    Args:
        annotations: of `read_annotations`.
        source: of the frames.
        kept: windows that will be stored.
        jpeg_quality: of the stored frames.
    """
    first_of_video: dict[str, Window] = {}
    for windows in annotations.splits.values():
        for window in windows:
            first_of_video.setdefault(window.video_id, window)
    encoder = JpegEncoder(jpeg_quality)
    sizes: list[int] = []
    for video, window in first_of_video.items():
        if not source.check(video, [window]):
            sizes += [
                sum(map(len, make_record(read, source.positions, encoder)["frames"]))
                for read in source.read(video, [window])
                if not read.problem
            ]
        if len(sizes) == _SAMPLED_WINDOWS:
            break
    return round(sum(sizes) / len(sizes) * kept) if sizes else None


def _compare(labels: dict[str, int], there: np.ndarray) -> dict[str, Any]:
    here = np.asarray([labels.get(str(label), 0) for label in sorted(AVA_ACTIONS)], np.float64)
    here, there = here / max(here.sum(), 1.0), there / there.sum()
    order = np.argsort(-np.abs(here - there), kind="stable")[:_NUM_DIFFERENCES]
    return {
        "distance": float(np.abs(here - there).sum() / 2),
        "largest_differences": [
            {"id": int(row) + 1, "here": float(here[row]), "there": float(there[row])}
            for row in order
        ],
    }
