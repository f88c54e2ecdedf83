"""Converts public PyTorch weights into the folders that this project reads.

    python launch/convert_weights.py --source blip2 --input blip2.safetensors --vocab vocab.txt --output weights/blip2
    python launch/convert_weights.py --source detr --input detr-r50-e632da11.pth --output weights/detr
    python launch/convert_weights.py --source xlmr --input xlmr.safetensors --vocab xlmr.model --output weights/xlmr

The folders are for model.backbone and model.detector, the last one's label_table.npy for model.label_table.
Several files of one model are given as --input A --input B. Reads safetensors, and PyTorch files without running any
code in them (PyTorch must be installed for those). Names of LAVIS, of DETR's authors and of Hugging Face are known;
tensors that are missing, unused or of another shape are all named.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags

from launch import command_line

_SOURCE = flags.DEFINE_enum(
    "source", None, ["official", "blip2", "detr", "xlmr"], "Whose weights they are.", required=True
)
_INPUT = flags.DEFINE_multi_string("input", None, "Weight file; may be repeated.", required=True)
_VOCAB = flags.DEFINE_string(
    "vocab", None, "blip2: BERT's WordPiece vocabulary. xlmr: the SentencePiece model."
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write; must not exist.", required=True)
_TO = flags.DEFINE_enum("to", "orbax", ["orbax", "torch"], "What to write. torch: not built yet.")


def main() -> None:
    """Reads the files, converts and reports the sizes."""
    from ravar_jax.errors import UsageError

    if _SOURCE.value == "official":
        raise UsageError("--source official is not built yet")
    if _TO.value == "torch":
        raise UsageError("--to torch is not built yet")
    vocab = Path(_VOCAB.value or "")
    if _SOURCE.value != "detr" and _VOCAB.value is None:
        raise UsageError(f"--source {_SOURCE.value} needs --vocab")
    # Imported here so that --help and a wrong flag answer at once.
    from ravar_jax.conversion import convert

    tensors = read_tensors(_INPUT.value)
    output = Path(_OUTPUT.value)
    if _SOURCE.value == "blip2":
        print(convert.convert_blip2(tensors, vocab, output))
    elif _SOURCE.value == "detr":
        convert.convert_detr(tensors, output)
    else:
        convert.convert_xlmr(tensors, vocab, output)
    print(f"wrote {output}")


def read_tensors(files: list[str]) -> dict:
    """Returns the tensors of all files as numpy arrays by name, float16 and bfloat16 as float32.

    Raises:
        UserError: a file is missing or not a file of weights, or two files hold a tensor of the same name.
    """
    from ravar_jax.errors import UserError

    tensors: dict = {}
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"--input {file}: no such file")
        read = read_safetensors if file.endswith(".safetensors") else read_torch
        found = read(file)
        twice = sorted(set(found) & set(tensors))
        if twice:
            raise UserError(f"--input {file}: {twice[0]} is in an earlier file too")
        tensors |= found
    return tensors


def read_safetensors(file: str) -> dict:
    """Returns the tensors of a safetensors file."""
    import ml_dtypes  # noqa: F401  bfloat16 for numpy
    import numpy as np
    import safetensors
    from safetensors.numpy import load_file

    from ravar_jax.errors import UserError

    try:
        tensors = load_file(file)
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise UserError(f"--input {file}: not a readable safetensors file: {error}") from error
    return {
        name: array.astype(np.float32) if array.dtype.itemsize == 2 else array
        for name, array in tensors.items()
    }


def read_torch(file: str) -> dict:
    """Returns the tensors of a PyTorch file, mapped into memory; code in it is refused, not run."""
    from ravar_jax.errors import UserError

    try:
        import torch
    except ImportError as error:
        raise UserError(f"--input {file}: reading a PyTorch file needs PyTorch") from error
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # zipfile, pickle and torch report damage in their own ways
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--input {file}: not a PyTorch file of weights alone ({reason})"
        ) from error
    for entry in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(entry), dict):
            content = content[entry]
    if not isinstance(content, dict) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise UserError(f"--input {file}: expected tensors by name")
    half = (torch.float16, torch.bfloat16)
    return {
        name: (tensor.float() if tensor.dtype in half else tensor).numpy()
        for name, tensor in content.items()
    }


if __name__ == "__main__":
    command_line.run(main)
