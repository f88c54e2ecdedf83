"""A dataset whose annotations, movies and data directory have names like gs://bucket/folder.

No bucket is at hand, so TensorFlow's file system in memory stands for one: epath treats `ram://` as it treats `gs://`,
and whatever went round epath or TensorFlow would look for a folder "ram:".
"""

from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from etils import epath
from etils.epath import gpath, register

from data_pipelines import record_index
from data_pipelines.quiet_tensorflow import tf
from data_pipelines.refava import prepare, survey
from data_pipelines.refava.annotations import FIELDS, read_annotations
from data_pipelines.refava.refava_dataset_builder import RefavaConfig
from tests.numbered_video import number_of, write_video

ROWS = """
train,long,902,0,0.1,0.2,0.5,0.8,11,The man in red.
train,gone,902,0,0.1,0.2,0.5,0.8,11,The man in red.
val,long,903,0,0.1,0.2,0.5,0.8,11,The man in red.
"""


class _Memory(gpath.backend_lib._TfBackend):
    """The file system in memory cannot rename folders, which buckets can."""

    def rename(self, path: str, dst: str) -> None:
        if not tf.io.gfile.isdir(path):
            super().rename(path, dst)
            return
        for name in tf.io.gfile.listdir(path):
            self.rename(f"{path}/{name.rstrip('/')}", f"{dst}/{name.rstrip('/')}")
        if tf.io.gfile.exists(path):
            tf.io.gfile.rmtree(path)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> epath.Path:
    memory = _Memory()
    monkeypatch.setattr(gpath.backend_lib, "tf_backend", memory)
    monkeypatch.setattr(gpath, "_GCS_BACKENDS", (memory,))
    monkeypatch.setattr(gpath, "_URI_PREFIXES", (*gpath._URI_PREFIXES, "ram://"))
    monkeypatch.setattr(gpath, "_URI_SCHEMES", gpath._URI_SCHEMES | {"ram"})
    monkeypatch.setitem(gpath._URI_MAP_ROOT, "ram://", "/ram/")
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "ram", memory)
    monkeypatch.setitem(register._URI_PREFIXES_TO_CLS, "ram://", gpath.PosixGPath)
    return epath.Path("ram://bucket/folder")


def test_dataset_from_and_in_a_bucket(bucket: epath.Path, tmp_path: Path) -> None:
    for folder in ("annotations", "videos", "data"):
        (bucket / folder).mkdir(parents=True)
    (bucket / "annotations" / "people.csv").write_text(",".join(FIELDS) + ROWS)
    movie = write_video(tmp_path / "long.mp4", [number / 25 for number in range(150)])
    epath.Path(movie).copy(bucket / "videos" / "long.mp4")
    config = RefavaConfig(
        name="ava_style",
        annotations=str(bucket / "annotations"),
        videos=str(bucket / "videos"),
        movie_start_seconds=900.0,
        stored_positions=(0, 45),
        max_skipped_share=0.5,
    )
    annotations = read_annotations(config.annotations)
    expected = prepare.check(annotations, config.source())
    assert {split: report["windows_kept"] for split, report in expected.items()} == {
        "train": 1,
        "val": 1,
    }
    assert survey.estimate_bytes(annotations, config.source(), 2, 90)
    report = prepare.build(config, bucket / "data", None, {})
    (skipped,) = report["splits"]["train"]["skipped"]
    assert (skipped["reason"], skipped["windows"]) == ("no video file", 1)
    assert "ram://bucket/folder/videos/gone{.mp4" in skipped["examples"][0]["detail"]
    assert [path.name for path in (bucket / "data").iterdir()] == ["refava"]
    dataset = bucket / "data" / "refava" / "ava_style" / "1.0.0"
    index = record_index.load_index(dataset, "val")
    assert index.clip_ids == ("long___0903",)
    (record,) = tfds.as_numpy(tfds.builder_from_directory(dataset).as_dataset("val"))
    assert [number_of(frame) for frame in record["frames"]] == [37, 75]
    assert not Path("ram:").exists()
