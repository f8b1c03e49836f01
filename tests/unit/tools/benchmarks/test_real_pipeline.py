"""tools/benchmarks/real_pipeline.py: its table on invented times, and files that it refuses."""

import json

import pytest
from benchmarks import real_pipeline

from megamtp.errors import InputError


def test_the_table_and_the_verdict(tmp_path):
    result = {
        "size": "1.3b",
        "vocabulary": 32000,
        "stages": 2,
        "heads": 4,
        "plan": "whole layers",
        "planned_step": 0.95,
        "bubble": 0.05,
        "imbalance": 1.01,
        "seconds": [0.9, 1.0, 1.5],
        "real_bubble": 0.06,
        "real_imbalance": 1.02,
    }
    shown = real_pipeline._table([result]).splitlines()[-1]
    assert (
        shown == "| 1.3b | 32000 | 2 | 4 | whole layers | 1000.0 [900.0, 1500.0] | 950.0 | 0.950 | 6.0%, 5.0% | 1.020, "
        "1.010 |"
    )
    assert real_pipeline._verdict([result]) == "largest error of the predicted step 5.0% <= 10%: holds"
    assert real_pipeline._verdict([result, result | {"planned_step": 1.2}]).endswith("20.0% <= 10%: FAILS")
    real_pipeline._draw([result]).savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_bubble_and_imbalance_of_a_profiled_step(monkeypatch):
    """Two pipelines with two stages. The ranks of a stage are consecutive."""
    monkeypatch.setattr(real_pipeline, "_with_engine", lambda result, settings, measure: None)
    monkeypatch.setattr(real_pipeline, "of_all_ranks", lambda seconds: [0.5, 0.7, 0.8, 1.0])
    profiled = real_pipeline.profile({"seconds": [0.9, 1.0, 1.5]}, {"pipelines": 2})
    assert profiled == {
        "computing_seconds": [0.5, 0.7, 0.8, 1.0],
        "real_bubble": pytest.approx(0.25),
        "real_imbalance": pytest.approx(1.2),
    }


def test_predictions_that_do_not_match_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"missing.json cannot be read .*expected the JSON file of `pipeline`"):
        real_pipeline.main(["--predicted", str(tmp_path / "missing.json")])
    content = {"settings": {"pipelines": 2}, "results": [{"stages": 2, "step_seconds": 1.0}]}
    (tmp_path / "predicted.json").write_text(json.dumps(content))
    with pytest.raises(
        InputError, match=r"1 ranks; expected as many as a plan in .*predicted.json has, \[4\]: use torchrun"
    ):
        real_pipeline.main(["--predicted", str(tmp_path / "predicted.json")])
