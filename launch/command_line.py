"""What every command shares: flags, one-line errors, exit codes 0, 1 and 2, and quiet libraries.

A command defines absl flags at module level, a `main()` without arguments, and ends with `command_line.run(main)`.
It imports this module first and whatever is heavy inside `main`, so that `--help` and a wrong flag answer at once.
`RAVAR_TRACEBACK=1` shows the traceback behind an error line.
"""

import atexit
import difflib
import os
import sys
import textwrap
import traceback
from collections.abc import Callable
from typing import Any

# Before TensorFlow or gRPC is loaded anywhere: their start-up notices would bury an error line.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from absl import flags, logging
from ml_collections import config_flags

from ravar_jax.errors import UsageError, UserError
from ravar_jax.tpu.host import quiet_libtpu

quiet_libtpu()

_CONFIG_HELP = (
    "Configuration file (configs/*.py, or configs/FILE.py:VARIANT). Any key of it can be set on the command line, "
    "after this flag: --config.train.steps=100."
)


def define_config_flag() -> None:
    """Defines the required `--config`, whose keys are the flags `--config.a.b=value`."""
    config_flags.DEFINE_config_file("config", lock_config=True, help_string=_CONFIG_HELP)
    flags.mark_flag_as_required("config")


def define_step_flag() -> Any:
    """Defines `--step`, which checkpoint of a run a command reads, for `restore.restore_run`."""
    return flags.DEFINE_string(
        "step",
        "latest",
        "Checkpoint of the run: latest, best (by config.checkpoint.best_metric on the val split, of a run with "
        "config.checkpoint.keep_best) or a number.",
    )


def start_jax() -> None:
    """Sets JAX up for a command: compiled programs are kept on disk between runs, except on CPU.

    A CPU program holds the instructions of the machine that compiled it, and a home directory may be shared by
    machines that differ.
    """
    import jax

    if jax.default_backend() != "cpu" and not getattr(
        jax.config, "jax_compilation_cache_dir", None
    ):
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "ravar_jax", "compiled"))


def run(main: Callable[[], None], argv: list[str] | None = None) -> None:
    """Parses the flags, runs `main()` and ends the process: 0 done, 2 wrong usage, 1 any other failure.

    Every failure is one line `error: ...` on stderr.
    """
    argv = sys.argv if argv is None else argv
    logging.set_verbosity(logging.WARNING)
    if any(argument in ("--help", "-help", "-h", "--helpfull") for argument in argv[1:]):
        print(_help(main, argv[0]))
        sys.exit(0)
    code = 0
    try:
        _parse_flags(argv)
        main()
    except UsageError as error:
        code = _fail(2, str(error))
    except UserError as error:
        code = _fail(1, str(error))
    except KeyboardInterrupt:
        code = _fail(1, "interrupted")
    except MemoryError:
        code = _fail(1, "out of memory")
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        code = _fail(1, f"{error.strerror or error}{where}")
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        code = _fail(
            1,
            f"internal: {type(error).__name__}: {first_line} (RAVAR_TRACEBACK=1 shows the traceback)",
        )
    _exit(main, code)


def _exit(main: Callable[[], None], code: int) -> None:
    """Ends the process.

    A command's own process ends without Python's tear-down, which TensorFlow's threads may not survive: they call a
    Python function for every batch that they prefetch. One of several processes that fails does not wait for the others
    either, as JAX would have it: they may be waiting for this one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if main.__module__ == "__main__":
        if code == 0 or "jax" not in sys.modules or sys.modules["jax"].process_count() == 1:
            atexit._run_exitfuncs()
        os._exit(code)
    sys.exit(code)


def _fail(code: int, message: str) -> int:
    """Prints the one line and returns the exit code; called while the exception is handled."""
    if os.environ.get("RAVAR_TRACEBACK") == "1":
        traceback.print_exc()
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def _parse_flags(argv: list[str]) -> None:
    """Parses into `flags.FLAGS`.

    Raises:
        UsageError: naming the flag, the config key or the config file that is wrong.
    """
    try:
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS:
            flags.FLAGS.config.keys()  # a file that could not be loaded raises only now
    except flags.UnrecognizedFlagError as error:
        if error.flagname.startswith("config.") and "config" in flags.FLAGS:
            raise UsageError(
                _unknown_key(argv) or f"--{error.flagname} needs --config before it"
            ) from error
        near = difflib.get_close_matches(error.flagname, list(flags.FLAGS), n=3)
        raise UsageError(
            f"unknown flag --{error.flagname}{_near(['--' + name for name in near])}"
        ) from error
    except flags.IllegalFlagValueError as error:
        raise UsageError(_illegal_value(str(error))) from error
    except flags.Error as error:
        raise UsageError(str(error)) from error
    except (
        AttributeError,
        KeyError,
        OSError,
    ) as error:  # what config_flags raises for an unknown key or file
        raise UsageError(_unknown_key(argv) or f"--config: {error}") from error
    except Exception as error:
        path = _config_path(argv)
        raise UsageError(
            f"--config {path} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if len(rest) > 1:
        raise UsageError(
            f"unexpected argument {rest[1]!r}: every value belongs to a flag, as in --name=value"
        )


def _illegal_value(message: str) -> str:
    """Shortens absl's message; the traceback of a failing config file comes down to its last line."""
    if "must have a value other than None" in message:
        return f"missing flag {message.removeprefix('flag ').partition('=')[0]}"
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    if len(lines) > 1 and "Traceback" in message:
        return f"{lines[0].partition(': ')[0].removeprefix('flag ')}: {lines[-1].partition(': ')[2] or lines[-1]}"
    return message.removeprefix("flag ")


def _config_path(argv: list[str]) -> str | None:
    """Returns the value given to `--config`, if any."""
    for argument, following in zip(argv[1:], [*argv[2:], ""], strict=True):
        name, equals, value = argument.lstrip("-").partition("=")
        if name == "config" and argument.startswith("-"):
            return value if equals else following
    return None


def _unknown_key(argv: list[str]) -> str | None:
    """Returns what is wrong with `--config` itself or with the first `--config.key` that the file lacks."""
    path = _config_path(argv)
    if path is None:
        return None
    file = path.partition(":")[0]
    if not os.path.isfile(file):
        return f"--config: no such file: {file}"
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=[])
    values(["", f"--config={path}"])
    known = _leaf_keys(values.config.to_dict(), "")
    for argument in argv[1:]:
        name = argument.lstrip("-").partition("=")[0]
        key = name.removeprefix("config.").removeprefix("noconfig.")
        is_section = any(other.startswith(f"{key}.") for other in known)
        if argument.startswith("-") and key != name and key not in known and not is_section:
            same_leaf = [
                other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]
            ]
            return f"unknown config key {key}{_near(same_leaf[:3] or difflib.get_close_matches(key, known, n=3))}"
    return None


def _leaf_keys(section: dict, prefix: str) -> list[str]:
    """Returns the dotted names of all values, sections left out."""
    keys: list[str] = []
    for name, value in section.items():
        keys.extend(
            _leaf_keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
        )
    return keys


def _near(names: list[str]) -> str:
    return f" (did you mean {' or '.join(names)}?)" if names else ""


def _help(main: Callable[[], None], program: str) -> str:
    """Returns the command's docstring and every flag that it or this module defines."""
    own = {flag.name: flag for flag in flags.FLAGS.get_key_flags_for_module(main.__module__)}
    own.update({flag.name: flag for flag in flags.FLAGS.get_key_flags_for_module(program)})
    if "config" in flags.FLAGS:
        own = {"config": flags.FLAGS["config"], **own}
    lines = [(sys.modules[main.__module__].__doc__ or "").strip(), "", "Flags:"]
    for name, flag in own.items():
        default = "" if flag.default is None else f" Default: {flag.default}."
        text = f"{(flag.help or '').strip()}{default}"
        lines.append(f"  --{name}")
        lines.extend(textwrap.wrap(text, 100, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)
