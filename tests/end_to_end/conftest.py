"""Fixtures of the end-to-end tests: a small corpus, settings of a small model, and a way to start processes."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from megamtp.data.corpus import prepare
from megamtp.data.input_files import find_source
from tests.end_to_end.jobs import environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A corpus of the standard library's asyncio package with 400 pieces: changes of megamtp do not change it."""
    folder = tmp_path_factory.mktemp("corpus")
    prepare(find_source([Path(asyncio.__file__).parent]), folder, vocab_size=400, validation_fraction=0.1)
    return folder


@pytest.fixture(scope="session")
def arguments(corpus) -> list[str]:
    """Settings of a model whose steps take some milliseconds. Each test adds its own run.directory."""
    return [
        "model.dim=32",
        "model.num_layers=4",
        "model.num_future_tokens=2",
        "model.num_attention_heads=2",
        "model.mlp_dim=48",
        "model.vocab_size=400",
        "optimizer.lr=1e-2",
        "optimizer.warmup_steps=2",
        "train.steps=20",
        "train.global_batch_tokens=256",
        "train.micro_batch_size=2",
        "train.sequence_length=32",
        "train.precision=fp32",
        "run.save_every_steps=10",
        "run.evaluate_every_steps=10",
        "run.evaluation_windows=12",
        "run.tensorboard=false",
        f"data.train={corpus}/train",
        f"data.validation={corpus}/validation",
        f"data.tokenizer={corpus}/tokenizer.model",
    ]


@pytest.fixture
def start(request):
    """start([...]) -> a running process. It is killed with all its descendants when the test ends."""
    from tests.end_to_end.jobs import kill_tree

    processes = []

    def start_process(command: list[str], **variables: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, *command],
            env=environment(**variables),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
        return process

    yield start_process
    for process in processes:
        kill_tree(process)
