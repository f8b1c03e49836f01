"""Tokenizers: lossless round trips, deterministic training, and refusal of bad models."""

import argparse
import io
import os
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megamtp.data import tokenizer as tokenizer_module
from megamtp.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, open_tokenizer, train_sentencepiece
from megamtp.errors import InputError
from megamtp.files import write_atomically
from tests import tokenizer_kinds

TEXTS = [Path(argparse.__file__).read_text(), "2024 " * 500]
VOCAB_SIZE = 400
PECULIAR = "\u2581 \t\r\n\v\x00a1<s>/_\u2585\u2047\ufeff\u0301\u00e9\u2028\U0001f600"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(TEXTS, path, VOCAB_SIZE, seed=0)
    return SentencePieceTokenizer(path)


def foreign_model(path: Path, **options) -> Path:
    """Writes a model that is trained with SentencePiece's default options and `options`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[0].splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


def refusal(function, *arguments) -> str:
    with pytest.raises(InputError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(), st.text(alphabet=PECULIAR), st.text(alphabet="def \u2581\t\r\n(:")))
@example("\u2581")
@example("\u2581 \u2581\u2581a\u2581")
@example("\tdef f():\r\n\t\treturn  1\r\n")
@example("<s></s><unk><0x41>")
@example("  ")
def test_decoding_undoes_encoding(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < VOCAB_SIZE and token != tokenizer.end_of_document_id for token in ids)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> dict[str, tuple[SentencePieceTokenizer, sentencepiece.SentencePieceProcessor]]:
    """Returns (our tokenizer, the library's tokenizer) for a model of each kind except our own."""
    folder, tokenizers = tmp_path_factory.mktemp("kinds"), {}
    for kind in tokenizer_kinds.KINDS.keys() - {tokenizer_kinds.OURS}:
        path = tokenizer_kinds.train_kind(kind, folder / f"{kind}.model")
        tokenizers[kind] = SentencePieceTokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    return tokenizers


@settings(max_examples=150, deadline=None)
@given(tokenizer_kinds.TEXTS)
@example("\u2581")
@example("a\u2581b \u2581")
@example("\u2581\u2581 <fim>\u2581self")
def test_ids_equal_those_of_the_library(foreign, text):
    for kind, (ours, library) in foreign.items():
        ids = library.encode(text)
        assert ours.encode(text) == ids, kind
        assert ours.encode_documents([text, text])[0].tolist() == [*ids, library.eos_id()] * 2, kind
        assert not ours.keeps_space_marks


def test_decoding_leaves_out_ids_beyond_the_vocabulary(tokenizer):
    ids = tokenizer.encode("one")
    assert tokenizer.decode([VOCAB_SIZE, *ids, VOCAB_SIZE + 9]) == "one"
    assert ByteTokenizer().decode([97, 257, 271]) == "a"


@settings(deadline=None)
@given(st.lists(st.text(max_size=20), max_size=5))
@example(["\u2581", "", "a\u2581b", ""])
@example(["def f():", TEXTS[0]])
@example([])
def test_encode_documents_concatenates_texts_with_end_of_document_ids(tokenizer, texts):
    for encoder in (tokenizer, ByteTokenizer()):
        tokens, lengths = encoder.encode_documents(texts)
        single = [[*encoder.encode(text), encoder.end_of_document_id] for text in texts]
        assert tokens.tolist() == [token for ids in single for token in ids]
        assert lengths.tolist() == [len(ids) for ids in single]
        assert tokens.dtype == "uint16"


def test_byte_tokenizer():
    tokenizer = open_tokenizer("bytes")
    assert tokenizer.encode("a\u00e9\0") == [97, 0xC3, 0xA9, 0]
    assert (tokenizer.vocab_size, tokenizer.end_of_document_id) == (257, 256)
    assert tokenizer.decode([97, 256, 0xC3, 0xA9, 256]) == "a\u00e9"
    assert tokenizer.decode([0xC3, 97]) == "\ufffda"


def test_decoding_leaves_out_end_of_document_ids(tokenizer):
    end = tokenizer.end_of_document_id
    assert tokenizer.decode([*tokenizer.encode("one "), end, *tokenizer.encode(" two"), end]) == "one  two"
    assert tokenizer.vocab_size == VOCAB_SIZE


def test_training_learns_merges(tokenizer):
    assert len(tokenizer.encode(TEXTS[0])) < 0.6 * len(TEXTS[0])
    assert len(tokenizer.encode(" " * 8)) < 8
    assert len(tokenizer.encode("2024")) == 4


def test_training_is_deterministic_and_seeded(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "MAX_CHUNKS", 8)
    monkeypatch.setattr(tokenizer_module, "CHUNK_CHARACTERS", 500)
    models = []
    for seed in (0, 0, 1):
        train_sentencepiece(iter(TEXTS), tmp_path / "tokenizer.model", 350, seed)
        models.append((tmp_path / "tokenizer.model").read_bytes())
    assert models[0] == models[1]
    assert models[0] != models[2]
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100, TEXTS[0].encode()])
def test_file_that_is_not_a_model_is_refused(tmp_path, content):
    (tmp_path / "bad.model").write_bytes(content)
    assert refusal(SentencePieceTokenizer, tmp_path / "bad.model").startswith(
        f"{tmp_path}/bad.model: not a SentencePiece model"
    )


def test_truncated_model_is_refused(tokenizer, tmp_path):
    content = tokenizer.path.read_bytes()
    (tmp_path / "cut.model").write_bytes(content[: len(content) // 2])
    assert "cut.model: not a SentencePiece model" in refusal(SentencePieceTokenizer, tmp_path / "cut.model")


def test_missing_file_and_folder_are_refused(tmp_path):
    assert "none.model: cannot read this tokenizer (No such file" in refusal(
        SentencePieceTokenizer, tmp_path / "none.model"
    )
    assert f"{tmp_path}: cannot read this tokenizer (Is a directory)" in refusal(SentencePieceTokenizer, tmp_path)


def test_model_without_end_of_sequence_piece_is_refused(tmp_path):
    message = refusal(SentencePieceTokenizer, foreign_model(tmp_path / "endless.model", eos_id=-1))
    assert message.startswith(f"{tmp_path}/endless.model: this tokenizer has no end-of-sequence piece")


def test_model_without_byte_pieces_reads_a_space_mark_as_a_space(tmp_path):
    tokenizer = SentencePieceTokenizer(foreign_model(tmp_path / "plain.model"))
    assert tokenizer.decode(tokenizer.encode("the\u2581parser")) == "the parser"


@pytest.mark.parametrize(("wrong", "words"), [(3, "expected at least"), (10**6, "expected at most")])
def test_vocabulary_size_that_is_too_small_or_too_large_is_refused(tmp_path, wrong, words):
    message = refusal(train_sentencepiece, TEXTS, tmp_path / "tokenizer.model", wrong, 0)
    assert f"a vocabulary of {wrong} pieces" in message
    assert list(tmp_path.iterdir()) == []
    possible = int(message.split(words)[1].split(":")[0])
    train_sentencepiece(TEXTS, tmp_path / "tokenizer.model", possible, 0)
    assert SentencePieceTokenizer(tmp_path / "tokenizer.model").vocab_size == possible


@pytest.mark.parametrize(
    ("vocab_size", "texts"), [(-5, TEXTS), (0, TEXTS), (1, TEXTS), (10**10, TEXTS), (300, []), (300, ["\n"])]
)
def test_training_without_text_or_with_an_impossible_size_is_refused(tmp_path, vocab_size, texts):
    message = refusal(train_sentencepiece, texts, tmp_path / "tokenizer.model", vocab_size, 0)
    assert f"cannot train {vocab_size} pieces on this corpus" in message
    assert list(tmp_path.iterdir()) == []


def test_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
