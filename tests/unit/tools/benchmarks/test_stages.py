"""One stage of a pipeline on a CPU."""

import pytest
import torch
from benchmarks import stages

from megamtp.planning.partition import whole_loss_partition
from megamtp.planning.spread import spread_loss_partition
from tests.cases import small_config


@pytest.mark.parametrize("make_plan", [whole_loss_partition, spread_loss_partition])
def test_a_measured_stage_sums_the_gradients_of_its_micro_batches(make_plan):
    """Two micro-batches give twice the gradients, although all heads share the unembedding."""
    config = small_config(
        1, 4, engine__kind="pipeline", engine__num_stages=2, model__num_layers=6, model__vocab_size=300
    )
    last = make_plan(config, 1).stages[-1]
    stage_class = stages.MeasuredSpreadStage if last.contents.spread else stages.MeasuredStage
    stage = stage_class(config, last, torch.device("cpu"))
    sums = []
    for _ in range(2):
        state = stages.StageMicroBatch(stage.receive())
        for pass_kind in stage.kinds:
            stage.run(pass_kind, state)
        sums.append({name: total.clone() for name, total in stage.sums.items()})
    for name, first in sums[0].items():
        assert first.abs().max() > 0, name
        assert torch.allclose(sums[1][name], 2 * first, rtol=1e-4, atol=1e-9), name
    assert all(parameter.grad is None for parameter in stage.parameters())
