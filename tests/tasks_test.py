"""The two tasks: what is trained, what is frozen, and that cached features and pixels give the same loss."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import mini_blip
from ravar_jax import sharding, train
from ravar_jax.backbone import encode_frames, encode_text, load_backbone, save_backbone
from ravar_jax.errors import UsageError, UserError
from ravar_jax.models.grounding_decoder import GroundingDecoder, token_owners
from ravar_jax.tasks import pretrain, ravar
from ravar_jax.tokenizer import BEGIN, END, PAD
from tests.untrained_run import IMAGE_SIZE, TEXT_LENGTH, WIDTH, make_config, write_backbone

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS, FRAMES = 3, 8


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone") / "weights"
    write_backbone(folder, depth=2)
    return folder


def make_batch(backbone_folder: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ids, mask, _ = load_backbone(str(backbone_folder)).tokenizer.encode(
        ["the man", "woman in a red coat on the left", ""], TEXT_LENGTH
    )
    size = (ROWS, FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3)
    return {
        "frames": rng.integers(0, 256, size, dtype=np.uint8),
        "token_ids": ids,
        "attention_mask": mask,
        "boxes": rng.uniform(0.2, 0.6, (ROWS, 100, 4)).astype(np.float32),
        "class_ids": np.where(np.arange(100) < 3, 1, 91)[None].repeat(ROWS, 0).astype(np.int32),
        "target_box": rng.uniform(0, 1, (ROWS, 4)).astype(np.float32),
        "action_labels": (rng.uniform(size=(ROWS, 80)) < 0.1).astype(np.float32),
        "mask": np.ones(ROWS, np.float32),
        "example_id": np.arange(ROWS, dtype=np.int32),
    }


def as_cached(backbone_folder: Path, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """Replaces frames by their features, as the cache holds them."""
    backbone = load_backbone(str(backbone_folder))
    frames = batch["frames"].reshape(-1, *batch["frames"].shape[2:])
    tokens = encode_frames(backbone.config, backbone.params, frames)
    text = encode_text(
        backbone.config, backbone.params, batch["token_ids"], batch["attention_mask"]
    )
    rest = {key: value for key, value in batch.items() if key != "frames"}
    image_tokens = tokens.reshape(ROWS, FRAMES, *tokens.shape[1:]).mean(1)
    return {**rest, "image_tokens": image_tokens, "text_tokens": text}


def loss_and_gradient(task: Any, batch: dict[str, Any]) -> tuple[jax.Array, Any]:
    params = {**task.init_params(jax.random.key(0)), **task.loaded}
    compute = jax.jit(jax.value_and_grad(task.loss, has_aux=True), static_argnums=4)
    (loss, _), gradient = compute(params, task.frozen, batch, jax.random.key(1), True)
    return loss, gradient


def test_cached_features_give_the_loss_of_pixels(backbone_folder: Path) -> None:
    task = ravar.make_task(make_config(backbone_folder))
    batch = make_batch(backbone_folder)
    from_pixels, gradient = loss_and_gradient(task, batch)
    from_cache, cached_gradient = loss_and_gradient(task, as_cached(backbone_folder, batch))
    np.testing.assert_allclose(from_pixels, from_cache, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, cached_gradient
    )


def test_backbone_is_frozen_unless_asked(backbone_folder: Path) -> None:
    batch = make_batch(backbone_folder)
    frozen = ravar.make_task(make_config(backbone_folder))
    assert not frozen.loaded
    tuned = ravar.make_task(make_config(backbone_folder, model__train_backbone=True))
    assert not tuned.frozen["backbone"]
    loss, gradient = loss_and_gradient(tuned, batch)
    np.testing.assert_allclose(loss, loss_and_gradient(frozen, batch)[0], rtol=1e-6)
    visual = jax.tree.leaves(gradient["backbone"]["visual_encoder"])
    assert max(float(jnp.abs(leaf).max()) for leaf in visual) > 0


@pytest.fixture(scope="module")
def of_an_older_run(backbone_folder: Path) -> tuple[jax.Array, Any]:
    """Loss and gradient with a config that has neither `model.remat` nor `model.scan`."""
    config = make_config(backbone_folder, model__train_backbone=True)
    with config.unlocked():
        del config.model.remat, config.model.scan
    return loss_and_gradient(ravar.make_task(config), make_batch(backbone_folder))


@pytest.mark.parametrize(("remat", "scan"), [("minimal", True), ("full", False)])
def test_program_of_the_encoder_does_not_change_the_numbers(
    backbone_folder: Path, of_an_older_run: tuple[jax.Array, Any], remat: str, scan: bool
) -> None:
    config = make_config(
        backbone_folder, model__train_backbone=True, model__remat=remat, model__scan=scan
    )
    found = loss_and_gradient(ravar.make_task(config), make_batch(backbone_folder))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), found, of_an_older_run
    )


def test_qformer_is_tuned_without_the_image_encoder(backbone_folder: Path) -> None:
    batch = make_batch(backbone_folder)
    tuned = ravar.make_task(make_config(backbone_folder, model__train_qformer=True))
    assert set(tuned.frozen["backbone"]) == {"visual_encoder"}
    assert set(tuned.loaded["backbone"]) == {"vision_norm", "query_tokens", "query_former"}
    loss, gradient = loss_and_gradient(tuned, batch)
    whole = ravar.make_task(make_config(backbone_folder, model__train_backbone=True))
    loss_of_all, gradient_of_all = loss_and_gradient(whole, batch)
    np.testing.assert_allclose(loss, loss_of_all, rtol=1e-6)
    for name, part in gradient["backbone"].items():
        assert any(np.any(leaf) for leaf in jax.tree.leaves(part)), name
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
            part,
            gradient_of_all["backbone"][name],
        )


def test_released_dropout_perturbs_the_frozen_features(backbone_folder: Path) -> None:
    config_file = backbone_folder / "config.json"
    noisy = backbone_folder.parent / "noisy"
    noisy.mkdir(exist_ok=True)
    for file in backbone_folder.iterdir():
        (noisy / file.name).write_bytes(file.read_bytes())
    text = config_file.read_text().replace('"dropout": 0.0', '"dropout": 0.1')
    (noisy / "config.json").write_text(text)
    batch = make_batch(backbone_folder)
    off = ravar.make_task(make_config(noisy))
    on = ravar.make_task(make_config(noisy, model__frozen_dropout="on"))
    params = off.init_params(jax.random.key(0))

    def loss(task: Any, seed: int, train: bool) -> float:
        return float(task.loss(params, task.frozen, batch, jax.random.key(seed), train)[0])

    assert loss(on, 1, True) != loss(off, 1, True)
    assert loss(on, 1, False) == loss(off, 1, False)
    # A trained Q-Former has its dropout whatever the switch says of frozen ones.
    tuned = ravar.make_task(make_config(noisy, model__train_qformer=True))
    params = {**params, **tuned.loaded}
    assert len({loss(tuned, 1, True), loss(tuned, 2, True), loss(tuned, 1, False)}) == 3
    np.testing.assert_allclose(loss(tuned, 1, False), loss(off, 1, False), rtol=1e-6)


def test_prediction_averages_logits_over_clips(backbone_folder: Path) -> None:
    task = ravar.make_task(make_config(backbone_folder))
    params = task.init_params(jax.random.key(0))
    batch = make_batch(backbone_folder)
    one, two = batch["frames"], batch["frames"][:, ::-1, ::-1]
    both = dict(batch, frames=np.stack([one, two], axis=1))
    singles = [
        task.predict(params, task.frozen, dict(batch, frames=frames[:, None]))["action_logits"]
        for frames in (one, two)
    ]
    together = task.predict(params, task.frozen, both)["action_logits"]
    np.testing.assert_allclose(together, (singles[0] + singles[1]) / 2, atol=1e-5)
    assert np.abs(singles[0] - singles[1]).max() > 1e-5


def test_label_table_is_the_mean_of_a_names_tokens(backbone_folder: Path) -> None:
    backbone = load_backbone(str(backbone_folder))
    table = ravar.compute_label_table(backbone)
    ids, mask, _ = backbone.tokenizer.encode(["person"], TEXT_LENGTH)
    tokens = encode_text(backbone.config, backbone.params, ids, mask)
    assert table.shape == (91, WIDTH)
    np.testing.assert_allclose(table[0], tokens[0, : mask.sum()].mean(0), atol=1e-5)


def test_blip2_needs_a_label_table_of_its_own(backbone_folder: Path, tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((backbone_folder / file).read_bytes())
    ids = load_backbone(str(backbone_folder)).tokenizer.vocab_size - 1  # and "[DEC]"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"word{n}" for n in range(ids - 4))]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    config = make_config(tmp_path)
    with pytest.raises(UserError, match=r"model.label_table is empty.*--source xlmr"):
        ravar.make_task(config)
    config.model.label_table = str(tmp_path / "table.npy")
    with pytest.raises(UserError, match=r"model.label_table=.*no such file.*--source xlmr"):
        ravar.make_task(config)
    np.save(tmp_path / "table.npy", np.ones((91, WIDTH)))
    assert ravar.make_task(config).frozen["label_table"].shape == (91, WIDTH)


def test_label_table_of_another_width_is_refused(backbone_folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "table.npy", np.zeros((91, WIDTH + 1)))
    config = make_config(backbone_folder, model__label_table=str(tmp_path / "table.npy"))
    with pytest.raises(UserError, match=rf"table.npy: shape \(91, {WIDTH + 1}\)"):
        ravar.make_task(config)


def test_width_of_another_backbone_is_refused(backbone_folder: Path) -> None:
    config = make_config(backbone_folder, model__width=WIDTH + 1)
    with pytest.raises(UserError, match=f"model.width={WIDTH + 1}"):
        ravar.make_task(config)


def test_released_aggregation_leaves_part_of_agent_box_untouched(backbone_folder: Path) -> None:
    config = make_config(backbone_folder)
    task, batch = ravar.make_task(config), make_batch(backbone_folder)
    _, gradient = loss_and_gradient(task, batch)
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        if task.no_gradient(path):
            assert not np.any(leaf), path
    untouched = [
        path
        for path in ("agent_box/norm2/scale", "agent_box/attention/value_kernel")
        if task.no_gradient(path)
    ]
    assert untouched == ["agent_box/norm2/scale"]
    averaged = ravar.make_task(make_config(backbone_folder, model__aggregation="mean_of_blocks"))
    assert not averaged.no_gradient("agent_box/norm2/scale")


def test_frozen_weights_lie_in_shards_and_give_the_same_loss(backbone_folder: Path) -> None:
    task, batch = ravar.make_task(make_config(backbone_folder)), make_batch(backbone_folder)
    params = task.init_params(jax.random.key(0))
    compute = jax.jit(lambda frozen: task.loss(params, frozen, batch, jax.random.key(1), True)[0])
    mesh = sharding.make_mesh(ConfigDict({"data": 1, "fsdp": 4, "tensor": 2}))
    placed = train.place_frozen(task.frozen, mesh)
    kernel = placed["backbone"]["query_former"]["layer0"]["mlp_in"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(WIDTH // 4, 16 // 2)}
    np.testing.assert_allclose(compute(placed), compute(task.frozen), rtol=1e-5)


def small_pretrain_config() -> ConfigDict:
    config = mini_blip.get_config()
    config.model.width = 16
    config.model.vision.update(width=16, depth=1, mlp_width=16, stem_widths=(4, 4))
    config.model.qformer.update(width=16, depth=1, mlp_width=16, vocab_size=280)
    config.data.update(image_size=96, text_length=8)
    return config


def pretrain_setup(config: ConfigDict) -> tuple[Any, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    person_mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], np.float32)
    return pretrain.make_task(config), {
        "frames": rng.integers(0, 256, (2, 2, 96, 96, 3), dtype=np.uint8),
        "token_ids": rng.integers(4, 40, (2, 4, 8), dtype=np.int32),
        "attention_mask": np.ones((2, 4, 8), np.int32),
        "target_box": rng.uniform(0, 1, (2, 4, 4)).astype(np.float32),
        "action_labels": (rng.uniform(size=(2, 4, 80)) < 0.1).astype(np.float32),
        "person_mask": person_mask,
        "mask": np.ones(2, np.float32),
        "example_id": np.arange(2, dtype=np.int32),
    }


def test_pretraining_ignores_padded_people_and_reaches_every_weight() -> None:
    task, batch = pretrain_setup(small_pretrain_config())
    params = task.init_params(jax.random.key(0))
    changed = dict(batch, action_labels=batch["action_labels"].copy())
    changed["action_labels"][0, 2:] = 1
    loss = jax.jit(lambda params, batch: task.loss(params, {}, batch, jax.random.key(0), True)[0])
    assert float(loss(params, batch)) == float(loss(params, changed))
    gradient = jax.jit(jax.grad(loss))(params, batch)
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        # A bias on keys shifts all scores of a query alike, and nothing reads the values of the detections' block; both
        # are in the optimizer all the same, as the release has them.
        zero = path.endswith(("key/bias", "agent_box/attention/value_kernel"))
        if not zero and not task.no_gradient(path):
            assert np.any(leaf != 0), path


def test_the_second_stage_trains_the_qformer_alone_from_the_first_one_s_weights(
    backbone_folder: Path, tmp_path: Path
) -> None:
    config = small_pretrain_config()
    sizes = pretrain.backbone_config(config)
    first_stage = sizes.init(jax.random.key(5))
    save_backbone(tmp_path / "first", sizes, first_stage, backbone_folder / "tokenizer.model")
    config.model.backbone = str(tmp_path / "first")
    task, batch = pretrain_setup(config)
    trained, frozen = task.loaded["backbone"], task.frozen["backbone"]
    assert set(frozen) == {"visual_encoder", "vision_norm"}
    jax.tree.map(np.testing.assert_array_equal, {**trained, **frozen}, first_stage)
    assert set(task.init_params(jax.random.key(0))) == {"fusion"}  # no decoders
    _, gradient = loss_and_gradient(task, batch)
    assert set(gradient["backbone"]) == {"query_tokens", "query_former"}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(gradient["backbone"]):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        if not path.endswith("key/bias"):
            assert np.any(leaf != 0), path

    tokenizer = pretrain.own_tokenizer(tmp_path / "run", config, ())
    assert (
        tokenizer.encode(["the man"], 8)[0].tolist()
        == load_backbone(str(backbone_folder)).tokenizer.encode(["the man"], 8)[0].tolist()
    )
    config.model.qformer.mlp_width = 32
    with pytest.raises(UsageError, match="first is of other sizes than the config"):
        pretrain.make_task(config)


def test_tokens_belong_to_who_covers_or_is_closest_to_their_place() -> None:
    boxes = jnp.array(
        [
            [
                [0.0, 0.0, 0.45, 1.0],  # almost the left half of the frame
                [0.25, 0.0, 0.5, 1.0],  # narrower: the second column is nearer to its middle
                [0.7, 0.7, 0.71, 0.71],  # covers no token's place
                [0.0, 0.0, 1.0, 1.0],  # padding
            ]
        ]
    )
    owners = np.asarray(token_owners(boxes, jnp.array([[1.0, 1.0, 1.0, 0.0]]), (2, 4)))[0]
    assert np.flatnonzero(owners[0]).tolist() == [0, 4]
    assert np.flatnonzero(owners[1]).tolist() == [1, 5]
    assert np.flatnonzero(owners[2]).tolist() == [6]
    assert not owners[3].any()


def test_matching_loss_counts_every_token_of_the_person() -> None:
    owners = jnp.zeros((1, 2, 8), bool).at[0, 0, :2].set(True)
    mask = jnp.array([[1.0, 0.0]])
    chance = jnp.zeros((1, 2, 8)).at[:, 1].set(50.0)  # padding must not count
    np.testing.assert_allclose(pretrain.matching_loss(chance, owners, mask), np.log(4), rtol=1e-6)
    sure = chance.at[0, 0, 1].set(50.0)
    np.testing.assert_allclose(pretrain.matching_loss(sure, owners, mask), 0.0, atol=1e-6)


def test_words_are_counted_without_padding_and_special_ids() -> None:
    ids = jnp.array([[[BEGIN, 5, 6, END, PAD, PAD]]])
    mask = jnp.array([[[1, 1, 1, 1, 0, 0]]])
    logits = jnp.zeros((1, 1, 6, 8)).at[0, 0, 1, 5].set(50.0)
    loss = pretrain.word_loss(logits, ids, mask, jnp.ones((1, 1)))
    np.testing.assert_allclose(loss, np.log(8) / 2, rtol=1e-6)


def test_a_word_is_guessed_without_seeing_it() -> None:
    decoder = GroundingDecoder(mlp_width=8, vocab_size=12)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.normal(size=(1, 4, 16)), jnp.float32)
    ids = jnp.asarray(rng.integers(4, 12, (1, 1, 6)), jnp.int32)
    inputs = (tokens, jnp.zeros((1, 1, 6, 16)))
    rest = (jnp.ones((1, 1, 6), jnp.int32), jnp.ones((1, 1, 4), bool))
    params = decoder.init(jax.random.key(0), *inputs, ids, *rest)

    def logits(ids: jax.Array) -> np.ndarray:
        output: Any = decoder.apply(params, *inputs, ids, *rest)
        return np.asarray(output.word_logits[0, 0])

    changed = logits(ids.at[0, 0, 3].set((ids[0, 0, 3] + 1) % 12))
    same = (changed == logits(ids)).all(axis=-1)
    assert same.tolist() == [True, True, False, True, False, True]  # only its neighbours see it


def test_query_tokens_start_by_looking_at_their_own_place() -> None:
    config = mini_blip.get_config()
    params = pretrain.make_task(config).init_params(jax.random.key(0))["backbone"]
    cross = params["query_former"]["layer0"]["cross_attention"]
    places = params["visual_encoder"]["position_embedding"][0, 1:]
    scores = np.asarray(
        (params["query_tokens"][0] @ cross["query"]["kernel"]) @ (places @ cross["key"]["kernel"]).T
    )
    rows, columns = np.divmod(scores.argmax(axis=1), 8)  # patches: 8 x 8; query tokens: 4 x 8
    assert (rows // 2).tolist() == np.repeat(np.arange(4), 8).tolist()
    assert columns.tolist() == np.tile(np.arange(8), 4).tolist()


def test_pretraining_refuses_encoders_of_two_widths() -> None:
    config = mini_blip.get_config()
    config.model.vision.width = 80
    with pytest.raises(
        UsageError, match="model.vision.width=80 differs from model.qformer.width=96"
    ):
        pretrain.make_task(config)
    config = mini_blip.get_config()
    config.model.width = 64
    with pytest.raises(UsageError, match="model.width=64 differs from model.qformer.width=96"):
        pretrain.make_task(config)
