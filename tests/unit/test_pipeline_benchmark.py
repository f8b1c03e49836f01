"""The pipeline benchmark on a CPU with a tiny model, and its plans and verdicts on invented times."""

import argparse
import json

import pytest
import torch
from benchmarks import pipeline, plans, stages
from benchmarks.stages import Measured

from megamtp.errors import InputError
from megamtp.planning.links import Link
from megamtp.planning.partition import whole_loss_partition
from megamtp.planning.spread import spread_loss_partition
from megamtp.planning.spread_schedule import PassKind, TransferTimes
from tests.cases import small_config
from tests.unit.test_partition import paper_config

TINY = ["model.dim=16", "model.mlp_dim=24", "model.num_attention_heads=2", "model.num_layers=6", "train.precision=fp32"]
ARGUMENTS = [
    "--device",
    "cpu",
    "--sizes",
    "6.7b",
    "--stages",
    "2",
    "--vocabularies",
    "300",
    "--heads",
    "1",
    "2",
    "--micro-batches",
    "4",
    "--sequence-length",
    "8",
    "--measured",
    "1",
    "--set",
    *TINY,
]
PIPELINE = dict(engine__kind="pipeline", engine__num_stages=2, model__num_layers=6, model__vocab_size=300)


class InventedMeter(plans.Meter):
    """A forward pass takes a second a layer, a backward pass two, a loss of 300 rows three; every peak is a GiB."""

    def measure(self, config, stage, alive=()):
        contents = stage.contents
        forward, backward = float(contents.num_trunk_layers), 2.0 * contents.num_trunk_layers
        if contents.spread:
            seconds = {
                PassKind.FORWARD: forward + contents.num_heads,
                PassKind.STATISTICS: contents.rows / 300,
                PassKind.GRADIENTS: 2 * contents.rows / 300,
                PassKind.BACKWARD: backward + 2 * contents.num_heads,
            }
        else:
            seconds = {PassKind.FORWARD: forward + 6 * contents.num_heads, PassKind.BACKWARD: backward}
        return Measured(
            seconds, {kind: (time, time) for kind, time in seconds.items()}, {count: 2**30 for count in alive}
        )


def test_runs_on_a_cpu_and_writes_all_three_files(tmp_path, monkeypatch, capsys):
    class Here:
        def __init__(self, function, *arguments):
            self.answer = function(*arguments)

        def result(self):
            return self.answer

    monkeypatch.setattr(pipeline, "Fresh", Here)
    pipeline.main([*ARGUMENTS, "--output", str(tmp_path)])
    content = json.loads((tmp_path / "pipeline.json").read_text())
    results = content["results"]
    assert [(r["heads"], r["plan"]) for r in results] == [
        (n, plan) for n in (1, 2) for plan in ("naive", "whole layers", "spread losses")
    ]
    for result in results:
        assert sum(result["layers"]) == 6 and sum(result["heads_of_stages"]) == result["heads"]
        assert result["step_seconds"] >= 4 * max(result["stage_seconds"])
        assert result["peak_bytes"] == [None, None]  # a CPU's are not counted
        assert 4 >= result["alive"][0] >= result["alive"][1] >= 1
    assert sum(results[-1]["rows"]) == 300
    assert content["settings"]["micro-batches"] == 4
    assert (tmp_path / "pipeline.png").stat().st_size > 10_000
    assert "6.7b, V=300, 2 stages, n=2" in capsys.readouterr().out


def test_a_size_that_does_not_fit_is_named_and_others_are_measured(tmp_path, monkeypatch, capsys):
    def measure(config, stage, alive, device, micro_batches):
        if config.model.num_attention_heads == 40:  # 13B
            raise torch.OutOfMemoryError("CUDA out of memory")
        return InventedMeter(device, 1).measure(config, stage, alive)

    class Here:
        def __init__(self, function, *arguments):
            self.call = lambda: function(*arguments)

        def result(self):
            return self.call()

    monkeypatch.setattr(pipeline, "Fresh", Here)
    monkeypatch.setattr(stages, "measure", measure)
    arguments = ["--device", "cpu", "--vocabularies", "300", "--stages", "4", "--output", str(tmp_path)]
    pipeline.main([*arguments, "--sizes", "13b", "6.7b"])
    assert (
        "13b: StageContents(num_trunk_layers=4, " in (shown := capsys.readouterr().out)
        and "does not fit on this card; expected" in shown
    )
    assert {result["size"] for result in json.loads((tmp_path / "pipeline.json").read_text())["results"]} == {"6.7b"}
    with pytest.raises(InputError, match="width 5120 does not fit"):
        pipeline.main([*arguments, "--sizes", "13b"])


def test_plans_are_played_with_what_was_measured():
    config, meter, link = (
        small_config(1, 4, **PIPELINE, model__num_future_tokens=2),
        InventedMeter(torch.device("cpu"), 1),
        Link(1e30, 0.0),
    )
    costs = plans.measured_costs(config, meter)
    assert (costs.layer_forward, costs.layer_backward, costs.loss, costs.unembedding_copy) == (1.0, 2.0, 3.0, 0.0)
    assert (costs.slice_statistics * 300, costs.slice_gradients * 300) == pytest.approx((1.0, 2.0))
    made = plans.make_plans(config, 1, costs, link)
    found = {name: plans.play_plan(config, plan, costs, link, meter) for name, plan in made.items()}
    naive, whole, spread_losses = (found[name] for name in (plans.NAIVE, plans.WHOLE, plans.SPREAD))
    assert (naive["layers"], naive["heads_of_stages"]) == ([3, 3], [0, 2])
    assert naive["stage_seconds"] == [9.0, 15.0] and naive["imbalance"] == 1.25
    assert naive["step_seconds"] == 3 + 4 * 15 + 6  # the last stage never waits; the first ends with its backward pass
    assert whole["layers"] == [4, 2] and whole["stage_seconds"] == [12.0, 12.0]
    assert sum(spread_losses["stage_seconds"]) == pytest.approx(24.0)
    assert spread_losses["imbalance"] == pytest.approx(1.0, abs=0.1)
    for plan in found.values():
        assert sum(box.end - box.start for box in plan["boxes"]) == pytest.approx(4 * 24.0)
        assert plan["peak_bytes"] == [2**30, 2**30]
    assert {box.label for box in spread_losses["boxes"]} == {"forward", "losses", "backward"}


def test_naive_cut_has_all_heads_last():
    layers = {
        (size, stages): plans.naive_layers(paper_config(size, f"engine.num_stages={stages}"))
        for size, stages in (("6.7b", 4), ("6.7b", 8), ("13b", 8), ("6.7b", 16))
    }
    assert layers["6.7b", 4] == [8] * 4 and layers["6.7b", 8] == [4] * 8 and layers["13b", 8] == [5] * 8
    assert layers["6.7b", 16] == [2] * 13 + [1, 1] + [4]


def test_link_times():
    config = paper_config("6.7b")
    transfer_times = Link(50e9, 1e-5).transfer_times(config)
    boundary = 4096 * 4096 * 2 / 50e9
    assert transfer_times == TransferTimes(
        pytest.approx(1e-5 + boundary), pytest.approx(7e-5 + boundary), pytest.approx(7e-5 + 7 * 49152 / 50e9)
    )
    reduction = Link(50e9, 0.0).unembedding_reduction(config, 2)
    assert reduction == pytest.approx(4 * 32001 * 4096 / 50e9)
    assert Link(50e9, 1.0).unembedding_reduction(config, 1) == 0.0


@pytest.mark.parametrize("plan", [whole_loss_partition, spread_loss_partition])
def test_a_measured_stage_sums_the_gradients_of_its_micro_batches(plan):
    """As often as it is run, and the unembedding's once for all heads of a micro-batch."""
    config = small_config(1, 4, **PIPELINE, model__num_future_tokens=2)
    last = plan(config, 1).stages[-1]
    kind = stages.MeasuredSpreadStage if last.contents.spread else stages.MeasuredStage
    stage = kind(config, last, torch.device("cpu"))
    sums = []
    for _ in range(2):
        passed = stages.Passed(stage.receive())
        for pass_kind in stage.kinds:
            stage.run(pass_kind, passed)
        sums.append({name: total.clone() for name, total in stage.sums.items()})
    for name, first in sums[0].items():
        assert first.abs().max() > 0, name
        assert torch.allclose(sums[1][name], 2 * first, rtol=1e-4, atol=1e-9), name
    assert all(parameter.grad is None for parameter in stage.parameters())


def test_verdicts_name_what_holds_and_what_fails():
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
        "ratio 1.050 + 0.02: holds; memory off by 11.0% at most: FAILS"
    )
    assert memory == "- memory, measured over planned, 5 stages of all plans: 0.980 to 1.110, median 1.040"


def test_options_are_the_issues():
    parsed = argparse.Namespace(
        sequence_length=4096, micro_batches=32, pipelines=8, vocabularies=[32000], stages=[8], heads=[4], set=[]
    )
    ((key, config),) = pipeline._configs("13b", parsed).items()
    assert key == (32000, 8, 4)
    assert (
        config.accumulation(8) == 32 and config.train.precision == "bf16" and not config.train.activation_checkpointing
    )
