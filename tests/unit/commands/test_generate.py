"""Tests of the generate command: models from runs, checkpoints and exports, and wrong arguments in one line."""

import argparse
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megamtp.checkpoint import formats, runs
from megamtp.checkpoint.contents import WEIGHT, Contents
from megamtp.checkpoint.tensors import InMemory
from megamtp.commands import convert_checkpoint
from megamtp.commands import generate as command
from megamtp.data.tokenizer import SentencePieceTokenizer, train_sentencepiece
from megamtp.decoding.generate import generate
from megamtp.errors import CheckpointError, InputError
from megamtp.model.mtp import MTPModel
from tests.checkpoints import MOMENTS, STATE, TEXT_MODEL, contents, text_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> MTPModel:
    return text_model()


@pytest.fixture(scope="module")
def run_directory(model, tmp_path_factory) -> Path:
    """A run of the model with one checkpoint and a tokenizer."""
    folder = tmp_path_factory.mktemp("text") / "run"
    weights = InMemory(model.state_dict())
    sources = {WEIGHT: weights, **dict.fromkeys(MOMENTS, weights)}
    runs.write(Contents(TEXT_MODEL, sources, step=3, state=STATE), folder)
    train_sentencepiece([Path(argparse.__file__).read_text()], folder / "spm.model", vocab_size=500, seed=0)
    sections = {
        "model": dataclasses.asdict(TEXT_MODEL),
        "train": {"steps": 3, "global_batch_tokens": 64, "micro_batch_size": 1, "sequence_length": 64},
        "data": {"train": "unused", "tokenizer": str(folder / "spm.model")},
        "run": {"directory": str(folder)},
    }
    (folder / "config.yaml").write_text(json.dumps(sections))  # JSON is YAML
    return folder


def call(monkeypatch, tool, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
    tool.main()


def test_run_checkpoint_and_export_generate_the_same_text(run_directory, model, tmp_path, monkeypatch, capsys):
    checkpoint = run_directory / "checkpoints" / "step-0000003"
    call(monkeypatch, convert_checkpoint, run_directory, tmp_path / "exported", "--to", "hf")
    call(monkeypatch, convert_checkpoint, checkpoint, tmp_path / "exported")
    capsys.readouterr()
    tokenizer = SentencePieceTokenizer(run_directory / "spm.model")
    ids = tokenizer.encode("def main(")
    expected = tokenizer.decode(ids + generate(model, ids, 12, end_id=tokenizer.end_of_document_id)) + "\n"
    for source in (run_directory, checkpoint, tmp_path / "exported"):
        call(monkeypatch, command, source, "--prompt", "def main(", "--max-new-tokens", 12, "--device", "cpu")
        assert capsys.readouterr().out == expected


@pytest.mark.parametrize("target", ["hf", "hf-mtp", "meta", "canonical"])
def test_model_with_more_rows_than_the_tokenizer_has_pieces(model, tmp_path, monkeypatch, capsys, target):
    """The additional ids can be sampled and decode to no text."""
    tokenizer_path = tmp_path / "spm.model"
    train_sentencepiece([Path(argparse.__file__).read_text()], tokenizer_path, vocab_size=400, seed=0)
    formats.FORMATS[target].write(contents(TEXT_MODEL, model.state_dict(), tokenizer_path), tmp_path / "exported")
    tokenizer = SentencePieceTokenizer(tokenizer_path)
    ids = tokenizer.encode("def main(")
    sampled = generate(model, ids, 30, temperature=1.0, end_id=tokenizer.end_of_document_id)
    assert max(sampled) >= 400 > min(sampled)
    call(
        monkeypatch,
        command,
        tmp_path / "exported",
        "--prompt",
        "def main(",
        "--max-new-tokens",
        30,
        "--temperature",
        1.0,
    )
    assert capsys.readouterr().out == tokenizer.decode([token for token in ids + sampled if token < 400]) + "\n"
    if target == "hf":
        exported_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
        assert exported_tokenizer.decode([*ids, 400, 499]) == tokenizer.decode([*ids, 400, 499]) == "def main("
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")(torch.tensor([ids])).logits
        torch.testing.assert_close(logits, model.logits(torch.tensor([ids]))[0], rtol=0, atol=1e-4)
        notes = formats.read(tmp_path / "exported").notes
        assert [note for note in notes if "400 pieces, but the model has 500 rows" in note]


def test_prompt_can_be_piped_in(run_directory, monkeypatch, capsys):
    call(monkeypatch, command, run_directory, "--prompt", "x = ", "--device", "cpu")
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("x = "))
    call(monkeypatch, command, run_directory, "--device", "cpu")
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "nonsense"], "--device nonsense"),
        (["--device", "meta"], "--device meta: Cannot copy out of meta tensor"),
        (["--temperature", "-1"], "temperature -1"),
        (["--prompt", "\udcff"], "not UTF-8"),
        (["--tokenizer", "nowhere.model"], "nowhere.model"),
    ],
)
def test_bad_arguments_are_input_errors(run_directory, monkeypatch, arguments, message):
    with pytest.raises(InputError, match=message):
        call(monkeypatch, command, run_directory, "--prompt", "x", "--device", "cpu", *arguments)


def test_output_that_the_terminal_cannot_show_or_the_disk_cannot_store(run_directory):
    program = [sys.executable, "-m", command.__name__, str(run_directory), "--prompt", "é", "--device", "cpu"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    finished = subprocess.run(program, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.startswith(r"\xe9")
    with open("/dev/full", "w") as full:
        finished = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True)
    assert finished.returncode == 2
    assert (
        finished.stderr == "megamtp: error: the output cannot be written: No space left on device; make room for it\n"
    )


@pytest.mark.parametrize("tool", [convert_checkpoint, command])
def test_missing_checkpoint_is_one_line_and_status_2(tool, tmp_path, monkeypatch, capsys):
    arguments = [tmp_path / "nowhere", *([tmp_path / "exported"] if tool is convert_checkpoint else ["--prompt", "x"])]
    with pytest.raises(CheckpointError):
        call(monkeypatch, tool, *arguments)
    with pytest.raises(SystemExit) as caught:
        tool.entry()
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
