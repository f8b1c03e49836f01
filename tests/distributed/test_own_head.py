"""A user-defined head kind, known only to this file: training, checkpoints, resuming and conversion."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamtp.checkpoint import canonical, formats, store
from megamtp.checkpoint.tensors import read_tensor
from megamtp.config import ModelConfig, read_config
from megamtp.errors import InputError
from megamtp.model.attention import DocumentMask
from megamtp.model.cost import flops_per_token, head_cost, num_head_parameters, num_parameters
from megamtp.model.heads import HEAD_KINDS, Head
from megamtp.model.layers import DEFAULT_OPTIONS, LayerCost, LayerOptions
from tests.cases import small_config
from tests.distributed.test_checkpoints import BOUND, FURTHER_STEPS, MICRO_BATCHES, STEPS, _train
from tests.engine_steps import largest_errors
from tests.ranks import run_ranks
from tests.saved import load_weights, save

NARROW = 8


class NarrowHead(Head):
    """Returns z + up(gelu(down(z))), without attention and norm."""

    def __init__(self, model: ModelConfig, index: int, options: LayerOptions = DEFAULT_OPTIONS):
        super().__init__()
        self.down = nn.Linear(model.dim, NARROW, bias=False)
        self.up = nn.Linear(NARROW, model.dim, bias=False)

    def forward(self, z_BTD: Tensor, document_mask: DocumentMask | None = None) -> Tensor:
        return z_BTD + self.up(F.gelu(self.down(z_BTD)))

    def cost(self, sequence_length: int) -> LayerCost:
        dim = self.down.in_features
        return LayerCost(4 * dim * NARROW, 0, dim + 2 * NARROW, dim)


KIND = {"model__head_kind": f"{__name__}:NarrowHead", "model__num_future_tokens": 3}
ENGINES = {
    "zero3": (2, 2, {"engine__kind": "zero3"}),
    "zero3 of DeepSpeed": (2, 2, {"engine__kind": "zero3", "engine__communication": "deepspeed"}),
    "pipeline": (2, 1, {"engine__kind": "pipeline", "engine__num_stages": 2, "engine__stage_layers": [3, 2]}),
    "spread": (2, 1, {"engine__kind": "pipeline", "engine__num_stages": 2, "engine__spread_losses": True}),
}


def _config(data_parallel_size: int, accumulation: int, **settings):
    return small_config(data_parallel_size, accumulation, **KIND | settings)


def _errors(data_parallel_size: int, settings: dict) -> tuple[float, float]:
    from megamtp.engines.build import build_engine

    config = _config(data_parallel_size, 2, **settings)
    return largest_errors(config, build_engine(config), num_steps=2)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_equal_the_reference(engine):
    ranks, data_parallel_size, settings = ENGINES[engine]
    gradient_error, loss_error = map(max, zip(*run_ranks(_errors, ranks, data_parallel_size, settings), strict=True))
    assert gradient_error < 1e-5 and loss_error < 1e-5


def _saved(directory: str) -> list[list[float]]:
    """Saves a checkpoint; returns the losses of the steps after it."""
    from megamtp.engines.build import build_engine

    config = _config(2, MICRO_BATCHES // 2, engine__kind="zero3", run__directory=directory)
    engine = build_engine(config)
    _train(config, engine, range(STEPS))
    save(config, engine, STEPS)
    return _train(config, engine, range(STEPS, STEPS + FURTHER_STEPS))


def _resumed(directory: str, data_parallel_size: int, settings: dict) -> list[list[float]]:
    from megamtp.engines.build import build_engine

    config = _config(data_parallel_size, MICRO_BATCHES // data_parallel_size, **settings)
    engine = build_engine(config)
    engine.load(store.newest_checkpoint(Path(directory)))
    return _train(config, engine, range(STEPS, STEPS + FURTHER_STEPS))


def test_resumes_with_other_engines_and_converts(tmp_path):
    expected = torch.tensor(run_ranks(_saved, 2, str(tmp_path / "run"))[0])
    for ranks, data_parallel_size, settings in ((1, 1, {"engine__kind": "zero3"}), ENGINES["pipeline"]):
        losses = torch.tensor(run_ranks(_resumed, ranks, str(tmp_path / "run"), data_parallel_size, settings)[0])
        torch.testing.assert_close(losses, expected, rtol=BOUND, atol=0)
    model, weights = load_weights(store.newest_checkpoint(tmp_path / "run"))
    assert {"heads.0.down.weight", "heads.2.up.weight"} < weights.keys()
    canonical.write(formats.read(tmp_path / "run"), tmp_path / "canonical")
    converted = canonical.read(tmp_path / "canonical")
    assert converted.model == model and converted.state.optimizer.steps == (STEPS,)
    assert all(torch.equal(read_tensor(converted.weights, name), tensor) for name, tensor in weights.items())
    for to in ("hf", "hf-mtp", "meta"):
        with pytest.raises(InputError, match=rf"^{to} cannot hold .*NarrowHead; expected model\.head_kind=parallel"):
            formats.FORMATS[to].write(converted, tmp_path / to)
        assert not (tmp_path / to).exists()


def test_costs_come_from_the_head_class():
    narrow = _config(1, 1).model
    parallel = _config(1, 1, model__head_kind="parallel").model
    assert num_head_parameters(narrow, 0) == 2 * narrow.dim * NARROW
    difference = num_head_parameters(parallel, 0) - num_head_parameters(narrow, 0)
    assert num_parameters(parallel) - num_parameters(narrow) == 3 * difference
    difference = head_cost(parallel, 0, 12).flops - head_cost(narrow, 0, 12).flops
    assert flops_per_token(parallel, 12) - flops_per_token(narrow, 12) == 3 * 3 * difference


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("paralel", f"model.head_kind=paralel; expected {' or '.join(HEAD_KINDS)}, or MODULE:CLASS of your own"),
        (
            "nowhere.at_all:Head",
            "cannot be imported (No module named 'nowhere'); expected MODULE:CLASS that Python can import",
        ),
        (f"{__name__}:Missing", "cannot be imported"),
        ("pathlib:Path", "expected a subclass of megamtp.model.head:Head"),
    ],
)
def test_an_invalid_kind_is_named_in_the_error(kind, words):
    from megamtp.engines.check import check_engine

    config = read_config(["configs/quickstart.yaml", "data.train=a", "run.directory=r", f"model.head_kind={kind}"])
    with pytest.raises(InputError) as error:
        check_engine(config, 0, 1)
    assert words in str(error.value)
