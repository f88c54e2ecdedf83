"""The process that decodes: it reads one request, opens one video file and answers with frames.

It runs apart from the command (`data_pipelines/video.py` starts it) because a hostile or damaged file can crash, hang
or blow up a decoder. One forward pass serves all windows of a request; it seeks over gaps. Every wanted time gets the
nearest frame by time stamp, so frame rates may be anything, also variable.

Request: one JSON line on stdin, `{path, times, key_times, short_side, max_pixels, max_frames, max_memory}`, where
`times` has one list of seconds a window. Answer on stdout: messages of an 8-byte length, a JSON header, and the
bytes of RGB frames: of its distinct frames (`frames`) those that are null; a number there is the place of the same
frame in the window before. No window at all asks for the facts about the file only.
"""

import json
import math
import os
import re
import struct
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import av
import numpy as np
from av.stream import Disposition

# Demuxers that read one plain file. Playlists (hls, concat) would let a "video" open other files and addresses.
_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,h264,hevc,m4v,mxf,dv,gif"
_SEEK_GAP = 8.0  # seconds without a wanted frame that make a seek worth while
_EPSILON = 1e-4  # seconds, below any frame interval and above rounding of time stamps
_BREAK_OFF = 0.5  # seconds of promised picture whose absence means a truncated file


class Unreadable(Exception):
    """The file cannot be used; the message goes on after its name."""


class _Video:
    """An open file, its facts and its frames in order of time; times are seconds from the first frame."""

    def __init__(self, request: dict[str, Any]):
        self._request = request
        self._num_decoded = 0
        self._stored_size: tuple[int, int] | None = None
        self._open()
        self._base = float(self._stream.time_base or 0)
        self._start = self._stream.start_time or 0
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.frame_rate = float(rate) if rate else 0.0
        whole = self._container.duration / av.time_base if self._container.duration else 0.0
        self.promised = self._promised_duration(
            whole
        )  # what the header says of the picture itself, or 0
        self.duration = self.promised or whole
        self.damaged = False  # whether the decoder has met an error since the caller last looked

    def _open(self) -> None:
        # "file:" keeps a name such as "http:x" a plain file.
        allowed = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
        try:
            self._container = av.open("file:" + self._request["path"], options=allowed)
        except (av.error.InvalidDataError, av.error.ArgumentError):
            raise Unreadable("is not a video that can be read (not a video, or damaged)") from None
        streams = [
            s for s in self._container.streams.video if not s.disposition & Disposition.attached_pic
        ]
        if not streams:
            raise Unreadable("has no video stream (audio only)")
        self._stream = streams[0]
        self._stream.thread_type = "AUTO"
        self._check_size(self._stream.codec_context.width, self._stream.codec_context.height)

    def _promised_duration(self, whole: float) -> float:
        if self._container.format.name == "avi" and self._stream.frames and self.frame_rate:
            # The duration of an AVI that has lost its index is a guess; the header's count of frames is not.
            return self._stream.frames / self.frame_rate
        if self._stream.duration:
            own = self._stream.duration * self._base
            return min(own, whole) if whole else own
        tag = self._stream.metadata.get("DURATION", "")  # Matroska: 00:00:04.000000000
        if re.fullmatch(r"\d+:\d+:[\d.]+", tag):
            hours, minutes, seconds = tag.split(":")
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        # Beside other streams the file's length is the longest one's, which says nothing about the picture.
        return whole if len(self._container.streams) == 1 else 0.0

    def frames(self, first_wanted: float) -> Iterator[tuple[float, av.VideoFrame]]:
        """Yields (seconds, frame), times ascending, from a frame at or before `first_wanted` if there is one."""
        if first_wanted > _SEEK_GAP:
            for back in (0.5, 15.0):  # an index may point past the wanted time: then further back
                if not self._seek(first_wanted - back):
                    break
                frames = self._decode()
                first = next(frames, None)
                if first is not None and first[0] <= first_wanted:
                    yield first
                    yield from frames
                    return
            self._container.close()
            self._open()
        yield from self._decode()

    def _seek(self, seconds: float) -> bool:
        try:
            self._container.seek(
                self._start + int(max(seconds, 0.0) / self._base), stream=self._stream
            )
        except (av.error.FFmpegError, ZeroDivisionError):
            return False
        return True

    def _decode(self) -> Iterator[tuple[float, av.VideoFrame]]:
        last = -math.inf
        for frame in self._decoded_packets():
            if frame.is_corrupt:
                self.damaged = True
                continue
            stamp = frame.pts if frame.pts is not None else frame.dts
            if stamp is not None:
                seconds = (stamp - self._start) * self._base
            else:  # raw streams have no stamps: count on from the frame before
                seconds = max(last, -1.0 / (self.frame_rate or 25.0)) + 1.0 / (
                    self.frame_rate or 25.0
                )
            if seconds <= last:
                continue
            last = seconds
            self._num_decoded += 1
            if self._num_decoded > self._request["max_frames"]:
                raise Unreadable(f"takes more than {self._request['max_frames']} decoded frames")
            self._check_size(frame.width, frame.height)
            yield seconds, frame

    def _decoded_packets(self) -> Iterator[av.VideoFrame]:
        packets = self._container.demux(self._stream)
        while True:
            try:
                frames = next(packets).decode()
            except (StopIteration, av.error.EOFError):
                return
            except av.error.InvalidDataError:  # this packet only: the demuxer goes on, or ends
                self.damaged = True
                continue
            yield from frames

    def measured_duration(self) -> float:
        """Returns the end of the last packet: for files whose header does not say (live recordings)."""
        self._container.close()
        self._open()
        end = 0.0
        for packet in self._container.demux(self._stream):
            if packet.pts is not None:
                end = max(end, (packet.pts - self._start + (packet.duration or 0)) * self._base)
        return end

    def end_of(self, seconds: float, frame: av.VideoFrame) -> float:
        """Returns when `frame`, shown from `seconds` on, ends."""
        return seconds + ((frame.duration or 0) * self._base or 1.0 / (self.frame_rate or 25.0))

    def pixels(self, frame: av.VideoFrame) -> np.ndarray:
        """Returns RGB uint8 (H, W, 3), upright, scaled down to the wanted short side, one size for the whole file."""
        if self._stored_size is None:
            self._stored_size = frame.width, frame.height
            shorter = min(self._stored_size)
            wanted = self._request["short_side"]
            if wanted and shorter > wanted:
                self._stored_size = (
                    round(frame.width * wanted / shorter),
                    round(frame.height * wanted / shorter),
                )
        width, height = self._stored_size
        array = frame.to_ndarray(
            format="rgb24", width=width, height=height, interpolation="BICUBIC"
        )
        return np.ascontiguousarray(np.rot90(array, round(frame.rotation / 90)))

    def upright_size(self, frame: av.VideoFrame) -> tuple[int, int]:
        """Returns width and height in pixels as the frame is to be seen."""
        return (
            (frame.height, frame.width)
            if round(frame.rotation / 90) % 2
            else (frame.width, frame.height)
        )

    def _check_size(self, width: int, height: int) -> None:
        limit = self._request["max_pixels"]
        if width * height > limit:
            raise Unreadable(
                f"has frames of {width}x{height} pixels; at most {limit} pixels are read"
            )


class _Filling:
    """Gives every wanted time its nearest frame, and sends each window once it is full."""

    def __init__(self, request: dict[str, Any], video: _Video, out: BinaryIO):
        self._video, self._out = video, out
        self._key_times = request["key_times"]
        self._wanted = sorted(
            (time, index) for index, times in enumerate(request["times"]) for time in times
        )
        self._missing = [len(times) for times in request["times"]]
        self._frames: list[list[np.ndarray]] = [[] for _ in request["times"]]  # distinct ones
        self._shown: list[list[int]] = [
            [] for _ in request["times"]
        ]  # index into those, one a wanted time
        self._repeated = [0] * len(request["times"])
        self._problems = [""] * len(request["times"])
        self._num_filled = 0
        self._num_sent = 0
        self._size = (0, 0)
        self._sent: list[np.ndarray] = []  # the distinct frames of the window before
        self.start()

    def next_time(self) -> float:
        """Returns the earliest wanted time without a frame, infinity when all have one."""
        return (
            self._wanted[self._num_filled][0] if self._num_filled < len(self._wanted) else math.inf
        )

    def start(self) -> None:
        """Begins a run of consecutive frames."""
        self._latest: tuple[float, av.VideoFrame] | None = None
        self._latest_pixels: np.ndarray | None = None
        self.progressed = False
        self._video.damaged = False

    def take(self, seconds: float, frame: av.VideoFrame) -> None:
        """Takes the next frame; the times nearer to the one before it are then settled."""
        if self._latest is None:
            self._size = self._video.upright_size(frame)
            before_first = seconds - _EPSILON
        else:
            before_first = -math.inf
            if self._video.damaged:
                for time, index in self._wanted[self._num_filled :]:
                    if time >= seconds:
                        break
                    self._problems[index] = (
                        f"is damaged between {self._latest[0]:.2f} s and {seconds:.2f} s"
                    )
            middle = (self._latest[0] + seconds) / 2 + _EPSILON
            while self.next_time() <= middle:
                self._show(outside=False)
        self._video.damaged = False
        self._latest, self._latest_pixels = (seconds, frame), None
        while self.next_time() < before_first:
            self._show(outside=True)
        self._send_full()

    def finish(self) -> None:
        """Settles the rest after the last frame: it is repeated, unless the file breaks off before its time.

        Raises:
            Unreadable: If there was no frame at all.
        """
        if self._latest is None:
            raise Unreadable("holds no frame that can be decoded (truncated or damaged?)")
        end, promised = self._video.end_of(*self._latest), self._video.promised
        broken_off = promised - end > _BREAK_OFF if promised else self._video.damaged
        for index in {
            index for time, index in self._wanted[self._num_filled :] if time >= end - _EPSILON
        }:
            if broken_off:
                told = f" of {promised:.2f} s" if promised else ""
                self._problems[index] = f"breaks off at {end:.2f} s{told} (truncated?)"
            elif self._key_times[index] > end + _EPSILON:
                self._problems[index] = (
                    f"ends at {end:.2f} s, before the wanted time {self._key_times[index]:.2f} s"
                )
        while self._num_filled < len(self._wanted):
            self._show(outside=self.next_time() >= end - _EPSILON)
        self._send_full()

    def _show(self, outside: bool) -> None:
        index = self._wanted[self._num_filled][1]
        assert self._latest is not None
        if self._latest_pixels is None:
            self._latest_pixels = self._video.pixels(self._latest[1])
        frames = self._frames[index]
        if not frames or frames[-1] is not self._latest_pixels:
            frames.append(self._latest_pixels)
        self._shown[index].append(len(frames) - 1)
        self._repeated[index] += outside
        self._missing[index] -= 1
        self._num_filled += 1
        self.progressed = True

    def _send_full(self) -> None:
        while self._num_sent < len(self._missing) and not self._missing[self._num_sent]:
            index = self._num_sent
            frames = [] if self._problems[index] else self._frames[index]
            places = {id(frame): place for place, frame in enumerate(self._sent)}
            header = {
                **_facts(self._video, self._size),
                "shown": self._shown[index],
                "frames_repeated": self._repeated[index],
                "problem": self._problems[index],
                "frames": [places.get(id(frame)) for frame in frames],
                "shape": frames[0].shape if frames else None,
            }
            _send(self._out, header, [frame for frame in frames if id(frame) not in places])
            self._frames[index], self._sent = [], frames
            self._num_sent += 1


def _facts(video: _Video, size: tuple[int, int]) -> dict[str, Any]:
    return {"frame_rate": video.frame_rate, "duration": video.duration, "size": size}


def _send(out: BinaryIO, header: dict[str, Any], frames: list[np.ndarray]) -> None:
    encoded = json.dumps(header).encode()
    out.write(struct.pack("<Q", len(encoded)) + encoded)
    for frame in frames:
        out.write(frame.data)
    out.flush()


def _answer(request: dict[str, Any], out: BinaryIO) -> None:
    video = _Video(request)
    if not request["times"]:
        first = next(video.frames(0.0), None)
        if first is None:
            raise Unreadable("holds no frame that can be decoded (truncated or damaged?)")
        size = video.upright_size(first[1])
        if not video.duration:
            video.duration = video.measured_duration()
        _send(out, _facts(video, size), [])
        return
    filling = _Filling(request, video, out)
    while filling.next_time() < math.inf:
        filling.start()
        for seconds, frame in video.frames(filling.next_time()):
            filling.take(seconds, frame)
            # Only after some progress: a seek may land far before the wanted time.
            if filling.next_time() == math.inf or (
                filling.progressed and filling.next_time() - seconds > _SEEK_GAP
            ):
                break
        else:
            filling.finish()


def main() -> None:
    """Answers the request on stdin."""
    request = json.loads(sys.stdin.buffer.readline())
    # Libraries that print must not disturb the messages.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    limit_memory(request["max_memory"])
    try:
        _answer(request, out)
    except Unreadable as error:
        _send(out, {"error": str(error)}, [])
    except av.error.FFmpegError as error:
        _send(out, {"error": f"cannot be read: {error.strerror}"}, [])
    except MemoryError:
        _send(out, {"error": f"takes more than {request['max_memory'] >> 20} MiB to decode"}, [])


def limit_memory(max_bytes: int) -> None:
    """Caps this process's address space, where the system can."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    except (ImportError, ValueError, OSError):
        pass


if __name__ == "__main__":
    main()
