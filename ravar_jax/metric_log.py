"""Metrics of a run on disk: `metrics.jsonl`, one object a line, and TensorBoard events. For process 0."""

import json
import math
import os

from etils import epath

from ravar_jax.config_check import write_atomically


class MetricLog:
    """Appends to `workdir/metrics.jsonl` and `workdir/tensorboard/`, flushed line by line.

    Opening drops what an earlier start logged after `start_step`: those steps are about to be done again, so a
    resumed run's file equals that of a run that never stopped.
    """

    def __init__(self, workdir: os.PathLike | str, start_step: int, evaluate_again: bool = False):
        """Args: evaluate_again: drop the scores of `start_step` as well, if they are there."""
        # Here, as it imports PyTorch where that is installed, and many a process logs nothing.
        from tensorboardX import SummaryWriter

        file = epath.Path(workdir) / "metrics.jsonl"
        if file.exists():
            kept = _lines_up_to(file.read_text(), start_step, evaluate_again)
            write_atomically(file, "".join(kept))
        self._file = file.open("a")
        self._events = SummaryWriter(
            str(epath.Path(workdir) / "tensorboard"), purge_step=start_step + 1
        )

    def write(self, step: int, metrics: dict[str, float | None]) -> None:
        """Logs `metrics` under `step`; None and what is not finite become null, and are left out of TensorBoard."""
        values = {name: _finite(value) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            if value is not None:
                self._events.add_scalar(name, value, step)
        self._events.flush()

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        self._events.close()

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _lines_up_to(text: str, step: int, without_last_scores: bool) -> list[str]:
    """Returns the lines of at most `step`; a last line that a kill cut short is none."""
    kept = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
            is_last_score = row["step"] == step and any(name.startswith("val/") for name in row)
            if row["step"] <= step and not (without_last_scores and is_last_score):
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    return kept
