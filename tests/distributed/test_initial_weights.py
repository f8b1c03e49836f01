"""Engines start from the weights of a canonical checkpoint (run.initial_weights)."""

import torch
import torch.distributed as dist

from megamtp.checkpoint import canonical
from megamtp.model.mtp import MTPModel
from tests.cases import global_batch, small_config
from tests.checkpoints import contents, random_model
from tests.ranks import run_ranks
from tests.reference import relative_error

ENGINES = [
    {"engine__kind": "zero3"},
    {"engine__kind": "zero1"},
    {"engine__kind": "pipeline", "engine__num_stages": 2, "engine__stage_layers": [3, 2], "world_size": 1},
]


def _nll_sums(folder: str, engines: list[dict]) -> list[torch.Tensor]:
    """Returns each engine's negative log-likelihoods, summed over all ranks."""
    from megamtp.engines.build import build_engine

    nll_sums = []
    for settings in engines:
        config = small_config(run__initial_weights=folder, **settings)
        engine = build_engine(config)
        batches = global_batch(config, 0, engine.data_parallel_size)
        totals = engine.evaluate(batches[engine.data_parallel_rank :: engine.data_parallel_size])
        dist.all_reduce(totals)
        nll_sums.append(totals.view(2, -1)[0])
    return nll_sums


def test_every_engine_starts_from_the_given_weights(tmp_path):
    config = small_config()
    model: MTPModel = random_model(config.model).double()
    canonical.write(contents(config.model, model.float().state_dict()), tmp_path / "initial")
    results = run_ranks(_nll_sums, 2, str(tmp_path / "initial"), ENGINES)
    for settings, nll_sums in zip(ENGINES, results[0], strict=True):
        batches = global_batch(config, 0, settings.get("world_size", 2))
        expected = sum(model.double()(batch.inputs, batch.targets, [1.0] * 2)[1] for batch in batches)
        assert relative_error(nll_sums.double(), expected.detach().double()) < 1e-5
