"""Verdicts of the pipeline benchmark on invented times, and a size that does not fit."""

import argparse
import json

import pytest
import torch
from benchmarks import pipeline, stages

from megamtp.errors import InputError
from tests.unit.tools.benchmarks.test_plans import InventedMeter


def test_an_error_names_the_size_that_does_not_fit_and_other_sizes_are_measured(tmp_path, monkeypatch, capsys):
    def measure(config, stage, in_flight, device, micro_batches):
        if config.model.num_attention_heads == 40:  # 13B
            raise torch.OutOfMemoryError("CUDA out of memory")
        return InventedMeter(device, 1).measure(config, stage, in_flight)

    class InThisProcess:
        def __init__(self, function, *arguments):
            self.call = lambda: function(*arguments)

        def run(self):
            return self.call()

    monkeypatch.setattr(pipeline, "ProcessCall", InThisProcess)
    monkeypatch.setattr(stages, "measure", measure)
    arguments = ["--smoke", "--set", "--stages", "4", "--output", str(tmp_path)]  # --set alone: models of full size
    pipeline.main([*arguments, "--sizes", "13b", "6.7b"])
    assert (
        "13b: StageContents(num_trunk_layers=4, " in (shown := capsys.readouterr().out)
        and "does not fit on this card; expected" in shown
    )
    assert {result["size"] for result in json.loads((tmp_path / "pipeline.json").read_text())["results"]} == {"6.7b"}
    with pytest.raises(InputError, match="width 5120 does not fit"):
        pipeline.main([*arguments, "--sizes", "13b"])


def test_verdicts_hold_and_fail():
    def result(plan: str, heads: int, step: float, slowest: float, peak: int | None) -> dict:
        return {
            "size": "6.7b",
            "vocabulary": 32000,
            "stages": 8,
            "heads": heads,
            "plan": plan,
            "flops": 100 + 5 * (heads > 1),
            "step_seconds": step,
            "imbalance": slowest,
            "peak_bytes": [peak],
            "planned_bytes": [100],
        }

    results = [
        result("naive", 1, 0.9, 1.2, 105),
        result("whole layers", 1, 1.0, 1.1, 104),
        result("spread losses", 1, 1.1, 1.0, None),
        result("naive", 4, 1.0, 1.5, 111),
        result("whole layers", 4, 1.5, 1.3, 100),
        result("spread losses", 4, 1.06, 1.04, 98),
    ]
    verdict, memory = pipeline._verdicts(results).splitlines()
    assert verdict == (
        "- 6.7b, V=32000, 8 stages, n=4, spread losses: slowest / mean 1.040 <= 1.05: holds; n=4 / n=1 1.060 <= FLOP "
        "ratio 1.050 + 0.02: holds; largest memory error 11.0%: FAILS"
    )
    assert memory == "- memory, measured / planned, 5 stages of all plans: 0.980 to 1.110, median 1.040"


def test_options_set_the_configuration():
    parsed = argparse.Namespace(
        sequence_length=4096, micro_batches=32, pipelines=8, vocabularies=[32000], stages=[8], heads=[4], set=[]
    )
    ((key, config),) = pipeline._configs("13b", parsed).items()
    assert key == (32000, 8, 4)
    assert (
        config.num_micro_batches(8) == 32
        and config.train.precision == "bf16"
        and not config.train.activation_checkpointing
    )
