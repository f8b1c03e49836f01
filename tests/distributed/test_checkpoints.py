"""Checkpoints of one layout load in others: weights, moments and counters are equal, and so are losses.

--full loads every layout's checkpoint in every layout.

The engines' state is read with DeepSpeed's own safe_get_full_*, which does not depend on our checkpoints.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamtp.checkpoint import store
from megamtp.checkpoint.shards import shard_name
from tests.cases import global_batch, own_share, small_config
from tests.ranks import run_ranks
from tests.saved import load_weights, save

STEPS, FURTHER_STEPS, MICRO_BATCHES = 3, 3, 6  # a step has the same number of micro-batches for any number of ranks
BOUND = 1e-6  # for losses after FURTHER_STEPS in another layout: fp32 sums in another order. Measured: 1e-7

ZERO1, ZERO3 = {"engine__kind": "zero1"}, {"engine__kind": "zero3"}
PIPELINE = {"engine__kind": "pipeline", "engine__num_stages": 2}
BF16 = {"train__precision": "bf16"}
SUB_GROUPS = {"engine__deepspeed": "{zero_optimization: {sub_group_size: 3000}}"}

# name -> (ranks, data-parallel ranks, settings). n = 3 of 5 layers are heads, so that the stages [3, 2] both have heads
# and the unembedding. Pipelines last: DeepSpeed cannot create other engines after one.
LAYOUTS = {
    "ZeRO-3 x1": (1, 1, ZERO3),
    "ZeRO-3 x2": (2, 2, ZERO3 | SUB_GROUPS),
    "ZeRO-3 x3": (3, 3, ZERO3),
    "ZeRO-3 x2, offload, bf16": (
        2,
        2,
        ZERO3 | BF16 | {"engine__offload_optimizer": True, "engine__communication": "deepspeed"},
    ),
    "ZeRO-1 x2": (2, 2, ZERO1),
    "ZeRO-1 x2, bf16": (2, 2, ZERO1 | BF16),
    "pipeline 2": (2, 1, PIPELINE | {"engine__stage_layers": [4, 1]}),
    "pipeline 2x2": (4, 2, PIPELINE | {"engine__stage_layers": [3, 2]}),
    "pipeline 2x2, bf16": (4, 2, PIPELINE | BF16 | {"engine__stage_layers": [3, 2]}),
}


# Without --full, a layout loads its own checkpoint and those of the layouts at these distances in LAYOUTS, so that each
# loads checkpoints of ZeRO and of a pipeline, in fp32 and in bf16.
DISTANCES = (0, 1, 4, 6, 8)


def sources_of(full: bool) -> dict[str, list[str]]:
    """Returns layout -> the layouts whose checkpoints it loads."""
    names = list(LAYOUTS)
    distances = range(len(names)) if full else DISTANCES
    return {name: [names[(index + d) % len(names)] for d in distances] for index, name in enumerate(names)}


def _each(function: Callable, directory: Path, *arguments: object) -> dict[str, list]:
    """Returns layout -> function(layout, directory, *arguments) of each rank. Layouts share a group of ranks."""
    results = {}
    for ranks in sorted({ranks for ranks, _, _ in LAYOUTS.values()}):
        names = [name for name in LAYOUTS if LAYOUTS[name][0] == ranks]
        by_rank = run_ranks(_one_after_another, ranks, function, names, directory, *arguments, timeout_seconds=500)
        results |= dict(zip(names, zip(*by_rank, strict=True), strict=True))
    return results


def _one_after_another(function: Callable, names: list[str], directory: Path, *arguments: object) -> list:
    return [function(name, directory, *arguments) for name in names]


def layout_config(name: str, directory: Path):
    _, data_parallel_size, settings = LAYOUTS[name]
    settings = {"model__num_future_tokens": 3, "run__directory": str(directory / name)} | settings
    return small_config(data_parallel_size, MICRO_BATCHES // data_parallel_size, **settings)


def _train(config, engine, steps: range) -> list[list[float]]:
    """Trains at learning rate 1e-2, and returns each step's losses by head."""
    from megamtp.engines.base import count_targets

    size, losses = engine.data_parallel_size, []
    for step in steps:
        batches = global_batch(config, step, config.num_micro_batches(size) * size)
        own = own_share(batches, engine.data_parallel_rank, size)
        counts = count_targets(own, True, size, engine.device)
        nll_sums = engine.train_batch(own, counts, 1e-2).nll_sums.double()
        dist.all_reduce(nll_sums)
        losses.append([nll / count for nll, count in zip(nll_sums.tolist(), counts, strict=True)])
    return losses


def _engine_state(engine) -> dict[str, Tensor]:
    """Returns copies of weights, moments and counters from DeepSpeed, for the parameters of this rank's model."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    state, optimizer = {}, engine.deepspeed_engine.optimizer
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed 0.19 links the moments after the first group's first step, when other groups have none yet.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.model.named_parameters():
        state[f"weight/{name}"] = safe_get_full_fp32_param(parameter).cpu()
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"{moment}/{name}"] = safe_get_full_optimizer_state(parameter, moment).cpu()
    steps = [int(tensors["step"]) for tensors in optimizer.optimizer.state.values()]
    state |= {
        "adam steps": torch.tensor(steps).unique(),
        "global steps": torch.tensor(engine.deepspeed_engine.global_steps),
    }
    return {key: value.clone() for key, value in state.items()}


def _saved(name: str, directory: Path) -> tuple[dict[str, Tensor], list[list[float]]]:
    """Returns (the state at the checkpoint, the losses of further steps)."""
    from megamtp.engines.build import build_engine

    config = layout_config(name, directory)
    engine = build_engine(config)
    _train(config, engine, range(STEPS))
    state = _engine_state(engine)
    save(config, engine, STEPS)
    return state, _train(config, engine, range(STEPS, STEPS + FURTHER_STEPS))


def _loaded(
    name: str, directory: Path, sources: dict[str, list[str]]
) -> dict[str, tuple[dict[str, Tensor], list[list[float]], set[str]]]:
    """Loads the checkpoints of the layout's sources.

    Returns:
        (the state after loading, the losses of further steps, the names of the files that were read), by source.
    """
    from megamtp.checkpoint import shards
    from megamtp.engines.build import build_engine

    config, results, opened, safe_open = layout_config(name, directory), {}, set(), shards.safe_open
    shards.safe_open = lambda path, **options: opened.add(path.name) or safe_open(path, **options)
    engine = build_engine(config)
    _train(config, engine, range(20, 21))  # so that loading must change the state
    for source in sources[name]:
        opened.clear()
        engine.load(store.newest_checkpoint(directory / source))
        state, files = _engine_state(engine), set(opened)
        results[source] = state, _train(config, engine, range(STEPS, STEPS + FURTHER_STEPS)), files
    shards.safe_open = safe_open
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict:
    """Returns layout -> (state of all ranks, losses of further steps), and the folder of all runs as "directory"."""
    directory, checkpoints = tmp_path_factory.mktemp("layouts"), {}
    for name, results in _each(_saved, directory).items():
        checkpoints[name] = {key: value for state, _ in results for key, value in state.items()}, results[0][1]
    return checkpoints | {"directory": directory}


@pytest.fixture(scope="module")
def loaded(saved, request) -> dict[str, list]:
    """Returns layout -> what _loaded returns on each rank."""
    return _each(_loaded, saved["directory"], sources_of(request.config.getoption("--full")))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_load_checkpoints_of_others(name, saved, loaded):
    results = loaded[name]
    for source in results[0]:
        expected, expected_losses = saved[source]
        state = {key: value for result in results for key, value in result[source][0].items()}
        assert state.keys() == expected.keys()
        different = [key for key in expected if not torch.equal(state[key], expected[key])]
        assert not different, (source, different)
        for result in results:  # also the copies on other ranks
            assert all(torch.equal(value, expected[key]) for key, value in result[source][0].items())
        # A pipeline reads copies of the unembedding from another stage's file.
        if source == name and name.startswith("ZeRO"):
            assert [result[source][2] for result in results] == [{shard_name(rank)} for rank in range(len(results))]
        losses = results[0][source][1]
        if source == name:
            assert losses == expected_losses
        elif "bf16" not in source + name:
            assert losses == [pytest.approx(expected, rel=BOUND, abs=0) for expected in expected_losses]


def test_whole_weights_are_read_from_every_layout(saved):
    for name in LAYOUTS:
        model, weights = load_weights(store.newest_checkpoint(saved["directory"] / name))
        assert model.num_future_tokens == 3
        expected = {
            key.removeprefix("weight/"): value for key, value in saved[name][0].items() if key.startswith("weight/")
        }
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], expected[key]) for key in expected)
