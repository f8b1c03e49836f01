"""One compiled layer function serves trunk and heads under ZeRO-3, without graph breaks, recompilations or a return
to eager.
"""

import functools

import pytest
import torch

from tests.cases import small_config
from tests.engine_steps import largest_errors
from tests.ranks import run_ranks

N = 3


def _graphs_and_error(checkpointing: bool) -> tuple[int, int, float]:
    """(layer graphs compiled, graph breaks, largest error of any gradient) of three training steps and an evaluation.

    With the backend "aot_eager", which needs no compiler but traces, guards and recompiles as any other.
    """
    from torch._dynamo.utils import counters

    from megamtp.engines.zero import ZeroEngine
    from megamtp.model import layers
    from tests.cases import global_batch, own_share

    layers.compiled_layer_output = functools.cache(
        lambda: torch.compile(layers.layer_output, dynamic=False, fullgraph=True, backend="aot_eager")
    )
    config = small_config(
        engine__kind="zero3",
        train__compile=True,
        model__num_layers=8,
        model__num_future_tokens=N,
        train__activation_checkpointing=checkpointing,
    )
    engine = ZeroEngine(config)
    error, _ = largest_errors(config, engine, num_steps=3)
    training = counters["stats"]["unique_graphs"]
    engine.evaluate(own_share(global_batch(config, 9, 2), engine.rank, 2))
    engine.evaluate(own_share(global_batch(config, 10, 2), engine.rank, 2))
    assert counters["stats"]["unique_graphs"] == training + 1  # without gradients
    return training, sum(counters["graph_break"].values()), error


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_graph_serves_all_layers(checkpointing):
    for graphs, breaks, error in run_ranks(_graphs_and_error, 2, checkpointing):
        assert graphs == 1
        assert breaks == 0
        assert error < 1e-5
