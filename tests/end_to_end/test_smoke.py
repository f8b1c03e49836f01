"""Runs main() of every benchmark with --smoke on a CPU. tests/gpu/test_benchmarks.py runs them on a GPU."""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from benchmarks import command, output, processes

from megamtp.cluster.ports import reserve_port
from megamtp.errors import InputError
from tests.gpu.test_benchmarks import ONLY_ON_A_GPU
from tests.ranks import run_ranks
from tests.smoke import INPUTS, check

ON_TWO_RANKS = ["links", "real_pipeline"]
ON_A_CPU = [
    "overhead",
    "world",
    "prediction",
    "layer",
    "float8",
    "gradients",
    "loss",
    "pipeline",
    "prepare",
    "data",
    "saving",
    "recovery",
    "learning",
    "train_step",
]
ON_A_CPU += [*ON_TWO_RANKS, "quickstart"]
MEASURES_NOTHING = ["results"]
WITH_SCRATCH = ["data", "saving"]  # write to a folder that they remove

without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_benchmarks.py runs it on the GPU")


def test_every_benchmark_has_one_smoke_test():
    assert sorted([*ON_A_CPU, *ONLY_ON_A_GPU, *MEASURES_NOTHING]) == sorted(command.BENCHMARKS)


def _main(arguments: list[str], port: int | None = None) -> str:
    """Runs tools/benchmark.py and returns its output. `port`: the master port if there are several ranks."""
    if port:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = ["benchmark.py", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        command.main()
    return printed.getvalue()


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Iterator[Callable[[str], tuple[Path, str]]]:
    """Returns smoke(name) -> (folder of the files, printed text), which runs each benchmark once in this process.

    Processes that a benchmark starts with multiprocessing are forked from the server of tests/ranks.py, because a new
    process would import torch and DeepSpeed, which takes longer than a smoke run.
    """
    finished: dict[str, tuple[Path, str]] = {}

    def run(name: str) -> tuple[Path, str]:
        if name not in finished:
            folder, scratch = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp("scratch")
            arguments = [name, "--smoke", "--output", str(folder)]
            arguments += ["--scratch", str(scratch)] if name in WITH_SCRATCH else []
            if name in INPUTS:
                option, other, path = INPUTS[name]
                arguments += [option, str(run(other)[0] / path)]
            if name in ON_TWO_RANKS:
                printed = "".join(run_ranks(_main, 2, arguments, reserve_port(), backend="none"))
            else:
                printed = _main(arguments)
            assert not any(scratch.iterdir())
            finished[name] = folder, printed
        return finished[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "SPAWN", get_context("forkserver"))
        patch.setattr(sys, "argv", sys.argv)
        patch.setenv("MEGAMTP_RANKS", "1")
        yield run


@without_a_gpu
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name == "recovery" else ()) for name in ON_A_CPU]
)
def test_on_a_cpu(name, smoke):
    check(name, *smoke(name))


@without_a_gpu
@pytest.mark.full
def test_learning_notices_a_planted_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    arguments = ["--variants", "bf16", "fault", "--fault-steps", "20", "--output", str(tmp_path)]
    assert "(seed 0, step 20); exceeds 0.5%, as it should: holds" in _main(["learning", "--smoke", *arguments])


@without_a_gpu
def test_real_ranks_are_compared_with_the_prediction(smoke):
    predicted, compared = (
        json.loads((smoke(name)[0] / f"{name}.json").read_text())["results"] for name in ("pipeline", "real_pipeline")
    )
    assert [result["planned_step"] for result in compared] == [result["step_seconds"] for result in predicted]


@without_a_gpu
@pytest.mark.parametrize("name", ONLY_ON_A_GPU)
def test_other_benchmarks_need_a_gpu(name, tmp_path, call_command):
    status, _, errors = call_command(command, name, "--smoke", "--output", tmp_path)
    assert (status, errors) == (2, "megamtp: error: no GPU; expected one: benchmarks measure a GPU's time\n")


def parse_example(*arguments: str) -> argparse.Namespace:
    parser = output.parser("", "example")
    parser.add_argument("--size", type=int, default=10)
    parser.add_argument("--data", type=Path, required=True)
    return output.parse(parser, list(arguments), {"size": 1, "data": Path("corpus")})


def test_smoke_replaces_only_defaults(tmp_path):
    defaults = parse_example("--data", "mine")
    assert (defaults.smoke, defaults.size, defaults.data, defaults.output) == (False, 10, Path("mine"), Path("results"))
    small = parse_example("--smoke", "--output", str(tmp_path))
    assert (small.smoke, small.size, small.data, small.output) == (True, 1, tmp_path / "corpus", tmp_path)
    explicit = parse_example("--data", "mine", "--size", "10", "--smo", "--output", "results")
    assert (explicit.smoke, explicit.size, explicit.data, explicit.output) == (True, 10, Path("mine"), Path("results"))
    with pytest.raises(InputError, match=r"the following arguments are required: --data; see .* example --help"):
        parse_example("--size", "3")
    assert list(tmp_path.iterdir()) == []


def test_a_smoke_run_writes_to_a_new_folder(tmp_path, monkeypatch):
    """Without --output, a smoke run must not write to results, which may be tools/results."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders = [parse_example("--smoke").output for _ in range(2)]
    assert sorted(folders) == sorted(tmp_path.iterdir()) and len(set(folders)) == 2
