"""Renders clips in child processes that know nothing of TensorFlow.

`rendered_clips` starts a few `python -m data_pipelines.mini_refava.worker`, each rendering every n-th clip of a split,
and yields their records in the order of the clips. Plain child processes, not `multiprocessing`: forking a process
that holds TensorFlow's threads can hang, and spawning would import the caller's main module, TensorFlow included.
"""

import os
import pathlib
import pickle
import struct
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

from data_pipelines.mini_refava import scenes

_LENGTH = struct.Struct("<Q")


def clip_record(seed: int, split: str, index: int, stored_frames: int) -> dict[str, Any]:
    """Draws a clip and returns its record as in `schema.record_features`, frames as JPEG bytes."""
    scene = scenes.make_scene(seed, split, index)
    positions = scenes.stored_positions(stored_frames)
    return {
        "clip_id": scene.clip_id,
        "video_id": scene.video_id,
        "key_time": scenes.KEY_TIME,
        "frames": [scenes.encode(scenes.render(scene, position)) for position in positions],
        "frame_indices": positions,
        "people": [
            {
                "person_id": person.person_id,
                "sentence": person.sentence,
                "box": person.box,
                "labels": list(person.actions.labels),
            }
            for person in scene.people
        ],
        "detections": [
            {"box": d.box, "class_id": d.class_id, "score": d.score} for d in scene.detections
        ],
    }


def rendered_clips(
    seed: int, split: str, num_clips: int, stored_frames: int, num_workers: int | None = None
) -> Iterator[dict[str, Any]]:
    """Yields the records of clips 0..num_clips-1 of a split, in order, rendered on all cores.

    Raises:
      RuntimeError: if a worker ends before its last clip; its own message is on stderr.
    """
    count = max(1, min(num_workers or os.cpu_count() or 1, num_clips))
    root = str(pathlib.Path(__file__).resolve().parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    arguments = [str(v) for v in (seed, split, num_clips, stored_frames, count)]
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(count):
            command = [
                sys.executable,
                "-m",
                "data_pipelines.mini_refava.worker",
                *arguments,
                str(number),
            ]
            workers.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment))
        for index in range(num_clips):
            record = _receive(workers[index % count])
            if record is None:
                raise RuntimeError(
                    f"MiniRefAVA worker {index % count} ended before clip {index} of {split} "
                    f"(exit code {workers[index % count].wait()})"
                )
            yield record
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            if worker.stdout is not None:
                worker.stdout.close()


def _receive(worker: "subprocess.Popen[bytes]") -> dict[str, Any] | None:
    assert worker.stdout is not None
    header = worker.stdout.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(header)
    payload = worker.stdout.read(length)
    # A pickle from our own child, never from a file.
    return pickle.loads(payload) if len(payload) == length else None


def _send(stream: BinaryIO, record: dict[str, Any]) -> None:
    payload = pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(_LENGTH.pack(len(payload)))
    stream.write(payload)
    stream.flush()


def main(arguments: list[str]) -> None:
    """Renders every `count`-th clip from `number` on and writes length-prefixed records to stdout."""
    seed, split, num_clips, stored_frames, count, number = arguments
    for index in range(int(number), int(num_clips), int(count)):
        _send(sys.stdout.buffer, clip_record(int(seed), split, index, int(stored_frames)))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (BrokenPipeError, KeyboardInterrupt):
        sys.exit(1)  # the parent is gone or going; it has the message
