"""tools/benchmarks/recovery.py: a small training on this machine, a rank of which is killed."""

import json
import sys

import pytest
from benchmarks import recovery

from megamtp.errors import InputError
from tests.end_to_end.jobs import ROOT

SMALL = [
    "model.dim=32",
    "model.num_layers=3",
    "model.num_future_tokens=2",
    "model.num_attention_heads=2",
    "model.mlp_dim=48",
    "train.sequence_length=32",
    "train.micro_batch_size=2",
    "train.global_batch_tokens=128",
    "train.precision=fp32",
]


def test_a_killed_training_goes_on(tmp_path, monkeypatch):
    arguments = [
        "--prepare",
        str(ROOT / "megamtp/data"),
        "--data",
        str(tmp_path / "corpus"),
        "--vocab-size",
        "400",
        "--heads",
        "2",
        "--steps",
        "120",
        "--save-every",
        "10",
        "--kill-at",
        "25",
        "--run",
        str(tmp_path / "run"),
        "--output",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "recovery", *arguments])
    recovery.main([*arguments, "--set", *SMALL])
    (result,) = json.loads((tmp_path / "recovery.json").read_text())["results"]
    steps = [record["step"] for record in result["records"] if record["kind"] == "train"]
    assert steps == list(range(1, 121))
    assert result["killed_rank"] == 1 and result["status"] != 0
    assert 25 <= result["killed_step"] < 120
    assert result["resumed_step"] % 10 == 0 and 10 <= result["resumed_step"] <= result["killed_step"]
    assert result["sample"].startswith("def main(")
    assert (tmp_path / "recovery.png").stat().st_size > 10_000
    with pytest.raises(InputError, match="run exists; expected a new folder"):
        recovery.main(arguments)


def test_steps_out_of_order_are_refused(tmp_path):
    with pytest.raises(InputError, match="--save-every 200 --kill-at 100 --steps 1000; expected them in rising order"):
        recovery.main(["--data", str(tmp_path), "--kill-at", "100"])
