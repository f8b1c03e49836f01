"""Tests of signals and dead launchers: all ranks save together and exit."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from megamtp.checkpoint.store import newest_checkpoint, read_manifest
from tests.end_to_end.jobs import MODULE, ROOT, deepspeed, environment, pretrain, ranks, records, wait_for

FULL = pytest.mark.full

ENDLESS = ["train.steps=1000000", "data.validation=null", "run.save_every_steps=1000000", "run.requeue_exit_code=85"]


def assert_saved_and_gone(directory) -> None:
    """Asserts that no rank is running and that the checkpoint of the last reported step is complete."""
    wait_for(lambda: not ranks(directory), seconds=60)
    manifest = read_manifest(newest_checkpoint(directory))
    assert manifest.step == records(directory)[-1]["step"]
    assert not list((directory / "checkpoints").glob("*.partial"))


def start_job(start, command, arguments, directory):
    """Starts a job and returns it when it has taken some steps."""
    process = start([*command, *arguments, *ENDLESS, f"run.directory={directory}"])
    wait_for(lambda: len(records(directory)) >= 3 or process.poll() is not None)
    assert process.poll() is None, process.communicate()[0]
    assert len(ranks(directory)) == 2
    return process


@pytest.mark.parametrize(("rank", "number"), [pytest.param(0, signal.SIGTERM, marks=FULL), (1, signal.SIGUSR1)])
def test_signal_to_one_rank_stops_all(rank, number, arguments, tmp_path, start):
    process = start_job(start, deepspeed(2), arguments, tmp_path / "run")
    ranks(tmp_path / "run")[rank].send_signal(number)
    process.communicate(timeout=90)
    assert process.returncode == 85
    assert_saved_and_gone(tmp_path / "run")


def test_signal_to_the_per_node_launcher(arguments, tmp_path, start):
    process = start_job(start, deepspeed(2), arguments, tmp_path / "run")
    (per_node,) = psutil.Process(process.pid).children()
    per_node.send_signal(signal.SIGTERM)
    process.communicate(timeout=90)
    assert_saved_and_gone(tmp_path / "run")


def test_signal_to_the_deepspeed_process(arguments, tmp_path, start):
    """The process dies at once, and its ranks notice that."""
    process = start_job(start, deepspeed(2), arguments, tmp_path / "run")
    os.kill(process.pid, signal.SIGTERM)
    process.wait(timeout=30)
    assert_saved_and_gone(tmp_path / "run")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=FULL), pytest.param(signal.SIGUSR1, marks=FULL)]
)
def test_signal_to_the_local_command(number, arguments, tmp_path, start):
    process = start_job(start, ["-m", "megamtp.commands.local"], arguments, tmp_path / "run")
    process.send_signal(number)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 85
    assert "Traceback" not in output
    assert_saved_and_gone(tmp_path / "run")


@pytest.mark.parametrize("seconds", [0.0, pytest.param(0.5, marks=FULL), 2.0, pytest.param(4.0, marks=FULL)])
def test_signal_before_the_first_step(seconds, arguments, tmp_path, start):
    """No process may remain, whether the ranks had started or not."""
    process = start(["-m", "megamtp.commands.local", *arguments, *ENDLESS, f"run.directory={tmp_path}/run"])
    wait_for(lambda: psutil.Process(process.pid).children())
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode in (128 + signal.SIGTERM, 85), output
    assert not ranks(tmp_path / "run")


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--module", MODULE]


@pytest.mark.parametrize("command", [deepspeed(2), TORCHRUN], ids=["deepspeed", "torchrun"])
def test_ranks_exit_if_their_launcher_is_killed_before_they_connect(command, arguments, tmp_path, start):
    """The launcher dies while the ranks still import torch."""
    process = start([*command, *arguments, *ENDLESS, f"run.directory={tmp_path}/run"])
    wait_for(lambda: len(ranks(tmp_path / "run")) == 2 and all(map(has_looked_up_launcher, ranks(tmp_path / "run"))))
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=90)  # until the last rank has closed the pipe
    assert not ranks(tmp_path / "run") and not (tmp_path / "run/metrics.jsonl").exists()
    assert "its launcher is gone" in output


def has_looked_up_launcher(rank: psutil.Process) -> bool:
    """Returns whether the rank has imported psutil. The next import, torch, takes longer than the lookup."""
    return any("_psutil_linux" in loaded.path for loaded in rank.memory_maps())


def test_killed_local_command_leaves_no_orphan(arguments, tmp_path, start):
    process = start_job(start, ["-m", "megamtp.commands.local"], arguments, tmp_path / "run")
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert_saved_and_gone(tmp_path / "run")


def test_dead_launcher_under_the_local_command(arguments, tmp_path, start):
    process = start_job(start, ["-m", "megamtp.commands.local"], arguments, tmp_path / "run")
    for child in psutil.Process(process.pid).children():
        child.send_signal(signal.SIGKILL)
    process.communicate(timeout=90)
    assert process.returncode > 0
    assert_saved_and_gone(tmp_path / "run")


def test_hanging_rank_ends_the_job(arguments, tmp_path, start):
    process = start_job(start, deepspeed(2), [*arguments, "run.stall_seconds=10"], tmp_path / "run")
    _, hung = ranks(tmp_path / "run")
    hung.suspend()
    wait_for(lambda: ranks(tmp_path / "run") == [hung], seconds=60)
    hung.resume()  # otherwise the launcher waits half a minute for it
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "Timeout (0:00:10)!" in output and "in _train_step" in output


def test_signal_during_a_long_evaluation(arguments, corpus, tmp_path, start):
    """The step is saved at once, and the next job repeats its evaluation."""
    arguments = [*arguments, "train.steps=3", f"run.directory={tmp_path}/run"]
    process = start(["-m", MODULE, *arguments, f"data.validation={corpus}/train", "run.evaluation_windows=null"])
    wait_for(lambda: len(records(tmp_path / "run")) == 3 or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0 and "asked to stop: saved at step 3" in output
    assert read_manifest(newest_checkpoint(tmp_path / "run")).step == 3 and not records(tmp_path / "run", "validation")
    for _ in range(2):
        finished = pretrain(arguments)
        assert finished.returncode == 0
        assert [record["step"] for record in records(tmp_path / "run", "validation")] == [3]
    assert "nothing to do" in finished.stdout


def test_run_continues_if_its_output_cannot_be_written(arguments, tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", MODULE, *arguments, f"run.directory={tmp_path}/run"]
        finished = subprocess.run(
            command, env=environment(), cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=90
        )
    assert finished.returncode == 0, finished.stderr
    assert read_manifest(newest_checkpoint(tmp_path / "run")).step == 20


def test_torchrun_restarts_killed_ranks(arguments, tmp_path, start):
    """The restarted ranks resume from the newest checkpoint."""
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "--max-restarts",
        "1",
        "-m",
        MODULE,
    ]
    process = start([*torchrun, *arguments, "train.steps=60", "data.validation=null", f"run.directory={tmp_path}/run"])
    wait_for(lambda: len(records(tmp_path / "run")) >= 12 or process.poll() is not None)
    ranks(tmp_path / "run")[1].kill()
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert [record["step"] for record in records(tmp_path / "run")] == list(range(1, 61))
    assert len(records(tmp_path / "run", "checkpoint")) == 6
