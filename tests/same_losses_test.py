"""Neither mesh nor number of processes changes the losses of RefAtomNet, and each reads what another wrote."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from ravar_jax.restore import restore_run
from ravar_jax.tasks import ravar
from tests import refatomnet_run
from tests.refatomnet_run import MESHES, ROWS, STEPS
from tests.together import run_together

pytestmark = pytest.mark.usefixtures("quick_compilation")


def losses(workdir: Path) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    found = [row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row]
    assert len(found) == STEPS
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory, quick_compilation) -> Path:
    """Holds the start of every run, and a run of one process that is split over data: the reference."""
    folder = tmp_path_factory.mktemp("runs")
    refatomnet_run.write_start(folder)
    refatomnet_run.run(folder, "reference", MESHES[0])
    return folder


@pytest.fixture(scope="module")
def next_loss_difference(folder):
    """A function: workdir -> what the loss of the next step by its last checkpoint differs by from the reference's."""
    config = refatomnet_run.make_config(folder, MESHES[0])
    batch = {key: rows[-ROWS:] for key, rows in refatomnet_run.rows_of_all_steps(config).items()}
    loss = jax.jit(ravar.make_task(config).loss, static_argnums=4)

    def of(workdir: Path) -> float:
        run = restore_run(workdir)
        assert run.step == STEPS
        params, frozen = jax.device_get((run.params, run.frozen))
        return float(loss(params, frozen, batch, jax.random.key(0), True)[0])

    expected = of(folder / "reference")
    return lambda workdir: of(workdir) - expected


def test_the_loss_changes_from_step_to_step(folder):
    found = losses(folder / "reference")
    assert np.all(np.isfinite(found))
    assert np.min(np.abs(np.diff(found))) > 1e-3
    assert np.mean(found[-5:]) < np.mean(found[:5]) - 0.5


@pytest.mark.parametrize("mesh", MESHES[1:])
def test_the_mesh_does_not_change_the_losses(folder, mesh):
    workdir = refatomnet_run.run(folder, "x".join(map(str, mesh)), mesh)
    np.testing.assert_allclose(losses(workdir), losses(folder / "reference"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("count", "mesh"), [(2, (1, 8, 1)), (4, (2, 2, 2))])
def test_processes_train_as_one_and_one_goes_on(
    folder, next_loss_difference, repository, count, mesh
):
    name, devices = f"by_{count}", 8 // count
    command = [sys.executable, "-m", "tests.refatomnet_run", folder, name, devices, *mesh]
    outputs = run_together([*map(str, command)], count, repository)
    assert f"process 0 of {count}" in outputs[0]
    assert f"{devices} of 8 cpu devices" in outputs[1]
    reference = folder / "reference"
    np.testing.assert_allclose(losses(folder / name), losses(reference), rtol=0, atol=1e-5)
    assert abs(next_loss_difference(folder / name)) < 1e-5
