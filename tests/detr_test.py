"""The detector against PyTorch `transformers`, on small random weights of odd sizes, and its conversion tables."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ravar_jax.conversion.detr import detr_table, hf_detr_table
from ravar_jax.conversion.mapping import from_torch, to_torch
from ravar_jax.errors import UserError
from ravar_jax.models.detr import DETR_R50, Detr, DetrOutput, detections, sine_positions

RESNET = {"stem_width": 6, "widths": (8, 12, 16, 20), "depths": (2, 1, 2, 1)}
ENCODER_DEPTH, DECODER_DEPTH = 2, 3
DEPTHS = RESNET["depths"], ENCODER_DEPTH, DECODER_DEPTH
# The stem, its pooling and each stride-2 stage see an even side once and an odd one once.
HEIGHT, WIDTH = 75, 110


def small_detr(**changed: Any) -> Detr:
    sizes = {
        "resnet": RESNET,
        "width": 20,
        "encoder_depth": ENCODER_DEPTH,
        "decoder_depth": DECODER_DEPTH,
        "num_heads": 5,
        "mlp_width": 28,
        "num_queries": 7,
        "num_classes": 11,
    }
    return Detr(**{**sizes, **changed})


def shapes_of(model: Detr) -> Any:
    pixels = jnp.zeros((1, 64, 64, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), pixels)["params"])


def random_pixels() -> np.ndarray:
    return 3 * np.random.default_rng(0).standard_normal((2, HEIGHT, WIDTH, 3)).astype(np.float32)


def random_state(shapes: Any, table: tuple) -> dict[str, np.ndarray]:
    """Returns a checkpoint in which no vector is zeros or ones."""
    rng = np.random.default_rng(1)
    empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    state = {}
    for name, array in to_torch(empty, table).items():
        noise = rng.standard_normal(array.shape).astype(np.float32)
        if name.endswith("running_var"):
            noise = np.exp(0.5 * noise)
        elif array.ndim >= 2:
            # The residual sums of the ResNet stay below 100, attention is far from uniform, the sigmoid from flat.
            gain = 1.0 if "backbone" in name else 2.0 if "bbox" in name else 3.0
            noise = noise * (gain / np.sqrt(np.prod(array.shape[1:])))
        elif name.endswith("weight"):
            noise = 1 + 0.3 * noise
        else:
            noise = 0.2 * noise
        state[name] = noise.astype(np.float32)
    return state


@pytest.fixture(scope="module")
def hf_model() -> Any:
    """A small `DetrForObjectDetection` with random values everywhere, batch statistics included."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(
        embedding_size=RESNET["stem_width"],
        hidden_sizes=list(RESNET["widths"]),
        depths=list(RESNET["depths"]),
        layer_type="bottleneck",
        downsample_in_bottleneck=False,
        out_features=["stage4"],
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone_config=backbone,
        d_model=20,
        encoder_layers=ENCODER_DEPTH,
        decoder_layers=DECODER_DEPTH,
        encoder_attention_heads=5,
        decoder_attention_heads=5,
        encoder_ffn_dim=28,
        decoder_ffn_dim=28,
        num_queries=7,
        num_labels=10,
        attn_implementation="eager",
    )
    model = transformers.DetrForObjectDetection(config).eval()
    table = hf_detr_table(*DEPTHS, timm_backbone=False, saved=False)
    state = random_state(shapes_of(small_detr()), table)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    return model


def numpy_state(model: Any) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def test_detector_equals_transformers(hf_model) -> None:
    torch = pytest.importorskip("torch")
    pixels = random_pixels()
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2))
    with torch.no_grad():
        expected = hf_model(images)
        (expected_map,) = hf_model.model.backbone.model(images).feature_maps
    ours = small_detr()
    table = hf_detr_table(*DEPTHS, timm_backbone=False, saved=False)
    params = from_torch(numpy_state(hf_model), table, model="DETR", shapes=shapes_of(ours))
    eager: Any = ours.apply({"params": params}, pixels)
    jitted: Any = jax.jit(ours.apply)({"params": params}, pixels)
    assert eager.feature_map.shape == (2, 3, 4, 20)
    for output in (eager, jitted):
        feature_map = output.feature_map.transpose(0, 3, 1, 2)
        np.testing.assert_allclose(feature_map, expected_map.numpy(), atol=1e-4)
        np.testing.assert_allclose(output.class_logits, expected.logits.numpy(), atol=1e-4)
        np.testing.assert_allclose(output.boxes, expected.pred_boxes.numpy(), atol=1e-4)
    # Outputs that hardly depend on the frame or the query would hide a fault.
    for array, spread in ((eager.class_logits, 0.05), (eager.boxes, 0.002)):
        assert np.std(array, axis=0).mean() > spread
        assert np.std(array, axis=1).mean() > spread


def test_names_are_those_of_saved_files_too(hf_model, tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    hf_model.save_pretrained(tmp_path)
    saved = safetensors.load_file(tmp_path / "model.safetensors")
    table = hf_detr_table(*DEPTHS, timm_backbone=False, saved=True)
    params = from_torch(saved, table, model="DETR", shapes=shapes_of(small_detr()))
    loaded = hf_detr_table(*DEPTHS, timm_backbone=False, saved=False)
    for name, array in to_torch(params, loaded).items():
        np.testing.assert_array_equal(array, numpy_state(hf_model)[name], err_msg=name)


def test_the_released_names() -> None:
    model = Detr(**DETR_R50)
    depths = model.resnet["depths"], model.encoder_depth, model.decoder_depth
    shapes = shapes_of(model)
    empty = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), shapes)
    tensors = to_torch(empty, detr_table(*depths))
    assert len(tensors) == 458
    expected = {
        "backbone.0.body.conv1.weight": (64, 3, 7, 7),
        "backbone.0.body.layer3.5.bn3.running_var": (1024,),
        "backbone.0.body.layer4.0.downsample.0.weight": (2048, 1024, 1, 1),
        "transformer.encoder.layers.5.self_attn.in_proj_weight": (768, 256),
        "transformer.decoder.layers.0.multihead_attn.in_proj_bias": (768,),
        "transformer.decoder.layers.5.norm3.weight": (256,),
        "input_proj.weight": (256, 2048, 1, 1),
        "query_embed.weight": (100, 256),
        "class_embed.weight": (92, 256),
        "bbox_embed.layers.2.bias": (4,),
    }
    assert {name: tensors[name].shape for name in expected} == expected
    hf = to_torch(empty, hf_detr_table(*depths, timm_backbone=True, saved=True))
    # Three tensors for the fused one, of weights and of biases, in each of 18 attentions.
    assert len(hf) == 458 + 18 * 4
    assert hf["model.backbone.conv_encoder.model.layer1.2.bn3.running_mean"].shape == (256,)
    assert hf["model.decoder.layers.5.encoder_attn.out_proj.weight"].shape == (256, 256)
    assert hf["model.encoder.layers.0.fc1.weight"].shape == (2048, 256)


def test_all_names_give_the_same_parameters() -> None:
    shapes = shapes_of(small_detr())
    released = random_state(shapes, detr_table(*DEPTHS))
    params = from_torch(released, detr_table(*DEPTHS), model="DETR", shapes=shapes)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    for timm_backbone in (True, False):
        for saved in (True, False):
            table = hf_detr_table(*DEPTHS, timm_backbone=timm_backbone, saved=saved)
            there = to_torch(params, table)
            back = from_torch(there, table, model="DETR", shapes=shapes)
            again = to_torch(back, detr_table(*DEPTHS))
            assert set(again) == set(released)
            for name, array in released.items():
                np.testing.assert_array_equal(array, again[name], err_msg=name)


@pytest.mark.parametrize(
    "table",
    [detr_table(*DEPTHS), hf_detr_table(*DEPTHS, timm_backbone=False, saved=False)],
    ids=["released", "hf"],
)
def test_any_missing_tensor_is_named(table) -> None:
    shapes = shapes_of(small_detr())
    state = random_state(shapes, table)
    for name in state:
        rest = {other: array for other, array in state.items() if other != name}
        with pytest.raises(UserError) as error:
            from_torch(rest, table, model="DETR", shapes=shapes)
        assert str(error.value) == f"not a DETR: missing {name}"
    with pytest.raises(UserError, match=r"^not a DETR: unused fc.weight$"):
        from_torch({**state, "fc.weight": np.ones(3)}, table, model="DETR", shapes=shapes)


def test_positions_of_the_release() -> None:
    positions = sine_positions(11, 15, 256)
    assert positions.shape == (165, 256)
    np.testing.assert_allclose(positions[0, :4], [0.5406, 0.8413, 0.4747, 0.8801], atol=5e-5)
    np.testing.assert_allclose(positions[0, 128:132], [0.4067, 0.9135, 0.3548, 0.9349], atol=5e-5)
    with pytest.raises(ValueError, match="width=10"):
        sine_positions(2, 3, 10)


def test_detections_keep_the_order_of_queries_and_the_unused_class() -> None:
    logits = np.zeros((1, 3, 92), np.float32)
    logits[0, [0, 1, 2], [91, 0, 1]] = [1.0, 5.0, 3.0]
    boxes = np.arange(12, dtype=np.float32).reshape(1, 3, 4) / 12
    found = detections(DetrOutput(jnp.asarray(logits), jnp.asarray(boxes), jnp.zeros((1, 1, 1, 1))))
    assert found.class_ids.tolist() == [[91, 0, 1]]
    assert found.class_ids.dtype == jnp.int32
    np.testing.assert_array_equal(found.boxes, boxes)


def test_dropout_and_half_precision() -> None:
    sizes: Any = {
        "resnet": {"stem_width": 4, "widths": (8,), "depths": (1,)},
        "encoder_depth": 1,
        "decoder_depth": 1,
    }
    model, table = small_detr(**sizes), detr_table((1,), 1, 1)
    shapes = shapes_of(model)
    params = from_torch(random_state(shapes, table), table, model="DETR", shapes=shapes)
    pixels = random_pixels()[:, :21, :30]

    @jax.jit
    def run(params, pixels):
        plain = model.apply({"params": params}, pixels)
        rngs = {"dropout": jax.random.key(1)}
        noisy = model.apply({"params": params}, pixels, deterministic=False, rngs=rngs)
        half = small_detr(**sizes, dtype=jnp.bfloat16).apply({"params": params}, pixels)
        return plain, noisy, half

    plain, noisy, half = run(params, pixels)
    np.testing.assert_array_equal(plain.feature_map, noisy.feature_map)
    assert np.abs(plain.class_logits - noisy.class_logits).max() > 0.1
    assert {leaf.dtype for leaf in half} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(half.boxes, plain.boxes, atol=0.05)
    assert np.abs(half.boxes - plain.boxes).max() > 0
