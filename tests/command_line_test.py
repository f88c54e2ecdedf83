"""Exit codes and the one line on stderr, of real commands in child processes."""

import os
import subprocess
import sys
import textwrap

import pytest

_COMMAND = """
    '''Says hello.'''
    import sys
    sys.path.insert(0, {repository!r})
    from absl import flags
    from launch import command_line
    from ravar_jax.errors import UsageError, UserError

    command_line.define_config_flag()
    _HOW = flags.DEFINE_enum("how", "done", ["done", "user", "usage", "crash", "file", "interrupt"], "How to end.")

    def main():
        if _HOW.value == "user":
            raise UserError("record 3 of train.tfrecord:\\n is torn")
        if _HOW.value == "usage":
            raise UsageError("--how is not built yet")
        if _HOW.value == "crash":
            raise ZeroDivisionError("second\\nline")
        if _HOW.value == "file":
            open("no_such_file.json")
        if _HOW.value == "interrupt":
            raise KeyboardInterrupt
        print("steps", flags.FLAGS.config.train.steps)

    if __name__ == "__main__":
        command_line.run(main)
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory, repository):
    file = tmp_path_factory.mktemp("command") / "hello.py"
    file.write_text(textwrap.dedent(_COMMAND).format(repository=str(repository)))

    def run(*arguments, **environment):
        return subprocess.run(
            [sys.executable, str(file), *arguments],
            cwd=repository,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=100,
        )

    return run


def test_done(command):
    result = command("--config", "configs/base.py", "--config.train.steps=5")
    assert (result.returncode, result.stdout, result.stderr) == (0, "steps 5\n", "")


def test_help_explains_every_flag(command):
    result = command("--help")
    assert result.returncode == 0
    for text in (
        "Says hello.",
        "--config",
        "configs/*.py",
        "--how",
        "How to end.",
        "Default: done.",
    ):
        assert text in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "--config configs/base.py --config.train.step=5",
            "error: unknown config key train.step (did you mean",
        ),
        (
            "--config configs/base.py --config.steps=5",
            "unknown config key steps (did you mean train.steps?)",
        ),
        ("--config=configs/base.py --config.a.b.c=5", "unknown config key a.b.c"),
        ("--config configs/base.py --config.train.steps=many", "--config.train.steps=many"),
        ("--config configs/base.py --config.train.steps=1.5", "--config.train.steps=1.5"),
        (
            "--config configs/base.py --config.model.train_backbone=maybe",
            "--config.model.train_backbone=maybe",
        ),
        ("--config configs/base.py --config.model=3", "--config.model=3"),
        ("--config configs/base.py:variant", "configs/base.py:variant"),
        ("--config.train.steps=5", "--config.train.steps needs --config before it"),
        ("--config configs/bse.py", "--config: no such file: configs/bse.py"),
        ("--how=done", "missing flag --config"),
        ("--config configs/base.py --hw=done", "unknown flag --hw (did you mean --how?)"),
        ("--config configs/base.py --how=do", "--how=do"),
        ("--config configs/base.py --how", "--how"),
        ("--config configs/base.py more", "unexpected argument 'more'"),
        ("--config configs/base.py --how=usage", "error: --how is not built yet"),
    ],
)
def test_wrong_usage_exits_2_with_one_line(command, arguments, expected):
    _assert_one_line(command(*arguments.split()), 2, expected)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("user", "error: record 3 of train.tfrecord: is torn\n"),
        (
            "crash",
            "error: internal: ZeroDivisionError: second (RAVAR_TRACEBACK=1 shows the traceback)\n",
        ),
        ("file", "error: No such file or directory: no_such_file.json\n"),
        ("interrupt", "error: interrupted\n"),
    ],
)
def test_failure_exits_1_with_one_line(command, how, expected):
    _assert_one_line(command("--config", "configs/base.py", f"--how={how}"), 1, expected)


def test_traceback_on_request(command):
    result = command("--config", "configs/base.py", "--how=crash", RAVAR_TRACEBACK="1")
    assert result.returncode == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: internal: ZeroDivisionError")


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_commands_explain_themselves(repository, name):
    result = subprocess.run(
        [sys.executable, f"launch/{name}.py", "--help"],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0
    assert "--workdir" in result.stdout


def _assert_one_line(result, code, expected):
    assert result.returncode == code, result.stderr
    assert expected in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
