"""Every layout's checkpoint in every other layout: weights, both moments and counters are the same, and training goes
on the same.

What the engines hold is read by DeepSpeed's own safe_get_full_*, which knows nothing of checkpoints.
"""

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

STEPS, FURTHER_STEPS, MICRO_BATCHES = 3, 3, 6  # micro-batches of a step: as many for every number of ranks
BOUND = 1e-6  # of losses after FURTHER_STEPS elsewhere: fp32 sums in another order. Measured: 1e-7

ZERO1, ZERO3 = {"engine__kind": "zero1"}, {"engine__kind": "zero3"}
PIPELINE = {"engine__kind": "pipeline", "engine__num_stages": 2}
BF16 = {"train__precision": "bf16"}
SUB_GROUPS = {"engine__deepspeed": "{zero_optimization: {sub_group_size: 3000}}"}

# name -> (ranks, ranks that share the data, settings). n = 3 of 5 layers: [3, 2] has heads, and so the unembedding, on
# both stages.
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


def layout_config(name: str, directory: Path):
    _, sharers, settings = LAYOUTS[name]
    settings = {"model__num_future_tokens": 3, "run__directory": str(directory / name)} | settings
    return small_config(sharers, MICRO_BATCHES // sharers, **settings)


def _train(config, engine, steps: range) -> list[list[float]]:
    """Losses of each head."""
    from megamtp.engines.base import count_targets

    size, found = engine.data_parallel_size, []
    for step in steps:
        own = own_share(global_batch(config, step, MICRO_BATCHES), engine.data_parallel_rank, size)
        counts = count_targets(own, True, size, engine.device)
        nll_sums = engine.train_batch(own, counts, 1e-2).nll_sums.double()
        dist.all_reduce(nll_sums)
        found.append([nll / count for nll, count in zip(nll_sums.tolist(), counts, strict=True)])
    return found


def _held(engine) -> dict[str, Tensor]:
    """Weights, moments and counters as DeepSpeed gives them out, of the parameters that this rank knows of."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    held, optimizer = {}, engine.deepspeed_engine.optimizer
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed 0.19 links the moments when the first group has taken its first step, and the others have none yet.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.model.named_parameters():
        held[f"weight/{name}"] = safe_get_full_fp32_param(parameter).cpu()
        for moment in ("exp_avg", "exp_avg_sq"):
            held[f"{moment}/{name}"] = safe_get_full_optimizer_state(parameter, moment).cpu()
    steps = [int(state["step"]) for state in optimizer.optimizer.state.values()]
    return held | {
        "adam steps": torch.tensor(steps).unique(),
        "global steps": torch.tensor(engine.deepspeed_engine.global_steps),
    }


def _saved(name: str, directory: Path) -> tuple[dict[str, Tensor], list[list[float]]]:
    """(what was held when it was saved, the losses of further steps)"""
    from megamtp.engines.build import build_engine

    config = layout_config(name, directory)
    engine = build_engine(config)
    _train(config, engine, range(STEPS))
    held = {key: value.clone() for key, value in _held(engine).items()}
    save(config, engine, STEPS)
    return held, _train(config, engine, range(STEPS, STEPS + FURTHER_STEPS))


def _loaded(name: str, directory: Path) -> dict[str, tuple[dict[str, Tensor], list[list[float]], set[str]]]:
    """Of every saved layout: (what is held when it has been loaded, the losses of further steps, the files that were
    read).
    """
    from megamtp.checkpoint import shards
    from megamtp.engines.build import build_engine

    config, found, opened, safe_open = layout_config(name, directory), {}, set(), shards.safe_open
    shards.safe_open = lambda path, **options: opened.add(path.name) or safe_open(path, **options)
    engine = build_engine(config)
    _train(config, engine, range(20, 21))  # away from where it is about to be
    for source in LAYOUTS:
        opened.clear()
        engine.load(store.newest_checkpoint(directory / source))
        held, read = {key: value.clone() for key, value in _held(engine).items()}, set(opened)
        found[source] = held, _train(config, engine, range(STEPS, STEPS + FURTHER_STEPS)), read
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict:
    """layout -> (all that was held, losses of further steps), and the folder of all runs as "directory"."""
    directory, found = tmp_path_factory.mktemp("layouts"), {}
    for name, (ranks, _, _) in LAYOUTS.items():
        results = run_ranks(_saved, ranks, name, directory)
        found[name] = {key: value for held, _ in results for key, value in held.items()}, results[0][1]
    return found | {"directory": directory}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_loaded(name, saved):
    results = run_ranks(_loaded, LAYOUTS[name][0], name, saved["directory"])
    for source in LAYOUTS:
        expected, expected_losses = saved[source]
        found = {key: value for result in results for key, value in result[source][0].items()}
        assert found.keys() == expected.keys()
        different = [key for key in expected if not torch.equal(found[key], expected[key])]
        assert not different, (source, different)
        for result in results:  # copies, too
            assert all(torch.equal(value, expected[key]) for key, value in result[source][0].items())
        # in a pipeline, copies of the unembedding are in another stage's file
        if source == name and name.startswith("ZeRO"):
            assert [result[source][2] for result in results] == [{shard_name(rank)} for rank in range(len(results))]
        losses = results[0][source][1]
        if source == name:
            assert losses == expected_losses
        elif "bf16" not in source + name:
            assert losses == [pytest.approx(expected, rel=BOUND, abs=0) for expected in expected_losses]


def test_weights_are_read_whole_from_every_layout(saved):
    for name in LAYOUTS:
        model, weights = load_weights(store.newest_checkpoint(saved["directory"] / name))
        assert model.num_future_tokens == 3
        expected = {
            key.removeprefix("weight/"): value for key, value in saved[name][0].items() if key.startswith("weight/")
        }
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], expected[key]) for key in expected)
