"""Decoding against decoding without a cache and against transformers; sampling; the command line."""

import argparse
import copy
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

from megamtp.checkpoint import formats, hf, runs, store
from megamtp.checkpoint.contents import WEIGHT, Contents
from megamtp.checkpoint.tensors import InMemory
from megamtp.commands import convert_checkpoint
from megamtp.commands import generate as command
from megamtp.config import ModelConfig
from megamtp.data.tokenizer import SentencePieceTokenizer, train_sentencepiece
from megamtp.decoding.generate import _sample, generate
from megamtp.errors import CheckpointError, InputError
from megamtp.model.initial import initial_value
from megamtp.model.mtp import MTPModel
from tests.checkpoints import MOMENTS, STATE, contents

CONFIG = ModelConfig(
    dim=32, num_layers=5, num_future_tokens=2, num_attention_heads=4, num_key_value_heads=2, mlp_dim=48, vocab_size=500
)
PROMPT = [5, 17, 300, 42]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Uses one thread: with many tiny operations, threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> MTPModel:
    """Returns a model whose weights are so large that the likeliest token depends on the whole prompt."""
    model = MTPModel(CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, CONFIG, seed=2) * (8 if parameter.dim() == 2 else 1))
    return model


def greedy_without_cache(model: MTPModel, ids: list[int], count: int) -> list[int]:
    """Returns the next `count` likeliest tokens, each computed from the whole window."""
    ids = list(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model.logits(torch.tensor([ids]))[0, 0, -1].argmax()))
    return ids[-count:]


def test_the_cache_changes_no_token(model):
    ids = generate(model, PROMPT, 40)
    assert ids == greedy_without_cache(model, PROMPT, 40)
    assert len(set(ids)) > 5
    assert ids != generate(model, [6, *PROMPT[1:]], 40)


def test_transformers_generates_the_same_tokens(model, tmp_path):
    hf.export(contents(CONFIG, model.state_dict()), tmp_path / "exported")
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    expected = llama.generate(torch.tensor([PROMPT]), max_new_tokens=40, do_sample=False)[0, len(PROMPT) :].tolist()
    assert generate(model, PROMPT, 40) == expected


def test_sampling_from_one_candidate_is_greedy(model):
    greedy = generate(model, PROMPT, 20)
    assert generate(model, PROMPT, 20, temperature=1.0, top_k=1) == greedy
    assert generate(model, PROMPT, 20, temperature=1.0, top_p=1e-9) == greedy
    assert generate(model, PROMPT, 20, temperature=1e-30) == greedy
    assert generate(model, PROMPT, 20, temperature=1e-300) == greedy  # 0 in fp32


def test_weights_that_are_not_finite_raise_an_input_error(model):
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        damaged.unembedding.weight[3, 5] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(InputError, match=rf"logits after {len(PROMPT)} tokens are not finite"):
            generate(damaged, PROMPT, 20, temperature=temperature)


def test_the_same_seed_draws_the_same_sample(model):
    samples = [generate(model, PROMPT, 20, temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    assert samples[0] == samples[1] != samples[2]


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (7, None), (None, 0.5), (7, 0.5)])
def test_samples_follow_the_truncated_distribution(model, top_k, top_p):
    """Compares the frequencies of 4000 samples with probabilities computed token by token."""
    with torch.no_grad():
        logits = model.logits(torch.tensor([PROMPT]))[0, 0, -1]
    probabilities = (logits / 0.7).softmax(0).tolist()
    kept, total = {}, 0.0
    ranked = sorted(enumerate(probabilities), key=lambda pair: -pair[1])[:top_k]
    mass = sum(probability for _, probability in ranked)
    for token, probability in ranked:
        if top_p is None or total < top_p * mass:
            kept[token] = probability
        total += probability
    generator = torch.Generator().manual_seed(0)
    draws = [_sample(logits, 0.7, top_k, top_p, generator) for _ in range(4000)]
    assert set(draws) <= kept.keys()
    for token, probability in kept.items():
        expected = probability / sum(kept.values())
        error = 5 * (expected * (1 - expected) / len(draws)) ** 0.5 + 1 / len(draws)
        assert abs(draws.count(token) / len(draws) - expected) < error


def test_decoding_stops_at_the_end_id_and_does_not_return_it(model):
    greedy = generate(model, PROMPT, 40)
    end_id = greedy[10]
    assert generate(model, PROMPT, 40, end_id=end_id) == greedy[: greedy.index(end_id)]


def test_an_empty_prompt_starts_after_the_end_id(model):
    end_id = next(token for token in range(500) if token not in greedy_without_cache(model, [token], 10))
    assert generate(model, [], 10, end_id=end_id) == greedy_without_cache(model, [end_id], 10)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": -1},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
        {"seed": 2**64},
        {"prompt_ids": []},
        {"prompt_ids": [500]},
        {"prompt_ids": [-1]},
    ],
)
def test_arguments_out_of_range_raise_an_input_error(model, arguments):
    with pytest.raises(InputError, match="expected"):
        generate(**{"model": model, "prompt_ids": PROMPT, "max_new_tokens": 3} | arguments)


@pytest.fixture
def run_directory(model, tmp_path) -> Path:
    """Returns the directory of a run with one checkpoint."""
    folder = tmp_path / "run"
    weights = InMemory(model.state_dict())
    sources = {WEIGHT: weights, **dict.fromkeys(MOMENTS, weights)}
    runs.write(Contents(CONFIG, sources, step=3, state=STATE), folder)
    train_sentencepiece([Path(argparse.__file__).read_text()], folder / "spm.model", vocab_size=500, seed=0)
    sections = {
        "model": dataclasses.asdict(CONFIG),
        "train": {"steps": 3, "global_batch_tokens": 64, "micro_batch_size": 1, "sequence_length": 64},
        "data": {"train": "unused", "tokenizer": str(folder / "spm.model")},
        "run": {"directory": str(folder)},
    }
    (folder / "config.yaml").write_text(json.dumps(sections))  # JSON is YAML
    return folder


def test_a_checkpoint_in_a_linked_folder_is_found(run_directory, tmp_path):
    (run_directory / "checkpoints").rename(tmp_path / "elsewhere")
    (run_directory / "checkpoints").symlink_to(tmp_path / "elsewhere")
    (checkpoint,) = store.checkpoints(run_directory)
    assert runs.find_checkpoint(checkpoint) == (checkpoint, run_directory)
    assert formats.read(checkpoint).weights.shapes == formats.read(run_directory).weights.shapes


def call(monkeypatch, tool, *arguments) -> None:
    """Calls the main function of a command with command-line arguments."""
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
def test_ids_beyond_the_tokenizer_are_sampled_and_decode_to_no_text(model, tmp_path, monkeypatch, capsys, target):
    """The model has 500 rows, its tokenizer 400 pieces."""
    tokenizer_path = tmp_path / "spm.model"
    train_sentencepiece([Path(argparse.__file__).read_text()], tokenizer_path, vocab_size=400, seed=0)
    formats.FORMATS[target].write(contents(CONFIG, model.state_dict(), tokenizer_path), tmp_path / "exported")
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
        assert [note for note in formats.read(tmp_path / "exported").notes if "400 pieces, the model 500 rows" in note]


def test_the_prompt_is_read_from_stdin(run_directory, monkeypatch, capsys):
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


def test_output_that_stdout_cannot_encode_or_the_disk_cannot_hold(run_directory):
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
def test_a_missing_checkpoint_prints_one_line_and_exits_with_status_2(tool, tmp_path, monkeypatch, capsys):
    arguments = [tmp_path / "nowhere", *([tmp_path / "exported"] if tool is convert_checkpoint else ["--prompt", "x"])]
    with pytest.raises(CheckpointError):
        call(monkeypatch, tool, *arguments)
    with pytest.raises(SystemExit) as caught:
        tool.entry()
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
