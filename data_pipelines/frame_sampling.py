"""Which of the 90 positions of a window are read: training, evaluation and random policies, and the key frame.

Every policy is a pure function of the config and of (seed, epoch, example), so that a resumed run reads the same
frames.
"""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.record_index import RecordIndex
from data_pipelines.schema import KEY_POSITION, NUM_POSITIONS
from ravar_jax.errors import UsageError, UserError


@dataclasses.dataclass(frozen=True)
class FrameSampler:
    """The frames of an example.

    Attributes:
        policy: name of the policy, for messages.
        clips: int (T,) or (E, T), positions 0..89 of every frame; zeros for the random policy.
        positions: int (U,), the distinct positions in `clips`, ascending; empty for the random policy.
        rows: int, shape of `clips`, row of `positions` (or of the drawn ones) for every frame.
        random: whether the positions are drawn for each example.
        segments: whether they are drawn one from each of as many equal parts of the window.
        seed: of the draws.
    """

    policy: str
    clips: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    random: bool = False
    segments: bool = False
    seed: int = 0

    def draw(self, stored: tuple[int, ...], epoch: int, example: int) -> np.ndarray:
        """Returns the distinct positions to read, int (U,) ascending; `rows` arranges them into clips.

        Args:
            stored: positions that the record stores.
            epoch: of the run.
            example: number of the example (or window) in file order.
        """
        if not self.random:
            return self.positions
        generator = np.random.default_rng([self.seed, epoch, example])
        if self.segments:
            return np.array([generator.choice(part) for part in self._parts(stored)])
        return np.sort(generator.choice(np.asarray(stored), size=self.rows.size, replace=False))

    def check(self, index: RecordIndex) -> None:
        """Refuses a dataset that does not store what the policy needs.

        Raises:
            UserError: names the policy, the position and what is stored.
        """
        for number, stored in enumerate(index.frame_sets):
            window = int(np.argmax(index.frame_set_numbers == number))
            problem = ""
            if self.random and len(stored) < self.rows.size:
                problem = f"{self.rows.size} stored positions"
            if self.segments and not all(map(len, self._parts(stored))):
                problem = f"a stored position in each of {self.rows.size} parts of the window"
            for position in self.positions:
                if int(position) not in stored:
                    problem = f"position {position}"
                    break
            if problem:
                raise UserError(
                    f"{self.policy} needs {problem}, but {index.where(window)} stores "
                    f"{', '.join(map(str, stored)) or 'no frames'}"
                )

    def _parts(self, stored: tuple[int, ...]) -> list[np.ndarray]:
        """Returns the stored positions of each part, ascending."""
        count, positions = self.rows.size, np.asarray(stored)
        parts = positions * count // NUM_POSITIONS
        return [positions[parts == part] for part in range(count)]


def training_sampler(config: ConfigDict) -> FrameSampler:
    """Returns the sampler of `data.train_frames`: frames shaped (T,).

    `uniform` takes the floor of `num_frames` evenly spaced points from 0 to 89, `head` the first positions, `random`
    distinct stored positions, drawn anew for each example and epoch, in order of time; `random_segments` draws one
    from each of `num_frames` equal parts of the window.
    """
    data = config.data
    _check_num_frames(data.num_frames)
    policy = f"data.train_frames={data.train_frames} with data.num_frames={data.num_frames}"
    if data.frames == "still":
        return _fixed("data.frames=still", np.zeros(data.num_frames, np.int64))
    if data.train_frames == "head":
        return _fixed(policy, np.arange(data.num_frames))
    if data.train_frames == "uniform":
        return _fixed(policy, _evenly_spaced(0, data.num_frames))
    zeros = np.zeros(data.num_frames, np.int64)
    return FrameSampler(
        policy,
        zeros,
        zeros[:0],
        np.arange(data.num_frames),
        random=True,
        segments=data.train_frames == "random_segments",
        seed=config.seed,
    )


def evaluation_sampler(config: ConfigDict) -> FrameSampler:
    """Returns the sampler of `data.eval_clips`: frames shaped (E, T).

    Clip j takes the floor of `num_frames` evenly spaced points from j to 89.

    Source: the released data set file, `val` and `test` branch.
    """
    data = config.data
    _check_num_frames(data.num_frames)
    clips = np.stack([_evenly_spaced(clip, data.num_frames) for clip in range(data.eval_clips)])
    if data.frames == "still":
        return _fixed("data.frames=still", np.zeros_like(clips))
    return _fixed(
        f"data.eval_clips={data.eval_clips} with data.num_frames={data.num_frames}", clips
    )


def cached_positions(config: ConfigDict) -> np.ndarray:
    """Returns the positions that a feature cache encodes, int (U,) ascending: all of training and of evaluation."""
    samplers = (training_sampler(config), evaluation_sampler(config))
    return np.unique(np.concatenate([sampler.clips.ravel() for sampler in samplers]))


def key_frame_sampler(config: ConfigDict) -> FrameSampler:
    """Returns the sampler of the detector's frame, shaped (1,): the key position, or the still as released (Q1)."""
    if config.data.frames == "still":
        return _fixed("data.frames=still", np.zeros(1, np.int64))
    return _fixed("model.detections=detr", np.full(1, KEY_POSITION))


def _evenly_spaced(first: int, count: int) -> np.ndarray:
    return np.floor(np.linspace(first, NUM_POSITIONS - 1, count)).astype(np.int64)


def _fixed(policy: str, clips: np.ndarray) -> FrameSampler:
    positions, rows = np.unique(clips, return_inverse=True)
    return FrameSampler(policy, clips, positions, rows.reshape(clips.shape))


def _check_num_frames(count: int) -> None:
    if not 1 <= count <= NUM_POSITIONS:
        raise UsageError(f"data.num_frames={count} is not in 1..{NUM_POSITIONS}")
