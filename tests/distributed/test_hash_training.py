"""Tests of tools/hash_training.py: equal trainings have equal hashes, and different trainings different hashes."""

import subprocess
import sys
from pathlib import Path

import hash_training
from benchmarks.corpora import write_random

from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]


def _train_three_times(corpus: str) -> list[tuple[str, str, str] | None]:
    _, settings = hash_training.CASES["zero1/ignored-targets"]
    return [
        hash_training.train(hash_training.config_of(2, f"{settings} {more}", corpus))
        for more in ("", "", "train.seed=1")
    ]


def test_equal_trainings_have_equal_hashes_and_another_seed_changes_all_three(tmp_path):
    write_random(tmp_path / "corpus", hash_training.TOKENS, hash_training.DOCUMENT_TOKENS, hash_training.VOCABULARY)
    (first, second, other), on_rank_1 = run_ranks(_train_three_times, 2, str(tmp_path / "corpus"))
    assert first == second
    assert len(set(first) | set(other)) == 6
    assert on_rank_1 == [None] * 3


def test_hash_of_a_state_does_not_depend_on_how_ranks_slice_it():
    def state_hash(*states: dict[str, bytes]) -> str:
        return hash_training.hashes([([b"loss"], ["0x1p0"], state) for state in states])[2]

    whole = state_hash({"weight/a@0": b"abcdefghijkl", "weight/b@0": b"mn"}, {})
    assert (
        state_hash({"weight/b@0": b"mn", "weight/a@0": b"ab"}, {"weight/a@10": b"kl", "weight/a@2": b"cdefghij"})
        == whole
    )
    assert state_hash({"weight/a@0": b"abcdefghijklmn", "weight/b@0": b""}, {}) != whole
    assert state_hash({"weight/a@0": b"abcdefghijkx", "weight/b@0": b"mn"}, {}) != whole


def test_unknown_case_is_one_line_and_status_2():
    command = [sys.executable, "tools/hash_training.py", "--cases", "zero1/plain", "zero2"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == "megamtp: error: --cases zero2; expected names that --list prints\n"
