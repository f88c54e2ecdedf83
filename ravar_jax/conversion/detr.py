"""DETR's parameters and two publishers' names: the authors' (`detr-r50-e632da11`, spec section 8) and Hugging Face's.

Both have one transformer and one ResNet in their own words; batch norms keep their four vectors, so nothing is folded
and a round trip is exact.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ravar_jax.conversion.mapping import Row, dense_rows, norm_rows

_STATISTICS = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
# Hugging Face: a loaded module's name -> a saved file's. The library renames on loading and back on saving, so that
# files stay as its first versions wrote them.
_SAVED_NAMES = {
    "model.backbone.": "model.backbone.conv_encoder.",
    ".o_proj.": ".out_proj.",
    ".mlp.fc": ".fc",
}


def depths_of(sizes: Mapping[str, Any]) -> tuple[Sequence[int], int, int]:
    """Returns what the tables ask of a `models.detr.Detr`'s attributes: ResNet's, encoder's and decoder's depths."""
    return sizes["resnet"]["depths"], sizes["encoder_depth"], sizes["decoder_depth"]


def detr_table(
    resnet_depths: Sequence[int], encoder_depth: int, decoder_depth: int
) -> tuple[Row, ...]:
    """Returns the table of the authors' checkpoints, the file's entry "model".

    Args:
        resnet_depths: blocks of each stage.
        encoder_depth: layers of the encoder.
        decoder_depth: layers of the decoder.
    """
    rows = [
        *_torchvision_rows("backbone.0.body", resnet_depths),
        Row(("query_embed.weight",), "query_embedding"),
        *_conv_rows("input_proj", "input_projection"),
        Row(("input_proj.bias",), "input_projection/bias"),
    ]
    for part, depth in (("encoder", encoder_depth), ("decoder", decoder_depth)):
        attentions = {"self_attn": "attention"}
        if part == "decoder":
            attentions["multihead_attn"] = "cross_attention"
        norms = [*(f"{path}/norm" for path in attentions.values()), "mlp_norm"]
        for i in range(depth):
            torch_layer, layer = f"transformer.{part}.layers.{i}", f"{part}/layer{i}"
            for torch_name, path in attentions.items():
                rows += _fused_attention_rows(f"{torch_layer}.{torch_name}", f"{layer}/{path}")
            rows += dense_rows(f"{torch_layer}.linear1", f"{layer}/mlp_in")
            rows += dense_rows(f"{torch_layer}.linear2", f"{layer}/mlp_out")
            for number, path in enumerate(norms, start=1):
                rows += norm_rows(f"{torch_layer}.norm{number}", f"{layer}/{path}")
    rows += norm_rows("transformer.decoder.norm", "decoder/norm")
    rows += _head_rows("class_embed", "bbox_embed")
    return tuple(rows)


def hf_detr_table(
    resnet_depths: Sequence[int],
    encoder_depth: int,
    decoder_depth: int,
    *,
    timm_backbone: bool,
    saved: bool,
) -> tuple[Row, ...]:
    """Returns the table of Hugging Face's `DetrForObjectDetection` (transformers 5).

    Args:
        resnet_depths: blocks of each stage.
        encoder_depth: layers of the encoder.
        decoder_depth: layers of the decoder.
        timm_backbone: whether the ResNet is timm's, with torchvision's names, or the library's own.
        saved: whether the names are a saved file's or a loaded module's `state_dict`.
    """
    backbone_rows = _torchvision_rows if timm_backbone else _hf_resnet_rows
    rows = [
        *backbone_rows("model.backbone.model", resnet_depths),
        Row(("model.query_position_embeddings.weight",), "query_embedding"),
        *_conv_rows("model.input_projection", "input_projection"),
        Row(("model.input_projection.bias",), "input_projection/bias"),
    ]
    for part, depth in (("encoder", encoder_depth), ("decoder", decoder_depth)):
        attentions = {"self_attn": "attention"}
        if part == "decoder":
            attentions["encoder_attn"] = "cross_attention"
        for i in range(depth):
            torch_layer, layer = f"model.{part}.layers.{i}", f"{part}/layer{i}"
            for torch_name, path in attentions.items():
                for letter, name in zip("qkvo", ("query", "key", "value", "output"), strict=True):
                    torch_dense = f"{torch_layer}.{torch_name}.{letter}_proj"
                    rows += dense_rows(torch_dense, f"{layer}/{path}/{name}")
                rows += norm_rows(f"{torch_layer}.{torch_name}_layer_norm", f"{layer}/{path}/norm")
            rows += dense_rows(f"{torch_layer}.mlp.fc1", f"{layer}/mlp_in")
            rows += dense_rows(f"{torch_layer}.mlp.fc2", f"{layer}/mlp_out")
            rows += norm_rows(f"{torch_layer}.final_layer_norm", f"{layer}/mlp_norm")
    rows += norm_rows("model.decoder.layernorm", "decoder/norm")
    rows += _head_rows("class_labels_classifier", "bbox_predictor")
    if saved:
        rows = [row._replace(torch_names=tuple(map(_saved_name, row.torch_names))) for row in rows]
    return tuple(rows)


def _saved_name(name: str) -> str:
    for loaded, saved in _SAVED_NAMES.items():
        name = name.replace(loaded, saved)
    return name


def _torchvision_rows(torch_name: str, depths: Sequence[int]) -> list[Row]:
    rows = _conv_norm_rows(
        f"{torch_name}.conv1", f"{torch_name}.bn1", "resnet/stem_conv", "resnet/stem_norm"
    )
    for stage, i, block in _blocks(depths):
        torch_block = f"{torch_name}.layer{stage}.{i}"
        for n in (1, 2, 3):
            torch_names = f"{torch_block}.conv{n}", f"{torch_block}.bn{n}"
            rows += _conv_norm_rows(*torch_names, f"{block}/conv{n}", f"{block}/norm{n}")
        if i == 0:
            torch_names = f"{torch_block}.downsample.0", f"{torch_block}.downsample.1"
            rows += _conv_norm_rows(
                *torch_names, f"{block}/shortcut_conv", f"{block}/shortcut_norm"
            )
    return rows


def _hf_resnet_rows(torch_name: str, depths: Sequence[int]) -> list[Row]:
    def pair(torch_layer: str, conv: str, norm: str) -> list[Row]:
        torch_names = f"{torch_layer}.convolution", f"{torch_layer}.normalization"
        return _conv_norm_rows(*torch_names, conv, norm)

    rows = pair(f"{torch_name}.embedder.embedder", "resnet/stem_conv", "resnet/stem_norm")
    for stage, i, block in _blocks(depths):
        torch_block = f"{torch_name}.encoder.stages.{stage - 1}.layers.{i}"
        for n in (1, 2, 3):
            rows += pair(f"{torch_block}.layer.{n - 1}", f"{block}/conv{n}", f"{block}/norm{n}")
        if i == 0:
            torch_shortcut = f"{torch_block}.shortcut"
            rows += pair(torch_shortcut, f"{block}/shortcut_conv", f"{block}/shortcut_norm")
    return rows


def _blocks(depths: Sequence[int]) -> Iterable[tuple[int, int, str]]:
    """Yields stage from 1, block from 0, and the block's path."""
    for stage, depth in enumerate(depths, start=1):
        for i in range(depth):
            yield stage, i, f"resnet/stage{stage}_block{i}"


def _conv_rows(torch_name: str, path: str) -> list[Row]:
    return [Row((f"{torch_name}.weight",), f"{path}/kernel", "conv")]


def _conv_norm_rows(torch_conv: str, torch_norm: str, conv: str, norm: str) -> list[Row]:
    statistics = [
        Row((f"{torch_norm}.{torch_leaf}",), f"{norm}/{leaf}")
        for torch_leaf, leaf in _STATISTICS.items()
    ]
    return [*_conv_rows(torch_conv, conv), *statistics]


def _fused_attention_rows(torch_name: str, path: str) -> list[Row]:
    return [
        Row((f"{torch_name}.in_proj_weight",), f"{path}/{{}}/kernel", "qkv"),
        Row((f"{torch_name}.in_proj_bias",), f"{path}/{{}}/bias", "qkv_bias"),
        *dense_rows(f"{torch_name}.out_proj", f"{path}/output"),
    ]


def _head_rows(torch_classes: str, torch_boxes: str) -> list[Row]:
    rows = [*dense_rows(torch_classes, "class_head")]
    for layer in (1, 2, 3):
        rows += dense_rows(f"{torch_boxes}.layers.{layer - 1}", f"box_head/layer{layer}")
    return rows
