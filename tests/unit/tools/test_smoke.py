"""Every benchmark's main() with --smoke on a CPU; those that need a GPU are in tests/gpu/test_benchmarks.py."""

import json
import os
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from benchmarks import command, output, processes

from megamtp.cluster.ports import reserve_port
from megamtp.errors import InputError
from tests.gpu.test_benchmarks import ONLY_ON_A_GPU
from tests.ranks import run_ranks
from tests.smoke import check

ON_ONE_RANK = ["overhead", "world", "prediction", "loss", "pipeline", "prepare", "data"]
ON_ONE_RANK += ["saving", "recovery", "learning"]
ON_TWO_RANKS = ["links", "real_pipeline"]
READ_FILES = ["quickstart", "results"]  # and measure nothing
WITH_SCRATCH = ["data", "saving"]  # write to a folder that they remove

without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_benchmarks.py runs it on the GPU")


def test_every_benchmark_has_one_smoke_test():
    assert sorted([*ON_ONE_RANK, *ON_TWO_RANKS, *ONLY_ON_A_GPU, *READ_FILES]) == sorted(command.COMMANDS)


@pytest.fixture
def smoke(tmp_path, monkeypatch, call_command):
    """smoke(name) runs a benchmark on one rank, in this process, and checks what it wrote to tmp_path.

    Processes that it starts with multiprocessing are forked from the server of tests/ranks.py: a new process would
    import torch and DeepSpeed, which takes longer than a smoke run.
    """
    monkeypatch.setattr(processes, "SPAWN", get_context("forkserver"))
    monkeypatch.setenv("MEGAMTP_RANKS", "1")

    def run(name: str) -> None:
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        further = ["--scratch", scratch] if name in WITH_SCRATCH else []
        status, shown, errors = call_command(command, name, "--smoke", "--output", tmp_path, *further)
        assert status == 0, errors
        assert "A smoke run: these numbers mean nothing." in shown
        assert not any(scratch.iterdir())
        check(name, tmp_path)

    return run


def _rank(arguments: list[str], port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = ["benchmark.py", *arguments]
    command.main()


@without_a_gpu
@pytest.mark.parametrize("name", ON_ONE_RANK)
def test_on_one_rank(name, smoke):
    smoke(name)


@without_a_gpu
@pytest.mark.parametrize("name", ON_TWO_RANKS)
def test_on_two_ranks(name, smoke, tmp_path):
    arguments = [name, "--smoke", "--output", str(tmp_path)]
    if name == "real_pipeline":
        smoke("pipeline")
        arguments += ["--predicted", str(tmp_path / "pipeline.json")]
    run_ranks(_rank, 2, arguments, reserve_port(), backend="none")
    check(name, tmp_path)
    if name == "real_pipeline":
        predicted, compared = (
            json.loads((tmp_path / f"{file}.json").read_text())["results"] for file in ("pipeline", name)
        )
        assert [r["planned_step"] for r in compared] == [r["step_seconds"] for r in predicted]


@without_a_gpu
@pytest.mark.parametrize("name", ONLY_ON_A_GPU)
def test_the_others_ask_for_a_gpu(name, tmp_path, call_command):
    status, _, errors = call_command(command, name, "--smoke", "--output", tmp_path)
    assert (status, errors) == (2, "megamtp: error: no GPU; expected one: benchmarks measure a GPU's time\n")


def invented_options(*arguments: str):
    parser = output.parser("", "invented")
    parser.add_argument("--size", type=int, default=10)
    parser.add_argument("--data", type=Path, required=True)
    return output.parse(parser, list(arguments), {"size": 1, "data": Path("corpus")})


def test_smoke_replaces_defaults_and_nothing_else(tmp_path, monkeypatch):
    given = invented_options("--data", "mine")
    assert (given.smoke, given.size, given.data, given.output) == (False, 10, Path("mine"), Path("results"))
    small = invented_options("--smoke", "--output", str(tmp_path))
    assert (small.smoke, small.size, small.data, small.output) == (True, 1, tmp_path / "corpus", tmp_path)
    explicit = invented_options("--data", "mine", "--size", "10", "--smo", "--output", "results")
    assert (explicit.smoke, explicit.size, explicit.data, explicit.output) == (True, 10, Path("mine"), Path("results"))
    with pytest.raises(InputError, match=r"the following arguments are required: --data; see .* invented --help"):
        invented_options("--size", "3")
    assert list(tmp_path.iterdir()) == []


def test_a_smoke_run_writes_to_a_new_folder(tmp_path, monkeypatch):
    """Not to results, which is tools/results for a user who is in tools."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders = [invented_options("--smoke").output for _ in range(2)]
    assert sorted(folders) == sorted(tmp_path.iterdir()) and len(set(folders)) == 2
