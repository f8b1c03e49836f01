"""Tests of launch/quickstart.sh: it can be stopped and continued, and limits the epochs on a small corpus."""

import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from megamtp.checkpoint.store import newest_checkpoint, read_manifest
from megamtp.data.corpus import prepare
from megamtp.data.input_files import find_source
from tests.end_to_end.jobs import ROOT, environment, kill_tree, ranks, records, wait_for

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
CORPUS = [
    str(LIBRARY / name)
    for name in ("asyncio", "email", "http", "logging", "multiprocessing", "unittest", "xml", "argparse.py")
]


@pytest.fixture
def quickstart(tmp_path):
    """quickstart() -> the running script. Its output goes to tmp_path/output."""
    processes = []

    def start() -> subprocess.Popen:
        command = ["bash", "launch/quickstart.sh", "--run", str(tmp_path / "run"), "--corpus", *CORPUS]
        with open(tmp_path / "output", "w") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                # A background process, such as this test may be, ignores SIGINT.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        processes.append(process)
        return process

    yield start
    for process in processes:
        kill_tree(process)


def test_stopped_while_it_prepares_the_corpus(quickstart, tmp_path):
    process = quickstart()
    wait_for(lambda: "1. Corpus" in (tmp_path / "output").read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    output = (tmp_path / "output").read_text()
    assert "Stopped. The same command continues from there." in output and "2. Pretraining" not in output
    assert "Traceback" not in output


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.full), signal.SIGINT])
def test_stopped_while_it_trains(number, quickstart, tmp_path):
    process = quickstart()
    wait_for(lambda: len(records(tmp_path / "run")) >= 2 or process.poll() is not None, seconds=200)
    process.send_signal(number)
    assert process.wait(timeout=90) == 75
    output = (tmp_path / "output").read_text()
    assert "Stopped and saved. The same command continues from there." in output and "3. Loss curves" not in output
    assert not ranks(tmp_path / "run")
    assert read_manifest(newest_checkpoint(tmp_path / "run")).step == records(tmp_path / "run")[-1]["step"]


def test_small_corpus_is_trained_on_for_four_epochs_at_most(tmp_path):
    """Calls the script's function that derives settings from the size of the corpus."""
    (tmp_path / "text.txt").write_text("".join(f"line {number} of a small text\n" for number in range(900)))
    corpus, _ = prepare(
        find_source([tmp_path / "text.txt"]), tmp_path / "small", tokenizer="bytes", validation_fraction=0.1
    )
    function = "source <(sed -n '/^settings_for/,/^}/p' launch/quickstart.sh); settings_for"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def settings_for(folder: Path) -> list[str]:
        command = ["bash", "-c", f"{function} {folder}"]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        ).stdout.split()

    steps = 4 * corpus.tokens["train"] // 1024
    assert 10 < steps < 700
    assert settings_for(tmp_path / "small") == [
        f"train.steps={steps}",
        f"run.evaluate_every_steps={-(-steps // 5)}",
        f"optimizer.warmup_steps={min(20, steps // 5)}",
    ]
    summary = tmp_path / "small/corpus.json"
    summary.write_text(summary.read_text().replace(f'"train": {corpus.tokens["train"]}', '"train": 100000000'))
    assert settings_for(tmp_path / "small") == []


def test_wrong_arguments_are_one_line():
    finished = subprocess.run(["bash", "launch/quickstart.sh", "--corpse"], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stderr.startswith("megamtp: error: --corpse: unknown argument") and finished.stderr.count("\n") == 1
