"""XLM-R against PyTorch `transformers` on small random weights, and the label table made with it."""

import functools

import jax
import numpy as np
import pytest

from ravar_jax.class_names import COCO_NAMES
from ravar_jax.conversion.mapping import from_torch, to_torch
from ravar_jax.conversion.xlm_roberta import IGNORED, xlm_roberta_table
from ravar_jax.errors import UserError
from ravar_jax.label_embeddings import label_embeddings, label_ids
from ravar_jax.models.xlm_roberta import XlmRoberta

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.torch_weights import randomize, state_of  # noqa: E402

OURS = XlmRoberta(width=40, depth=3, num_heads=5, mlp_width=44, vocab_size=31, max_positions=12)
TABLE = xlm_roberta_table(3)
RNG = np.random.default_rng(0)
# Names of one to six pieces; 0 is the unknown piece.
PIECES = [RNG.integers(0, 30, RNG.integers(1, 7)).tolist() for _ in COCO_NAMES]
PIECES[3] = [5, 0, 29, 0, 7, 8]
IDS, MASK = label_ids(PIECES)


@pytest.fixture(scope="module")
def theirs() -> "torch.nn.Module":
    config = transformers.XLMRobertaConfig(
        vocab_size=31,
        hidden_size=40,
        num_hidden_layers=3,
        num_attention_heads=5,
        intermediate_size=44,
        max_position_embeddings=12,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        attn_implementation="eager",
    )
    model = transformers.XLMRobertaModel(config).eval()
    randomize(model)
    return model


@pytest.fixture(scope="module")
def shapes():
    return jax.eval_shape(OURS.init, jax.random.key(0), IDS, MASK)["params"]


@pytest.fixture(scope="module")
def params(theirs, shapes):
    return from_torch(
        state_of(theirs), TABLE, model="label encoder", shapes=shapes, ignored=IGNORED
    )


@pytest.fixture(scope="module")
def expected(theirs):
    with torch.no_grad():
        ids, mask = (torch.from_numpy(x.astype(np.int64)) for x in (IDS, MASK))
        return theirs(ids, attention_mask=mask).last_hidden_state.numpy()


def test_tokens_equal_transformers(params, expected):
    actual = jax.jit(OURS.apply)({"params": params}, IDS, MASK)
    valid = MASK.astype(bool)
    np.testing.assert_allclose(actual[valid], expected[valid], atol=1e-5)


def test_label_table_is_the_mean_of_each_names_own_tokens(params, expected):
    table = jax.jit(functools.partial(label_embeddings, OURS))(params, IDS, MASK)
    assert table.shape == (91, 40)
    means = [tokens[: len(name) + 2].mean(0) for tokens, name in zip(expected, PIECES, strict=True)]
    np.testing.assert_allclose(table, means, atol=1e-5)
    with pytest.raises(ValueError, match="90 rows of ids, but 91 names"):
        label_embeddings(OURS, params, IDS[1:], MASK[1:])


def test_ids_are_fairseqs():
    assert IDS.shape == (91, 8)
    assert IDS[3].tolist() == [0, 6, 3, 30, 3, 8, 9, 2]
    ids, mask = label_ids([[3], [4, 9]])
    assert ids.tolist() == [[0, 4, 2, 1], [0, 5, 10, 2]]
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_too_many_tokens_are_refused():
    ids = np.zeros((1, 11), np.int32)
    with pytest.raises(ValueError, match="11 tokens, but 10 positions"):
        jax.eval_shape(OURS.init, jax.random.key(0), ids, ids)


def test_the_table_is_a_bijection_and_misses_any_dropped_key_by_name(theirs, params, shapes):
    paths = [path for row in TABLE for path in row.paths]
    assert len(paths) == len(set(paths)) == len(jax.tree.leaves(shapes))
    state, back = state_of(theirs), to_torch(params, TABLE)
    assert set(state) - set(back) == {"pooler.dense.weight", "pooler.dense.bias"}
    for name, array in back.items():
        np.testing.assert_array_equal(array, state[name])
        rest = {key: value for key, value in state.items() if key != name}
        with pytest.raises(UserError) as error:
            from_torch(rest, TABLE, model="label encoder", shapes=shapes, ignored=IGNORED)
        assert str(error.value) == f"not a label encoder: missing {name}"
