"""The corrections (a) to (e) of head_hooks.py, the number of gathers and reductions, and the trace of evaluations."""

import itertools
from collections import Counter

import pytest
import torch

from megamtp.config import Config
from tests.cases import global_batch, own_share, small_config
from tests.engine_steps import largest_errors, step_with_gradients
from tests.ranks import run_ranks

N = 3  # heads
COMMUNICATIONS = ("grouped", "deepspeed")
DEEPSPEED = {"engine__kind": "zero3", "engine__communication": "deepspeed"}


def zero3(communication: str, **settings) -> Config:
    return small_config(
        engine__kind="zero3", engine__communication=communication, model__num_future_tokens=N, **settings
    )


# name -> (settings, loss scale); the first letter is that of the correction.
CASES = {
    "a zero1": ({"engine__kind": "zero1", "accumulation": 2}, None),
    "a zero3": ({"engine__kind": "zero3", "accumulation": 2}, None),
    # The loss scale of fp16, here with fp32 gradients, must scale the gradients of trunk and heads alike.
    "a zero1, scaled": ({"engine__kind": "zero1"}, 256.0),
    "a zero3, scaled": ({"engine__kind": "zero3"}, 256.0),
    "b grouped, small buckets": ({"engine__kind": "zero3", "engine__reduce_bucket_size": 300}, None),
    "b deepspeed, small buckets": (DEEPSPEED | {"engine__reduce_bucket_size": 300}, None),
    "b deepspeed, large buckets": (DEEPSPEED | {"engine__reduce_bucket_size": 100_000}, None),
    "c zero1": ({"engine__kind": "zero1", "accumulation": 2, "engine__reduce_bucket_size": 300}, None),
    "c zero3, offloaded": (
        {
            "engine__kind": "zero3",
            "engine__offload_optimizer": True,
            "accumulation": 2,
            "engine__reduce_bucket_size": 300,
        },
        None,
    ),
    "d zero1, bf16": ({"engine__kind": "zero1", "accumulation": 2, "train__precision": "bf16"}, None),
}


def _gradient_errors(names: list[str]) -> list[float]:
    from megamtp.engines.zero import ZeroEngine

    errors = []
    for settings, loss_scale in (CASES[name] for name in names):
        config = small_config(model__num_future_tokens=N, **settings)
        engine = ZeroEngine(config)
        if loss_scale:
            engine.deepspeed_engine.optimizer.override_loss_scale(loss_scale)
        errors.append(largest_errors(config, engine, num_steps=3)[0])
    return errors


@pytest.fixture(scope="module")
def gradient_errors() -> dict[str, float]:
    """Returns each case's largest error of any rank. All cases run in one group of ranks."""
    by_rank = run_ranks(_gradient_errors, 2, list(CASES))
    return dict(zip(CASES, map(max, zip(*by_rank, strict=True)), strict=True))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("a") and "scaled" not in name])
def test_a_heads_start_from_the_outer_loss_gradient(name, gradient_errors):
    assert gradient_errors[name] < 1e-5


@pytest.mark.parametrize("name", [name for name in CASES if "scaled" in name])
def test_a_heads_use_the_loss_scale(name, gradient_errors):
    assert gradient_errors[name] < 1e-5


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("b")])
def test_b_shared_gradients_are_reduced_after_the_last_head(name, gradient_errors):
    assert gradient_errors[name] < 1e-5


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("c")])
def test_c_optimizer_learns_of_the_last_micro_batch_before_the_heads(name, gradient_errors):
    assert gradient_errors[name] < 1e-5


def test_d_bf16_optimizer_sums_the_heads_gradients(gradient_errors):
    assert gradient_errors["d zero1, bf16"] < 0.04


def _errors_after_interruptions(settings: dict) -> list[float]:
    """Returns the gradient errors of steps after interrupted steps.

    Steps are interrupted between two heads, within a layer's backward pass, and before the trunk's backward pass.
    """
    from megamtp.engines.zero import ZeroEngine

    config = small_config(accumulation=2, engine__reduce_bucket_size=300, model__num_future_tokens=N, **settings)
    engine = ZeroEngine(config)
    largest_errors(config, engine, num_steps=2)
    errors = []
    for micro_batch in (0, 1):
        for owner, method in ((engine.model.heads[1], "forward"), (engine.deepspeed_engine, "backward")):
            _interrupt(config, engine, owner, method, after_calls=micro_batch)
            errors.append(largest_errors(config, engine, num_steps=2)[0])
        _interrupt_within_a_layer(config, engine, after_calls=micro_batch)
        errors.append(largest_errors(config, engine, num_steps=2)[0])
    return errors


def _interrupt_within_a_layer(config: Config, engine, after_calls: int) -> None:
    """Runs a step that is interrupted when a head has some of its gradients."""
    calls = []

    def interrupt(gradient: torch.Tensor) -> None:
        calls.append(gradient)
        if len(calls) > after_calls:
            raise KeyboardInterrupt

    hook = engine.model.heads[1].mlp.gate.weight.register_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        step_with_gradients(engine, global_batch(config, 0, 4))
    hook.remove()


def _interrupt(config: Config, engine, owner: object, method: str, after_calls: int) -> None:
    """Runs a step that is interrupted in the call of owner.method after `after_calls` complete calls."""
    original, calls = getattr(owner, method), []

    def interrupted(*arguments):
        if len(calls) == after_calls:
            raise KeyboardInterrupt
        calls.append(arguments)
        return original(*arguments)

    setattr(owner, method, interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            step_with_gradients(engine, global_batch(config, 0, 4))
    finally:
        setattr(owner, method, original)


@pytest.mark.parametrize(
    "settings",
    [
        {"engine__kind": "zero1"},
        {"engine__kind": "zero1", "train__precision": "bf16"},
        {"engine__kind": "zero3"},
        DEEPSPEED,
    ],
)
def test_e_interrupted_steps_leave_no_gradients(settings):
    bound = 0.04 if "train__precision" in settings else 1e-5
    for errors in run_ranks(_errors_after_interruptions, 2, settings):
        assert len(errors) == 6
        assert all(error < bound for error in errors), errors


class CommunicationLog:
    """The names of the parameters that ZeRO-3 gathers and reduces, in order."""

    def __init__(self, engine):
        self.clear()
        self._names = {parameter.ds_id: name for name, parameter in engine.model.named_parameters()}
        if engine.communication:
            self._record_grouped(engine.communication)
        else:
            self._record_deepspeed(engine)

    def clear(self) -> None:
        self.gathers: list[str] = []
        self.reductions: list[str] = []
        self.events: list[tuple[str, str]] = []

    def _gathered(self, parameters) -> None:
        names = sorted(self._names[parameter.ds_id] for parameter in parameters)
        self.gathers += names
        self.events += [("gather", name) for name in names]

    def _reduced(self, parameters) -> None:
        self.reductions += [self._names[parameter.ds_id] for parameter in parameters]

    def _record_grouped(self, communication) -> None:
        gatherer, reducer = communication.gatherer, communication.reducer
        start_gather, start_reduction = gatherer._start_gather, reducer._start_reduction

        def recording_start_gather(unit):
            if unit.buffer is None:
                self._gathered(unit.parameters)
            start_gather(unit)

        def recording_start_reduction(unit):
            self._reduced(unit.parameters)
            start_reduction(unit)

        gatherer._start_gather, reducer._start_reduction = recording_start_gather, recording_start_reduction

    def _record_deepspeed(self, engine) -> None:
        for parameter in engine.model.parameters():
            gather = parameter.all_gather_coalesced

            def recording_gather(parameters, *arguments, gather=gather, **options):
                self._gathered(parameters)
                return gather(parameters, *arguments, **options)

            parameter.all_gather_coalesced = recording_gather
        optimizer = engine.deepspeed_engine.optimizer
        attribute = "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads"
        reduce = getattr(optimizer, attribute)

        def recording_reduce(communication_dtype):
            self._reduced(optimizer.ipg_buckets[communication_dtype].params)
            return reduce(communication_dtype)

        setattr(optimizer, attribute, recording_reduce)


UNEMBEDDINGS = ("shared", "replicated")


def _communication_of_steps(communication: str, unembedding: str) -> list[tuple[bool, Counter, Counter]]:
    """Returns (whether the trace is complete, gathers, reductions) of each of five steps with one micro-batch.

    The first step records the trace. The trunk, which has two layers, is recomputed in one of the two cases.
    """
    from megamtp.engines.zero import ZeroEngine

    config = zero3(
        communication,
        model__num_layers=3,
        model__match_parameters=False,
        model__unembedding=unembedding,
        train__activation_checkpointing=unembedding == "shared",
    )
    engine = ZeroEngine(config)
    log = CommunicationLog(engine)
    records = []
    for step in range(5):
        log.clear()
        step_with_gradients(engine, global_batch(config, step, 2))
        complete = engine.deepspeed_engine.optimizer.parameter_offload.get_param_coordinator().is_complete_trace()
        records.append((complete, Counter(log.gathers), Counter(log.reductions)))
    return records


@pytest.mark.parametrize("communication", COMMUNICATIONS)
@pytest.mark.parametrize("unembedding", UNEMBEDDINGS)
def test_heads_and_unembedding_are_gathered_and_reduced_once(communication, unembedding, recorded):
    records = recorded[_communication_of_steps.__name__, communication, unembedding]
    assert [complete for complete, _, _ in records] == [False, True, True, True, True]
    for _, gathers, reductions in records:
        heads = [name for name in gathers if name.startswith(("heads.", "unembedding"))]
        assert len(heads) == 9 * N + 2 * (1 if unembedding == "shared" else N)
        assert all(gathers[name] == 1 for name in heads)
        assert all(reductions[name] == 1 for name in heads)
        trunk = [name for name in gathers if name.startswith("trunk.")]
        assert len(trunk) == 9 * 2
        assert all(gathers[name] <= 2 and reductions[name] == 1 for name in trunk)


def _events_of_a_prefetching_step(communication: str) -> list[tuple[str, str]]:
    from megamtp.engines.zero import ZeroEngine

    config = zero3(communication)
    engine = ZeroEngine(config)
    log = CommunicationLog(engine)
    for index, head in enumerate(engine.model.heads):
        head.attention_norm.weight.register_post_accumulate_grad_hook(
            lambda _, index=index: log.events.append(("gradient", f"heads.{index}.attention_norm.weight"))
        )
    for step in range(4):
        log.clear()
        step_with_gradients(engine, global_batch(config, step, 2))
    return log.events


@pytest.mark.parametrize("communication", COMMUNICATIONS)
def test_next_head_is_prefetched_during_the_backward_pass_of_a_head(communication, recorded):
    events = recorded[_events_of_a_prefetching_step.__name__, communication]
    for index in range(N - 1):
        gathered = events.index(("gather", f"heads.{index + 1}.attention_norm.weight"))
        assert gathered < events.index(("gradient", f"heads.{index}.attention_norm.weight"))


MICRO_BATCHES = 3


def _events_of_an_accumulating_step() -> tuple[list[tuple[str, str]], list[str]]:
    """Returns (events of a step with several micro-batches and a complete trace, modules still gathered after it)."""
    from megamtp.engines.zero import ZeroEngine

    config = zero3("grouped", accumulation=MICRO_BATCHES)
    engine = ZeroEngine(config)
    log = CommunicationLog(engine)
    first_layer = engine.model.trunk[0].attention_norm.weight
    first_layer.register_post_accumulate_grad_hook(
        lambda _: log.events.append(("gradient", "trunk.0.attention_norm.weight"))
    )
    for step in range(2):
        log.clear()
        step_with_gradients(engine, global_batch(config, step, 2 * MICRO_BATCHES))
    units = engine.communication.gatherer._units
    return log.events, [type(unit.module).__name__ for unit in units if unit.buffer is not None]


def test_micro_batches_start_with_kept_or_prefetched_weights(recorded):
    events, still_gathered = recorded[(_events_of_an_accumulating_step.__name__,)]
    first_layer, embedding = "trunk.0.attention_norm.weight", "embedding.weight"
    gathers = Counter(name for kind, name in events if kind == "gather")
    assert gathers["trunk.1.attention_norm.weight"] == 2 * MICRO_BATCHES  # forward and backward
    assert gathers[first_layer] == MICRO_BATCHES + 1  # kept from each backward pass for the next forward pass
    assert gathers[embedding] == MICRO_BATCHES
    backward_ends = [index for index, event in enumerate(events) if event == ("gradient", first_layer)]
    embedding_gathers = [index for index, event in enumerate(events) if event == ("gather", embedding)]
    assert len(backward_ends) == MICRO_BATCHES
    # The next micro-batch's embedding is gathered during the backward pass.
    assert all(gather < end for gather, end in zip(embedding_gathers[1:], backward_ends, strict=False))
    assert still_gathered == []


def _trace_around_evaluation(communication: str) -> tuple[list[bool], list[str], list[str]]:
    """Returns (whether the trace is complete at each point, gathers of a step before and after evaluations)."""
    from megamtp.engines.zero import ZeroEngine

    config = zero3(communication)
    engine = ZeroEngine(config)
    log = CommunicationLog(engine)

    def is_complete() -> bool:
        return engine.deepspeed_engine.optimizer.parameter_offload.get_param_coordinator().is_complete_trace()

    def gathers_of_step(step: int) -> list[str]:
        log.clear()
        step_with_gradients(engine, global_batch(config, step, 2))
        return list(log.gathers)

    for step in range(4):
        before = gathers_of_step(step)
    complete = [is_complete()]
    for _ in range(3):
        engine.evaluate(own_share(global_batch(config, 9, 6), engine.rank, 2))
        complete.append(is_complete())
        after = gathers_of_step(5)
        complete.append(is_complete())
    return complete, before, after


@pytest.mark.parametrize("communication", COMMUNICATIONS)
def test_evaluations_do_not_disturb_the_prefetch_trace(communication, recorded):
    complete, before, after = recorded[_trace_around_evaluation.__name__, communication]
    assert all(complete)
    assert before == after
    assert len(before) > 9 * 5


def _evaluation_and_reference(settings: dict) -> tuple[list[float], list[float]]:
    """Returns each head's loss in an evaluation by the engine and by the reference."""
    import torch.distributed as dist

    from megamtp.engines.zero import ZeroEngine
    from tests.reference import reference_model, reference_step

    config: Config = small_config(model__num_future_tokens=N, **settings)
    engine = ZeroEngine(config)
    batches = global_batch(config, 3, 6)
    totals = engine.evaluate(own_share(batches, engine.rank, 2))
    dist.all_reduce(totals)
    nll_sums, counts = totals.view(2, N)
    return (nll_sums / counts).tolist(), reference_step(config, reference_model(config), batches).losses


@pytest.mark.parametrize("kind", ["zero1", "zero3"])
def test_evaluation_equals_the_reference(kind):
    for losses, expected in run_ranks(_evaluation_and_reference, 2, {"engine__kind": kind}):
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-6, atol=0)


def _all_recorded() -> dict[tuple, tuple | list]:
    """Returns (name of a function above, its arguments) -> its result."""
    calls = [
        *((_communication_of_steps, *arguments) for arguments in itertools.product(COMMUNICATIONS, UNEMBEDDINGS)),
        *itertools.product((_events_of_a_prefetching_step, _trace_around_evaluation), COMMUNICATIONS),
        (_events_of_an_accumulating_step,),
    ]
    return {(function.__name__, *arguments): function(*arguments) for function, *arguments in calls}


@pytest.fixture(scope="module")
def recorded() -> dict[tuple, tuple | list]:
    """Returns what _all_recorded returns on rank 0. All calls run in one group of ranks."""
    return run_ranks(_all_recorded, 2)[0]
