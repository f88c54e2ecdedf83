"""SentencePiece tokens: ids padded to a fixed length with a mask, and training on a list of sentences."""

import functools
import hashlib
import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import sentencepiece

from ravar_jax.errors import UserError

PAD, UNKNOWN, BEGIN, END = 0, 1, 2, 3


class Tokenizer(Protocol):
    """What a backbone's tokenizer is: `SentencePieceTokenizer`, or `wordpiece.WordPieceTokenizer`.

    Attributes:
        sha256: of the file that it was read from.
        vocab_size: number of ids.
    """

    sha256: str
    vocab_size: int

    def encode(
        self, sentences: Sequence[str], text_length: int
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Returns ids and mask, int32 (n, text_length), and how many sentences were cut."""


class SentencePieceTokenizer:
    """A SentencePiece model with byte fallback, so that any sentence has ids.

    Attributes:
        sha256: of the model file.
        vocab_size: number of ids.
    """

    def __init__(self, model_file: str | pathlib.Path):
        """Loads the model.

        Raises:
            UserError: if the file is missing or not a SentencePiece model with this project's special ids.
        """
        try:
            serialized = pathlib.Path(model_file).read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=serialized)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{model_file}: not a readable SentencePiece model") from error
        found = tuple(
            getattr(self._processor, f"{name}_id")() for name in ("pad", "unk", "bos", "eos")
        )
        if found != (PAD, UNKNOWN, BEGIN, END):
            raise UserError(
                f"{model_file}: ids of pad, unk, bos, eos are {found}, expected (0, 1, 2, 3)"
            )
        self.sha256 = hashlib.sha256(serialized).hexdigest()
        self.vocab_size = self._processor.vocab_size()
        self._encode = functools.lru_cache(maxsize=1 << 17)(self._processor.encode)

    def encode(
        self, sentences: Sequence[str], text_length: int
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Encodes sentences as BEGIN, pieces, END, padded with PAD.

        A sentence longer than `text_length` loses pieces before END; the empty string is BEGIN, END.

        Returns:
            Token ids and attention mask, int32 (n, text_length), and the number of sentences that were cut.
        """
        ids = np.full((len(sentences), text_length), PAD, np.int32)
        attention_mask = np.zeros((len(sentences), text_length), np.int32)
        num_truncated = 0
        for row, sentence in enumerate(sentences):
            pieces = self._encode(sentence)
            num_truncated += len(pieces) > text_length - 2
            pieces = [BEGIN, *pieces[: text_length - 2], END]
            ids[row, : len(pieces)] = pieces
            attention_mask[row, : len(pieces)] = 1
        return ids, attention_mask, num_truncated


def train_sentencepiece(
    sentences: Iterable[str], vocab_size: int, output_file: str | pathlib.Path
) -> None:
    """Trains a BPE model with byte fallback on the sentences and writes it to `output_file`.

    Raises:
        UserError: if the sentences hold too little text for `vocab_size` ids.
    """
    output_file = pathlib.Path(output_file)
    with output_file.open("wb") as file:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=file,
                vocab_size=vocab_size,
                model_type="bpe",  # unigram wants more text than a few templates give
                byte_fallback=True,
                normalization_rule_name="nmt_nfkc_cf",
                pad_id=PAD,
                unk_id=UNKNOWN,
                bos_id=BEGIN,
                eos_id=END,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            output_file.unlink()
            raise UserError(f"{output_file}: cannot train {vocab_size} ids: {error}") from error
