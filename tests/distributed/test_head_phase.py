"""What DeepSpeed is told around the heads: each of (a) to (e), how often parameters travel, and evaluation's own
trace.
"""

from collections import Counter

import pytest
import torch

from megamtp.config import Config
from tests.cases import global_batch, own_share, small_config
from tests.engine_steps import largest_errors, step_with_gradients
from tests.ranks import run_ranks

N = 3  # heads
COMMUNICATIONS = ("grouped", "deepspeed")


def zero3(communication: str, **settings) -> Config:
    return small_config(
        engine__kind="zero3", engine__communication=communication, model__num_future_tokens=N, **settings
    )


def _errors(settings: dict, loss_scale: float | None = None) -> float:
    from megamtp.engines.zero import ZeroEngine

    config = small_config(model__num_future_tokens=N, **settings)
    engine = ZeroEngine(config)
    if loss_scale:
        engine.deepspeed_engine.optimizer.override_loss_scale(loss_scale)
    return largest_errors(config, engine, num_steps=3)[0]


def error_of(**settings) -> float:
    return max(run_ranks(_errors, 2, settings))


@pytest.mark.parametrize("kind", ["zero1", "zero3"])
def test_a_heads_start_with_the_outer_backwards_seed(kind):
    assert error_of(accumulation=2, engine__kind=kind) < 1e-5


@pytest.mark.parametrize("kind", ["zero1", "zero3"])
def test_a_heads_know_the_loss_scale(kind):
    """fp16's, which on a CPU stands in front of fp32 gradients; the trunk's and the heads' must be scaled alike."""
    assert max(run_ranks(_errors, 2, {"engine__kind": kind}, 256.0)) < 1e-5


@pytest.mark.parametrize(("communication", "bucket"), [("grouped", 300), ("deepspeed", 300), ("deepspeed", 100_000)])
def test_b_shared_gradients_wait_for_the_last_head(communication, bucket):
    assert error_of(engine__kind="zero3", engine__communication=communication, engine__reduce_bucket_size=bucket) < 1e-5


@pytest.mark.parametrize(
    "settings", [{"engine__kind": "zero1"}, {"engine__kind": "zero3", "engine__offload_optimizer": True}]
)
def test_c_heads_know_the_last_micro_batch(settings):
    assert error_of(accumulation=2, engine__reduce_bucket_size=300, **settings) < 1e-5


def test_d_bf16_optimizer_keeps_the_heads_gradients():
    assert error_of(accumulation=2, engine__kind="zero1", train__precision="bf16") < 0.04


def _errors_after_interruptions(settings: dict) -> list[float]:
    """Interrupts steps between two heads, within a layer's backward, or before the trunk's; gradients' errors in
    later steps.
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
    """Takes a step that is interrupted when a head has some of its gradients."""
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
    """Takes a step in which owner.method is interrupted at the call after `after_calls` good ones."""
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
        {"engine__kind": "zero3", "engine__communication": "deepspeed"},
    ],
)
def test_e_an_interrupted_step_leaves_nothing_behind(settings):
    bound = 0.04 if "train__precision" in settings else 1e-5
    for errors in run_ranks(_errors_after_interruptions, 2, settings):
        assert len(errors) == 6
        assert all(error < bound for error in errors), errors


class Traffic:
    """Which parameters are gathered and reduced under ZeRO-3, in order, by name."""

    def __init__(self, engine):
        self.clear()
        self._names = {parameter.ds_id: name for name, parameter in engine.model.named_parameters()}
        if engine.communication:
            self._watch_units(engine.communication)
        else:
            self._watch_deepspeed(engine)

    def clear(self) -> None:
        self.gathers: list[str] = []
        self.reductions: list[str] = []
        self.log: list[tuple[str, str]] = []

    def _gathered(self, parameters) -> None:
        found = sorted(self._names[parameter.ds_id] for parameter in parameters)
        self.gathers += found
        self.log += [("gather", name) for name in found]

    def _reduced(self, parameters) -> None:
        self.reductions += [self._names[parameter.ds_id] for parameter in parameters]

    def _watch_units(self, traffic) -> None:
        send_for, send = traffic.gatherer._start_gather, traffic.reducer._start_reduction

        def watched_send_for(unit):
            if unit.buffer is None:
                self._gathered(unit.parameters)
            send_for(unit)

        def watched_send(unit):
            self._reduced(unit.parameters)
            send(unit)

        traffic.gatherer._start_gather, traffic.reducer._start_reduction = watched_send_for, watched_send

    def _watch_deepspeed(self, engine) -> None:
        for parameter in engine.model.parameters():
            gather = parameter.all_gather_coalesced

            def watched_gather(parameters, *arguments, gather=gather, **options):
                self._gathered(parameters)
                return gather(parameters, *arguments, **options)

            parameter.all_gather_coalesced = watched_gather
        optimizer = engine.deepspeed_engine.optimizer
        attribute = "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads"
        reduce = getattr(optimizer, attribute)

        def watched_reduce(communication_dtype):
            self._reduced(optimizer.ipg_buckets[communication_dtype].params)
            return reduce(communication_dtype)

        setattr(optimizer, attribute, watched_reduce)


def _traffic_of_steps(communication: str, checkpointing: bool) -> list[tuple[bool, Counter, Counter]]:
    """(prefetch trace complete, gathers, reductions) of each of five one-micro-batch steps; the first records the
    trace.
    """
    from megamtp.engines.zero import ZeroEngine

    config = zero3(communication, train__activation_checkpointing=checkpointing)
    engine = ZeroEngine(config)
    traffic = Traffic(engine)
    records = []
    for step in range(5):
        traffic.clear()
        step_with_gradients(engine, global_batch(config, step, 2))
        complete = engine.deepspeed_engine.optimizer.parameter_offload.get_param_coordinator().is_complete_trace()
        records.append((complete, Counter(traffic.gathers), Counter(traffic.reductions)))
    return records


@pytest.mark.parametrize("communication", COMMUNICATIONS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_heads_and_unembedding_travel_once(communication, checkpointing):
    records, _ = run_ranks(_traffic_of_steps, 2, communication, checkpointing)
    assert [complete for complete, _, _ in records] == [False, True, True, True, True]
    for _, gathers, reductions in records:
        once = [name for name in gathers if name.startswith(("heads.", "unembedding."))]
        assert len(once) == 9 * N + 2
        assert all(gathers[name] == 1 for name in once)
        assert all(reductions[name] == 1 for name in once)
        trunk = [name for name in gathers if name.startswith("trunk.")]
        assert len(trunk) == 9 * (5 - N)
        assert all(gathers[name] <= 2 and reductions[name] == 1 for name in trunk)


def _events_of_a_prefetching_step(communication: str) -> list[tuple[str, str]]:
    from megamtp.engines.zero import ZeroEngine

    config = zero3(communication)
    engine = ZeroEngine(config)
    traffic = Traffic(engine)
    for index, head in enumerate(engine.model.heads):
        head.attention_norm.weight.register_post_accumulate_grad_hook(
            lambda _, index=index: traffic.log.append(("gradient", f"heads.{index}.attention_norm.weight"))
        )
    for step in range(4):
        traffic.clear()
        step_with_gradients(engine, global_batch(config, step, 2))
    return traffic.log


@pytest.mark.parametrize("communication", COMMUNICATIONS)
def test_next_head_is_fetched_before_this_heads_backward_ends(communication):
    log, _ = run_ranks(_events_of_a_prefetching_step, 2, communication)
    for index in range(N - 1):
        gathered = log.index(("gather", f"heads.{index + 1}.attention_norm.weight"))
        assert gathered < log.index(("gradient", f"heads.{index}.attention_norm.weight"))


MICRO_BATCHES = 3


def _traffic_of_an_accumulating_step() -> tuple[list[tuple[str, str]], list[str]]:
    """(events of a step of several micro-batches with a complete trace, modules whose weights are still there after
    it).
    """
    from megamtp.engines.zero import ZeroEngine

    config = zero3("grouped", accumulation=MICRO_BATCHES)
    engine = ZeroEngine(config)
    traffic = Traffic(engine)
    first_layer = engine.model.trunk[0].attention_norm.weight
    first_layer.register_post_accumulate_grad_hook(
        lambda _: traffic.log.append(("gradient", "trunk.0.attention_norm.weight"))
    )
    for step in range(2):
        traffic.clear()
        step_with_gradients(engine, global_batch(config, step, 2 * MICRO_BATCHES))
    left = [type(unit.module).__name__ for unit in engine.communication.gatherer._units if unit.buffer is not None]
    return traffic.log, left


def test_a_micro_batch_begins_with_weights_that_the_last_one_left_or_sent_for():
    log, left = run_ranks(_traffic_of_an_accumulating_step, 2)[0]
    first_layer, embedding = "trunk.0.attention_norm.weight", "embedding.weight"
    gathers = Counter(name for kind, name in log if kind == "gather")
    assert gathers["trunk.1.attention_norm.weight"] == 2 * MICRO_BATCHES  # forward and backward
    assert gathers[first_layer] == MICRO_BATCHES + 1  # kept from each backward pass for the next forward pass
    assert gathers[embedding] == MICRO_BATCHES
    ends = [place for place, event in enumerate(log) if event == ("gradient", first_layer)]
    arrivals = [place for place, event in enumerate(log) if event == ("gather", embedding)]
    assert len(ends) == MICRO_BATCHES
    # during the backward pass before
    assert all(arrival < end for arrival, end in zip(arrivals[1:], ends, strict=False))
    assert left == []


def _trace_around_evaluation(communication: str) -> tuple[list[bool], list[str], list[str]]:
    from megamtp.engines.zero import ZeroEngine

    config = zero3(communication)
    engine = ZeroEngine(config)
    traffic = Traffic(engine)

    def complete() -> bool:
        return engine.deepspeed_engine.optimizer.parameter_offload.get_param_coordinator().is_complete_trace()

    def gathers_of_step(step: int) -> list[str]:
        traffic.clear()
        step_with_gradients(engine, global_batch(config, step, 2))
        return list(traffic.gathers)

    for step in range(4):
        before = gathers_of_step(step)
    states = [complete()]
    for _ in range(3):
        engine.evaluate(own_share(global_batch(config, 9, 6), engine.rank, 2))
        states.append(complete())
        after = gathers_of_step(5)
        states.append(complete())
    return states, before, after


@pytest.mark.parametrize("communication", COMMUNICATIONS)
def test_evaluation_leaves_the_prefetch_trace_intact(communication):
    (states, before, after), _ = run_ranks(_trace_around_evaluation, 2, communication)
    assert all(states)
    assert before == after
    assert len(before) > 9 * 5


def _evaluation_and_reference(settings: dict) -> tuple[list[float], list[float]]:
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
    for found, expected in run_ranks(_evaluation_and_reference, 2, {"engine__kind": kind}):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-6, atol=0)
