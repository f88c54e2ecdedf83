r"""Tells what the person that a sentence describes does in a video file, and where.

    python launch/predict.py --workdir runs/quickstart --video clip.mp4 \
        --sentence "the woman in the red coat on the left" --output predictions/clip

Writes prediction.json (ten actions with probabilities, the box), overlay.png (the key frame) and overlay.mp4 (the three
seconds around it). The frames are those that evaluation reads, at the same positions of the window.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags

from launch import command_line
from ravar_jax.errors import UsageError, UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_STEP = command_line.define_step_flag()
_VIDEO = flags.DEFINE_string("video", None, "Video file.", required=True)
_SENTENCE = flags.DEFINE_string("sentence", None, "Description of one person.", required=True)
_TIME = flags.DEFINE_float(
    "time", None, "Key time in seconds from the video's first frame. Default: the middle."
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write to.", required=True)

_LISTED = 5  # actions in the pictures
_VIDEO_SHORT_SIDE = 720  # of overlay.mp4, at most


def main() -> None:
    """Decodes the window, predicts, writes the three files and prints the actions."""
    sentence = _SENTENCE.value.strip()
    if not sentence:
        raise UserError("--sentence is empty: describe one person of the video")
    if _TIME.value is not None and not 0 <= _TIME.value < math.inf:
        raise UsageError(f"--time={_TIME.value}: expected seconds, at least 0")
    # Imported here so that --help and a wrong flag answer at once.
    import json

    from data_pipelines.video import FRAMES_PER_SECOND, probe, read_window
    from data_pipelines.video_clip import read_evaluation_frames
    from ravar_jax import overlay, predict
    from ravar_jax.config_check import write_atomically
    from ravar_jax.restore import restore_run

    info = probe(_VIDEO.value)
    time = info.duration / 2 if _TIME.value is None else _TIME.value
    window, window_info = read_window(_VIDEO.value, time, short_side=_VIDEO_SHORT_SIDE)
    command_line.start_jax()
    run = restore_run(_WORKDIR.value, _STEP.value)
    frames = read_evaluation_frames(run.config, _VIDEO.value, time)
    batch, cut = predict.single_batch(
        run.config, run.tokenizer, frames.clips, sentence, frames.key_frame
    )
    if cut:
        length = run.config.data.text_length
        print(f"warning: --sentence is longer than {length} tokens and was cut", file=sys.stderr)
    logits, box = predict.predict(run.task, run.params, run.frozen, batch)
    prediction = predict.prediction(
        video=_VIDEO.value,
        sentence=sentence,
        time_seconds=time,
        action_logits=logits,
        box=box,
        frame_size=info.size,
        detections_source=predict.detections_source(run.config),
        frames_repeated=window_info.frames_repeated,
    )

    output = Path(_OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(prediction, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(output / "prediction.json", text + "\n")
    actions = [(row["name"], row["probability"]) for row in prediction["actions"]]
    shown = (sentence, prediction["box"], actions[:_LISTED])
    overlay.draw_prediction(frames.picture, *shown).save(output / "overlay.png")
    if overlay.can_write_video():
        pictures = (overlay.draw_prediction(frame, *shown) for frame in window)
        overlay.write_video(output / "overlay.mp4", pictures, FRAMES_PER_SECOND)
    print("\n".join(f"{probability:.3f}  {name}" for name, probability in actions[:_LISTED]))
    print(
        f"box {prediction['box_pixels']} pixels at {prediction['time_seconds']} s; wrote {output}/"
    )


if __name__ == "__main__":
    command_line.run(main)
