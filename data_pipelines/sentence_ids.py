"""Sentences to token ids, each distinct sentence once, with a count of those that were cut."""

import logging
import threading
import weakref

import numpy as np

from ravar_jax.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class SentenceIds:
    """Looks token ids up by sentence. Safe to call from several threads."""

    def __init__(self, tokenizer: Tokenizer, text_length: int):
        """Args: tokenizer: of the backbone. text_length: ids a sentence (L), padded or cut."""
        self._tokenizer = tokenizer
        self._text_length = text_length
        self._known: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()
        self._cut: set[str] = set()
        # When the reader is dropped, or the process ends; it must not keep the reader alive.
        weakref.finalize(self, _tell_truncated, self._cut, text_length)

    @property
    def num_truncated(self) -> int:
        """Distinct sentences that were longer than the text length, so far."""
        return len(self._cut)

    def __call__(self, sentence: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns (ids int32 (L,), mask int32 (L,)); the empty string gives the special tokens alone."""
        with self._lock:
            if sentence not in self._known:
                ids, mask, truncated = self._tokenizer.encode([sentence], self._text_length)
                self._known[sentence] = (ids[0], mask[0])
                if truncated:
                    self._cut.add(sentence)
                if truncated and len(self._cut) == 1:
                    _log.warning(
                        "a sentence is longer than data.text_length=%d ids and was cut: %s",
                        self._text_length,
                        sentence,
                    )
            return self._known[sentence]


def _tell_truncated(cut: set[str], text_length: int) -> None:
    if cut:
        _log.warning(
            "%d distinct sentence(s) were longer than data.text_length=%d ids and were cut",
            len(cut),
            text_length,
        )
