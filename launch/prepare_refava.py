"""Turns annotations of RefAVA, RefAVA++ or your own, with the movies or their frames, into a dataset of TFRecords.

    python launch/prepare_refava.py --annotations DIR --videos DIR --data_dir data --movie_start_seconds 900

Writes DATA_DIR/refava/<refava|refava_plus_plus|ava_style>/1.0.0 with the TFRecords, their index, and report.json, which
says what was kept and what was skipped and why. The layouts are in data_pipelines/refava/README.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags

from launch import command_line

_ANNOTATIONS = flags.DEFINE_string(
    "annotations", None, "Folder of the released pickles, or of CSV or JSONL files.", required=True
)
_VIDEOS = flags.DEFINE_string(
    "videos", None, "Folder of movies <video>.mp4, .mkv, .avi, .webm or .mov."
)
_FRAMES = flags.DEFINE_string(
    "frames",
    None,
    "Instead of --videos: folder of extracted frames <video>/image_<6 digits>.jpg, 30 a second from 900 on.",
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where datasets are kept.", required=True)
_MOVIE_START = flags.DEFINE_float(
    "movie_start_seconds",
    0.0,
    "Second of the movie at which the files of --videos start; 900 for most copies of AVA.",
)
_SHORT_SIDE = flags.DEFINE_integer(
    "short_side",
    256,
    "Pixels of the shorter side of stored frames; larger ones are scaled down.",
    lower_bound=16,
)
_POSITIONS = flags.DEFINE_list(
    "stored_positions",
    [],
    "Frame positions 0..89 to store, 30 a second around the key frame 45, which is always "
    "stored. All, if not given.",
)
_JPEG_QUALITY = flags.DEFINE_integer(
    "jpeg_quality", 90, "Of the stored frames.", lower_bound=1, upper_bound=95
)
_BEAM = flags.DEFINE_list(
    "beam_pipeline_options",
    [],
    "Apache Beam options, as runner=DataflowRunner,project=P; this machine, if not given.",
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run",
    False,
    "Only check annotations and files, say what would be kept, and write DATA_DIR/refava/<config>/report.json.",
)
_MAX_SKIPPED = flags.DEFINE_float(
    "max_skipped_share",
    0.1,
    "Share of the windows that may be left out because they cannot be read; with more the command fails.",
    lower_bound=0.0,
    upper_bound=1.0,
)
_CLASS_COUNTS = flags.DEFINE_string(
    "class_counts",
    None,
    ".npy of how often each action is annotated, to compare with; RefAVA's is dataloaders/label_num.npy.",
)
_AVA_CSV = flags.DEFINE_list(
    "ava_csv",
    [],
    "AVA's own ava_train_v2.2.csv and the like, to compare people, boxes and actions with.",
)
_AVA_LABEL_MAP = flags.DEFINE_string(
    "ava_label_map", None, "AVA's own ava_action_list_v2.2.pbtxt, to compare action ids with."
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace a dataset that is already there.")

_NUM_SHOWN = 10  # faults of annotations


def main() -> None:
    """Checks the input, then builds what is not there yet."""
    import json

    from etils import epath

    from data_pipelines.refava.annotations import read_annotations
    from ravar_jax.config_check import write_atomically
    from ravar_jax.errors import UsageError, UserError

    if bool(_VIDEOS.value) == bool(_FRAMES.value):
        raise UsageError("--videos, --frames: give exactly one of them")
    if _FRAMES.value and flags.FLAGS["movie_start_seconds"].present:
        raise UsageError(
            "--movie_start_seconds: belongs to --videos; extracted frames count from second 900"
        )
    for flag, folder in (("videos", _VIDEOS.value), ("frames", _FRAMES.value)):
        if folder and not epath.Path(folder).is_dir():
            raise UserError(f"--{flag} {folder}: no such directory")
    wrong = [word for word in _POSITIONS.value if not (word.isdecimal() and int(word) < 90)]
    if wrong:
        raise UsageError(f"--stored_positions: {wrong[0]!r} is not a whole number 0..89")

    faults: list[str] | None = [] if _DRY_RUN.value else None
    annotations = read_annotations(_ANNOTATIONS.value, faults)
    # Only now, because TensorFlow takes seconds to load; quietly, if this module comes first.
    from data_pipelines.quiet_tensorflow import tf  # noqa: F401
    from data_pipelines.refava import ava_cross_check, prepare, skip_report, survey
    from data_pipelines.refava.refava_dataset_builder import (
        REPORT_NAME,
        RefavaConfig,
        describe_input,
    )

    config = RefavaConfig(
        name=annotations.config_name,
        annotations=_ANNOTATIONS.value,
        videos=_VIDEOS.value or "",
        frames=_FRAMES.value or "",
        movie_start_seconds=_MOVIE_START.value,
        short_side=_SHORT_SIDE.value,
        stored_positions=tuple(map(int, _POSITIONS.value)) or tuple(range(90)),
        jpeg_quality=_JPEG_QUALITY.value,
        max_skipped_share=_MAX_SKIPPED.value,
    )
    beam = prepare.beam_options(_BEAM.value)
    data_dir = epath.Path(_DATA_DIR.value)
    dataset = prepare.dataset_dir(data_dir, config.name)
    if not _OVERWRITE.value and not _DRY_RUN.value:
        report = prepare.finished_report(dataset, describe_input(annotations, config))
        if report:
            print(skip_report.table(report["splits"]))
            print(f"{dataset} is already complete; nothing to do (--overwrite builds it again)")
            return
    counts = survey.read_class_counts(_CLASS_COUNTS.value) if _CLASS_COUNTS.value else None
    ava_people = ava_cross_check.read_ava_csvs(_AVA_CSV.value)
    names = ava_cross_check.read_label_map(_AVA_LABEL_MAP.value) if _AVA_LABEL_MAP.value else None
    found = survey.survey(annotations, counts)
    print(survey.describe(found))
    if _AVA_CSV.value:
        found["ava_csv"] = ava_cross_check.compare_people(annotations, ava_people)
        print(ava_cross_check.describe_people(found["ava_csv"]))
    if names:
        found["ava_label_map"] = ava_cross_check.compare_label_map(annotations, names)
        print(ava_cross_check.describe_label_map(found["ava_label_map"]))
    source = config.source()
    expected = prepare.check(annotations, source)
    num_windows = sum(report["windows_kept"] for report in expected.values())
    size = survey.estimate_bytes(annotations, source, num_windows, config.jpeg_quality)
    told = "of unknown size"
    if size is not None:
        told = f"about {size / 1e9:.2g} GB (twice that while it is built)"
    if faults is not None:
        print(skip_report.table(expected))
        report_file = dataset.parent / REPORT_NAME
        content = {
            "annotation_faults": faults,
            "survey": found,
            "splits": expected,
            "estimated_bytes": size,
        }
        report_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(report_file, json.dumps(content, indent=2) + "\n")
        for fault in faults[:_NUM_SHOWN]:
            print(f"fault: {fault}")
        print(f"dry run: {num_windows} windows, {told}; wrote {report_file} and nothing else")
        if faults:
            raise UserError(
                f"{len(faults)} faults in the annotations; {report_file} has all of them"
            )
        skip_report.check_skipped(expected, _MAX_SKIPPED.value)
        return
    skip_report.check_skipped(expected, _MAX_SKIPPED.value)
    print(f"building {num_windows} windows, {told}, into {dataset}", flush=True)
    report = prepare.build(config, data_dir, beam, {"survey": found})
    print(skip_report.table(report["splits"]))
    print(f"wrote {dataset}")


if __name__ == "__main__":
    command_line.run(main)
