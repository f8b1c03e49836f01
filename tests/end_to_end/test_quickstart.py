"""launch/quickstart.sh, stopped in the middle of a stage: it says so, leaves no process, and goes on from there."""

import json
import re
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from megamtp.checkpoint.store import newest_checkpoint, read_manifest
from megamtp.config import read_config
from tests.end_to_end.jobs import ROOT, environment, kill_tree, ranks, records, wait_for

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
CORPUS = [
    str(LIBRARY / name) for name in ("asyncio", "email", "http", "logging", "multiprocessing", "unittest", "xml", "argparse.py")
]


@pytest.fixture
def quickstart(tmp_path):
    """quickstart() -> the running script, its output in tmp_path/output."""
    started = []

    def start() -> subprocess.Popen:
        command = ["bash", "launch/quickstart.sh", "--run", str(tmp_path / "run"), "--corpus", *CORPUS]
        with open(tmp_path / "output", "w") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which tests in the background have ignored
            )
        started.append(process)
        return started[-1]

    yield start
    for process in started:
        kill_tree(process)


def test_stopped_while_it_prepares_the_corpus(quickstart, tmp_path):
    process = quickstart()
    wait_for(lambda: "1. Corpus" in (tmp_path / "output").read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    output = (tmp_path / "output").read_text()
    assert "Stopped. The same command goes on from there." in output and "2. Pretraining" not in output
    assert "Traceback" not in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_while_it_trains(number, quickstart, tmp_path):
    process = quickstart()
    wait_for(lambda: len(records(tmp_path / "run")) >= 2 or process.poll() is not None, seconds=200)
    process.send_signal(number)
    assert process.wait(timeout=90) == 75
    output = (tmp_path / "output").read_text()
    assert "Stopped and saved. The same command goes on from there." in output and "3. Loss curves" not in output
    assert not ranks(tmp_path / "run")
    assert read_manifest(newest_checkpoint(tmp_path / "run")).step == records(tmp_path / "run")[-1]["step"]


def test_wrong_arguments_are_one_line():
    finished = subprocess.run(["bash", "launch/quickstart.sh", "--corpse"], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stderr.startswith("megamtp: error: --corpse: unknown argument") and finished.stderr.count("\n") == 1


@pytest.mark.parametrize(("tokens", "steps"), [(300, 1), (12_439, 48), (51_520, 201), (10_000_000, 700)])
def test_a_small_corpus_gets_the_steps_of_four_epochs(tokens, steps, tmp_path):
    """The Python of the script's settings_for, on a summary of a corpus with so many tokens."""
    summary = {
        "settings": {}, "vocab_size": 4096, "documents": {}, "tokens": {"train": tokens, "validation": 100}, "bytes_per_token": 3.0,
        "unigram_entropy": 6.0, "unreadable_files": [],
    }  # fmt: skip
    (tmp_path / "corpus.json").write_text(json.dumps(summary))
    (program,) = re.findall(r"<<'PY'\n(.*?)^PY$", (ROOT / "launch/quickstart.sh").read_text(), re.DOTALL | re.MULTILINE)
    command = [sys.executable, "-c", program, str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    config = read_config(["configs/quickstart.yaml", "data.train=corpus/train", "run.directory=run", *found.stdout.split()])
    assert config.train.steps == steps and bool(found.stdout) == (steps < 700)
    assert config.run.evaluate_every_steps * 5 >= steps and config.optimizer.warmup_steps <= steps
