"""Who may import what. Imports run one way, so a layer can be read, tested and replaced alone."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

OURS = ("configs", "data_pipelines", "launch", "ravar_jax", "tests")
TENSORFLOW = ("tensorflow", "tensorflow_datasets", "apache_beam", "clu")
TORCH = ("torch", "transformers")
# ravar_jax modules that know only arrays: never each other, nor the models.
LEAVES = ("losses", "metrics", "optimizer", "sharding", "checkpoints")
# Third-party packages a model file may use; of ours only other models and these two.
MODEL_PACKAGES = ("jax", "flax", "numpy")
MODEL_FUNCTIONS = ("ravar_jax.sharding.constrain", "ravar_jax.gpu.has_cuda")


def imported_names(source: str) -> Iterator[str]:
    """Yields every dotted name that a module imports, `from a import b` as `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def violations(path: str, source: str) -> list[str]:
    """Returns what the module at `path` (relative to the repository) imports and must not."""
    parts = Path(path).with_suffix("").parts
    top = parts[0]
    wrong: list[str] = []
    for name in imported_names(source):
        root = name.split(".")[0]
        ours = root in OURS
        stdlib = root in sys.stdlib_module_names
        allowed = True
        if within(name, TENSORFLOW):
            allowed = top in ("data_pipelines", "launch", "tests")
        if within(name, TORCH):
            allowed = top == "tests" or path == "ravar_jax/conversion/weight_files.py"
        if root == "launch":
            allowed = top in ("launch", "tests")
        if root == "tests":
            allowed = top == "tests"
        if root == "data_pipelines" and top == "ravar_jax":
            allowed = False  # it receives iterators and arrays
        if top == "configs":
            allowed = stdlib or root in ("configs", "ml_collections")
        if parts[:2] == ("ravar_jax", "models"):
            allowed = (
                stdlib
                or root in MODEL_PACKAGES
                or within(name, ("ravar_jax.models", *MODEL_FUNCTIONS))
            )
        if top == "ravar_jax" and parts[1] in LEAVES and ours:
            allowed = within(name, ("ravar_jax.errors", "ravar_jax.class_names"))
        if not allowed:
            wrong.append(f"{path} imports {name}")
    return wrong


def test_every_import_is_allowed(repository):
    wrong = [
        line
        for folder in OURS
        for file in sorted((repository / folder).rglob("*.py"))
        for line in violations(str(file.relative_to(repository)), file.read_text())
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ravar_jax/train.py", "import tensorflow as tf"),
        ("ravar_jax/train.py", "def f():\n    from tensorflow_datasets import core"),
        ("ravar_jax/train.py", "from data_pipelines import input_pipeline"),
        ("ravar_jax/train.py", "from launch import command_line"),
        ("ravar_jax/conversion/mapping.py", "import torch.nn"),
        ("launch/train.py", "import torch"),
        ("configs/base.py", "import jax"),
        ("ravar_jax/models/qformer.py", "from ravar_jax.sharding import make_mesh"),
        ("ravar_jax/models/qformer.py", "import optax"),
        ("ravar_jax/losses.py", "from ravar_jax import metrics"),
        ("ravar_jax/sharding.py", "from ravar_jax.models import qformer"),
    ],
)
def test_the_check_finds_a_wrong_import(path, source):
    assert violations(path, source)


def test_ravar_jax_imports_with_tensorflow_and_torch_blocked(repository):
    modules = sorted(
        ".".join(file.relative_to(repository).with_suffix("").parts).removesuffix(".__init__")
        for file in (repository / "ravar_jax").rglob("*.py")
    )
    program = (
        "import importlib, sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {TENSORFLOW + TORCH!r}:\n"
        "            raise ImportError(f'{name} is blocked')\n"
        "sys.meta_path.insert(0, Blocked())\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
