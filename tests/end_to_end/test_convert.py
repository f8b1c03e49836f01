"""Tests of convert_checkpoint: every format to every other, errors in one line, and limited memory."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from megamtp.checkpoint import canonical, formats
from megamtp.checkpoint.contents import parameter_shapes, resolve_defaults
from megamtp.checkpoint.safetensors_file import encode_header
from megamtp.checkpoint.tensors import read_tensor
from megamtp.commands import convert_checkpoint
from megamtp.config import ModelConfig, write_config
from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.data.windows import Windows
from megamtp.errors import InputError
from megamtp.model.mtp import MTPModel
from tests.cases import small_config
from tests.checkpoints import MOMENTS, SMALL, STATE, with_moments
from tests.end_to_end.jobs import ROOT, environment, pretrain, records

MODULE = "megamtp.commands.convert_checkpoint"
WITH_STATE = ["run", "canonical", "universal"]
WRITABLE = ["run", "canonical", "hf", "hf-mtp", "meta", "universal"]


def convert(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    convert_checkpoint.main()


@pytest.fixture
def sources(tmp_path, monkeypatch) -> dict[str, Path]:
    """One checkpoint of the same model in each format. The one in hf has only head 1."""
    # The universal checkpoint has 200 small files, whose fsync is slow.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    # "checkpoints" is also the name of a folder in a run directory.
    folders = {name: tmp_path / "sources/checkpoints" / name for name in formats.writable_formats()}
    for name, folder in folders.items():
        formats.FORMATS[name].write(with_moments(SMALL), folder, torch.float32)
    return folders


def test_every_format_to_every_other(sources, tmp_path, monkeypatch):
    assert list(sources) == WRITABLE
    expected = with_moments(SMALL)
    for source, folder in sources.items():
        assert formats.detect(folder) == source
        for target in WRITABLE:
            destination = tmp_path / f"{source}-{target}"
            if target in ("run", "universal") and source not in WITH_STATE:
                with pytest.raises(InputError, match="no optimizer state"):
                    convert(monkeypatch, folder, destination, "--to", target)
                assert not destination.exists()
                continue
            convert(monkeypatch, folder, destination, "--to", target)
            assert formats.detect(destination) == target
            converted = formats.read(destination)
            one_head = "hf" in (source, target)
            model = dataclasses.replace(SMALL, num_layers=3, num_future_tokens=1) if one_head else SMALL
            assert converted.model == resolve_defaults(model)
            for kind, tensors in converted.sources.items():
                assert tensors.shapes == parameter_shapes(model)
                assert all(
                    torch.equal(read_tensor(tensors, name), read_tensor(expected.sources[kind], name))
                    for name in tensors.shapes
                )
            keeps_state = {source, target} <= set(WITH_STATE)
            assert (set(MOMENTS) <= set(converted.sources)) == keeps_state
            assert (converted.state == STATE) == keeps_state


def test_byte_level_model_keeps_its_tokenizer(tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, vocab_size=257)
    canonical.write(dataclasses.replace(with_moments(config), tokens_are_bytes=True), tmp_path / "canonical")
    for source, target in (("canonical", "universal"), ("universal", "hf-mtp"), ("hf-mtp", "hf"), ("hf", "canonical2")):
        convert(monkeypatch, tmp_path / source, tmp_path / target, "--to", target.rstrip("2"))
        assert formats.read(tmp_path / target).tokens_are_bytes
    ids = AutoTokenizer.from_pretrained(tmp_path / "hf-mtp")("\u00e9\n")["input_ids"]
    assert ids == list("\u00e9\n".encode())


def test_run_resumes_from_a_converted_checkpoint(arguments, tmp_path, monkeypatch):
    """Run -> canonical -> universal -> run, then more steps: bitwise equal to the run without conversions."""
    finished = pretrain([*arguments, f"run.directory={tmp_path}/whole"])
    assert finished.returncode == 0, finished.stderr
    tokenizer = formats.read(tmp_path / "whole").tokenizer
    steps = [("whole/checkpoints/step-0000010", "canonical"), ("canonical", "universal"), ("universal", "zero3")]
    for source, target in steps:
        convert(monkeypatch, tmp_path / source, tmp_path / target, "--to", target)
        assert formats.read(tmp_path / target).tokenizer.read_bytes() == tokenizer.read_bytes()
    finished = pretrain([*arguments, f"run.directory={tmp_path}/zero3"])
    assert finished.returncode == 0, finished.stderr
    assert [record["step"] for record in records(tmp_path / "zero3")] == list(range(11, 21))
    expected, resumed = (formats.read(tmp_path / name) for name in ("whole", "zero3"))
    assert (resumed.model, resumed.step, resumed.state) == (expected.model, 20, expected.state)
    for kind, tensors in expected.sources.items():
        assert all(
            torch.equal(read_tensor(tensors, name), read_tensor(resumed.sources[kind], name)) for name in tensors.shapes
        )


def test_conversion_error_is_one_line(sources, tmp_path, monkeypatch, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    config = tmp_path / "sources/checkpoints/config.yaml"
    other = dataclasses.asdict(SMALL) | {"norm_eps": 1.0}
    write_config(small_config(**{f"model__{key}": value for key, value in other.items()}), config)
    cases = {
        ("canonical", "new", "--to", "zero9"): ["invalid choice", "zero9"],
        ("canonical", "other", "--to", "meta"): ["holds other files", "notes.txt"],
        ("canonical", "new", "--num-future-tokens", "2"): ["has 3 heads", "expected --num-future-tokens=2"],
        ("canonical", "new", "--to", "canonical", "--dtype", "bf16"): ["fp32"],
        ("universal", "new", "--config", str(config)): ["model.norm_eps=0.001, expected 1.0"],
        ("../../other", "new"): ["not a checkpoint of a known format", "universal"],
        ("../../nowhere", "new"): ["does not exist"],
        ("x" * 300, "new"): ["cannot be read: File name too long", "expected a checkpoint"],
        ("canonical", "x" * 300): ["cannot be written: File name too long"],
        ("hf", "new", "--num-future-tokens", "1000000"): ["1000000; expected a whole number, 1 to 999"],
        ("hf", "new", "--num-future-tokens", "0"): ["0; expected a whole number, 1 to 999"],
    }
    for (source, destination, *options), words in cases.items():
        arguments = [str(tmp_path / "sources/checkpoints" / source), str(tmp_path / destination), *options]
        monkeypatch.setattr(sys, "argv", ["convert", *arguments])
        with pytest.raises(SystemExit) as caught:
            convert_checkpoint.entry()
        assert caught.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("megamtp: error: ")
        assert all(word in line for word in words), line
    assert {path.name for path in tmp_path.iterdir()} == {"sources", "other"}
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


def head_losses(checkpoint: Path, windows: Windows) -> list[float]:
    """Returns the loss of each head on the first 64 windows."""
    contents = formats.read(checkpoint)
    model = MTPModel(contents.model)
    weights = {name: read_tensor(contents.weights, name) for name in contents.weights.shapes}
    model.load_state_dict(weights, strict=True)
    batch = windows.windows_at(np.arange(64))
    with torch.no_grad():
        logits = model.logits(torch.stack([window.inputs for window in batch]))
    targets = torch.stack([window.targets for window in batch], dim=1)
    return [cross_entropy(*pair).item() for pair in zip(logits.flatten(1, 2), targets.flatten(1), strict=True)]


def test_training_starts_from_a_converted_llama(arguments, tmp_path, monkeypatch):
    """Head 1's first loss equals that of the Llama, and a short training improves all heads."""
    shape = {"dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "mlp_dim": 176}
    common = [
        *arguments,
        *(f"model.{key}={value}" for key, value in shape.items()),
        "train.steps=80",
        "optimizer.lr=3e-3",
    ]

    def train(name: str, *settings: str) -> None:
        finished = pretrain([*common, f"run.directory={tmp_path}/{name}", *settings])
        assert finished.returncode == 0, finished.stderr

    train("next-token", "model.num_layers=4", "model.num_future_tokens=1")
    convert(monkeypatch, tmp_path / "next-token", tmp_path / "llama", "--to", "hf")
    convert(monkeypatch, tmp_path / "llama", tmp_path / "initial", "--to", "canonical", "--num-future-tokens", 4)
    train("run", "model.num_layers=7", "model.num_future_tokens=4", f"run.initial_weights={tmp_path}/initial")
    prefixes = dict(word.split("=", 1) for word in arguments)
    training, validation = (
        Windows(IndexedDataset(prefixes[f"data.{name}"]), 32, 4, seed=0) for name in ("train", "validation")
    )
    batch = training.windows_at(np.arange(8))  # the windows of the first step
    inputs, targets = (
        torch.stack([window.inputs for window in batch]),
        torch.stack([window.targets[0] for window in batch]),
    )
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")(inputs).logits
    expected = cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert records(tmp_path / "run")[0]["losses"][0] == pytest.approx(expected.item(), rel=1e-4)
    before, after = head_losses(tmp_path / "initial", validation), head_losses(tmp_path / "run", validation)
    assert all(new < old - 0.1 for old, new in zip(before, after, strict=True)), (before, after)


def test_run_keeps_the_special_ids_of_its_initial_weights(arguments, tmp_path):
    """The run has no data.tokenizer, as with a corpus from another program."""
    ids = {"bos_token_id": 7, "eos_token_id": [8, 9]}
    config = ModelConfig(dim=32, num_layers=4, num_future_tokens=2, num_attention_heads=2, mlp_dim=48, vocab_size=400)
    canonical.write(dataclasses.replace(with_moments(config), special_ids=ids), tmp_path / "initial")
    settings = [f"run.initial_weights={tmp_path}/initial", "data.tokenizer=null", f"run.directory={tmp_path}/run"]
    finished = pretrain([*arguments, *settings, "train.steps=1"])
    assert finished.returncode == 0, finished.stderr
    assert formats.read(tmp_path / "run").special_ids == ids


def sparse_canonical(folder: Path, model: ModelConfig, stems: tuple[str, ...] = ("weights",)) -> None:
    """Writes a canonical checkpoint of zeros in sparse files, which need no disk space."""
    folder.mkdir()
    header = encode_header({name: (torch.float32, shape) for name, shape in parameter_shapes(model).items()}, {})
    size = len(header) + 4 * sum(torch.Size(shape).numel() for shape in parameter_shapes(model).values())
    files = [f"{stem}-00001-of-00001.safetensors" for stem in stems]
    for file in files:
        (folder / file).write_bytes(header)
        os.truncate(folder / file, size)
    description = {
        "format": canonical.FORMAT,
        "version": canonical.VERSION,
        "step": 9,
        "state": STATE.to_json(),
        "model": dataclasses.asdict(model),
        "file_bytes": dict.fromkeys(files, size),
    }
    (folder / canonical.DESCRIPTION).write_text(json.dumps(description))


def peak_anonymous_bytes(command: list[str]) -> int:
    """Runs `python command...` and returns its peak anonymous memory."""
    process = subprocess.Popen(
        [sys.executable, *command],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    peak = 0
    while process.poll() is None:
        match = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        peak = max(peak, int(match[1]) * 1024 if match else 0)
        time.sleep(0.005)
    assert process.returncode == 0, process.stdout.read()
    return peak


def test_tensor_larger_than_the_memory_limit_is_converted(tmp_path):
    """The embedding takes 600 MB in fp32. The limit of 300 MB includes the memory of the imports."""
    model = ModelConfig(
        dim=64, num_layers=2, num_future_tokens=1, num_attention_heads=2, mlp_dim=64, vocab_size=2_350_000
    )
    sparse_canonical(tmp_path / "canonical", model)
    assert torch.Size(parameter_shapes(model)["embedding.weight"]).numel() * 4 > 600_000_000
    source = str(tmp_path / "canonical")
    for target in ("hf", "meta"):
        peak = peak_anonymous_bytes(["-m", MODULE, source, str(tmp_path / target), "--to", target, "--dtype", "bf16"])
        assert peak < 300_000_000, target
    assert formats.read(tmp_path / "meta").weights.shapes == parameter_shapes(model)


def test_state_with_tensors_larger_than_the_memory_limit_is_converted(tmp_path):
    """Embedding, unembedding and each of their moments take 300 MB in fp32."""
    model = resolve_defaults(
        ModelConfig(dim=64, num_layers=2, num_future_tokens=1, num_attention_heads=2, mlp_dim=64, vocab_size=1_175_000)
    )
    sparse_canonical(tmp_path / "canonical", model, ("weights", *MOMENTS))
    limit = 400_000_000
    assert peak_anonymous_bytes(["-m", MODULE, "--help"]) + 4 * model.dim * model.vocab_size > limit
    for source, target in (("canonical", "zero3"), ("zero3", "universal")):
        paths = [str(tmp_path / source), str(tmp_path / target)]
        assert peak_anonymous_bytes(["-m", MODULE, *paths, "--to", target]) < limit, target
    assert formats.read(tmp_path / "universal").sources[MOMENTS[1]].shapes == parameter_shapes(model)
