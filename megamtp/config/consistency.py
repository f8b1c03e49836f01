"""Checks every section, and settings of different sections against each other, without looking at devices or files.

Tests: tests/unit/config/test_reader.py.
"""

from dataclasses import fields
from itertools import accumulate

from megamtp.config.fields import expect, shown
from megamtp.config.schema import FLOAT8_MULTIPLE, Config


def check(config: Config) -> None:
    """Checks all settings.

    Raises:
        InputError: a setting is out of bounds, has no effect, or conflicts with another setting.
    """
    for section in fields(config):
        getattr(config, section.name).check(section.name)
    _check_head_loss(config)
    if config.train.precision == "fp8":
        _check_float8(config)
    if config.engine.kind == "zero3" and config.engine.communication == "deepspeed":
        _check_shipped_communication(config)
    if config.train.cuda_graphs:
        _check_cuda_graphs(config)
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
    if head_loss.precision is not None:
        found = f"head_loss.precision={head_loss.precision} with train.precision={config.train.precision}"
        expect(config.train.dtype == "bf16", found, "train.precision=bf16 or fp8")
    in_float8 = config.resolved_head_loss.precision == "fp8"
    found = f"head_loss.fp8_first_head=False with head_loss.precision={shown(head_loss.precision)}"
    expect(head_loss.fp8_first_head or in_float8, found, "losses in fp8: the setting has no effect otherwise")
    if in_float8:
        fp8 = "head_loss.precision=fp8" if head_loss.precision else "train.precision=fp8"
        for name in ("dim", "vocab_size"):
            _check_float8_size(fp8, f"model.{name}", getattr(config.model, name))


def _check_float8(config: Config) -> None:
    model, train, fp8 = config.model, config.train, "train.precision=fp8"
    _check_float8_size(fp8, "model.dim", model.dim)
    _check_float8_size(fp8, "model.mlp_dim", model.hidden_dim)
    _check_float8_size(
        fp8, "model.num_key_value_heads x the width of an attention head", model.key_value_heads * model.head_dim
    )
    _check_float8_size(
        fp8, "train.micro_batch_size x train.sequence_length", train.micro_batch_size * train.sequence_length
    )


def _check_shipped_communication(config: Config) -> None:
    found = "with engine.communication=deepspeed"
    is_float8 = config.train.precision == "fp8"
    expect(not is_float8, f"train.precision=fp8 {found}", "grouped, which gathers weights in fp8")
    expect(
        not config.model.shares_chain_weights or config.model.num_future_tokens <= 2,
        f"heads that share their weights (model.chain_form, model.chain_weights) {found}",
        "grouped: DeepSpeed would reduce a module's gradients once for each of its uses",
    )


def _check_float8_size(fp8: str, name: str, size: int) -> None:
    found = f"{fp8} with {name}={size}"
    expect(size % FLOAT8_MULTIPLE == 0, found, f"a multiple of {FLOAT8_MULTIPLE}, as fp8 products need")


def _check_cuda_graphs(config: Config) -> None:
    train, engine = config.train, config.engine
    grouped = engine.kind == "zero3" and engine.communication == "grouped"
    for name, value, is_supported, expected in (
        ("engine.kind", engine.kind, grouped or engine.kind == "zero3", "zero3"),
        ("engine.communication", engine.communication, grouped, "grouped"),
        ("train.compile", train.compile, train.compile is not False, "null or true: torch.compile makes the graphs"),
        ("train.activation_checkpointing", True, not train.activation_checkpointing, "false"),
        ("data.documents", config.data.documents, config.data.documents != "isolate", "continue or mask"),
    ):
        expect(is_supported, f"train.cuda_graphs=true with {name}={shown(value)}", expected)


def _check_pipeline(config: Config) -> None:
    engine, num_layers = config.engine, config.model.num_layers_and_heads
    expect(
        engine.num_stages is not None and engine.num_stages >= 2,
        f"engine.num_stages={shown(engine.num_stages)}",
        "at least 2 with engine.kind=pipeline (engine.kind=zero1 is a pipeline of one stage)",
    )
    num_stages = engine.pipeline_stages
    found = f"engine.num_stages={num_stages} with {num_layers} trunk layers and heads"
    expect(num_stages <= num_layers, found, "no more stages than these")
    if engine.stage_layers is not None:
        expect(
            len(engine.stage_layers) == num_stages and sum(engine.stage_layers) == num_layers,
            f"engine.stage_layers={engine.stage_layers}",
            f"{num_stages} numbers (engine.num_stages) that sum to the {num_layers} trunk layers and heads",
        )
        separated = any(end in config.model.inseparable for end in accumulate(engine.stage_layers))
        expected = f"the last {config.model.num_future_tokens - 1} heads in one stage: they share their weights"
        expect(not separated, f"engine.stage_layers={engine.stage_layers}", expected)
        has_memory_limit = engine.stage_memory_bytes is not None
        expect(not has_memory_limit, "engine.stage_memory_bytes with engine.stage_layers", "one of them")
    zero = engine.deepspeed.get("zero_optimization")
    for name in zero if isinstance(zero, dict) else ():
        found = f"engine.deepspeed.zero_optimization.{name} with engine.kind=pipeline"
        expect(not str(name).startswith("stage"), found, "engine.kind=zero3: a pipeline has ZeRO-1")
    breakdown = engine.deepspeed.get("wall_clock_breakdown")
    found = "engine.deepspeed.wall_clock_breakdown with engine.kind=pipeline"
    expect(not breakdown, found, "false: DeepSpeed's pipeline starts its timers twice")
    expect(config.train.precision != "fp16", "train.precision=fp16 with engine.kind=pipeline", "bf16, fp32 or fp8")
    expect(config.cluster.emulate is None, "cluster.emulate with engine.kind=pipeline", "engine.kind=zero3")
