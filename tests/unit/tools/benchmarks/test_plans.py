"""Plans of a pipeline, simulated with invented stage times."""

import pytest
import torch
from benchmarks import plans
from benchmarks.stages import StageMeasurement

from megamtp.planning.links import Link
from megamtp.planning.spread_schedule import PassKind
from tests.cases import paper_config, small_config


class InventedMeter(plans.Meter):
    """A layer takes 1 s forward and 2 s backward, a loss over 300 rows takes 3 s, and every peak is 1 GiB."""

    def measure(self, config, stage, in_flight=()):
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
        return StageMeasurement(
            seconds, {kind: (time, time) for kind, time in seconds.items()}, {count: 2**30 for count in in_flight}
        )


def test_plans_are_simulated_with_measured_times():
    config, meter, link = (
        small_config(1, 4, engine__kind="pipeline", engine__num_stages=2, model__num_layers=6, model__vocab_size=300),
        InventedMeter(torch.device("cpu"), 1),
        Link(1e30, 0.0),
    )
    costs = plans.measured_costs(config, meter)
    assert (costs.layer_forward, costs.layer_backward, costs.loss, costs.unembedding_copy) == (1.0, 2.0, 3.0, 0.0)
    assert (costs.slice_statistics * 300, costs.slice_gradients * 300) == pytest.approx((1.0, 2.0))
    made = plans.make_plans(config, 1, costs, link)
    simulated = {name: plans.simulate_plan(config, plan, costs, link, meter) for name, plan in made.items()}
    naive, whole, spread_losses = (simulated[name] for name in (plans.NAIVE, plans.WHOLE, plans.SPREAD))
    assert (naive["layers"], naive["heads_of_stages"]) == ([3, 3], [0, 2])
    assert naive["stage_seconds"] == [9.0, 15.0] and naive["imbalance"] == 1.25
    assert naive["step_seconds"] == 3 + 4 * 15 + 6  # the last stage never waits; the first ends with its backward pass
    assert whole["layers"] == [4, 2] and whole["stage_seconds"] == [12.0, 12.0]
    assert sum(spread_losses["stage_seconds"]) == pytest.approx(24.0)
    assert spread_losses["imbalance"] == pytest.approx(1.0, abs=0.1)
    for plan in simulated.values():
        assert sum(box.end - box.start for box in plan["boxes"]) == pytest.approx(4 * 24.0)
        assert plan["peak_bytes"] == [2**30, 2**30]
    assert {box.label for box in spread_losses["boxes"]} == {"forward", "losses", "backward"}


def test_the_naive_cut_has_all_heads_on_the_last_stage():
    layers = {
        (size, stages): plans.naive_layers(paper_config(size, f"engine.num_stages={stages}"))
        for size, stages in (("6.7b", 4), ("6.7b", 8), ("13b", 8), ("6.7b", 16))
    }
    assert layers["6.7b", 4] == [8] * 4 and layers["6.7b", 8] == [4] * 8 and layers["13b", 8] == [5] * 8
    assert layers["6.7b", 16] == [2] * 13 + [1, 1] + [4]
