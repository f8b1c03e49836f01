"""The pipeline engine: gradients, losses, weights and updates equal the float64 reference, with all partitions.

Pipelines, micro-batches and heads have different shares of ignored targets; if there are several micro-batches, one has
no valid target.
"""

import itertools
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megamtp.cluster.ports import reserve_port
from megamtp.data.indexed_dataset import IndexedDatasetWriter
from tests.cases import global_batch, own_share, small_config
from tests.end_to_end.jobs import wait_for
from tests.engine_steps import largest_errors, step_with_gradients
from tests.ranks import run_ranks
from tests.reference import reference_model, reference_step, relative_error

# fp32: measured 7e-7. bf16: measured 1.6 %; test_gradients.py explains the bound. A pipeline rounds dz once more on
# each stage that has heads and also sends z: P - 1 roundings in addition to about fifty.
FP32_BOUND, BF16_BOUND, BF16_LOSS_BOUND = 1e-5, 0.04, 2e-3

# Partitions of five layers, trunk and heads, by (stages, heads): heads only on the last stage, or on several stages.
# With n = 4 and three stages, the middle stage has only heads.
STAGE_LAYERS = {
    (2, 1): ([2, 3], [4, 1]),
    (2, 2): ([3, 2], [4, 1]),
    (2, 4): ([1, 4], [3, 2]),
    (3, 1): ([2, 1, 2],),
    (3, 2): ([2, 1, 2], [1, 3, 1]),
    (3, 4): ([1, 1, 3], [2, 1, 2]),
}
SHAPES = {2: (2, 1), 3: (3, 1), 4: (2, 2)}  # ranks: (stages, pipelines)


def cases(ranks: int) -> list[tuple]:
    """Returns (accumulation, heads, stage layers, precision, recompute) of each case; every third case recomputes."""
    stages, _ = SHAPES[ranks]
    combinations = [
        (accumulation, n, stage_layers, precision)
        for accumulation, n, precision in itertools.product((1, 4), (1, 2, 4), ("fp32", "bf16"))
        for stage_layers in STAGE_LAYERS[stages, n]
        if accumulation > 1 or precision == "fp32"
    ]
    return [(*combination, index % 3 == 0) for index, combination in enumerate(combinations)]


def selected_cases(ranks: int, full: bool) -> list[tuple]:
    """Returns the cases that run on this number of ranks. Without --full, a case of two stages runs on 2 or 4 ranks."""
    return cases(ranks) if full or ranks == 3 else cases(ranks)[ranks // 2 - 1 :: 2]


def pipeline_config(stages: int, pipelines: int, accumulation: int = 2, **settings):
    return small_config(pipelines, accumulation, engine__kind="pipeline", engine__num_stages=stages, **settings)


def case_config(ranks: int, case: tuple):
    accumulation, n, stage_layers, precision, recompute = case
    return pipeline_config(
        *SHAPES[ranks],
        accumulation,
        model__num_future_tokens=n,
        engine__stage_layers=stage_layers,
        train__precision=precision,
        train__activation_checkpointing=recompute,
        head_loss__weights=[1.0, 0.5, 0.75, 0.25][:n],
    )


def _gradient_errors(ranks: int, selected: list[tuple]) -> list[tuple[float, float]]:
    from megamtp.engines.pipeline import PipelineEngine

    errors = []
    for case in selected:
        config = case_config(ranks, case)
        errors.append(largest_errors(config, PipelineEngine(config), num_steps=2))
    return errors


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        full = metafunc.config.getoption("--full")
        selected = [(ranks, case) for ranks in SHAPES for case in selected_cases(ranks, full)]
        metafunc.parametrize(("ranks", "case"), selected, ids=str)


@pytest.fixture(scope="module")
def errors_by_ranks() -> dict:
    """Returns a dictionary that _errors fills: ranks -> case -> largest (gradient error, loss error) of any rank.

    All cases of a number of ranks run in one group of ranks.
    """
    return {}


def _errors(errors_by_ranks: dict, ranks: int, full: bool) -> dict[str, tuple[float, float]]:
    if ranks not in errors_by_ranks:
        selected = selected_cases(ranks, full)
        results = run_ranks(_gradient_errors, ranks, ranks, selected, timeout_seconds=600)
        errors_by_ranks[ranks] = {
            str(case): tuple(map(max, zip(*errors, strict=True)))
            for case, errors in zip(selected, zip(*results, strict=True), strict=True)
        }
    return errors_by_ranks[ranks]


@pytest.mark.timeout(700)
def test_gradients_equal_the_reference(ranks, case, errors_by_ranks, request):
    gradient_error, loss_error = _errors(errors_by_ranks, ranks, request.config.getoption("--full"))[str(case)]
    bf16 = "bf16" in case
    assert gradient_error < (BF16_BOUND if bf16 else FP32_BOUND)
    assert loss_error < (BF16_LOSS_BOUND if bf16 else FP32_BOUND)


def _sums_equal_deepspeeds() -> bool:
    """Returns whether gradients of four micro-batches, accumulated in place, have the same bits as DeepSpeed's sums."""
    from megamtp.engines.pipeline import PipelineEngine

    config = pipeline_config(2, 1, 4, model__num_future_tokens=4, engine__stage_layers=[3, 2], train__precision="bf16")
    in_place_engine, deepspeed_engine = PipelineEngine(config), PipelineEngine(config)
    _, _, in_place = step_with_gradients(in_place_engine, global_batch(config, 0, 4))
    del deepspeed_engine.deepspeed_engine.optimizer._update_hp_grad
    _, _, expected = step_with_gradients(deepspeed_engine, global_batch(config, 0, 4))
    return in_place.keys() == expected.keys() and all(torch.equal(in_place[name], expected[name]) for name in expected)


def test_accumulation_in_place_equals_deepspeeds():
    assert run_ranks(_sums_equal_deepspeeds, 2) == [True, True]


def _weights(engine) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}


def _train(config, engine, steps) -> list[list[float]]:
    """Trains at learning rate 1e-2, and returns each step's losses by head."""
    from megamtp.engines.base import count_targets

    size, losses = engine.data_parallel_size, []
    for step in steps:
        own = own_share(
            global_batch(config, step, size * config.num_micro_batches(size)), engine.data_parallel_rank, size
        )
        counts = count_targets(own, True, size, engine.device)
        nll_sums = engine.train_batch(own, counts, 1e-2).nll_sums.double()
        dist.all_reduce(nll_sums)
        losses.append([nll / count for nll, count in zip(nll_sums.tolist(), counts, strict=True)])
    return losses


def _initial_weights_are_equal() -> list[bool]:
    """Returns whether this stage's initial weights equal the reference model's bit for bit, in fp32 and in bf16."""
    from megamtp.engines.pipeline import PipelineEngine

    equal = []
    for precision in ("fp32", "bf16"):
        config = pipeline_config(3, 1, engine__stage_layers=[1, 3, 1], train__precision=precision)
        expected = dict(reference_model(config, torch.float32).named_parameters())
        weights = _weights(PipelineEngine(config))
        equal.append(bool(weights) and all(torch.equal(weights[name].float(), expected[name]) for name in weights))
    return equal


def test_initial_weights_equal_those_of_other_engines():
    assert run_ranks(_initial_weights_are_equal, 3) == [[True, True]] * 3


def _counts(recompute: bool, settings: dict) -> tuple[Counter, Counter, int, list[int]]:
    """Counts events of a step.

    Returns:
        (forward passes of each layer, gradients of each layer's output, DeepSpeed's calls of backward, elements of each
        reduction over the unembedding's copies).
    """
    from megamtp.engines.build import build_engine
    from megamtp.model import layers

    config = pipeline_config(3, 1, 4, model__num_future_tokens=3, train__activation_checkpointing=recompute, **settings)
    engine = build_engine(config)
    names = {parameter: name.split(".attention_norm")[0] for name, parameter in engine.model.named_parameters()}
    forwards, backwards, backward_calls, reduced = Counter(), Counter(), [], []
    layer_output, backward, all_reduce = layers.layer_output, torch.Tensor.backward, dist.all_reduce

    def counted_output(x, weights, *rest):
        name = names[weights[0]]
        forwards[name] += 1
        output = layer_output(x, weights, *rest)
        if output.requires_grad:
            output.register_hook(lambda _: backwards.update([name]))
        return output

    def counted_backward(*arguments, **options):
        backward_calls.append(arguments)
        return backward(*arguments, **options)

    def counted_all_reduce(tensor, *arguments, **options):
        if any(options.get("group") is group for _, group in engine.stage_module.copies):
            reduced.append(tensor.numel())
        return all_reduce(tensor, *arguments, **options)

    layers.layer_output, torch.Tensor.backward, dist.all_reduce = counted_output, counted_backward, counted_all_reduce
    try:
        _train(config, engine, [0])
    finally:
        layers.layer_output, torch.Tensor.backward, dist.all_reduce = layer_output, backward, all_reduce
    return forwards, backwards, len(backward_calls), reduced


@pytest.mark.parametrize("recompute", [False, True])
def test_each_stage_runs_one_backward_pass_per_micro_batch_and_no_head_twice(recompute):
    results = run_ranks(_counts, 3, recompute, {"engine__stage_layers": [2, 1, 2]})
    forwards, backwards = (sum((result[index] for result in results), Counter()) for index in (0, 1))
    trunk, heads = {"trunk.0": 4, "trunk.1": 4}, {"heads.0": 4, "heads.1": 4, "heads.2": 4}
    assert forwards == {name: count * (2 if recompute else 1) for name, count in trunk.items()} | heads
    assert {name: backwards[name] for name in heads} == heads
    if not recompute:  # with recomputation, the first output has no graph
        assert {name: backwards[name] for name in trunk} == trunk
    assert [num_calls for _, _, num_calls, _ in results] == [4, 4, 4]
    # The gradients of the unembedding's norm and weight are reduced once per step, over the stages that have heads.
    assert [sorted(reduced) for _, _, _, reduced in results] == [[], [16, 97 * 16], [16, 97 * 16]]


def _reduction_before_the_last_backward(folder: str) -> bool:
    """Runs a step in which the first stage's last backward pass waits until the copies' gradients are reduced.

    Returns whether this stage has a copy of the unembedding. The first stage has none.
    """
    from deepspeed.runtime.pipe import schedule

    from megamtp.engines.pipeline import PipelineEngine

    engine = PipelineEngine(pipeline_config(3, 1, 4, engine__stage_layers=[2, 1, 2], model__num_future_tokens=3))
    instructions, count = engine.deepspeed_engine._INSTRUCTION_MAP, itertools.count(1)
    run_backward, reduce = instructions[schedule.BackwardPass], instructions[schedule.ReduceTiedGrads]

    def backward(*arguments, **options):
        if engine.rank == 0 and next(count) == 4:
            wait_for(lambda: len(list(Path(folder).iterdir())) == 2)
        run_backward(*arguments, **options)

    def reduce_and_signal(*arguments):
        reduce(*arguments)
        if engine.stage_module.copies:
            (Path(folder) / str(engine.rank)).touch()

    engine.deepspeed_engine._INSTRUCTION_MAP = instructions | {
        schedule.BackwardPass: backward,
        schedule.ReduceTiedGrads: reduce_and_signal,
    }
    _train(engine.config, engine, [0])
    return bool(engine.stage_module.copies)


def test_copies_are_reduced_while_previous_stages_run_backward_passes(tmp_path):
    assert run_ranks(_reduction_before_the_last_backward, 3, str(tmp_path)) == [False, True, True]
    assert len(list(tmp_path.iterdir())) == 2


def _reduced_gradient() -> torch.Tensor:
    """Returns the unembedding's gradient after the reduction over the copies. All ranks start with different ones."""
    from megamtp.engines.pipeline import PipelineEngine

    engine = PipelineEngine(pipeline_config(2, 2, engine__stage_layers=[4, 1]))
    for parameter in engine.model.unembedding.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(engine.rank))
    engine._reduce_copies(engine.deepspeed_engine)
    return engine.model.unembedding.weight.grad


def test_reduction_over_pipelines_adds_only_zeros_to_the_copies_gradients():
    """Otherwise stages could sum in different orders, as NCCL does for buffers of different sizes.

    The copies would then drift apart.
    """
    first, second, *last_stage = run_ranks(_reduced_gradient, 4)
    gradients = [torch.randn(first.shape, generator=torch.Generator().manual_seed(rank)) for rank in range(4)]
    torch.testing.assert_close(first, sum(gradients))
    assert torch.equal(last_stage[0], first)
    assert not second.any() and not last_stage[1].any()


def _copy_after_training(stages: int, pipelines: int, stage_layers: list[int], precision: str) -> torch.Tensor:
    from megamtp.engines.pipeline import PipelineEngine

    # Shards are multiples of 16 elements: see optimizers/adamw.py.
    shape = {"model__dim": 24, "model__mlp_dim": 32, "model__vocab_size": 144}
    config = pipeline_config(
        stages,
        pipelines,
        model__num_future_tokens=3,
        engine__stage_layers=stage_layers,
        train__precision=precision,
        **shape,
    )
    engine = PipelineEngine(config)
    _train(config, engine, range(4))
    for group in engine.deepspeed_engine.optimizer.optimizer.param_groups[:1]:  # the group of matrices
        assert all(parameter.numel() % 16 == 0 for parameter in group["params"])
    return _weights(engine)["unembedding.weight"]


@pytest.mark.parametrize(
    ("stages", "pipelines", "stage_layers", "precision"),
    [(2, 2, [3, 2], "bf16"), (3, 1, [3, 1, 1], "fp32"), (2, 3, [4, 1], "fp32")],
)
def test_copies_of_the_unembedding_stay_equal(stages, pipelines, stage_layers, precision):
    """Also with three pipelines, whose sums depend on the order of summation."""
    weights = run_ranks(_copy_after_training, stages * pipelines, stages, pipelines, stage_layers, precision)
    assert len(weights) == stages * pipelines
    assert all(torch.equal(weight, weights[0]) for weight in weights)


def _update_errors() -> dict[str, float]:
    """Returns the relative error of each parameter's change over four steps, against float64 AdamW with clipping."""
    from deepspeed.utils import safe_get_full_fp32_param

    from megamtp.engines.base import count_targets
    from megamtp.engines.pipeline import PipelineEngine

    config = pipeline_config(
        2,
        2,
        2,
        engine__stage_layers=[4, 1],
        optimizer__beta1=0.8,
        optimizer__beta2=0.9,
        optimizer__eps=1e-3,
        optimizer__weight_decay=0.3,
        optimizer__gradient_clipping=0.4,
    )
    engine, model = PipelineEngine(config), reference_model(config)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.3},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-3)
    for step, lr in enumerate([1e-2, 3e-2, 1e-2, 2e-2]):
        batches = global_batch(config, step, 4)
        own = own_share(batches, engine.data_parallel_rank, 2)
        norm = engine.train_batch(own, count_targets(own, True, 2, engine.device), lr).gradient_norm
        reference_step(config, model, batches)
        expected_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.4).item()
        assert expected_norm > 0.4  # otherwise nothing is clipped
        assert norm == pytest.approx(expected_norm, rel=1e-4)
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
    whole = dict(model.named_parameters())
    return {
        name: relative_error(
            safe_get_full_fp32_param(parameter) - start[name].float(), whole[name].detach() - start[name]
        )
        for name, parameter in engine.model.named_parameters()
    }


def test_steps_are_clipped_adamw_over_all_stages():
    for errors in run_ranks(_update_errors, 4):
        assert max(errors.values()) < 1e-3, errors


def _losses_of_ten_steps(kind: str, data_parallel_size: int, settings: dict) -> list[list[float]]:
    from megamtp.engines.build import build_engine

    config = small_config(
        data_parallel_size, 4 // data_parallel_size, engine__kind=kind, model__num_future_tokens=3, **settings
    )
    return _train(config, build_engine(config), [step % 2 for step in range(10)])


def test_losses_of_ten_steps_equal_zero3s():
    expected = torch.tensor(run_ranks(_losses_of_ten_steps, 2, "zero3", 2, {})[0])
    two_stages = {"engine__num_stages": 2, "engine__stage_layers": [3, 2]}
    three_stages, spread = {"engine__num_stages": 3, "engine__stage_layers": [2, 1, 2]}, {"engine__spread_losses": True}
    whole_losses = ((2, 1, two_stages), (4, 2, two_stages), (3, 1, three_stages))
    spread_losses = ((4, 2, two_stages | spread), (3, 1, three_stages | spread))
    for ranks, data_parallel_size, settings in (*whole_losses, *spread_losses):
        losses = torch.tensor(run_ranks(_losses_of_ten_steps, ranks, "pipeline", data_parallel_size, settings)[0])
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    assert (expected[0] - expected[8]).min() > 0.1  # the model learned, so a difference would have grown


def _evaluations() -> list[tuple[list[float], list[float]]]:
    """Returns (sums, expected sums) of evaluations before, between and after training steps.

    The evaluations have 3, 8 and 5 batches; a training step has 4 micro-batches.
    """
    from megamtp.engines.pipeline import PipelineEngine

    config = pipeline_config(2, 2, 4, engine__stage_layers=[3, 2], model__num_future_tokens=3)
    engine, evaluations = PipelineEngine(config), []
    for num_batches, train in ((3, True), (8, True), (5, False)):
        model = reference_model(config)
        weights = [None] * 4
        dist.all_gather_object(weights, _weights(engine))
        model.load_state_dict(
            {name: value.double() for rank_weights in weights for name, value in rank_weights.items()}
        )
        batches = global_batch(config, num_batches, num_batches * 2)
        sums = engine.evaluate(iter(own_share(batches, engine.data_parallel_rank, 2)))
        dist.all_reduce(sums)
        expected = reference_step(config, model, batches)
        counts = sum((batch.targets >= 0).sum(dim=(1, 2)) for batch in batches).tolist()
        nll_sums = [loss * count for loss, count in zip(expected.losses, counts, strict=True)]
        evaluations.append((sums.tolist(), [*nll_sums, *counts]))
        if train:
            _train(config, engine, [0])
    return evaluations


def test_evaluation_before_and_after_training():
    for evaluations in run_ranks(_evaluations, 4):
        for sums, expected in evaluations:
            assert sums == pytest.approx(expected, rel=1e-5)


def _num_searches(arguments: list[str], port: int) -> int:
    """Returns how often this rank searches for the best partition with whole losses while it trains for one step."""
    from megamtp import pretrain
    from megamtp.planning import spread

    whole_loss_partition, calls = spread.whole_loss_partition, []
    spread.whole_loss_partition = lambda *arguments: calls.append(arguments) or whole_loss_partition(*arguments)
    pretrain.close_communicators = lambda: None
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    assert pretrain.main(arguments) == 0
    return len(calls)


def test_best_partition_is_searched_once(tmp_path):
    with IndexedDatasetWriter(tmp_path / "train", np.uint16) as writer:
        writer.add_document([5] * 200)
    settings = [
        "model.dim=32",
        "model.num_layers=4",
        "model.num_future_tokens=2",
        "model.num_attention_heads=2",
        "model.mlp_dim=48",
        "model.vocab_size=64",
        "train.steps=1",
        "train.global_batch_tokens=64",
        "train.micro_batch_size=1",
        "train.precision=fp32",
        "train.sequence_length=16",
        "data.tokenizer=null",
        f"data.train={tmp_path}/train",
        "data.validation=null",
        "engine.kind=pipeline",
        "engine.num_stages=2",
        "run.tensorboard=false",
        f"run.directory={tmp_path}/run",
    ]
    configuration = str(Path(__file__).parents[2] / "configs/quickstart.yaml")
    assert run_ranks(_num_searches, 2, [configuration, *settings], reserve_port(), backend="none") == [1, 1]
