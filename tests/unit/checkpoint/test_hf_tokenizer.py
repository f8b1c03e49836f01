"""Exported tokenizers: transformers gives the same ids and texts, and unsupported tokenizers are refused."""

import argparse
import dataclasses
import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from megamtp.checkpoint import hf, hf_tokenizer
from megamtp.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, train_sentencepiece
from megamtp.errors import CheckpointError
from tests import tokenizer_kinds
from tests.checkpoints import SMALL, contents, random_model

AWKWARD = [
    "",
    " ",
    "  ",
    "\n",
    "\t",
    "\tx = 1\n",
    "    return  x\n",
    "a\r\nb\r",
    "x\n\n\n  y ",
    "trailing   ",
    "</s>",
    "<s>a</s>",
    "<unk>",
    "<0x0A>",
    "é e\u0301 \ufb01 \uff21 中文 😀",
    "a\u00a0b\u200bc\u2028d\x00\x01",
    "\u2581",
    "a \u2581 b\u2581",
    "12345 1.5e-10",
    "====------",
]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    sources = [Path(module.__file__).read_text() for module in (argparse, json, os, random, dataclasses)]
    train_sentencepiece(sources, path, vocab_size=700, seed=0)
    return path


def test_exported_tokenizer_gives_our_ids(tmp_path, tokenizer_path):
    config = dataclasses.replace(SMALL, vocab_size=700)
    hf.export(contents(config, random_model(config).state_dict(), tokenizer_path), tmp_path / "exported")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "exported"), SentencePieceTokenizer(tokenizer_path)
    draw = random.Random(0)
    alphabet = [*AWKWARD, *" \t\n-=#_.abcdefs01", "self", "def ", "    "]
    texts = [
        *AWKWARD,
        Path(__file__).read_text(),
        *("".join(draw.choices(alphabet, k=draw.randrange(30))) for _ in range(500)),
    ]
    texts += [symbol * count for symbol in " -=a\n" for count in range(2, 80)]
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids, skip_special_tokens=True) == text
    assert theirs.eos_token_id == theirs.bos_token_id == ours.end_of_document_id
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert llama.generation_config.eos_token_id == ours.end_of_document_id
    assert (tmp_path / "exported" / "tokenizer.model").read_bytes() == tokenizer_path.read_bytes()


@pytest.fixture(scope="module")
def exported_kinds(tmp_path_factory) -> dict:
    """Returns (our tokenizer, transformers' tokenizer) for each kind that can be exported, including bytes."""
    folder, pairs = tmp_path_factory.mktemp("kinds"), {}
    for kind in tokenizer_kinds.EXPORTED:
        ours = SentencePieceTokenizer(tokenizer_kinds.train_kind(kind, folder / f"{kind}.model"))
        (folder / kind).mkdir()
        hf_tokenizer.write_tokenizer(folder / kind, ours, 64)
        pairs[kind] = ours, AutoTokenizer.from_pretrained(folder / kind)
    (folder / "bytes").mkdir()
    hf_tokenizer.write_byte_tokenizer(folder / "bytes", 64)
    return pairs | {"bytes": (ByteTokenizer(), AutoTokenizer.from_pretrained(folder / "bytes"))}


@settings(max_examples=150, deadline=None)
@given(tokenizer_kinds.TEXTS)
@example("\u2581")
@example("a\u2581b \u2581")
@example("<fim>")
@example("<fim>a <fim_x>\u2581\u2581b")
@example("<fim></s><fim_x><0x0A>[INST]<fim><unk>")
def test_every_kind_of_exported_tokenizer_gives_our_ids(exported_kinds, text):
    for kind, (ours, theirs) in exported_kinds.items():
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids, kind
        # Without byte pieces, SentencePiece decodes unknown characters as U+2047.
        if "no bytes" not in kind and kind != "characters":
            assert theirs.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), kind


def test_each_user_defined_symbol_is_one_token(exported_kinds):
    for kind in (kind for kind in exported_kinds if "symbols" in kind):
        ours, theirs = exported_kinds[kind]
        symbols = [ours.processor.id_to_piece(token) for token in ours.user_defined]
        assert theirs.convert_tokens_to_ids("<fim>") == ours.user_defined[symbols.index("<fim>")]
        assert theirs("a<fim><fim>b")["input_ids"].count(theirs.convert_tokens_to_ids("<fim>")) == 2
        assert theirs.convert_tokens_to_ids("[INST]") not in theirs("a [INST] b")["input_ids"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("normalising", r"it normalises texts \(nmt_nfkc\)"),
        ("default", r"it normalises texts \(nmt_nfkc\)"),
        ("without extra spaces", "it removes extra spaces"),
        ("unigram", "it is a unigram model"),
        ("normalising unigram", "it is a unigram model"),
        ("spaces as suffixes", "its pieces end, rather than begin, with spaces"),
    ],
)
def test_tokenizer_that_cannot_be_translated_is_refused(tmp_path, kind, reason):
    path = tokenizer_kinds.train_kind(kind, tmp_path / "foreign.model")
    config = dataclasses.replace(SMALL, vocab_size=SentencePieceTokenizer(path).vocab_size)
    with pytest.raises(CheckpointError, match=rf"foreign\.model cannot be exported to hf or hf-mtp: {reason}"):
        hf.export(contents(config, random_model(config).state_dict(), path), tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_tokenizer_with_too_many_pieces_is_refused(tokenizer_path):
    with pytest.raises(CheckpointError, match="700 pieces, expected at most 300"):
        hf_tokenizer.read_tokenizer(tokenizer_path, SMALL.vocab_size)
