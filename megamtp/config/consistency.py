"""Checks every section, and settings of different sections against each other, without looking at devices or files.

Tests: tests/unit/config/test_reader.py.
"""

from dataclasses import fields

from megamtp.config.fields import expect, shown
from megamtp.config.schema import Config


def check(config: Config) -> None:
    """Checks all settings.

    Raises:
        InputError: a setting is out of bounds, has no effect, or conflicts with another setting.
    """
    for section in fields(config):
        getattr(config, section.name).check(section.name)
    _check_head_loss(config)
    if config.engine.kind == "pipeline":
        _check_pipeline(config)
    expect(
        not (config.cluster.emulate and config.run.initial_weights),
        "run.initial_weights with cluster.emulate",
        "one of them: an emulated rank does not compute with a model's weights",
    )
    config.num_micro_batches(data_parallel_size=1)  # raises if no number of ranks can share the batch


def _check_head_loss(config: Config) -> None:
    head_loss, n = config.head_loss, config.model.num_future_tokens
    if head_loss.weights is not None:
        found = f"head_loss.weights has {len(head_loss.weights)} numbers"
        expect(len(head_loss.weights) == n, found, f"{n}, one per head (model.num_future_tokens)")
    expect(any(config.head_weights), f"head_loss.weights={config.head_weights}", "at least one above 0")
    if head_loss.precision == "fp8":
        fp8, precision = "head_loss.precision=fp8", config.train.precision
        expect(precision == "bf16", f"{fp8} with train.precision={precision}", "train.precision=bf16")
        for name in ("dim", "vocab_size"):
            size = getattr(config.model, name)
            expect(size % 16 == 0, f"{fp8} with model.{name}={size}", "a multiple of 16, as fp8 products need")


def _check_pipeline(config: Config) -> None:
    engine, num_layers = config.engine, config.model.num_layers
    expect(
        engine.num_stages is not None and engine.num_stages >= 2,
        f"engine.num_stages={shown(engine.num_stages)}",
        "at least 2 with engine.kind=pipeline (engine.kind=zero1 is a pipeline of one stage)",
    )
    num_stages = engine.pipeline_stages
    found = f"engine.num_stages={num_stages} with model.num_layers={num_layers}"
    expect(num_stages <= num_layers, found, "no more stages than layers")
    if engine.stage_layers is not None:
        expect(
            len(engine.stage_layers) == num_stages and sum(engine.stage_layers) == num_layers,
            f"engine.stage_layers={engine.stage_layers}",
            f"{num_stages} numbers (engine.num_stages) that sum to model.num_layers={num_layers}",
        )
        has_memory_limit = engine.stage_memory_bytes is not None
        expect(not has_memory_limit, "engine.stage_memory_bytes with engine.stage_layers", "one of them")
    zero = engine.deepspeed.get("zero_optimization")
    for name in zero if isinstance(zero, dict) else ():
        found = f"engine.deepspeed.zero_optimization.{name} with engine.kind=pipeline"
        expect(not str(name).startswith("stage"), found, "engine.kind=zero3: a pipeline has ZeRO-1")
    breakdown = engine.deepspeed.get("wall_clock_breakdown")
    found = "engine.deepspeed.wall_clock_breakdown with engine.kind=pipeline"
    expect(not breakdown, found, "false: DeepSpeed's pipeline starts its timers twice")
    expect(config.train.precision != "fp16", "train.precision=fp16 with engine.kind=pipeline", "bf16 or fp32")
    expect(config.cluster.emulate is None, "cluster.emulate with engine.kind=pipeline", "engine.kind=zero3")
