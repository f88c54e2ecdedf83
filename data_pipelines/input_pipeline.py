"""Batches of a config: which records, in which order, shown how.

    config -> index of the split (dataset folder or feature cache) -> example source -> order -> `Batches`

The keys, dtypes and shapes of a batch are listed in the README ("Input contract"). Process p of P receives its
contiguous share of every global batch, and every process receives the same number of batches.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from data_pipelines import feature_cache
from data_pipelines.augmentation import configured_augmentation
from data_pipelines.batches import Batches
from data_pipelines.dataset_folder import dataset_folder
from data_pipelines.example_order import EvaluationOrder, TrainingOrder, local_batch_size
from data_pipelines.examples import ExampleSource, PixelExamples, PixelWindows, ReadingOptions
from data_pipelines.frame_sampling import FrameSampler, evaluation_sampler, training_sampler
from data_pipelines.key_frame import key_frame
from data_pipelines.perturbations import Perturbation, check_perturbation
from data_pipelines.record_index import RecordIndex, load_index
from data_pipelines.records import Window, parse_window
from data_pipelines.sentence_ids import SentenceIds
from ravar_jax.errors import UsageError
from ravar_jax.tokenizer import Tokenizer


def split_size(config: ConfigDict, split: str) -> int:
    """Returns the number of examples of a split: (window, person) pairs, or windows when pretraining."""
    index = _index(config, split)
    return index.num_windows if config.task == "pretrain" else index.num_examples


def train_batches(
    config: ConfigDict,
    tokenizer: Tokenizer,
    start_step: int,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Batches:
    """Returns the endless stream of training batches from a step on, a pure function of (config, step).

    Args:
        config: every value comes from it.
        tokenizer: of the backbone.
        start_step: first global step.
        process_index: which share of each global batch; None asks JAX.
        process_count: number of shares; None asks JAX.

    Raises:
        UserError: the dataset or cache is missing, damaged, or does not store what the config needs.
    """
    source = _example_source(config, tokenizer, "train", training=True, sentences="true")
    order = TrainingOrder(source.index.num_examples, config.seed)
    return _training(config, source, order, start_step, process_index, process_count)


def eval_batches(
    config: ConfigDict,
    tokenizer: Tokenizer,
    split: str,
    sentences: str = "true",
    process_index: int | None = None,
    process_count: int | None = None,
    only_shared_windows: bool = False,
    perturbation: Perturbation | None = None,
) -> Batches:
    """Returns batches that hold every example of a split once, in file order, padded with mask 0.

    Args:
        config: every value comes from it; `data.sentences="blank"` overrides `sentences`.
        tokenizer: of the backbone.
        split: `train`, `val` or `test`.
        sentences: `true`, `swapped` or `blank`.
        process_index: which share of each global batch; None asks JAX.
        process_count: number of shares; None asks JAX.
        only_shared_windows: leave out examples alone in their window, as `swapped` always does; the number that was
            left out is in `num_left_out`.
        perturbation: of the frames, and of the detector's key frame; a config with a feature cache is refused.

    Raises:
        UserError: the dataset or cache is missing, damaged, or does not store what the config needs.
        UsageError: the config has a feature cache, or the perturbation would change nothing.
    """
    if perturbation is not None:
        check_perturbation(config, perturbation)
    source = _example_source(
        config, tokenizer, split, training=False, sentences=sentences, perturbation=perturbation
    )
    examples = np.arange(source.index.num_examples)
    if only_shared_windows or sentences == "swapped":
        examples = examples[source.index.num_people[source.index.examples[:, 0]] > 1]
    return _evaluation(config, source, examples, process_index, process_count)


def pretrain_batches(
    config: ConfigDict,
    tokenizer: Tokenizer,
    start_step: int,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Batches:
    """Returns the endless stream of pretraining batches, one row a window; otherwise as `train_batches`."""
    source = _window_source(config, tokenizer, "train", "true")
    order = TrainingOrder(source.index.num_windows, config.seed)
    return _training(config, source, order, start_step, process_index, process_count)


def pretrain_eval_batches(
    config: ConfigDict,
    tokenizer: Tokenizer,
    split: str,
    sentences: str = "true",
    process_index: int | None = None,
    process_count: int | None = None,
) -> Batches:
    """Returns batches that hold every window of a split once; frames by the training policy of epoch 0.

    `sentences` is `true` or `blank`: with all people of a window in one row, swapping has no meaning.
    """
    source = _window_source(config, tokenizer, split, sentences)
    return _evaluation(
        config, source, np.arange(source.index.num_windows), process_index, process_count
    )


def describe_examples(config: ConfigDict, split: str, example_ids: Sequence[int]) -> list[str]:
    """Returns "clip_id/person_id" of examples (pretraining: "clip_id"), so that a user can find them."""
    index = _index(config, split)
    if config.task == "pretrain":
        return [index.clip_ids[number] for number in example_ids]
    names = []
    for number in example_ids:
        window, person = index.examples[number]
        people = _window(index, window).people
        names.append(f"{index.clip_ids[window]}/{people[person].person_id}")
    return names


def training_sentences(config: ConfigDict) -> Iterator[str]:
    """Yields the sentences of the train split in file order, to train a tokenizer on."""
    index = _index(config, "train")
    for number in range(index.num_windows):
        for person in _window(index, number).people:
            yield person.sentence


def _reading_options(
    config: ConfigDict, sentences: str, perturbation: Perturbation | None
) -> ReadingOptions:
    """Returns what of a record is shown under a config.

    Raises:
        UsageError: `sentences` is unknown.
    """
    if sentences not in ("true", "swapped", "blank"):
        raise UsageError(f"sentences={sentences!r} is not one of true, swapped, blank")
    return ReadingOptions(
        sentences="blank" if config.data.sentences == "blank" else sentences,
        blank_video=config.data.video == "blank",
        detections=config.model.detections == "dataset",
        num_detections=config.model.num_detections,
        pixels=config.data.pixels,
        image_size=config.data.image_size,
        key_frame=key_frame(config),
        perturbation=perturbation,
    )


def _example_source(
    config: ConfigDict,
    tokenizer: Tokenizer,
    split: str,
    *,
    training: bool,
    sentences: str,
    perturbation: Perturbation | None = None,
) -> ExampleSource:
    options = _reading_options(config, sentences, perturbation)
    if training:
        options = dataclasses.replace(options, augmentation=configured_augmentation(config))
    if config.data.feature_cache:
        return feature_cache.cached_examples(config, split, training, options)
    sampler = training_sampler(config) if training else evaluation_sampler(config)
    return PixelExamples(*_pixel_arguments(config, tokenizer, split, sampler, options))


def _window_source(
    config: ConfigDict, tokenizer: Tokenizer, split: str, sentences: str
) -> ExampleSource:
    if sentences == "swapped":
        raise UsageError("sentences=swapped has no meaning for task=pretrain; use true or blank")
    if config.data.feature_cache:
        raise UsageError(
            "data.feature_cache is set, but task=pretrain trains the backbone from pixels"
        )
    options = ReadingOptions(
        sentences="blank" if config.data.sentences == "blank" else sentences,
        blank_video=config.data.video == "blank",
        detections=False,
        num_detections=0,
        pixels=config.data.pixels,
        image_size=config.data.image_size,
    )
    return PixelWindows(
        *_pixel_arguments(config, tokenizer, split, training_sampler(config), options)
    )


def _pixel_arguments(
    config: ConfigDict,
    tokenizer: Tokenizer,
    split: str,
    sampler: FrameSampler,
    options: ReadingOptions,
) -> tuple[RecordIndex, FrameSampler, SentenceIds, ReadingOptions, int]:
    sentence_ids = SentenceIds(tokenizer, config.data.text_length)
    return _index(config, split), sampler, sentence_ids, options, config.data.max_bad_records


def _index(config: ConfigDict, split: str) -> RecordIndex:
    folder = config.data.feature_cache or dataset_folder(config)
    return load_index(folder, split, config.data.max_bad_records)


def _window(index: RecordIndex, number: int) -> Window:
    return parse_window(index.read(number), index.where(number))


def _training(
    config: ConfigDict,
    source: ExampleSource,
    order: TrainingOrder,
    start_step: int,
    process_index: int | None,
    process_count: int | None,
) -> Batches:
    process_index, process_count = _process(process_index, process_count)
    local_batch_size(config.train.batch_size, process_count, "train.batch_size")
    return Batches(
        source,
        order,
        batch_size=config.train.batch_size,
        start_step=start_step,
        stop_step=None,
        process_index=process_index,
        process_count=process_count,
    )


def _evaluation(
    config: ConfigDict,
    source: ExampleSource,
    examples: np.ndarray,
    process_index: int | None,
    process_count: int | None,
) -> Batches:
    process_index, process_count = _process(process_index, process_count)
    batch_size = config.evaluation.batch_size
    local_batch_size(batch_size, process_count, "evaluation.batch_size")
    order = EvaluationOrder(examples)
    total = (
        source.index.num_windows if isinstance(source, PixelWindows) else source.index.num_examples
    )
    return Batches(
        source,
        order,
        batch_size=batch_size,
        start_step=0,
        stop_step=order.num_batches(batch_size),
        process_index=process_index,
        process_count=process_count,
        num_left_out=total - len(examples),
    )


def _process(index: int | None, count: int | None) -> tuple[int, int]:
    return (
        jax.process_index() if index is None else index,
        jax.process_count() if count is None else count,
    )
