"""Layers in fp8 (train.precision=fp8) under all engines: gradients, gathered weights, and the bytes of gathers."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamtp.checkpoint import store
from megamtp.config import Config, ModelConfig
from megamtp.data.loader import Batch
from megamtp.model.attention import DocumentMask
from megamtp.model.heads import Head
from megamtp.model.initial import initial_value
from megamtp.model.layers import DEFAULT_OPTIONS, LayerCost, LayerOptions, TransformerLayer, linear
from megamtp.model.mtp import MTPModel
from megamtp.targets import IGNORED
from tests.cases import HEAD_KINDS, global_batch, own_share, small_config
from tests.distributed.test_checkpoints import _train
from tests.engine_steps import names_on_all_ranks, step_with_gradients
from tests.ranks import run_ranks
from tests.reference import relative_error
from tests.saved import save

PIPELINE = {"engine__kind": "pipeline", "engine__num_stages": 2, "engine__stage_layers": [3, 2]}


def _heads(kind: str) -> dict:
    """Returns the settings of a kind of heads, with two trunk layers."""
    shape = {"model__num_layers": 3, "model__match_parameters": False}
    return shape | {f"model__{key}": value for key, value in HEAD_KINDS[kind].items()}


SETTINGS = {
    "zero1": {"engine__kind": "zero1"},
    "zero3": {"engine__kind": "zero3"},
    "zero3, deferred": {"engine__kind": "zero3", "engine__head_schedule": "deferred"},
    "zero3, offloaded": {"engine__kind": "zero3", "engine__offload_parameters": True},
    "zero3, persistent": {"engine__kind": "zero3", "engine__param_persistence_threshold": 300},
    "zero3, recomputed": {"engine__kind": "zero3", "train__activation_checkpointing": True},
    "zero3, losses in bf16": {"engine__kind": "zero3", "head_loss__precision": "bf16"},
    "zero1, deepseek": {"engine__kind": "zero1"} | _heads("deepseek"),
    "zero3, linear": {"engine__kind": "zero3"} | _heads("linear"),
    "zero3, anticausal": {"engine__kind": "zero3"} | _heads("anticausal"),
    "zero3, deepseek": {"engine__kind": "zero3"} | _heads("deepseek"),
    "zero3, eagle3": {"engine__kind": "zero3"} | _heads("eagle3"),
    "pipeline, deepseek": PIPELINE | _heads("deepseek"),
    "pipeline": PIPELINE,
    # Each slice of the unembedding has its own scale, so fp8 losses would differ from those of one process.
    "pipeline, spread losses": PIPELINE | {"engine__spread_losses": True, "head_loss__precision": "bf16"},
}
# Under ZeRO, the engine and the reference quantise the same numbers, and differ by the rounding of gradients to bf16 in
# reductions and sums. Stages of a pipeline also round dz between them, to 2^-9. About 1 % of its numbers then round to
# another number in e5m2, 2^-2.5 away: sqrt(0.01) * 2^-2.5 = 1.8 % in each product in turn, and more in the gradients of
# query and key, which are small differences. A head that is missing causes an error of at least 25 %.
BOUND, PIPELINE_BOUND = 0.008, 0.2
FLOAT8_EFFECT = 0.03  # fp8 changes the gradient of each trunk matrix by more than this


def _config(ranks: int, settings: dict) -> Config:
    sharers = 1 if settings["engine__kind"] == "pipeline" else ranks
    common = {
        "model__mlp_dim": 32,
        "model__vocab_size": 112,
        "model__num_future_tokens": 3,
        "head_loss__chunk_rows": 16,
    }
    lengths = {"train__sequence_length": 16, "train__global_batch_tokens": 16 * 2 * sharers * 2}
    return small_config(
        sharers, 2, **common | lengths | {"train__micro_batch_size": 2, "train__precision": "fp8"} | settings
    )


def _reference(config: Config, batches: list[Batch], options: LayerOptions) -> dict[str, Tensor]:
    """Returns the gradients of one process, summed over micro-batches in fp64."""
    model = MTPModel(config.model, config.resolved_head_loss, config.engine.head_schedule, options).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, config.model, config.train.seed).bfloat16())
    model.quantise_weights()
    counts = [sum(int((batch.targets[head] != IGNORED).sum()) for batch in batches) for head in range(3)]
    sums = {name: torch.zeros(parameter.shape, dtype=torch.float64) for name, parameter in model.named_parameters()}
    for batch in batches:
        model(batch.inputs, batch.targets, [1 / count for count in counts], None, batch.following)[0].backward()
        for name, parameter in model.named_parameters():
            sums[name] += parameter.grad
            parameter.grad = None
    return sums


def _errors(ranks: int, names: list[str]) -> list[tuple[float, float]]:
    """Returns the largest error against fp8, and the smallest of trunk matrices against bf16, of each engine."""
    from megamtp.engines.build import build_engine

    errors = []
    for name in names:
        config = _config(ranks, SETTINGS[name])
        engine = build_engine(config)
        num_micro_batches = config.num_micro_batches(engine.data_parallel_size) * engine.data_parallel_size
        largest, smallest = 0.0, 1.0
        for step in range(3):  # the first steps record the order of fetches, later steps prefetch
            batches = global_batch(config, step, num_micro_batches)
            _, _, gradients = step_with_gradients(engine, batches)
            expected = _reference(config, batches, LayerOptions(float8=True))
            in_bf16 = _reference(config, batches, DEFAULT_OPTIONS)
            assert names_on_all_ranks(gradients) == expected.keys()
            parameters = dict(engine.model.named_parameters())
            for key, gradient in gradients.items():
                first = getattr(parameters[key], "first_element", 0)
                exact, unquantised = (
                    tensors[key].flatten()[first : first + gradient.numel()].view(gradient.shape)
                    for tensors in (expected, in_bf16)
                )
                largest = max(largest, relative_error(gradient, exact))
                if key.startswith("trunk") and gradient.dim() == 2:
                    smallest = min(smallest, relative_error(gradient, unquantised))
        errors.append((largest, smallest))
    return errors


@pytest.fixture(scope="module")
def errors_on_two_ranks() -> dict[str, tuple[float, float]]:
    by_rank = run_ranks(_errors, 2, 2, list(SETTINGS))
    return {
        name: (max(largest for largest, _ in errors), min(smallest for _, smallest in errors))
        for name, errors in zip(SETTINGS, zip(*by_rank, strict=True), strict=True)
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_equal_those_of_one_process(name, errors_on_two_ranks):
    error, effect = errors_on_two_ranks[name]
    assert error < (PIPELINE_BOUND if name.startswith("pipeline") else BOUND)
    assert effect > FLOAT8_EFFECT


def _gathers(ranks: int) -> list[tuple[list[int], bool]]:
    """Returns the bytes of each gather of a step, and checks the gathered weights."""
    from megamtp.engines.build import build_engine

    config = _config(ranks, {"engine__kind": "zero3"})
    engine = build_engine(config)
    gatherer, sizes = engine.communication.gatherer, []
    all_gather, wait = gatherer._all_gather, gatherer._wait
    model = MTPModel(config.model, options=LayerOptions(float8=True)).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, config.model, config.train.seed).bfloat16())
    model.quantise_weights()
    names = {module: name for name, module in engine.model.named_modules()}

    def recording_gather(outputs, shards):
        sizes.append(sum(output.nbytes for output in outputs))
        return all_gather(outputs, shards)

    def checking_wait(unit):
        wait(unit)
        whole = model.get_submodule(names[unit.module])
        for group, expected in zip(unit.float8, getattr(whole, "weight_groups", []), strict=True):
            weights, scale = group.group.quantised
            gathered = torch.cat([matrix.flatten().view(torch.uint8) for matrix in weights])
            assert all(matrix.data_ptr() % 16 == 0 for matrix in weights)  # fp8 products on a GPU need it
            # Quantised and then gathered equals gathered and then quantised, on every rank, bit for bit.
            assert torch.equal(gathered, expected.quantised.matrices[0].flatten().view(torch.uint8))
            assert torch.equal(scale, expected.quantised.scale)

    gatherer._all_gather, gatherer._wait = recording_gather, checking_wait
    batches = global_batch(config, 0, config.num_micro_batches(ranks) * ranks)
    step_with_gradients(engine, batches)
    return sizes


@pytest.mark.parametrize("ranks", [2, 3])
def test_gathers_move_one_byte_per_element_of_a_matrix(ranks):
    """With 3 ranks, shards are padded, and each weight is a matrix of its own."""
    by_rank = run_ranks(_gathers, ranks, ranks)
    assert all(sizes == by_rank[0] for sizes in by_rank)
    dim, mlp_dim, vocabulary = 16, 32, 112

    def padded(*sizes: int) -> int:
        return sum(-(-size // ranks) * ranks for size in sizes)

    layer = padded(*[dim * dim] * 4, *[dim * mlp_dim] * 3) + 2 * padded(dim, dim)
    unembedding, embedding = 2 * padded(dim, vocabulary * dim), 2 * padded(vocabulary * dim)
    assert set(by_rank[0]) == {layer, unembedding, embedding}
    # Two micro-batches: each trunk layer forward and backward, each head and the unembedding once.
    assert by_rank[0].count(layer) >= 2 * 3 and by_rank[0].count(unembedding) == 2


def test_scales_are_agreed_in_one_reduction_for_all_weights():
    assert set(run_ranks(_reductions, 2)) == {1}


def _reductions() -> int:
    """Returns the number of reductions before the first gather of a step."""
    from megamtp.engines.build import build_engine

    config = _config(2, {"engine__kind": "zero3"})
    engine = build_engine(config)
    all_reduce, calls = dist.all_reduce, []

    def recording_all_reduce(tensor, op=dist.ReduceOp.SUM, **options):
        if op == dist.ReduceOp.MAX:
            calls.append(tensor.numel())
        return all_reduce(tensor, op, **options)

    dist.all_reduce = recording_all_reduce
    try:
        engine.communication.gatherer.start_forward(training=True, another_micro_batch_follows=False)
    finally:
        dist.all_reduce = all_reduce
    assert calls == [4 * config.model.num_layers]
    return len(calls)


def _evaluations(ranks: int) -> list[tuple[list[float], list[float]]]:
    """Returns the evaluation after a training step, and that of one process with the trained weights, by engine."""
    from deepspeed.utils import safe_get_full_fp32_param

    from megamtp.engines.build import build_engine

    results = []
    for name in ("zero1", "zero3", "pipeline"):
        config = _config(ranks, SETTINGS[name])
        engine = build_engine(config)
        size = engine.data_parallel_size
        batches = global_batch(config, 1, 2 * size)
        own = own_share(batches, engine.data_parallel_rank, size)
        engine.evaluate(own)  # quantises the weights before the step
        _train(config, engine, range(1))
        totals = engine.evaluate(own)
        dist.all_reduce(totals)
        weights: dict[str, Tensor] = {}
        for key, parameter in engine.model.named_parameters():
            weights[key] = safe_get_full_fp32_param(parameter).bfloat16()
        by_rank: list[dict[str, Tensor]] = [{}] * ranks
        dist.all_gather_object(by_rank, weights)
        model = MTPModel(config.model, config.resolved_head_loss, options=LayerOptions(float8=True)).bfloat16()
        merged = {key: tensor for rank_weights in by_rank for key, tensor in rank_weights.items()}
        model.load_state_dict(merged)
        model.quantise_weights()
        with torch.no_grad():
            exact = sum(model(batch.inputs, batch.targets, [1.0] * 3)[1] for batch in batches)
        results.append((totals[:3].tolist(), exact.tolist()))
    return results


def test_evaluation_uses_the_newest_weights():
    for result in run_ranks(_evaluations, 2, 2):
        for losses, exact in result:
            torch.testing.assert_close(torch.tensor(losses), torch.tensor(exact), rtol=1e-5, atol=0)


class NestedHead(Head):
    """A head of a user's own that contains a layer, and a matrix that stays in bf16."""

    def __init__(self, model: ModelConfig, index: int, options: LayerOptions = DEFAULT_OPTIONS):
        super().__init__()
        self.layer = TransformerLayer(model, options)
        self.matrix = torch.nn.Linear(model.dim, model.dim, bias=False)

    def forward(self, z_BTD: Tensor, document_mask: DocumentMask | None = None) -> Tensor:
        return self.layer(z_BTD, document_mask) + linear(z_BTD, self.matrix.weight)

    def cost(self, sequence_length: int) -> LayerCost:
        return self.layer.cost(sequence_length)


NESTED = {"model__head_kind": f"{__name__}:NestedHead"}


def test_heads_of_a_users_own_may_contain_layers():
    for error, effect in run_ranks(_nested_errors, 2):
        assert error < BOUND and effect > FLOAT8_EFFECT


def _nested_errors() -> tuple[float, float]:
    SETTINGS["nested"] = {"engine__kind": "zero3"} | NESTED
    return _errors(2, ["nested"])[0]


class OwnForward(TransformerLayer, Head):
    """A head that computes in bf16 with parameters that ZeRO-3 gathers in fp8 only."""

    def __init__(self, model: ModelConfig, index: int, options: LayerOptions = DEFAULT_OPTIONS):
        TransformerLayer.__init__(self, model, options)

    def forward(self, z_BTD: Tensor, document_mask: DocumentMask | None = None) -> Tensor:
        return linear(z_BTD, self.get_parameter("attention.output.weight"))


def _own_forward() -> bool:
    from megamtp.engines.build import build_engine

    config = _config(2, {"engine__kind": "zero3", "model__head_kind": f"{__name__}:OwnForward"})
    losses = build_engine(config).evaluate(global_batch(config, 0, 1))[:3].tolist()
    return any(math.isfinite(loss) for loss in losses)


def test_parameters_that_were_not_gathered_give_no_finite_loss():
    assert run_ranks(_own_forward, 2) == [False, False]


def _trained(directory: str) -> list[list[float]]:
    """Saves a checkpoint after 3 steps; returns the losses of the next 3 steps."""
    from megamtp.engines.build import build_engine

    config = _config(2, {"engine__kind": "zero3", "run__directory": directory})
    engine = build_engine(config)
    _train(config, engine, range(3))
    save(config, engine, 3)
    return _train(config, engine, range(3, 6))


def _resumed(directory: str, settings: dict) -> list[list[float]]:
    from megamtp.engines.build import build_engine

    config = _config(2, settings)
    engine = build_engine(config)
    engine.load(store.newest_checkpoint(Path(directory)))
    return _train(config, engine, range(3, 6))


def test_a_resumed_run_continues_bit_for_bit_and_may_change_its_precision(tmp_path):
    expected = run_ranks(_trained, 2, str(tmp_path))[0]
    assert run_ranks(_resumed, 2, str(tmp_path), {"engine__kind": "zero3"})[0] == expected
    changes = (
        {"train__precision": "bf16"},
        {"engine__kind": "zero1"},
        PIPELINE | {"train__global_batch_tokens": 16 * 2 * 4},  # as many micro-batches as two ranks have
        {"train__precision": "bf16", "engine__kind": "zero1"},
    )
    for change in changes:
        losses = run_ranks(_resumed, 2, str(tmp_path), {"engine__kind": "zero3"} | change)[0]
        assert losses != expected
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=5e-3, atol=0)
