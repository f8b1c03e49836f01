"""Tests that a job gives the same losses under every launcher."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megamtp.cluster.ports import reserve_port
from tests.end_to_end.jobs import MODULE, ROOT, deepspeed, environment, losses, pretrain, run, start_pretrain, wait_for

STEPS = ["train.steps=4", "data.validation=null", "run.save_every_steps=100"]


@pytest.fixture(scope="module")
def expected(arguments, tmp_path_factory) -> list[list[float]]:
    directory = tmp_path_factory.mktemp("plain") / "run"
    finished = pretrain([*arguments, *STEPS, f"run.directory={directory}"])
    assert finished.returncode == 0, finished.stderr
    return losses(directory)


def assert_same(directory: Path, expected: list[list[float]]) -> None:
    torch.testing.assert_close(torch.tensor(losses(directory)), torch.tensor(expected), rtol=1e-5, atol=0)
    assert len(expected) == 4


def launcher(name: str) -> list[str]:
    """Returns the arguments of Python that start the launcher, to be followed by those of the job."""
    if name == "deepspeed":
        return deepspeed(2)
    if name == "torchrun":
        return ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={reserve_port()}", "-m", MODULE]
    mpirun = Path(sys.executable).with_name("mpirun")
    return [
        "-c",
        "import os, sys; os.execv(sys.argv[1], sys.argv[1:])",
        str(mpirun),
        "-n",
        "2",
        sys.executable,
        "-m",
        MODULE,
    ]


@pytest.mark.parametrize("name", ["deepspeed", "torchrun", "mpirun"])
def test_launchers_give_the_losses_of_one_rank(name, arguments, expected, tmp_path):
    finished = run([*launcher(name), *arguments, *STEPS, f"run.directory={tmp_path}/run"])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert_same(tmp_path / "run", expected)


def test_libraries_print_no_warnings(arguments, tmp_path):
    """From the imports to the last checkpoint, with DeepSpeed's communication, which calls deprecated functions."""
    settings = [
        "train.steps=2",
        "run.tensorboard=true",
        "engine.communication=deepspeed",
        f"run.directory={tmp_path}/run",
    ]
    finished = run([*launcher("torchrun"), *arguments, *settings], PYTHONWARNINGS="")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "Warning" not in finished.stderr, finished.stderr


def test_local_script_resolves_paths_in_the_current_folder(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {dim: wide}\n")
    (tmp_path / "megamtp").mkdir()  # a folder with this name, such as a clone, must not be imported
    variables = environment()
    del variables["PYTHONPATH"]
    script = ["bash", str(ROOT / "launch/local.sh"), "mine.yaml"]
    finished = subprocess.run(script, cwd=tmp_path, env=variables, timeout=240, capture_output=True, text=True)
    output = finished.stdout + finished.stderr
    assert finished.returncode == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("megamtp: error: ")]
    assert "mine.yaml: model.dim" in line and "expected int" in line


def test_failed_rank_ends_the_job_under_mpirun():
    program = (
        "import sys, torch.distributed as dist; from megamtp.config import ClusterConfig; "
        "from megamtp.cluster.environment import errors_shared, find_place; "
        "from megamtp.engines.deepspeed.join import join_peers; place = find_place()"
        "\nwith errors_shared(place): pass\n"
        "join_peers(place, ClusterConfig()); sys.exit(3) if place.rank else dist.barrier()"
    )
    *mpirun, _, _ = launcher("mpirun")
    finished = run([*mpirun, "-c", program], timeout=100)
    assert finished.returncode != 0
    assert "barrier" in finished.stderr  # rank 0 did not wait forever: it was told that the other rank had failed


def test_error_of_one_rank_ends_all_ranks_under_mpirun(arguments, tmp_path):
    """Only rank 0 notices that another job uses the run directory."""
    endless = [*arguments, "train.steps=1000000", f"run.directory={tmp_path}/run"]
    with start_pretrain(endless) as first:
        wait_for(lambda: losses(tmp_path / "run"))
        os.kill(first.ranks[0].pid, signal.SIGSTOP)  # leaves the processors to the second job
        finished = run([*launcher("mpirun"), *endless], timeout=100)
    assert finished.returncode == 2
    errors = [line for line in (finished.stdout + finished.stderr).splitlines() if "megamtp: error: " in line]
    assert len(errors) == 1 and "belongs to a running job" in errors[0]
    assert "Traceback" not in finished.stderr


def test_unexpected_error_of_one_rank_ends_all_ranks_under_mpirun(arguments, tmp_path):
    """The error comes before the ranks have connected, while the other rank waits for its MPI message."""
    program = (
        "import os\nfrom megamtp import pretrain\ncheck = pretrain.check\n"
        "def fail(config, place):\n    if place.rank:\n        raise OSError(5, 'Input/output error')\n"
        "    return check(config, place)\npretrain.check = fail\npretrain.entry()"
    )
    *mpirun, _, _ = launcher("mpirun")
    finished = run([*mpirun, "-c", program, *arguments, f"run.directory={tmp_path}/run"], timeout=60)
    assert finished.returncode != 0
    assert "OSError: [Errno 5] Input/output error" in finished.stderr and "megamtp: error" not in finished.stderr


def test_two_nodes_give_the_losses_of_one(arguments, expected, tmp_path, start):
    """Two launchers on this machine act as two nodes with one rank each (`--no_ssh --node_rank`)."""
    hosts = tmp_path / "hosts"
    hosts.write_text("node-a slots=1\nnode-b slots=1\n")
    port = reserve_port()
    nodes = [
        start(
            [
                "-m",
                "deepspeed.launcher.runner",
                "--hostfile",
                str(hosts),
                "--no_ssh",
                "--node_rank",
                str(node),
                "--master_addr",
                "127.0.0.1",
                "--master_port",
                str(port),
                "--module",
                MODULE,
                *arguments,
                *STEPS,
                f"run.directory={tmp_path}/run",
            ]
        )
        for node in (0, 1)
    ]
    for node in nodes:
        output, _ = node.communicate(timeout=200)
        assert node.returncode == 0, output
    assert_same(tmp_path / "run", expected)


def test_emulated_cluster_trains_as_one_rank_and_writes_no_checkpoint(arguments, tmp_path):
    settings = ["cluster.emulate=4", "train.global_batch_tokens=256", "train.micro_batch_size=1"]
    finished = pretrain([*arguments, *STEPS, *settings, f"run.directory={tmp_path}/run"])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "no checkpoint is written" in finished.stdout + finished.stderr
    assert len(losses(tmp_path / "run")) == 4
    assert not (tmp_path / "run/checkpoints").exists()
