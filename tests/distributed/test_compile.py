"""ZeRO-3 runs trunk and heads through one compiled function, without graph breaks, recompilation or eager fallback."""

import functools

import pytest
import torch

from tests.cases import small_config
from tests.engine_steps import largest_errors
from tests.ranks import run_ranks

N = 3


def _graphs_and_error(checkpointing: bool) -> tuple[int, int, float]:
    """Returns (compiled layer graphs, graph breaks, largest gradient error) of three training steps and an evaluation.

    The backend "aot_eager" needs no compiler, but traces, guards and recompiles like any other backend.
    """
    from torch._dynamo.utils import counters

    from megamtp.engines.zero import ZeroEngine
    from megamtp.model import layers
    from tests.cases import global_batch, own_share

    layers.compiled = functools.cache(
        lambda function, _: torch.compile(function, dynamic=False, fullgraph=True, backend="aot_eager")
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
    num_training_graphs = counters["stats"]["unique_graphs"]
    engine.evaluate(own_share(global_batch(config, 9, 2), engine.rank, 2))
    engine.evaluate(own_share(global_batch(config, 10, 2), engine.rank, 2))
    assert counters["stats"]["unique_graphs"] == num_training_graphs + 1  # one graph without gradients
    return num_training_graphs, sum(counters["graph_break"].values()), error


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_layers_share_one_graph(checkpointing):
    for num_graphs, num_breaks, error in run_ranks(_graphs_and_error, 2, checkpointing):
        assert num_graphs == 1
        assert num_breaks == 0
        assert error < 1e-5
