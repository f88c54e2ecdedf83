"""Converts public PyTorch weights into the folders that this project reads, and back.

    python launch/convert_weights.py --source blip2 --input blip2.safetensors --vocab vocab.txt --output weights/blip2
    python launch/convert_weights.py --source detr --input detr-r50-e632da11.pth --output weights/detr
    python launch/convert_weights.py --source xlmr --input xlmr.safetensors --vocab xlmr.model --output weights/xlmr
    python launch/convert_weights.py --source official --input pytorch_model.bin.9 --vocab vocab.txt \
        --label_table weights/xlmr/label_table.npy --output runs/released
    python launch/convert_weights.py --source official --to torch --input runs/released --output for_pytorch

The folders are for model.backbone and model.detector, the last one's label_table.npy for model.label_table.
Several files of one model are given as --input A --input B. Reads safetensors, and PyTorch files without running any
code in them (PyTorch must be installed for those). Names of LAVIS, of DETR's authors and of Hugging Face are known;
tensors that are missing, unused or of another shape are all named. `--source official` gives a run's folder, for
`launch/evaluate.py` and `launch/predict.py`. `--to torch` takes a folder and writes OUTPUT/pytorch_model.bin.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags

from launch import command_line

_SOURCE = flags.DEFINE_enum(
    "source", None, ["official", "blip2", "detr", "xlmr"], "Whose weights they are.", required=True
)
_INPUT = flags.DEFINE_multi_string(
    "input", None, "Weight file; may be repeated. With --to torch: the folder.", required=True
)
_VOCAB = flags.DEFINE_string(
    "vocab", None, "official, blip2: BERT's WordPiece vocabulary. xlmr: the SentencePiece model."
)
_LABEL_TABLE = flags.DEFINE_string(
    "label_table", None, "official: .npy of the 91 label embeddings, which --source xlmr writes."
)
_PUBLIC = flags.DEFINE_multi_string(
    "public_blip2", [], "official: LAVIS's BLIP-2, to say whether the checkpoint's differs."
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write; must not exist.", required=True)
_TO = flags.DEFINE_enum("to", "orbax", ["orbax", "torch"], "What to write.")
_NEEDS = {"official": ("vocab", "label_table"), "blip2": ("vocab",), "xlmr": ("vocab",), "detr": ()}


def main() -> None:
    """Converts and says what was written."""
    from ravar_jax.errors import UsageError

    source, output, vocab = _SOURCE.value, Path(_OUTPUT.value), Path(_VOCAB.value or "")
    if _TO.value == "torch":
        if source == "xlmr":
            raise UsageError("--source xlmr --to torch: only XLM-R's label embeddings are kept")
        if len(_INPUT.value) != 1:
            raise UsageError("--to torch takes one --input, a folder")
    else:
        for name in _NEEDS[source]:
            if flags.FLAGS[name].value is None:
                raise UsageError(f"--source {source} needs --{name}")
    # Imported here so that --help and a wrong flag answer at once.
    from ravar_jax.conversion import back, convert, official
    from ravar_jax.conversion.weight_files import read_tensors

    if _TO.value == "torch":
        print(back.write_back(source, Path(_INPUT.value[0]), output))
        return
    tensors = read_tensors(_INPUT.value)
    if source == "official":
        from configs import base

        config = base.apply_preset(base.get_config(), "official")
        config.data.dataset = "refava"
        if _PUBLIC.value:
            print(official.compare_with_public(tensors, read_tensors(_PUBLIC.value)))
        table = Path(_LABEL_TABLE.value or "")
        official.convert_official(tensors, vocab, table, config, output)
    elif source == "blip2":
        print(convert.convert_blip2(tensors, vocab, output))
    elif source == "detr":
        convert.convert_detr(tensors, output)
    else:
        convert.convert_xlmr(tensors, vocab, output)
    print(f"wrote {output}")


if __name__ == "__main__":
    command_line.run(main)
