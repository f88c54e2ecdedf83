"""The image encoder and the Q-Former against PyTorch `transformers`, on small random weights of odd sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ravar_jax.models.blip2 import Blip2
from ravar_jax.models.vision_transformer import VisionTransformer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WIDTH, HEADS, DEPTH, QUERIES, LENGTH = 40, 5, 3, 7, 9
VISION = {"width": 24, "depth": DEPTH, "num_heads": 3, "mlp_width": 52, "patch_size": 6}
QFORMER = {
    "width": WIDTH,
    "depth": 4,
    "num_heads": HEADS,
    "mlp_width": 44,
    "vocab_size": 31,
    "max_positions": 12,
}


def randomize(module: "torch.nn.Module") -> None:
    """Gives every parameter a random value, norms and biases too, so that none can hide."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if is_scale else 0.2 * noise)


def dense(layer: "torch.nn.Linear") -> dict:
    out = {"kernel": layer.weight.detach().numpy().T}
    if layer.bias is not None:
        out["bias"] = layer.bias.detach().numpy()
    return out


def norm(layer: "torch.nn.LayerNorm") -> dict:
    return {"scale": layer.weight.detach().numpy(), "bias": layer.bias.detach().numpy()}


def vision_model() -> "torch.nn.Module":
    config = transformers.Blip2VisionConfig(
        hidden_size=VISION["width"],
        intermediate_size=VISION["mlp_width"],
        num_hidden_layers=DEPTH,
        num_attention_heads=VISION["num_heads"],
        image_size=18,
        patch_size=VISION["patch_size"],
        layer_norm_eps=1e-6,
        hidden_act="gelu",
        qkv_bias=True,
        attn_implementation="eager",
    )
    model = transformers.Blip2VisionModel(config).eval()
    randomize(model)
    for layer in model.encoder.layers:  # EVA has no bias on keys
        layer.self_attn.qkv.bias.data[VISION["width"] : 2 * VISION["width"]] = 0
    return model


def vision_params(model: "torch.nn.Module") -> dict:
    blocks = []
    for layer in model.encoder.layers:
        qkv = [w.detach().numpy().T for w in layer.self_attn.qkv.weight.chunk(3)]
        biases = [b.detach().numpy() for b in layer.self_attn.qkv.bias.chunk(3)]
        blocks.append(
            {
                "norm1": norm(layer.layer_norm1),
                "norm2": norm(layer.layer_norm2),
                "attention": {
                    "query": {"kernel": qkv[0], "bias": biases[0]},
                    "key": {"kernel": qkv[1]},
                    "value": {"kernel": qkv[2], "bias": biases[2]},
                    "output": dense(layer.self_attn.projection),
                },
                "mlp_in": dense(layer.mlp.fc1),
                "mlp_out": dense(layer.mlp.fc2),
            }
        )
    embeddings = model.embeddings
    patch = embeddings.patch_embedding
    return {
        "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks),
        "cls_token": embeddings.class_embedding.detach().numpy(),
        "position_embedding": embeddings.position_embedding.detach().numpy(),
        "patch_embedding": {
            "kernel": patch.weight.detach().numpy().transpose(2, 3, 1, 0),
            "bias": patch.bias.detach().numpy(),
        },
    }


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", [True, False])
def test_vision_transformer_equals_transformers(scan: bool, remat: bool) -> None:
    model = vision_model()
    pixels = np.random.default_rng(0).standard_normal((2, 18, 18, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model.encoder(
            model.embeddings(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
        ).last_hidden_state.numpy()
    ours = VisionTransformer(**VISION, scan=scan, remat=remat)
    actual = ours.apply({"params": vision_params(model)}, pixels)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_image_that_is_not_whole_patches_is_refused() -> None:
    with pytest.raises(ValueError, match="20x18"):
        VisionTransformer(**VISION).init(jax.random.key(0), jnp.zeros((1, 20, 18, 3)))


def qformer_model() -> "torch.nn.Module":
    config = transformers.Blip2QFormerConfig(
        vocab_size=QFORMER["vocab_size"],
        hidden_size=WIDTH,
        num_hidden_layers=QFORMER["depth"],
        num_attention_heads=HEADS,
        intermediate_size=QFORMER["mlp_width"],
        max_position_embeddings=QFORMER["max_positions"],
        cross_attention_frequency=2,
        encoder_hidden_size=VISION["width"],
        layer_norm_eps=1e-12,
        use_qformer_text_input=True,
        attn_implementation="eager",
    )
    model = transformers.Blip2QFormerModel(config).eval()
    randomize(model)
    return model


def attention(layer: "torch.nn.Module") -> dict:
    inner = layer.attention
    return {
        "query": dense(inner.query),
        "key": dense(inner.key),
        "value": dense(inner.value),
        "output": dense(layer.output.dense),
        "norm": norm(layer.output.LayerNorm),
    }


def qformer_params(model: "torch.nn.Module", embeddings: dict) -> dict:
    params = {"embedding_norm": norm(model.layernorm), **embeddings}
    for i, layer in enumerate(model.encoder.layer):
        params[f"layer{i}"] = {
            "attention": attention(layer.attention),
            "mlp_in": dense(layer.intermediate.dense),
            "mlp_out": dense(layer.output.dense),
            "mlp_norm": norm(layer.output.LayerNorm),
            "query_mlp_in": dense(layer.intermediate_query.dense),
            "query_mlp_out": dense(layer.output_query.dense),
            "query_mlp_norm": norm(layer.output_query.LayerNorm),
        }
        if i % 2 == 0:
            params[f"layer{i}"]["cross_attention"] = attention(layer.crossattention)
    return params


def test_qformer_equals_transformers_in_both_modes() -> None:
    vision, qformer = vision_model(), qformer_model()
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    words, positions = draw(QFORMER["vocab_size"], WIDTH), draw(QFORMER["max_positions"], WIDTH)
    query_tokens, scale, bias = draw(1, QUERIES, WIDTH), 1 + 0.1 * draw(24), draw(24)
    embeddings = {
        "word_embedding": {"embedding": words},
        "position_embedding": {"embedding": positions},
    }
    ours = Blip2(VISION, QFORMER, QUERIES)
    params = {
        "visual_encoder": vision_params(vision),
        "vision_norm": {"scale": scale, "bias": bias},
        "query_tokens": query_tokens,
        "query_former": qformer_params(qformer, embeddings),
    }
    pixels = draw(2, 18, 18, 3)
    ids = rng.integers(0, QFORMER["vocab_size"], (2, LENGTH))
    mask = (np.arange(LENGTH) < np.array([[9], [5]])).astype(np.int32)
    expected_shapes = jax.eval_shape(ours.init, jax.random.key(0), pixels, ids, mask)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected_shapes)

    with torch.no_grad():
        features = vision.encoder(
            vision.embeddings(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
        ).last_hidden_state
        features = torch.nn.functional.layer_norm(
            features, (24,), torch.from_numpy(scale), torch.from_numpy(bias), 1e-5
        )
        image = qformer(
            torch.from_numpy(np.repeat(query_tokens, 2, 0)),
            query_length=QUERIES,
            encoder_hidden_states=features,
        ).last_hidden_state.numpy()
        text = qformer(
            torch.from_numpy(words[ids] + positions[None, :LENGTH]),
            query_length=0,
            attention_mask=torch.from_numpy(mask),
        ).last_hidden_state.numpy()
    actual_image, actual_text = ours.apply({"params": params}, pixels, ids, mask)
    np.testing.assert_allclose(actual_image, image, atol=1e-5)
    valid = mask.astype(bool)
    np.testing.assert_allclose(actual_text[valid], text[valid], atol=1e-5)


def test_text_features_do_not_depend_on_padding() -> None:
    ours = Blip2(VISION, QFORMER, QUERIES)
    ids = np.arange(1, LENGTH + 1)[None] % QFORMER["vocab_size"]
    mask = np.ones((1, LENGTH), np.int32)
    params = ours.init(jax.random.key(0), jnp.zeros((1, 18, 18, 3)), ids, mask)
    encode = lambda ids, mask: ours.apply(params, ids, mask, method="encode_text")  # noqa: E731
    padded = encode(np.pad(ids, ((0, 0), (0, 3))), np.pad(mask, ((0, 0), (0, 3))))
    np.testing.assert_allclose(padded[:, :LENGTH], encode(ids, mask), atol=1e-6)
