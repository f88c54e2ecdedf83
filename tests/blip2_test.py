"""The image encoder and the Q-Former against PyTorch `transformers`, on small random weights of odd sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import CHOICES
from ravar_jax.conversion.blip2 import (
    HF_IGNORED,
    LAVIS_IGNORED,
    hf_blip2_table,
    lavis_table,
)
from ravar_jax.conversion.mapping import from_torch, to_torch
from ravar_jax.errors import UserError
from ravar_jax.models.blip2 import Blip2
from ravar_jax.models.vision_transformer import VisionTransformer, resize_position_embedding

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.torch_blip2 import make_blip2  # noqa: E402
from tests.torch_weights import assert_gradients_equal, randomize, state_of  # noqa: E402

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
HF_TABLE = hf_blip2_table(DEPTH, QFORMER["depth"])
LAVIS_TABLE = lavis_table(DEPTH, QFORMER["depth"])
RNG = np.random.default_rng(0)
PIXELS = RNG.standard_normal((2, 18, 18, 3)).astype(np.float32)
# No id 0: PyTorch drops its gradient, as padding's.
IDS = RNG.integers(1, QFORMER["vocab_size"], (2, LENGTH))
MASK = (np.arange(LENGTH) < np.array([[9], [5]])).astype(np.int32)


def model_of(scan: bool = True) -> Blip2:
    return Blip2({**VISION, "scan": scan}, QFORMER, QUERIES)


@pytest.fixture(scope="module")
def shapes():
    variables = jax.eval_shape(model_of().init, jax.random.key(0), PIXELS, IDS, MASK)
    return variables["params"]


@pytest.fixture(scope="module")
def theirs() -> "torch.nn.Module":
    model = make_blip2(
        VISION, QFORMER, QUERIES, 18, image_text_hidden_size=3, attn_implementation="eager"
    )
    randomize(model)
    for layer in model.vision_model.encoder.layers:  # EVA has no bias on keys
        layer.self_attn.qkv.bias.data[VISION["width"] : 2 * VISION["width"]] = 0
    return model


@pytest.fixture(scope="module")
def params(theirs, shapes):
    return from_torch(state_of(theirs), HF_TABLE, model="BLIP-2", shapes=shapes, ignored=HF_IGNORED)


def their_features(model):
    return model.vision_model(torch.from_numpy(PIXELS.transpose(0, 3, 1, 2))).last_hidden_state


def their_image_tokens(model):
    query_tokens = model.query_tokens.expand(len(PIXELS), -1, -1)
    out = model.qformer(query_tokens, encoder_hidden_states=their_features(model))
    return out.last_hidden_state


def their_text_tokens(model):
    embedded, mask = model.embeddings(torch.from_numpy(IDS)), torch.from_numpy(MASK)
    return model.qformer(embedded, query_length=0, attention_mask=mask).last_hidden_state


def their_multimodal_tokens(model):
    query_tokens = model.query_tokens.expand(len(PIXELS), -1, -1)
    embedded = model.embeddings(torch.from_numpy(IDS), query_embeds=query_tokens)
    out = model.qformer(
        embedded,
        query_length=QUERIES,
        attention_mask=torch.from_numpy(np.pad(MASK, ((0, 0), (QUERIES, 0)), constant_values=1)),
        encoder_hidden_states=their_features(model),
    )
    return out.last_hidden_state


# Whether the image encoder is scanned, our method, its inputs, theirs, what counts of the output.
IMAGE = np.ones((2, QUERIES, 1), np.float32)
TEXT = MASK[..., None].astype(np.float32)
MULTIMODAL = np.concatenate([IMAGE, TEXT], axis=1)
MODES = {
    "image": (True, "encode_image", (PIXELS,), their_image_tokens, IMAGE),
    "image_unrolled": (False, "encode_image", (PIXELS,), their_image_tokens, IMAGE),
    "text": (True, "encode_text", (IDS, MASK), their_text_tokens, TEXT),
    "multimodal": (
        True,
        "encode_multimodal",
        (PIXELS, IDS, MASK),
        their_multimodal_tokens,
        MULTIMODAL,
    ),
}


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", CHOICES["model.remat"])
def test_vision_transformer_equals_transformers(theirs, params, scan: bool, remat: str) -> None:
    with torch.no_grad():
        vision = theirs.vision_model
        embedded = vision.embeddings(torch.from_numpy(PIXELS.transpose(0, 3, 1, 2)))
        expected = vision.encoder(embedded).last_hidden_state.numpy()
    ours = VisionTransformer(**VISION, scan=scan, remat=remat)
    actual = ours.apply({"params": params["visual_encoder"]}, PIXELS)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_image_that_is_not_whole_patches_is_refused() -> None:
    with pytest.raises(ValueError, match="20x18"):
        VisionTransformer(**VISION).init(jax.random.key(0), jnp.zeros((1, 20, 18, 3)))


@pytest.mark.parametrize(("height", "width"), [(30, 30), (12, 12), (18, 42), (18, 18)])
def test_positions_of_other_image_sizes_equal_transformers(theirs, height, width) -> None:
    embeddings = theirs.vision_model.embeddings
    rows, columns = height // VISION["patch_size"], width // VISION["patch_size"]
    with torch.no_grad():
        patches = torch.zeros(1, 1 + rows * columns, VISION["width"])
        expected = embeddings.interpolate_pos_encoding(patches, height, width).numpy()
    table = embeddings.position_embedding.detach().numpy()
    actual = resize_position_embedding(jnp.asarray(table), rows, columns)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_positions_of_no_square_are_refused() -> None:
    with pytest.raises(ValueError, match="11 patch positions"):
        resize_position_embedding(jnp.zeros((1, 12, 4)), 2, 2)


@pytest.mark.parametrize("mode", MODES)
def test_outputs_and_gradients_equal_transformers(theirs, params, mode) -> None:
    scan, method, inputs, run, counts = MODES[mode]
    weights = counts * np.random.default_rng(1).standard_normal((*counts.shape[:2], WIDTH))
    weights = weights.astype(np.float32)
    theirs.zero_grad()
    expected = run(theirs)
    (expected * torch.from_numpy(weights)).sum().backward()

    def loss(params):
        output = model_of(scan).apply({"params": params}, *inputs, method=method)
        if method == "encode_multimodal":
            output = jnp.concatenate(output, axis=1)
        return (output * weights).sum(), output

    gradients, actual = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(actual * counts, expected.detach().numpy() * counts, atol=1e-5)
    assert_gradients_equal(to_torch(gradients, HF_TABLE), theirs)


def test_matching_scores_equal_transformers(theirs, params) -> None:
    with torch.no_grad():
        expected = theirs(
            torch.from_numpy(PIXELS.transpose(0, 3, 1, 2)),
            torch.from_numpy(IDS),
            torch.from_numpy(MASK),
            use_image_text_matching_head=True,
        ).logits_per_image.numpy()
    head = {key: tensor.detach().numpy() for key, tensor in theirs.itm_head.named_parameters()}
    apply = jax.jit(functools.partial(model_of().apply, method="encode_multimodal"))
    tokens, _ = apply({"params": params}, PIXELS, IDS, MASK)
    actual = (tokens @ head["weight"].T + head["bias"][None, None]).mean(axis=1)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_text_features_do_not_depend_on_padding(params) -> None:
    encode = lambda ids, mask: model_of().apply(  # noqa: E731
        {"params": params}, ids, mask, method="encode_text"
    )
    ids, mask = IDS[:1], MASK[:1]
    padded = encode(np.pad(ids, ((0, 0), (0, 3))), np.pad(mask, ((0, 0), (0, 3))))
    np.testing.assert_allclose(padded[:, :LENGTH], encode(ids, mask), atol=1e-5)


@pytest.mark.parametrize("table", [HF_TABLE, LAVIS_TABLE], ids=["transformers", "lavis"])
def test_a_table_is_a_bijection_and_misses_any_dropped_key_by_name(params, shapes, table) -> None:
    paths = [path for row in table for path in row.paths]
    assert len(paths) == len(set(paths)) == len(jax.tree.leaves(shapes))
    state = to_torch(params, table)
    convert = lambda state: from_torch(state, table, model="BLIP-2", shapes=shapes)  # noqa: E731
    again = convert(state)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))
    for name, array in to_torch(again, table).items():
        np.testing.assert_array_equal(array, state[name])
    for name in state:
        rest = {key: array for key, array in state.items() if key != name}
        with pytest.raises(UserError) as error:
            convert(rest)
        assert str(error.value) == f"not a BLIP-2: missing {name}"


def test_an_encoder_of_one_block_is_a_stack_too(params) -> None:
    blocks = jax.tree.map(lambda leaf: leaf[:1], params["visual_encoder"]["blocks"])
    one = {**params, "visual_encoder": {**params["visual_encoder"], "blocks": blocks}}
    table = hf_blip2_table(1, QFORMER["depth"])
    again = from_torch(to_torch(one, table), table, model="BLIP-2", shapes=one)
    jax.tree.map(np.testing.assert_array_equal, again, one)


def test_what_transformers_holds_comes_back_bit_for_bit(theirs, params) -> None:
    state = state_of(theirs)
    back = to_torch(params, HF_TABLE)
    beside = {name.split(".")[0] for name in set(state) - set(back)}
    assert beside == {"vision_projection", "text_projection", "itm_head"}
    for name, array in back.items():
        np.testing.assert_array_equal(array, state[name])


def test_unknown_misshapen_and_impossible_tensors_are_named_at_once(theirs, shapes) -> None:
    state = state_of(theirs)
    state["vision_model.encoder.layers.1.self_attn.qkv.bias"] = np.ones(72, np.float32)
    state["query_tokens"] = np.zeros((1, 3, WIDTH), np.float32)
    state["vision_projection.scale"] = np.zeros(1)
    with pytest.raises(UserError) as error:
        from_torch(state, HF_TABLE, model="BLIP-2", shapes=shapes, ignored=HF_IGNORED)
    assert str(error.value) == (
        "not a BLIP-2: unused vision_projection.scale; "
        "non-zero vision_model.encoder.layers.1.self_attn.qkv.bias, part 2 of 3; "
        "misshapen query_tokens (1, 3, 40), query_tokens is (1, 7, 40)"
    )


def test_a_transformers_model_without_text_is_refused_by_what_it_lacks(theirs, shapes) -> None:
    text_only = ("embeddings.", "qformer.encoder.layer.0.intermediate.")
    state = {n: a for n, a in state_of(theirs).items() if not n.startswith(text_only)}
    state["language_model.lm_head.weight"] = np.zeros(3)
    with pytest.raises(UserError) as error:
        from_torch(state, HF_TABLE, model="BLIP-2", shapes=shapes, ignored=HF_IGNORED)
    assert str(error.value) == (
        "not a BLIP-2: missing embeddings.word_embeddings.weight; "
        "missing embeddings.position_embeddings.weight; "
        "missing qformer.encoder.layer.0.intermediate.dense.weight; "
        "missing qformer.encoder.layer.0.intermediate.dense.bias"
    )


def test_lavis_names_at_the_released_depths_are_those_of_a_ravar_checkpoint(params, shapes) -> None:
    table = lavis_table(39, 12)
    names = [name for row in table for name in row.torch_names]
    vision = [name for name in names if name.startswith("visual_encoder.")]
    qformer = [name for name in names if name.startswith("Qformer.")]
    # Of the spec's 511 and 336 tensors the head's seven and position_ids are beside the extractor.
    assert (len(vision), len(qformer), len(names)) == (511, 336 - 7 - 1, 511 + 328 + 3)
    beside = [
        "Qformer.bert.embeddings.position_ids",
        "Qformer.cls.predictions.bias",
        "Qformer.cls.predictions.transform.LayerNorm.weight",
        "vision_proj.weight",
        "text_proj.bias",
        "itm_head.weight",
        "temp",
    ]
    state = {**to_torch(params, LAVIS_TABLE), **dict.fromkeys(beside, np.zeros(1))}
    from_torch(state, LAVIS_TABLE, model="BLIP-2", shapes=shapes, ignored=LAVIS_IGNORED)
    with pytest.raises(UserError, match="unused temperature"):
        from_torch(
            {**state, "temperature": np.zeros(1)},
            LAVIS_TABLE,
            model="BLIP-2",
            shapes=shapes,
            ignored=LAVIS_IGNORED,
        )
