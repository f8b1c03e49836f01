"""Tests that prepare_data, killed at random moments and called again, makes the same bytes as without a kill."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.jobs import ROOT, environment

PREPARE = """
from megamtp.commands import prepare_data
from megamtp.data import shards
shards.MIN_SHARD_BYTES = 20_000
print("ready", flush=True)
prepare_data.entry()
"""


@pytest.fixture
def texts(tmp_path) -> Path:
    """About 1.5 MB of text files and JSON lines, with duplicates among both."""
    folder, words = tmp_path / "texts", (ROOT / "README.md").read_text().split()
    folder.mkdir()
    generator = random.Random(0)
    # Each document begins with its number, because two documents of a single word could be equal.
    documents = [
        " ".join([str(number), *generator.choices(words, k=generator.randrange(1, 600))]) for number in range(700)
    ]
    for number, text in enumerate(documents[:300]):
        (folder / f"{number:03}.txt").write_text(text)
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[250:]))
    return folder


def start(texts: Path, output: Path) -> subprocess.Popen:
    """Starts a preparation with two workers, and returns when its imports are done."""
    command = [
        sys.executable,
        "-c",
        PREPARE,
        "--input",
        texts,
        "--output",
        output,
        "--vocab-size",
        "500",
        "--deduplicate",
    ]
    process = subprocess.Popen(
        [*command, "--workers", "2"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def finish(texts: Path, output: Path) -> dict[str, bytes]:
    """Runs a preparation to its end. Returns the content of each file of the corpus."""
    process = start(texts, output)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    return {path.name: path.read_bytes() for path in output.iterdir()}


def kill_after(seconds: float, texts: Path, output: Path) -> None:
    """Starts a preparation and kills it after `seconds`. Checks that its workers end as well."""
    process = start(texts, output)
    time.sleep(seconds)
    workers = psutil.Process(process.pid).children() if process.poll() is None else []
    process.kill()
    process.communicate(timeout=10)
    _, running = psutil.wait_procs(workers, 10)
    assert running == []


@pytest.mark.timeout(900)
def test_killed_at_random_moments_and_resumed(texts, tmp_path, request):
    num_kills = 20 if request.config.getoption("--full") else 3
    start_seconds = time.monotonic()
    process = start(texts, tmp_path / "whole")
    import_seconds = time.monotonic() - start_seconds
    process.communicate(timeout=120)
    seconds = time.monotonic() - start_seconds - import_seconds
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(whole) == 9 and json.loads(whole["corpus.json"])["duplicates"] == 50
    generator, num_parts = random.Random(0), []
    for kill in range(num_kills):  # at a random moment in each of `num_kills` equal intervals
        output = tmp_path / str(kill)
        kill_after((kill + generator.random()) / num_kills * seconds, texts, output)
        if (output / "corpus.json").exists():
            assert {name: (output / name).read_bytes() for name in whole} == whole
        num_parts.append(len(list((output / ".preparation").glob("*.json"))))
        assert finish(texts, output) == whole
    assert max(num_parts) > 0  # some preparations resumed from finished parts
