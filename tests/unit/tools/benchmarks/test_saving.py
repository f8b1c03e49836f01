"""tools/benchmarks/saving.py: steps told apart by a training's metrics, and the whole of it with a small model on
this machine.
"""

import json
import sys

from benchmarks import saving


def train(step: int, seconds: float, save: float = 0.0) -> dict:
    return {
        "kind": "train",
        "step": step,
        "seconds": {"train": seconds, "data": 0.25} | ({"save": save} if save else {}),
    }


def test_steps_are_told_apart():
    """Saved after steps 3 and 6; the first is on disk after step 5, and its publication counts with step 6; the
    second never is.
    """
    records = [
        train(1, 9),
        train(2, 9),
        train(3, 1),
        train(4, 2, save=0.5),
        train(5, 2),
        {"kind": "checkpoint", "step": 3},
    ]
    steps = saving.steps_of([*records, train(6, 1, save=0.125), train(7, 2, save=0.5)], save_every=3)
    assert [(step.number, step.seconds, step.still, step.saving) for step in steps] == [
        (3, 1.25, 0.0, False),
        (4, 2.25, 0.5, True),
        (5, 2.25, 0.0, True),
        (6, 1.25, 0.125, False),
        (7, 2.25, 0.5, True),
    ]
    assert saving.verdict(steps) == "step while saving / other step: 1.800 <= 1.1: FAILS"
    even = [train(1, 9), train(2, 9), train(3, 2), train(4, 2, save=9.0)]
    assert saving.verdict(saving.steps_of(even, save_every=3)) == "step while saving / other step: 1.000 <= 1.1: holds"


def test_a_small_training_is_measured(tmp_path, monkeypatch):
    small = [
        "model.dim=64",
        "model.num_layers=3",
        "model.num_future_tokens=2",
        "model.num_attention_heads=2",
        "model.vocab_size=300",
        "train.sequence_length=64",
        "train.precision=fp32",
        "optimizer.warmup_steps=1",
    ]
    arguments = ["--size", "0.3b", "--steps", "9", "--save-every", "4", "--tokens", "256", "--scratch", str(tmp_path)]
    monkeypatch.setenv("MEGAMTP_RANKS", "1")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "saving", *arguments])
    saving.main([*arguments, "--output", str(tmp_path / "results"), "--set", *small])
    written = json.loads((tmp_path / "results/saving.json").read_text())["results"]
    checkpoints = [result for result in written if result.get("kind") == "checkpoint"]
    steps = [result for result in written if "saving" in result]
    assert [result["step"] for result in checkpoints] == [4, 8, 9]
    assert [step["number"] for step in steps] == list(range(3, 10))
    assert steps[2]["saving"] and steps[2]["still"] > 0 and not steps[0]["saving"]
    assert all(result["copy_seconds"] > 0 and result["wait_seconds"] > 0 for result in checkpoints)
    assert all(result["bytes"] > 12 * 64 * 300 * 2 for result in checkpoints)
    assert (tmp_path / "results/saving.png").stat().st_size > 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
