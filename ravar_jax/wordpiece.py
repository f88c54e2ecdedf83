"""BERT's WordPiece tokens, as BLIP-2's Q-Former takes them: lower-cased, with "[DEC]" behind the vocabulary.

The vocabulary is a file that the user brings: one token a line, `bert-base-uncased` for the released weights.
"""

import functools
import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np
from tokenizers import BertWordPieceTokenizer

from ravar_jax.errors import UserError

BLIP2_VOCAB_SIZE = 30523  # of bert-base-uncased, and "[DEC]"
_ADDED = "[DEC]"  # LAVIS adds it to the vocabulary, so its id is the last one


class WordPieceTokenizer:
    """BERT's lower-casing tokenizer, with the interface of `tokenizer.SentencePieceTokenizer`.

    Attributes:
        sha256: of the vocabulary file.
        vocab_size: number of ids, with "[DEC]".
    """

    def __init__(self, vocab_file: str | pathlib.Path, vocab_size: int = BLIP2_VOCAB_SIZE):
        """Loads the vocabulary.

        Args:
            vocab_file: one token a line; a token's id is its line.
            vocab_size: number of ids that the model has, with "[DEC]".

        Raises:
            UserError: if the file is missing, lacks one of BERT's special tokens, or is of another size.
        """
        try:
            content = pathlib.Path(vocab_file).read_bytes()
            tokens = content.decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{vocab_file}: not a readable vocabulary") from error
        ids = {token: number for number, token in enumerate(tokens)}
        lacking = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if token not in ids]
        if lacking:
            raise UserError(f"{vocab_file}: not a BERT vocabulary: no {', '.join(lacking)}")
        tokenizer = BertWordPieceTokenizer(ids, lowercase=True)
        tokenizer.add_special_tokens([_ADDED])
        self.vocab_size = tokenizer.get_vocab_size()
        if self.vocab_size != vocab_size:
            raise UserError(
                f"{vocab_file}: {self.vocab_size} ids with {_ADDED}, the model has {vocab_size}"
            )
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._pad, self._begin, self._end = (ids[name] for name in ("[PAD]", "[CLS]", "[SEP]"))
        self._encode = functools.lru_cache(maxsize=1 << 17)(
            lambda sentence: tokenizer.encode(sentence, add_special_tokens=False).ids
        )

    def encode(
        self, sentences: Sequence[str], text_length: int
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Encodes sentences as [CLS], pieces, [SEP], padded with [PAD].

        A sentence longer than `text_length` loses pieces before [SEP]; the empty string is [CLS], [SEP].

        Returns:
            Token ids and attention mask, int32 (n, text_length), and the number of sentences that were cut.
        """
        ids = np.full((len(sentences), text_length), self._pad, np.int32)
        attention_mask = np.zeros((len(sentences), text_length), np.int32)
        num_truncated = 0
        for row, sentence in enumerate(sentences):
            pieces = self._encode(sentence)
            num_truncated += len(pieces) > text_length - 2
            pieces = [self._begin, *pieces[: text_length - 2], self._end]
            ids[row, : len(pieces)] = pieces
            attention_mask[row, : len(pieces)] = 1
        return ids, attention_mask, num_truncated
