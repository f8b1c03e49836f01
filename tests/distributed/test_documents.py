"""data.documents=isolate: with any engine, gradients equal those of training on each document's piece alone.

The reference reads documents as lists of tokens: it has no windows, masks or positions.
"""

import functools

import numpy as np
import pytest
import torch

from megamtp.config import Config
from megamtp.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megamtp.data.loader import Batch, TrainLoader
from megamtp.data.windows import Windows
from megamtp.targets import IGNORED
from tests.cases import POSITIONS, VOCABULARY, small_config
from tests.engine_steps import errors_of_step
from tests.ranks import run_ranks
from tests.reference import reference_model, reference_step

LENGTHS = [7, 0, 1, 1, 2, 15, 3, 0, 0, 9, 4, 30, 1, 6, 2, 12, 11]  # tokens of each document; a window has 12
BOUND = 1e-5
ENGINES = {  # pipelines last: DeepSpeed cannot create other engines after one
    "zero3": {},
    "zero3, recomputed": {"train__activation_checkpointing": True},
    "zero3 by DeepSpeed": {"engine__communication": "deepspeed"},
    "zero3, deferred": {"engine__head_schedule": "deferred"},
    "zero3, compiled": {"train__compile": True},
    "zero1": {"engine__kind": "zero1"},
    "pipeline": {"engine__kind": "pipeline", "engine__num_stages": 2, "engine__stage_layers": [4, 1]},
    "pipeline, no head before the last": {
        "engine__kind": "pipeline",
        "engine__num_stages": 2,
        "engine__stage_layers": [2, 3],
        "train__activation_checkpointing": True,
    },
    "pipeline, spread losses": {"engine__kind": "pipeline", "engine__num_stages": 2, "engine__spread_losses": True},
}


def make_documents() -> list[list[int]]:
    generator = np.random.default_rng(3)
    return [generator.integers(VOCABULARY, size=length).tolist() for length in LENGTHS]


def pieces(documents: list[list[int]], window: int, n: int) -> list[Batch]:
    """Returns the window's piece of each document as its own batch, with targets from that document only."""
    begin, batches, first = window * POSITIONS, [], 0
    for document in documents:
        start, stop = max(begin - first, 0), min(begin + POSITIONS - first, len(document))
        if start < stop:
            after = [*document, *[IGNORED] * n]
            targets = [after[start + head : stop + head] for head in range(1, n + 1)]
            batches.append(Batch(torch.tensor([document[start:stop]]), torch.tensor(targets)[:, None]))
        first += len(document)
    return batches


def _errors(prefix: str, settings: dict) -> tuple[float, float, int]:
    """Runs two steps.

    Returns:
        (largest relative error of a gradient, largest relative error of a loss, number of layer graphs compiled).
    """
    from torch._dynamo.utils import counters

    from megamtp.engines.build import build_engine
    from megamtp.model import layers

    layers.compiled = functools.cache(
        lambda function, _: torch.compile(function, dynamic=False, fullgraph=True, backend="aot_eager")
    )
    counters.clear()
    pipelines = 1 if "engine__num_stages" in settings else 2
    config = small_config(pipelines, accumulation=4 // pipelines, data__documents="isolate", **settings)
    engine = build_engine(config)
    n = config.model.num_future_tokens
    windows = Windows(IndexedDataset(prefix), POSITIONS, n, seed=1, documents="isolate")
    loader = TrainLoader(windows, config.global_batch_windows, config.train.micro_batch_size, 0, 1)
    return *_largest_errors(config, engine, loader), counters["stats"]["unique_graphs"]


def _largest_errors(config: Config, engine, loader: TrainLoader) -> tuple[float, float]:
    model, documents, gradient_error, loss_error = reference_model(config), make_documents(), 0.0, 0.0
    number = len(loader.windows)
    for step in range(2):
        places = np.arange(step * config.global_batch_windows, (step + 1) * config.global_batch_windows)
        order = [int(loader.windows.epoch_order(int(place) // number)(place % number)[0]) for place in places]
        alone = [piece for window in order for piece in pieces(documents, window, config.model.num_future_tokens)]
        expected = reference_step(config, model, alone)
        counts, *errors = errors_of_step(engine, loader.read(step), expected)
        assert counts == [
            sum(int((piece.targets[head] != IGNORED).sum()) for piece in alone) for head in range(len(counts))
        ]
        gradient_error, loss_error = max(gradient_error, errors[0]), max(loss_error, errors[1])
    return gradient_error, loss_error


def _all_errors(prefix: str) -> dict[str, tuple[float, float, int]]:
    return {name: _errors(prefix, settings) for name, settings in ENGINES.items()}


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> list[dict]:
    prefix = tmp_path_factory.mktemp("corpus") / "documents"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in make_documents():
            writer.add_document(document)
    return run_ranks(_all_errors, 2, str(prefix))


@pytest.mark.parametrize("name", ENGINES)
def test_gradients_equal_those_of_each_document_alone(name, errors):
    for rank_errors in errors:
        gradient_error, loss_error, graphs = rank_errors[name]
        assert gradient_error < BOUND and loss_error < BOUND
        assert graphs == (name == "zero3, compiled")
