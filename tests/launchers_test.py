"""The scripts that start runs on pods and clusters, with stand-ins for the clouds' own commands."""

import os
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

TPU = {"TPU_NAME": "slice", "TPU_ZONE": "zone", "TPU_REPOSITORY": "https://example.org/r.git"}
# Answers `describe` with the first line of the file `states`, which it removes; other calls are noted. A call that
# runs a command fails as often as the file `failures` has lines.
GCLOUD = """#!/usr/bin/env bash
here="$(dirname "$0")"
take() { head -n 1 "$here/$1"; sed -i 1d "$here/$1"; }
if [[ "$4" == describe ]]; then take states; exit; fi
echo "$4 ${*: -1}" >> "$here/calls"
if [[ "$4" == ssh && "$*" == *launch/train.py* && -s "$here/failures" ]]; then exit "$(take failures)"; fi
"""


def run(script: Path, *arguments: str, env: dict[str, str] | None = None):
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith(("TPU_", "SLURM"))
    }
    return subprocess.run(
        ["bash", str(script), *arguments], capture_output=True, text=True, env=clean | (env or {})
    )


@pytest.fixture
def tpu_pod(repository: Path) -> Path:
    return repository / "launch" / "tpu_pod.sh"


@pytest.fixture
def slurm(repository: Path) -> Path:
    return repository / "launch" / "slurm.sbatch"


@pytest.fixture
def cloud(tmp_path: Path) -> Path:
    """A folder for PATH with a stand-in for gcloud."""
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    for name in ("states", "failures", "calls"):
        (tmp_path / name).touch()
    return tmp_path


def test_shell_is_clean(repository: Path):
    scripts = [repository / "launch" / name for name in ("tpu_pod.sh", "slurm.sbatch")]
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_dry_run_prints_every_command(tpu_pod: Path):
    done = run(tpu_pod, "--dry_run", "run", "launch/train.py", "--workdir=a b", env=TPU)
    assert done.returncode == 0, done.stderr
    create, setup, train = done.stdout.splitlines()
    assert create.startswith("+ gcloud compute tpus tpu-vm create slice --zone=zone")
    assert "--accelerator-type=v5litepod-16" in create
    assert create.endswith("--spot")
    assert "git" in setup
    assert "example.org/r.git" in setup
    assert "--worker=all" in train
    # Quoted for the hosts' shell and for this one.
    command = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {train[2:]}"], capture_output=True, text=True
    )
    inner = command.stdout.splitlines()[-1].removeprefix("--command=")
    words = subprocess.run(
        ["bash", "-c", f"cd() {{ :; }}; .() {{ :; }}; printf '%s\\n' {inner.split('&& ')[1]}"],
        capture_output=True,
        text=True,
    )
    assert words.stdout.splitlines() == [".venv/bin/python", "launch/train.py", "--workdir=a b"]


def test_preempted_slice_is_made_anew_and_the_command_goes_on(tpu_pod: Path, cloud: Path):
    (cloud / "states").write_text("READY\nPREEMPTED\nPREEMPTED\nREADY\n")
    (cloud / "failures").write_text("255\n")
    env = TPU | {"PATH": f"{cloud}:{os.environ['PATH']}"}
    done = run(tpu_pod, "run", "launch/train.py", env=env)
    assert done.returncode == 0, done.stderr
    calls = [line.split()[0] for line in (cloud / "calls").read_text().splitlines()]
    assert calls == ["ssh", "delete", "create", "ssh", "ssh"]
    assert "the slice is gone; starting over" in done.stderr


def test_command_that_fails_on_a_good_slice_is_not_repeated(tpu_pod: Path, cloud: Path):
    (cloud / "states").write_text("READY\nREADY\n")
    (cloud / "failures").write_text("2\n2\n")
    env = TPU | {"PATH": f"{cloud}:{os.environ['PATH']}"}
    assert run(tpu_pod, "run", "launch/train.py", env=env).returncode == 2
    assert len((cloud / "calls").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "env", "told"),
    [
        (["create"], {}, "TPU_NAME is not set"),
        (["destroy"], TPU, "expected create, setup, run or delete, not 'destroy'"),
        (["run"], TPU, "run needs a command"),
        (["--dry_run", "setup"], TPU | {"TPU_REPOSITORY": ""}, "TPU_REPOSITORY is not set"),
    ],
)
def test_wrong_usage_of_tpu_pod(tpu_pod: Path, arguments, env, told):
    done = run(tpu_pod, *arguments, env=env)
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: {told}" or done.stderr.startswith(f"error: {told}")


def test_slurm_prints_or_runs_and_queues_again_only_when_time_is_over(slurm: Path, tmp_path: Path):
    done = run(slurm, "--dry_run", "launch/train.py", "--workdir=a b")
    assert done.stdout == "+ srun .venv/bin/python launch/train.py --workdir=a\\ b\n"
    for name, text in (("srun", "exit 1"), ("scontrol", f'echo "$*" >> {tmp_path}/queued')):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    assert run(slurm, "x", env=env | {"SLURM_JOB_END_TIME": str(2**40)}).returncode == 1
    assert not (tmp_path / "queued").exists()
    assert run(slurm, "x", env=env | {"SLURM_JOB_END_TIME": "1"}).returncode == 1
    assert (tmp_path / "queued").read_text() == "requeue 7\n"
    assert run(slurm).returncode == 2


def test_jobset_is_a_valid_job_with_flags_that_exist(repository: Path):
    from absl import flags
    from ml_collections import config_flags

    jobset = yaml.safe_load((repository / "launch" / "gke_jobset.yaml").read_text())
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert set(jobset["spec"]) == {"failurePolicy", "replicatedJobs"}
    (hosts,) = jobset["spec"]["replicatedJobs"]
    assert set(hosts) == {"name", "replicas", "template"}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "hosts"}}
    kubernetes_validate.validate(job | hosts["template"], "1.33", strict=True)
    spec = hosts["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    # 4x4 chips, four a host.
    assert spec["parallelism"] == spec["completions"] == 4
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert container["resources"]["limits"]["google.com/tpu"] == 4
    python, program, *arguments = container["command"]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", flag_values=values, lock_config=True, sys_argv=[program, *arguments]
    )
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    assert (python, program) == ("python", "launch/train.py")
    values([program, *arguments])
    assert values.config.data.feature_cache == "/shared/data/refatomnet_features"
