"""Which checkpoint of a run is read."""

import shutil

import pytest

from ravar_jax.errors import UsageError, UserError
from ravar_jax.restore import restore_run
from tests import untrained_run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    untrained_run.write_backbone(folder / "backbone")
    config = untrained_run.make_config(
        folder / "backbone",
        checkpoint__keep_best=1,
        checkpoint__best_metric="mIoU",
        checkpoint__keep_last=1,
    )
    scores = {
        step: {"mIoU": value, "mAP_macro": -value} for step, value in ((3, 0.2), (6, 0.4), (9, 0.3))
    }
    untrained_run.write_run(folder / "run", config, scores)
    return folder / "run"


@pytest.mark.parametrize(("asked", "step"), [("latest", 9), ("best", 6), ("6", 6)])
def test_a_checkpoint_is_chosen(workdir, asked, step):
    assert restore_run(workdir, asked).step == step


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ("3", UserError, r"--step=3: .*checkpoints has checkpoints of step 6, 9"),
        ("last", UsageError, "--step=last: expected latest, best or the number"),
    ],
)
def test_what_is_not_there_is_named(workdir, asked, error, message):
    with pytest.raises(error, match=message):
        restore_run(workdir, asked)


def test_best_is_refused_where_none_was_kept(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    file.write_text(file.read_text().replace('"keep_best": 1', '"keep_best": 0'))
    with pytest.raises(UserError, match=r"--step=best: .*keep_best=1"):
        restore_run(tmp_path / "run", "best")


def test_another_step_is_offered_for_a_damaged_one(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "9" / "meta" / "metadata").unlink()
    with pytest.raises(UserError, match=r"checkpoints/9 .*meta/metadata.*of step 6 \(--step\)"):
        restore_run(tmp_path / "run")
