"""The hf format: transformers computes the same logits and ids, round trips are bit-exact, bad input is refused."""

import argparse
import dataclasses
import json
import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megamtp.checkpoint import hf, hf_tokenizer, safetensors_file
from megamtp.checkpoint.tensors import read_tensor
from megamtp.config import ModelConfig
from megamtp.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, train_sentencepiece
from megamtp.errors import CheckpointError
from megamtp.model.mtp import MTPModel
from tests import tokenizer_kinds
from tests.checkpoints import SMALL, VOCABULARY, contents, random_model

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


def read_back(folder: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    contents = hf.read(folder)
    return contents.model, {name: read_tensor(contents.weights, name) for name in contents.weights.shapes}


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    sources = [Path(module.__file__).read_text() for module in (argparse, json, os, random, dataclasses)]
    train_sentencepiece(sources, path, vocab_size=700, seed=0)
    return path


@pytest.fixture
def exported(tmp_path) -> Path:
    hf.export(contents(SMALL, random_model(SMALL).state_dict()), tmp_path / "exported")
    return tmp_path / "exported"


@pytest.mark.parametrize("key_value_heads", [None, 2, 1])
@pytest.mark.parametrize("num_future_tokens", [1, 3])
def test_transformers_computes_the_same_logits(tmp_path, key_value_heads, num_future_tokens):
    config = dataclasses.replace(SMALL, num_key_value_heads=key_value_heads, num_future_tokens=num_future_tokens)
    model = random_model(config)
    hf.export(contents(config, model.state_dict()), tmp_path / "exported")
    llama, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(loading.values()), loading
    assert llama.config.num_hidden_layers == 5 - num_future_tokens + 1
    assert llama.dtype == torch.float32
    tokens = torch.randint(VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, logits = model.logits(tokens)[0], llama(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_round_trip_is_bit_exact(exported):
    config, weights = read_back(exported)
    assert config == dataclasses.replace(SMALL, num_layers=3, num_future_tokens=1)
    expected = random_model(SMALL).state_dict()
    assert weights.keys() == {name for name in expected if not name.startswith(("heads.1.", "heads.2."))}
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    MTPModel(config).load_state_dict(weights, strict=True)


def test_large_model_is_split_into_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "LARGEST_FILE_BYTES", 40_000)
    model = random_model(SMALL)
    hf.export(contents(SMALL, model.state_dict()), tmp_path / "exported")
    assert len(list((tmp_path / "exported").glob("*.safetensors"))) > 1
    _, weights = read_back(tmp_path / "exported")
    assert all(torch.equal(weights[name], model.state_dict()[name]) for name in weights)
    AutoModelForCausalLM.from_pretrained(tmp_path / "exported")


def test_model_that_transformers_has_saved_is_read(exported, tmp_path):
    AutoModelForCausalLM.from_pretrained(exported).save_pretrained(tmp_path / "saved")
    config, weights = read_back(tmp_path / "saved")
    expected_config, expected = read_back(exported)
    assert config == expected_config
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def drop(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def add(tensors):
    tensors["model.layers.1.mlp.up_proj.bias"] = torch.zeros(3)


def reshape(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(47, 32)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"),
        (add, r"unknown tensor model\.layers\.1\.mlp\.up_proj\.bias"),
        (reshape, r"tensor model\.layers\.1\.mlp\.up_proj\.weight has shape \[47, 32\], expected \[48, 32\]"),
    ],
)
def test_wrong_tensor_is_refused_when_reading(exported, damage, message):
    tensors = load_file(exported / "model.safetensors")
    damage(tensors)
    save_file(tensors, exported / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        hf.read(exported)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("heads.2.mlp.up.weight", None, r"no tensor heads\.2\.mlp\.up\.weight"),
        ("heads.3.mlp.up.weight", torch.zeros(48, 32), r"unknown tensor heads\.3\.mlp\.up\.weight"),
        (
            "trunk.0.attention.key.weight",
            torch.zeros(32, 32),
            r"trunk\.0\.attention\.key\.weight has shape \[32, 32\], expected \[16, 32\]",
        ),
    ],
)
def test_wrong_tensor_is_refused_when_exporting(tmp_path, name, value, message):
    weights = random_model(SMALL).state_dict() | {name: value}
    if value is None:
        del weights[name]
    with pytest.raises(CheckpointError, match=message):
        hf.export(contents(SMALL, weights), tmp_path / "exported")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["hidden_size", "model_type", "rms_norm_eps"])
def test_config_without_a_key_is_refused(exported, key):
    settings = json.loads((exported / "config.json").read_text())
    del settings[key]
    (exported / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=key):
        hf.read(exported)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:100])])
def test_missing_or_truncated_file_is_refused_in_one_line(exported, file, damage):
    damage(exported / file)
    with pytest.raises(CheckpointError) as caught:
        hf.read(exported)
    assert "\n" not in str(caught.value)


def test_earlier_export_is_replaced(exported):
    larger = dataclasses.replace(SMALL, mlp_dim=64)
    hf.export(contents(larger, random_model(larger).state_dict()), exported)
    assert hf.read(exported).model.mlp_dim == 64
    assert [path.name for path in exported.parent.iterdir()] == ["exported"]


def test_folder_with_other_files_is_refused_and_not_touched(exported):
    (exported / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    with pytest.raises(CheckpointError, match="holds other files"):
        hf.export(contents(SMALL, random_model(SMALL).state_dict()), exported)
    assert before == {path.name: path.read_bytes() for path in exported.iterdir()}


def test_all_files_have_the_same_permissions(exported):
    assert {path.stat().st_mode for path in exported.iterdir()} == {(exported / "config.json").stat().st_mode}


def test_empty_folder_is_accepted_and_file_is_refused(tmp_path):
    weights = random_model(SMALL).state_dict()
    (tmp_path / "empty").mkdir()
    hf.export(contents(SMALL, weights), tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        hf.export(contents(SMALL, weights), tmp_path / "file")


def test_failed_export_leaves_the_earlier_export_unchanged(exported, monkeypatch):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    monkeypatch.setattr(safetensors_file, "write", full_disk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        hf.export(contents(SMALL, random_model(SMALL).state_dict()), exported)
    assert [path.name for path in exported.parent.iterdir()] == ["exported"]
    assert before == {path.name: path.read_bytes() for path in exported.iterdir()}


def test_unwritable_parent_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        hf.export(contents(SMALL, random_model(SMALL).state_dict()), tmp_path / "file" / "exported")


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


def test_note_about_a_tokenizer_that_is_not_carried_over(exported):
    assert not hf.read(exported).notes
    (exported / "tokenizer.json").write_text(json.dumps({"long": "x" * hf_tokenizer.LARGEST_BYTE_TOKENIZER}))
    contents = hf.read(exported)
    assert contents.tokenizer is None
    (note,) = contents.notes
    assert "has a tokenizer, but no SentencePiece model of at most 300 pieces" in note
