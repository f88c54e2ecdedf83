"""WordPiece ids: on a tiny vocabulary, and against PyTorch `transformers` on BERT's own."""

import csv
import hashlib

import numpy as np
import pytest

from ravar_jax.errors import UserError
from ravar_jax.wordpiece import WordPieceTokenizer

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "man", "walk", "##ing", "##s", "cafe", "."]


@pytest.fixture
def vocab_file(tmp_path):
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(TOKENS) + "\n")
    return file


def test_ids_of_a_tiny_vocabulary(vocab_file):
    tokenizer = WordPieceTokenizer(vocab_file, len(TOKENS) + 1)
    sentences = ["The man  walking.", "", "CAFÉ [DEC]", "mans jump", "the man the man the man"]
    ids, mask, num_truncated = tokenizer.encode(sentences, 7)
    assert ids.dtype == mask.dtype == np.int32
    np.testing.assert_array_equal(
        ids,
        [
            [2, 4, 5, 6, 7, 10, 3],
            [2, 3, 0, 0, 0, 0, 0],
            [2, 9, 11, 3, 0, 0, 0],
            [2, 5, 8, 1, 3, 0, 0],
            [2, 4, 5, 4, 5, 4, 3],
        ],
    )
    np.testing.assert_array_equal(mask, np.arange(7) < np.array([[7], [2], [4], [5], [7]]))
    assert num_truncated == 1
    assert tokenizer.vocab_size == 12
    assert tokenizer.sha256 == hashlib.sha256(vocab_file.read_bytes()).hexdigest()


def test_windows_line_ends_are_the_same_vocabulary(vocab_file, tmp_path):
    other = tmp_path / "windows.txt"
    other.write_bytes(vocab_file.read_bytes().replace(b"\n", b"\r\n"))
    expected, actual = (
        WordPieceTokenizer(file, 12).encode(["the walking man"], 8)[0]
        for file in (vocab_file, other)
    )
    np.testing.assert_array_equal(actual, expected)


def test_wrong_files_are_refused_in_one_line(vocab_file, tmp_path):
    with pytest.raises(UserError, match=r"vocab.txt: 12 ids with \[DEC\], the model has 30523"):
        WordPieceTokenizer(vocab_file)
    with pytest.raises(UserError, match="missing.txt: not a readable vocabulary"):
        WordPieceTokenizer(tmp_path / "missing.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary: not a readable vocabulary"):
        WordPieceTokenizer(tmp_path / "binary")
    (tmp_path / "words").write_text("the\n[CLS]\n[SEP]\n")
    with pytest.raises(UserError, match=r"words: not a BERT vocabulary: no \[PAD\], \[UNK\]"):
        WordPieceTokenizer(tmp_path / "words")


def test_ids_equal_transformers(shared_dir):
    transformers = pytest.importorskip("transformers")
    texts = shared_dir / "real-data/text"
    if not (texts / "bert_base_uncased_vocab.txt").is_file():
        pytest.skip("no BERT vocabulary in `shared`")
    with (texts / "jhmdb_sentences.csv").open() as file:
        sentences = [row["sentence"] for row in csv.DictReader(file)]
    sentences += [
        "The LADY, in a jäger-green coat: 3.5m left of 中国?",
        "",
        "naïve [SEP] [DEC] x" * 20,
    ]
    theirs = transformers.BertTokenizer(str(texts / "bert_base_uncased_vocab.txt"))
    theirs.add_special_tokens({"bos_token": "[DEC]"})
    expected = theirs(sentences, padding="max_length", truncation=True, max_length=24)
    ours = WordPieceTokenizer(texts / "bert_base_uncased_vocab.txt")
    ids, mask, num_truncated = ours.encode(sentences, 24)
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"])
    assert len(sentences) > 100
    assert num_truncated == sum(len(theirs(sentence)["input_ids"]) > 24 for sentence in sentences)
    assert ours.encode(["[DEC]"], 3)[0].tolist() == [[101, 30522, 102]]
