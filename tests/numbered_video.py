"""Small video files whose every frame shows its own number, for tests of decoding."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT = 128, 64
_BITS = 8


def write_video(
    path: Path,
    times: Sequence[float],
    *,
    rate: Fraction | int = 25,
) -> Path:
    """Writes frame number i at `times[i]` seconds; `rate` is what the header says. AVI has constant rates only."""
    base = 1 / Fraction(rate) if path.suffix == ".avi" else Fraction(1, 60000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.bit_rate = 2_000_000
        stream.codec_context.time_base = base
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(_image(number), format="rgb24")
            frame.pts, frame.time_base = round(time / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_audio(path: Path) -> Path:
    """Writes a file with half a second of silence and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for start in range(0, 8000, 1000):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1000), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def number_of(frame: np.ndarray) -> int:
    """Returns the number that a frame (H, W, 3) shows."""
    columns = np.array_split(frame.mean(axis=(0, 2)), _BITS)
    return sum(int(column[len(column) // 2] > 128) << bit for bit, column in enumerate(columns))


def _image(number: int) -> np.ndarray:
    bits = [(number >> bit) & 1 for bit in range(_BITS)]
    return np.broadcast_to(
        np.repeat(bits, WIDTH // _BITS)[None, :, None] * np.uint8(255), (HEIGHT, WIDTH, 3)
    ).astype(np.uint8)
