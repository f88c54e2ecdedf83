"""Sentences to token ids, each distinct sentence once, with a count of those that were cut."""

import atexit
import logging
import threading

import numpy as np

from ravar_jax.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class SentenceIds:
    """Looks token ids up by sentence. Safe to call from several threads.

    Attributes:
        num_truncated: distinct sentences that were longer than the text length.
    """

    def __init__(self, tokenizer: Tokenizer, text_length: int):
        """Args: tokenizer: of the backbone. text_length: ids a sentence (L), padded or cut."""
        self._tokenizer = tokenizer
        self._text_length = text_length
        self._known: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()
        self.num_truncated = 0
        atexit.register(self._tell_truncated)

    def __call__(self, sentence: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns (ids int32 (L,), mask int32 (L,)); the empty string gives the special tokens alone."""
        with self._lock:
            if sentence not in self._known:
                ids, mask, truncated = self._tokenizer.encode([sentence], self._text_length)
                self._known[sentence] = (ids[0], mask[0])
                self.num_truncated += truncated
                if truncated and self.num_truncated == 1:
                    _log.warning(
                        "a sentence is longer than data.text_length=%d ids and was cut: %s",
                        self._text_length,
                        sentence,
                    )
            return self._known[sentence]

    def _tell_truncated(self) -> None:
        """Says at the end of the process how many there were."""
        if self.num_truncated:
            _log.warning(
                "%d distinct sentence(s) were longer than data.text_length=%d ids and were cut",
                self.num_truncated,
                self._text_length,
            )
