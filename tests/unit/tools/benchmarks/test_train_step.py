"""tools/benchmarks/train_step.py divides steps into parts; timed_training.py records them."""

import json
import time
from types import SimpleNamespace

import pytest
from benchmarks import timed_training, train_step

from megamtp.engines.hosted import HostedEngine


def result(size: str, passes: float, optimizer: float, data: float = 0.0, other: float = 0.0) -> dict:
    parts = {"passes": passes, "optimizer": optimizer, "data": data, "other": other}
    return {
        "size": size,
        "heads": 2,
        "precision": "bf16",
        "tokens": 1000.0,
        "flops": 4e12,
        "milliseconds": [sum(parts.values())] * 2,
        "parts": parts,
    }


def test_a_step_is_divided_into_parts():
    """The seconds are exact in binary. The median of three steps is the second."""
    records = [{"seconds": {"data": 0.125, "train": train, "report": 0.25}} for train in (1.0, 2.0, 4.0)]
    times = [{"passes": 0.5 * train, "optimizer": 0.25 * train} for train in (1.0, 2.0, 4.0)]
    assert train_step.parts_of(records, times) == {
        "milliseconds": [1375.0, 2375.0, 4375.0],
        "parts": {"passes": 1000.0, "optimizer": 500.0, "data": 125.0, "other": 750.0},
    }
    with pytest.raises(ValueError, match="zip"):
        train_step.parts_of(records, times[:2])


def test_table_and_verdict():
    good, bad, small = result("1.3b", 98.0, 1.0, 0.5, 0.5), result("6.7b", 90.0, 10.0), result("0.3b", 50.0, 50.0)
    table = train_step.tables([good, bad])
    assert "| 1.3b | bf16 | 2 | 100.0 [100.0, 100.0] | 10,000 | 40 | 98.0 | 1.0 | 0.5 | 0.5 | 2.0% |" in table
    assert table.endswith("not in passes, 1.3B and larger: at most 10.0% of a step <= 3%: FAILS")
    assert train_step.verdict([good, small]).endswith("at most 2.0% of a step <= 3%: holds")
    assert train_step.verdict([small]) is None


def test_passes_end_where_the_optimizer_begins(tmp_path, monkeypatch):
    deepspeed_engine = SimpleNamespace(_take_model_step=lambda lr: time.sleep(0.04))

    def train_batch(batches: str) -> str:
        time.sleep(0.02)
        engine.deepspeed_engine._take_model_step(lr=1.0)
        time.sleep(0.08)
        return batches

    engine = SimpleNamespace(rank=0, train_batch=train_batch)
    monkeypatch.setattr(HostedEngine, "attach_model", lambda engine, model: setattr(engine, "model", model))
    with timed_training.recording(tmp_path / "times"):
        engine.deepspeed_engine = deepspeed_engine
        HostedEngine.attach_model(engine, "model")
    assert engine.model == "model" and engine.train_batch("result") == "result"
    (seconds,) = [json.loads(line) for line in (tmp_path / "times").read_text().splitlines()]
    assert 0.02 <= seconds["passes"] < 0.04 <= seconds["optimizer"] < 0.08
