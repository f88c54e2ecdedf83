"""Kills a small real training at random moments, resumes it each time, and compares it with one that was left alone.

    python -m tests.benchmarks.kill_loop --kills 50

The training is `launch/train.py` on the quickstart's config, with few scenes and a checkpoint every few steps, so that
many kills (SIGKILL) meet a save; with --tiny it is `tests/tiny_run.py`, whose start takes a second. One kill in five
comes while the program starts. A run that ends before all kills are done is compared, and another begins. Exit code 1
if anything differs or more than the one checkpoint that was being written is lost.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import orbax.checkpoint as ocp

from launch import command_line
from ravar_jax import checkpoints
from ravar_jax.train import train_and_evaluate
from tests import tiny_run

FORKS = multiprocessing.get_context("forkserver")
IMPORTED = ("data_pipelines.input_pipeline", "ravar_jax.train", "ravar_jax.tasks.pretrain")
TIMINGS = ("train/clips_per_second", "train/data_wait_share")
STARTS_KILLED = 0.2
EVALUATE_EVERY = 40


def config_flags(folder: Path, steps: int, save_every: int) -> list[str]:
    changes = {
        "data.data_dir": folder / "data",
        "data.num_clips": 60,
        "train.steps": steps,
        "train.batch_size": 8,
        "train.log_every_steps": 1,
        "train.eval_every_steps": EVALUATE_EVERY,
        "evaluation.batch_size": 8,
        "checkpoint.every_steps": save_every,
    }
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    return ["--config=configs/quickstart.py", *flags]


def run_tiny(steps: str, save_every: str, workdir: str) -> None:
    config = tiny_run.make_config(
        train__steps=int(steps),
        train__eval_every_steps=EVALUATE_EVERY,
        checkpoint__every_steps=int(save_every),
    )

    def batches(start: int) -> Iterator[dict[str, np.ndarray]]:
        for batch in tiny_run.train_batches(start):
            time.sleep(0.01)  # or it would save all the time
            yield batch

    task = tiny_run.make_task()
    train_and_evaluate(config, workdir, batches, tiny_run.eval_batches, task)


def run_command(name: str, arguments: list[str], output: Path) -> None:
    """Is a process: runs a command, whose output goes to a file."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code: object = 1
    try:
        if name == "tiny":
            run_tiny(*arguments)
            sys.exit(0)
        sys.argv = [f"launch/{name}.py", *arguments]
        command_line.run(importlib.import_module(f"launch.{name}").main)
    except SystemExit as end:
        code = end.code
    os._exit(int(code or 0))  # as the command ends: without Python's tear-down


def start(folder: Path, name: str, *arguments: object) -> multiprocessing.Process:
    """Starts a command in a process of its own, forked from one that has its imports, which take most of a start."""
    output = folder / "output.txt"
    output.write_text("")
    process = FORKS.Process(target=run_command, args=(name, [*map(str, arguments)], output))
    process.start()
    return process


def end(process: multiprocessing.Process) -> int:
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def run_to_its_end(folder: Path, name: str, *arguments: object) -> None:
    if end(start(folder, name, *arguments)) != 0:
        sys.exit(f"{name} failed:\n{(folder / 'output.txt').read_text()}")


def logged(workdir: Path) -> dict[tuple[int, bool], dict]:
    """Returns what is logged by step and whether it is of the val split; a line that the kill cut is left out."""
    file, rows = workdir / "metrics.jsonl", {}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        is_val = "val/mIoU" in row
        rows[row["step"], is_val] = {key: row[key] for key in row if key not in TIMINGS}
    return rows


def whole_checkpoints(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(name) for name in names if name.isdecimal())


def has_done_a_step(workdir: Path, start: int) -> bool:
    """Tells whether a run that goes on from a step has logged the next."""
    return f"from step {start} to" in (workdir.parent / "output.txt").read_text() and (
        start + 1,
        False,
    ) in logged(workdir)


def final_state(workdir: Path) -> list[tuple[str, np.ndarray]]:
    with checkpoints.open_reader(workdir) as manager:
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore())
        state = manager.restore(manager.latest_step(), args=arguments).state
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in leaves]


def differences(workdir: Path, straight: Path) -> list[str]:
    """Returns in what a finished run differs from the straight one."""
    found = [] if logged(workdir) == logged(straight) else ["metrics.jsonl"]
    name = "final_metrics.json"
    if (straight / name).exists() and (workdir / name).read_text() != (straight / name).read_text():
        found.append(name)
    for (path, ours), (_, theirs) in zip(final_state(workdir), final_state(straight), strict=True):
        if ours.tobytes() != theirs.tobytes():
            found.append(path)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=150, help="of a run")
    parser.add_argument("--save_every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="of training at most before a kill"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--tiny", action="store_true", help="train tests/tiny_run.py")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    misses: list[str] = []
    tally = {"kills": 0, "of them at the start": 0, "during a save": 0, "during an evaluation": 0}
    tally |= {"finished runs compared": 0, "most steps lost": 0, "most checkpoints lost": 0}

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/compiled"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        FORKS.set_forkserver_preload([__name__, *IMPORTED])
        if options.tiny:
            command = ["tiny", str(options.steps), str(options.save_every)]
        else:
            flags, features = (
                config_flags(folder, options.steps, options.save_every),
                folder / "features",
            )
            run_to_its_end(folder, "cache_features", *flags, "--output", features)
            command = ["train", *flags, f"--config.data.feature_cache={features}", "--workdir"]
        straight = folder / "straight"
        begin = time.monotonic()
        run_to_its_end(folder, *command, straight)
        print(
            f"straight run of {options.steps} steps: {time.monotonic() - begin:.0f} s", flush=True
        )
        expected = logged(straight)
        number, start_seconds = 0, 10.0

        def train() -> multiprocessing.Process:
            return start(folder, *command, folder / f"run{number}")

        def compare() -> None:
            nonlocal number
            tally["finished runs compared"] += 1
            found = differences(folder / f"run{number}", straight)
            misses.extend(f"run {number}: {what} differs" for what in found)
            number += 1

        while tally["kills"] < options.kills:
            workdir = folder / f"run{number}"
            before = whole_checkpoints(workdir)[-1:] or [0]
            begin, begin_time = time.monotonic(), time.time()
            process = train()
            at_start = moments.random() < STARTS_KILLED
            if at_start:
                time.sleep(moments.uniform(0, start_seconds))
            else:
                while process.is_alive() and not has_done_a_step(workdir, before[0]):
                    time.sleep(0.05)
                start_seconds = time.monotonic() - begin
                time.sleep(moments.uniform(0, options.seconds))
            process.kill()  # SIGKILL
            if end(process) == 0:
                compare()
                continue
            if process.exitcode != -signal.SIGKILL:
                sys.exit(f"a resumed run failed:\n{(folder / 'output.txt').read_text()}")
            tally["kills"] += 1
            tally["of them at the start"] += at_start
            half_written = workdir.glob("checkpoints/*tmp*")  # what an earlier kill left is older
            saving = any(path.stat().st_mtime > begin_time for path in half_written)
            tally["during a save"] += saving
            rows, newest = logged(workdir), (whole_checkpoints(workdir)[-1:] or [0])[0]
            reached = max((step for step, _ in rows), default=0)
            evaluating = (reached, False) in rows and (reached, True) not in rows
            tally["during an evaluation"] += evaluating and reached % EVALUATE_EVERY == 0
            lost = reached // options.save_every - newest // options.save_every
            tally["most steps lost"] = max(tally["most steps lost"], reached - newest)
            tally["most checkpoints lost"] = max(tally["most checkpoints lost"], lost)
            print(
                f"kill {tally['kills']}: from step {before[0]} to {reached}, "
                f"{'while saving, ' * saving}goes on from {newest}",
                flush=True,
            )
            if lost > 1:
                misses.append(f"kill {tally['kills']}: step {reached}, goes on from {newest}")
            wrong = [key for key, row in rows.items() if expected.get(key) != row]
            if wrong:
                misses.append(f"kill {tally['kills']}: step {wrong[0][0]} has other numbers")
        if end(train()) != 0:
            sys.exit(f"the last run failed:\n{(folder / 'output.txt').read_text()}")
        compare()

    print(json.dumps(tally, indent=2))
    print("\n".join(misses) or "every resumed run is bit-equal to the straight one")
    sys.exit(bool(misses))


if __name__ == "__main__":
    main()
