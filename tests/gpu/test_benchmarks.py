"""Runs the benchmarks that measure a GPU with --smoke: bash launch/test.sh tests/gpu/test_benchmarks.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megamtp.cluster.ports import reserve_port
from tests.end_to_end.jobs import ROOT
from tests.smoke import INPUTS, check

ONLY_ON_A_GPU = ["trace"]
BY_ITSELF = [
    *ONLY_ON_A_GPU,
    "overhead",
    "world",
    "layer",
    "float8",
    "gradients",
    "loss",
    "pipeline",
    "saving",
    "recovery",
    "learning",
]


def _run(name: str, folder: Path, *arguments: str, num_ranks: int = 1) -> None:
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}", f"--master-port={reserve_port()}"]
    command = ["tools/benchmark.py", name, "--smoke", "--output", str(folder), *arguments]
    finished = subprocess.run(
        [sys.executable, *(launcher if num_ranks > 1 else []), *command],
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cuda", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    check(name, folder, finished.stdout, on_gpu=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BY_ITSELF)
def test_by_itself(name, tmp_path):
    _run(name, tmp_path)


@pytest.mark.gpu(count=2)
def test_links(tmp_path):
    _run("links", tmp_path, num_ranks=2)


@pytest.mark.gpu(count=2)
def test_real_pipeline(tmp_path):
    option, predicting, path = INPUTS["real_pipeline"]
    _run(predicting, tmp_path)
    _run("real_pipeline", tmp_path, option, str(tmp_path / path), num_ranks=2)
