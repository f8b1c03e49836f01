"""Tests of the installed commands from another folder: prepare, train, convert, generate, report and plan."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch

from megamtp.checkpoint.store import newest_checkpoint
from megamtp.model.mtp import MTPModel
from tests.end_to_end.jobs import ROOT, environment, run
from tests.saved import load_weights

MODEL = [
    "model.dim=32",
    "model.num_layers=4",
    "model.num_future_tokens=2",
    "model.num_attention_heads=2",
    "model.vocab_size=400",
    "train.steps=3",
    "train.global_batch_tokens=256",
    "train.micro_batch_size=2",
    "train.sequence_length=32",
    "train.precision=fp32",
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The bin folder of a new environment with megamtp, which uses the libraries of the current environment."""
    folder = tmp_path_factory.mktemp("installed")
    sources = folder / "sources"
    shutil.copytree(ROOT / "megamtp", sources / "megamtp", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--ignore-installed"]
    subprocess.run([*pip, "--prefix", str(folder / "venv"), str(sources)], check=True)
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv/bin"


def test_installed_commands(installed, tmp_path):
    def command(name: str, *arguments: str) -> str:
        finished = subprocess.run(
            [str(installed / name), *arguments],
            cwd=tmp_path,
            env=environment(PYTHONPATH=""),
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    command("megamtp-prepare-data", "--input", str(ROOT / "megamtp"), "--output", "corpus", "--vocab-size", "400")
    data = ["data.train=corpus/train", "data.validation=corpus/validation", "data.tokenizer=corpus/tokenizer.model"]
    command("megamtp-pretrain", *MODEL, *data, "run.directory=run")
    command("megamtp-convert", "run", "hf", "--to", "hf")
    assert command("megamtp-generate", "hf", "--prompt", "def ", "--max-new-tokens", "5").startswith("def ")
    assert command("megamtp-generate", "run", "--prompt", "def ", "--max-new-tokens", "5").startswith("def ")
    assert "head" in command("megamtp-report", "run")
    assert "**total**" in command("megamtp-plan", str(ROOT / "configs/6.7b_n4.yaml"), "--gpus", "64")
    assert "\n    megamtp-plan configs/" in command("megamtp-plan", "--help")
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "run/tensorboard").iterdir())

    from transformers import AutoModelForCausalLM

    config, weights = load_weights(newest_checkpoint(tmp_path / "run"))
    model = MTPModel(config)
    model.load_state_dict(weights)
    tokens = torch.randint(400, (2, 30))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(exported(tokens).logits, model.logits(tokens)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["prepare_data", "convert_checkpoint", "generate", "report"])
def test_tools_run_the_commands(name, tmp_path):
    finished = run([str(ROOT / "tools" / f"{name}.py"), "--help"], cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert f"{name}.py" in finished.stdout


def test_help_of_pretraining_lists_the_keys():
    finished = run(["-m", "megamtp.pretrain", "--help"])
    assert finished.returncode == 0
    for key in ("model.num_future_tokens", "optimizer.lr", "train.global_batch_tokens", "engine.kind", "run.directory"):
        assert key in finished.stdout


def test_help_of_pretraining_to_a_closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "megamtp.pretrain", "--help"]
    finished = subprocess.run(
        command, env=environment(), cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=100
    )
    os.close(writer)
    assert (finished.returncode, finished.stderr) == (0, "")


def test_help_of_local_starts_no_job():
    finished = run(["-m", "megamtp.commands.local", "--help"])
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.startswith("Runs a training job on this machine")
    assert finished.stdout.count("\n  run.directory ") == 1


def test_active_environment_can_be_replaced(tmp_path):
    """environment.sh installs a new .venv even if its Python is that of the old .venv, which is active."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch/environment.sh", tmp_path / "launch")
    (tmp_path / "setup.py").write_text('from setuptools import setup\n\nsetup(name="nothing")  # "torch>=999.0"\n')
    (tmp_path / "requirements.lock").write_text(f"setuptools=={importlib.metadata.version('setuptools')}\n")
    venv.create(tmp_path / ".venv", with_pip=False, symlinks=True)
    finished = subprocess.run(
        ["bash", "-c", ". .venv/bin/activate && . launch/environment.sh && command -v python"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == str(tmp_path / ".venv/bin/python")
    assert (tmp_path / ".venv/stamp").exists()
