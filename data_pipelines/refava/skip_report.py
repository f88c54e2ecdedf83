"""What was kept of the windows and what was left out and why: counts, the error lines of a budget, a table."""

from collections import defaultdict
from typing import Any

from data_pipelines.refava.annotations import Window
from data_pipelines.refava.sources import Problem
from ravar_jax.errors import UserError

_NUM_EXAMPLES = 5


def window_line(window: Window, frames_repeated: int, problem: Problem | None) -> dict[str, Any]:
    """Returns one window's line, of which `summarise` takes a list."""
    return {
        "clip_id": window.clip_id,
        "people": len(window.people),
        "frames_repeated": frames_repeated,
        "reason": problem.reason if problem else "",
        "detail": problem.detail if problem else "",
    }


def summarise(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns what was kept of a split and what was skipped, by reason, with the first examples."""
    skipped: dict[str, list[dict[str, Any]]] = {}
    for line in sorted(lines, key=lambda line: line["clip_id"]):
        if line["reason"]:
            skipped.setdefault(line["reason"], []).append(line)
    kept = [line for line in lines if not line["reason"]]
    return {
        "windows": len(lines),
        "people": sum(line["people"] for line in lines),
        "windows_kept": len(kept),
        "people_kept": sum(line["people"] for line in kept),
        "windows_with_repeated_frames": sum(line["frames_repeated"] > 0 for line in kept),
        "frames_repeated": sum(line["frames_repeated"] for line in kept),
        "skipped": [
            {
                "reason": reason,
                "windows": len(of_reason),
                "people": sum(line["people"] for line in of_reason),
                "examples": [
                    {"clip_id": line["clip_id"], "detail": line["detail"]}
                    for line in of_reason[:_NUM_EXAMPLES]
                ],
            }
            for reason, of_reason in skipped.items()
        ],
    }


def check_skipped(splits: dict[str, dict[str, Any]], allowed: float) -> None:
    """Refuses to leave out more of the windows than allowed, and to keep none at all.

    Args:
        splits: reports of the splits, expected or of a build.
        allowed: share of all windows, 0 to 1.

    Raises:
        UserError: more are left out; names the commonest reason.
    """
    if not any(report["windows_kept"] for report in splits.values()):
        raise UserError(_nothing_kept(*next(iter(splits.items()))))
    total = sum(report["windows"] for report in splits.values())
    skipped = [reason for report in splits.values() for reason in report["skipped"]]
    count = sum(reason["windows"] for reason in skipped)
    if count > allowed * total:
        by_reason: dict[str, int] = defaultdict(int)
        for reason in skipped:
            by_reason[reason["reason"]] += reason["windows"]
        commonest = max(by_reason, key=lambda name: by_reason[name])
        raise UserError(
            f"{count} of {total} windows would be left out ({count / total:.1%}; {by_reason[commonest]}: {commonest}), "
            f"--max_skipped_share={allowed:g} allows fewer"
        )


def table(splits: dict[str, dict[str, Any]]) -> str:
    """Returns a table of what was kept and skipped, and the reasons."""
    columns = ("windows", "people", "windows_kept", "people_kept", "windows_with_repeated_frames")
    heads = ("split", "windows", "people", "windows kept", "people kept", "with repeated frames")
    rows = [
        heads,
        *((split, *(str(report[name]) for name in columns)) for split, report in splits.items()),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    for split, report in splits.items():
        for skipped in report["skipped"]:
            example = skipped["examples"][0]
            lines.append(
                f"{split}: skipped {skipped['windows']} windows ({skipped['people']} people), {skipped['reason']}; "
                f"first {example['clip_id']}: {example['detail']}"
            )
    return "\n".join(lines)


def _nothing_kept(split: str, report: dict[str, Any]) -> str:
    first = report["skipped"][0]
    example = first["examples"][0]
    return (
        f"split {split}: none of its {report['windows']} windows can be read; {first['windows']}: {first['reason']} "
        f"({example['clip_id']}: {example['detail']})"
    )
