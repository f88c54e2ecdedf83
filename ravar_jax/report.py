"""The report of a finished run: `report.md`, its curves and its sheet of examples.

metrics.jsonl --> curves.png
test_*.json, final_metrics.json --> tables
shown examples (frame, truth, prediction) --> examples.png
all of it --> report.md
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ravar_jax import overlay
from ravar_jax.class_names import AVA_ACTIONS
from ravar_jax.errors import UserError
from ravar_jax.metrics import box_iou

CURVES_FILE, EXAMPLES_FILE, REPORT_FILE = "curves.png", "examples.png", "report.md"
SENTENCES = ("true", "swapped", "blank")
METRICS = ("mIoU", "mAP_macro", "mAP_weighted", "AUROC_macro", "AUROC_weighted")
CELL_WIDTH = 620
TOP_ACTIONS = 4
_CURVE_COLORS = (overlay.PREDICTED, overlay.TRUE, (110, 170, 255))


@dataclasses.dataclass(frozen=True)
class Example:
    """One example of the sheet.

    Attributes:
        frame: (H, W, 3) uint8 RGB key frame.
        sentence: given to the model.
        true_box: (4,) x1, y1, x2, y2 fractions.
        box: (4,) predicted, likewise.
        labels: (80,) multi-hot.
        action_logits: (80,).
    """

    frame: np.ndarray
    sentence: str
    true_box: np.ndarray
    box: np.ndarray
    labels: np.ndarray
    action_logits: np.ndarray


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the lines of `metrics.jsonl`.

    Raises:
        UserError: the file is missing or a line is not an object with a `step`.
    """
    file = workdir / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"no {file}: expected the workdir of a run of launch/train.py")
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines() if line]
        return [row for row in rows if isinstance(row["step"], int)]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: expected one JSON object with a step on every line") from error


def read_scores(workdir: Path) -> dict[str, dict[str, Any]]:
    """Returns the scores on the test split by kind of sentence: `true`, and `swapped`, `blank` where evaluated.

    Reads `test_<kind>.json`; without `test_true.json` the true score is that of `final_metrics.json`.

    Raises:
        UserError: there is no true score, or a file is not what `launch/evaluate.py` writes.
    """
    files = {kind: workdir / f"test_{kind}.json" for kind in SENTENCES}
    if not files["true"].is_file():
        files["true"] = workdir / "final_metrics.json"
    scores = {}
    for kind, file in files.items():
        if not file.is_file():
            continue
        try:
            scores[kind] = json.loads(file.read_text())
            scores[kind]["test/mIoU"], scores[kind]["per_class"], scores[kind]["sentences"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: expected scores of the test split") from error
    if "true" not in scores:
        raise UserError(f"no {files['true']}: the run in {workdir} has not finished")
    return scores


def markdown(
    config: Any, arithmetic: str, scores: Mapping[str, Mapping[str, Any]], num_examples: int
) -> str:
    """Returns the report's text.

    Args:
        config: of the run.
        arithmetic: its switches in words.
        scores: of `read_scores`.
        num_examples: how many the picture shows; 0 leaves it out.
    """
    true = scores["true"]
    data = (
        f"{config.data.dataset}, seed {config.data.seed}"
        if config.data.dataset == "mini_refava"
        else config.data.dataset
    )
    lines = [
        "# Report of a run",
        "",
        f"Arithmetic: {arithmetic}. {true['step']} steps of {config.train.batch_size} examples, seed {config.seed}; "
        f"data: {data}; {'cached features' if config.data.feature_cache else 'pixels'}. "
        f"Test split: {true['num_examples']} examples.",
        "",
        "## Scores on the test split",
        "",
        "| | " + " | ".join(METRICS) + " | examples |",
        "|---|" + "---:|" * (len(METRICS) + 1),
    ]
    names = {
        "true": "with its own sentence",
        "swapped": "with the sentence of another person of the same window",
        "blank": "without a sentence",
    }
    for kind, row in scores.items():
        cells = [_number(row.get(f"test/{metric}")) for metric in METRICS]
        lines.append(f"| {names[row['sentences']]} | {' | '.join(cells)} | {row['num_examples']} |")
        if kind == "swapped" and row.get("true_sentences"):
            cells = [_number(row["true_sentences"].get(f"test/{metric}")) for metric in METRICS]
            lines.append(
                f"| the same examples, own sentence | {' | '.join(cells)} | {row['num_examples']} |"
            )
    cells = [_number(true.get(f"test/prior_{metric}")) for metric in METRICS]
    lines.append(f"| class prior (what prevalence alone scores) | {' | '.join(cells)} | |")
    lines += [
        "",
        "A model that refers scores high with a person's own sentence and falls with another person's: box and labels "
        "stay those of the first person.",
        "",
        "## Training",
        "",
        f"![curves]({CURVES_FILE})",
        "",
    ]
    if num_examples:
        lines += [
            "## Examples",
            "",
            f"{num_examples} examples of the test split at even distances, not selected by score; where a window has "
            "several people, two of them side by side. Over the actions, the sentence that the model was given. "
            "Green: true box and actions. Orange: predicted.",
            "",
            f"![examples]({EXAMPLES_FILE})",
            "",
        ]
    lines += [
        "## Per class",
        "",
        "| id | action | positives | AP | AUROC |",
        "|---:|---|---:|---:|---:|",
    ]
    for action_id, row in sorted(true["per_class"].items(), key=lambda item: int(item[0])):
        if row["positives"]:
            ap, auroc = _number(row["AP"]), _number(row["AUROC"])
            lines.append(f"| {action_id} | {row['name']} | {row['positives']} | {ap} | {auroc} |")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def draw_example(example: Example) -> Image.Image:
    """Returns the frame with both boxes over a panel with the sentence, the truth and the top actions."""
    iou = float(box_iou(example.box[None], example.true_box[None])[0])
    boxes = [
        overlay.DrawnBox(example.true_box, overlay.TRUE),
        overlay.DrawnBox(example.box, overlay.PREDICTED),
    ]
    picture = overlay.draw_boxes(example.frame, boxes, CELL_WIDTH)
    probabilities = 1 / (1 + np.exp(-np.clip(example.action_logits.astype(np.float64), -60, 60)))
    columns = np.argsort(-probabilities, kind="stable")[:TOP_ACTIONS]
    actions = [(AVA_ACTIONS[int(c) + 1], float(probabilities[c])) for c in columns]
    true = [AVA_ACTIONS[int(c) + 1] for c in np.flatnonzero(example.labels)]
    note = f"true: {', '.join(true)}. IoU {iou:.2f}"
    panel = overlay.draw_panel(example.sentence, actions, CELL_WIDTH, note=note, marked=true)
    return overlay.stack(picture, panel)


def draw_sheet(examples: Sequence[Example], columns: int = 2) -> Image.Image:
    """Returns the examples in rows of `columns`, in order; a row is as high as its highest cell."""
    cells = [draw_example(example) for example in examples]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    gap = 12
    heights = [max(cell.height for cell in row) for row in rows]
    size = (columns * (CELL_WIDTH + gap) + gap, sum(heights) + gap * (len(rows) + 1))
    sheet = Image.new("RGB", size, (250, 250, 250))
    y = gap
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            x = gap + column * (CELL_WIDTH + gap)
            sheet.paste(overlay.BACKGROUND, (x, y, x + CELL_WIDTH, y + height))
            sheet.paste(cell, (x, y))
        y += height + gap
    return sheet


def draw_curves(rows: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Returns two plots over the steps: the training losses, and the scores on the val split."""
    losses = {name: _series(rows, f"train/{name}") for name in ("loss", "action_loss", "box_loss")}
    scores = {name: _series(rows, f"val/{name}") for name in ("mAP_macro", "mIoU", "AUROC_macro")}
    picture = Image.new("RGB", (1280, 400), overlay.BACKGROUND)
    highest = max((value for points in losses.values() for _, value in points), default=1.0)
    _plot(picture, (0, 0, 640, 400), "training loss", losses, highest or 1.0)
    _plot(picture, (640, 0, 1280, 400), "val split", scores, 1.0)
    return picture


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _plot(
    picture: Image.Image,
    area: tuple[int, int, int, int],
    title: str,
    series: Mapping[str, Sequence[tuple[int, float]]],
    highest: float,
) -> None:
    """Draws lines over steps (x from 0 to the last step, y from 0 to `highest`) into one area."""
    draw = ImageDraw.Draw(picture)
    text_font = overlay.font(15)
    left, top, right, bottom = area[0] + 70, area[1] + 70, area[2] - 30, area[3] - 45
    last = max((step for points in series.values() for step, _ in points), default=1)
    draw.text((left, area[1] + 14), title, fill=overlay.TEXT, font=overlay.font(19))
    for tick in range(5):
        y = bottom - (bottom - top) * tick / 4
        draw.line((left, y, right, y), fill=overlay.BAR)
        value = highest * tick / 4
        draw.text((left - 8, y), f"{value:.3g}", fill=overlay.FAINT, font=text_font, anchor="rm")
    for tick in range(5):
        x = left + (right - left) * tick / 4
        step = f"{round(last * tick / 4)}"
        draw.text((x, bottom + 8), step, fill=overlay.FAINT, font=text_font, anchor="ma")
    x_legend = float(left)
    for color, (name, points) in zip(_CURVE_COLORS, series.items(), strict=True):
        if not points:
            continue
        draw.rectangle((x_legend, area[1] + 48, x_legend + 14, area[1] + 53), fill=color)
        draw.text((x_legend + 20, area[1] + 41), name, fill=overlay.TEXT, font=text_font)
        x_legend += 44 + text_font.getlength(name)
        line = [
            (
                left + (right - left) * step / last,
                bottom - (bottom - top) * min(value, highest) / highest,
            )
            for step, value in points
        ]
        if len(line) > 1:
            draw.line(line, fill=color, width=2)
        for x, y in line if len(line) < 12 else ():
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=color)


def write_report(workdir: Path, config: Any, arithmetic: str, examples: Sequence[Example]) -> Path:
    """Writes `report.md`, `curves.png` and, if there are examples, `examples.png`; returns the report's path."""
    rows, scores = read_metrics(workdir), read_scores(workdir)
    draw_curves(rows).save(workdir / CURVES_FILE)
    if examples:
        draw_sheet(examples).save(workdir / EXAMPLES_FILE)
    report = workdir / REPORT_FILE
    report.write_text(markdown(config, arithmetic, scores, len(examples)))
    return report
