"""Configuration: what is accepted, what is refused and in which words, and every file in configs/."""

import dataclasses
import re
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megamtp.config import (
    Config,
    EfficiencyConfig,
    describe_keys,
    differences,
    read_config,
    with_absolute_paths,
    write_config,
)
from megamtp.config.reader import _keys
from megamtp.console import print_error
from megamtp.errors import InputError
from megamtp.model import cost
from tests.cases import published_config

ROOT = Path(__file__).parents[3]
GOOD = [
    "model.dim=128",
    "model.num_layers=6",
    "model.num_attention_heads=4",
    "model.vocab_size=100",
    "train.steps=1",
    "train.global_batch_tokens=1024",
    "train.micro_batch_size=1",
    "train.sequence_length=128",
    "data.train=x",
    "run.directory=y",
]

# Source: paper.md, table S5.
PARAMETERS = {"0.3b": 296.8e6, "0.6b": 630.5e6, "1.3b": 1364.3e6, "3b": 3018.8e6, "6.7b": 6738.4e6, "13b": 13015.9e6}
FLOP_RATIOS = {
    "0.3b": (1.097, 1.290),
    "0.6b": (1.056, 1.168),
    "1.3b": (1.044, 1.131),
    "3b": (1.025, 1.074),
    "6.7b": (1.018, 1.055),
    "13b": (1.012, 1.036),
}
WIDTHS = {
    "0.3b": (1024, 18, 16),
    "0.6b": (1280, 27, 20),
    "1.3b": (2048, 24, 16),
    "3b": (2560, 36, 20),
    "6.7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
}


def paper_config(size: str, n: int) -> Config:
    return read_config([str(ROOT / f"configs/{size}_n{n}.yaml"), "data.train=x", "run.directory=y"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("model.dmi=3", "unknown key model.dmi; did you mean model.dim? (--help lists every key)"),
        ("lr=3", "unknown key lr; did you mean optimizer.lr? (--help lists every key)"),
        ("optimiser.lr=3", "unknown key optimiser.lr; did you mean optimizer.lr? (--help lists every key)"),
        ("model.dim=wide", "model.dim: Value 'wide' of type 'str' could not be converted to Integer; expected int"),
        ("model.dim=null", "model.dim: Incompatible value 'None' for field of type 'int'; expected int"),
        ("train.precision=fp4", "train.precision=fp4; expected fp32 or bf16 or fp16 or fp8"),
        ("model.num_future_tokens=0", "model.num_future_tokens=0; expected at least 1"),
        (
            "model.num_future_tokens=6",
            "model.num_future_tokens=6 with model.num_layers=6; expected fewer heads than layers: num_layers counts "
            "trunk and heads together, and the trunk needs one",
        ),
        (
            "model.num_attention_heads=3",
            "model.dim=128 with model.num_attention_heads=3; expected heads of one even width: dim a multiple of 2 x "
            "num_attention_heads",
        ),
        (
            "model.num_key_value_heads=3",
            "model.num_key_value_heads=3; expected a divisor of model.num_attention_heads=4",
        ),
        (
            "engine.spread_losses=true",
            "engine.spread_losses=True with engine.kind=zero3; expected engine.kind=pipeline: the setting has no "
            "effect otherwise",
        ),
        (
            "head_loss.weights=[1,2]",
            "head_loss.weights has 2 numbers; expected 4, one per head (model.num_future_tokens)",
        ),
        ("head_loss.precision=fp4", "head_loss.precision=fp4; expected null or fp8 or bf16"),
        ("optimizer.lr=nan", "optimizer.lr=nan; expected a finite number, at most 3.4e+38"),
        ("optimizer.lr=-1", "optimizer.lr=-1.0; expected 0 or more"),
        ("optimizer.lr=1e39", "optimizer.lr=1e+39; expected a finite number, at most 3.4e+38"),
        ("cluster.node_bandwidth=inf", "cluster.node_bandwidth=inf; expected a finite number, at most 3.4e+38"),
        ("model.vocab_size=9223372036854775807", "model.vocab_size=9223372036854775807; expected at most 16777216"),
        ("model.num_layers=1000000", "model.num_layers=1000000; expected at most 1000"),
        ("train.steps=2147483648", "train.steps=2147483648; expected at most 2147483647"),
        (
            "engine.reduce_bucket_size=100000000000000000000",
            "engine.reduce_bucket_size=100000000000000000000; expected at most 2147483647",
        ),
        ("train.seed=549755813888", "train.seed=549755813888; expected at most 549755813887"),
        ("run.stall_seconds=0", "run.stall_seconds=0; expected at least 1"),
        ("run.requeue_exit_code=256", "run.requeue_exit_code=256; expected at most 255"),
        (
            "engine.deepspeed.a=[1, {b: 9223372036854775808}]",
            "engine.deepspeed.a[1].b=9223372036854775808; expected at most 9223372036854775807",
        ),
        (
            "cluster.efficiency.all_gather=[1]",
            "cluster.efficiency.all_gather: Value '[1]' of type 'ListConfig' could not be converted to Float; "
            "expected float",
        ),
        (
            "cluster.efficiency.all_gather={a: 1}",
            "cluster.efficiency.all_gather: Value '{'a': 1}' of type 'DictConfig' could not be converted to Float; "
            "expected float",
        ),
        ("cluster.efficiency={all_gather: 0}", "cluster.efficiency.all_gather=0.0; expected at least 1e-06"),
        (
            "cluster.efficiency={gather: 0.5}",
            "unknown key cluster.efficiency.gather; did you mean cluster.efficiency.all_gather? (--help lists every "
            "key)",
        ),
        ("cluster.efficiency.all_gather=1e-300", "cluster.efficiency.all_gather=1e-300; expected at least 1e-06"),
        ("head_loss.weights=[1,[2],3,4]", "head_loss.weights[1]=[2]; expected float"),
        (
            "head_loss.weights=[1,true,1,1]",
            "head_loss.weights[1]: Value 'True' of type 'bool' could not be converted to Float; expected float",
        ),
        (
            "cluster.efficiency.all_gather=null",
            "cluster.efficiency.all_gather: Incompatible value 'None' for field of type 'float'; expected float",
        ),
        ("foo={}", "unknown key foo; did you mean model.chain_form? (--help lists every key)"),
        ("engine.stage_layers=[1,{a: 2}]", "engine.stage_layers[1]={'a': 2}; expected int"),
        (
            "engine.deepspeed.a=!!binary aGk=",
            "engine.deepspeed.a=b'hi'; expected null, true or false, a number, text, a list or a mapping",
        ),
        ("engine.deepspeed.a={1: 2}", "engine.deepspeed.a={1: 2}; expected text as keys, not 1"),
        ("model.dim=!!bool 3", "no valid key or value (KeyError: '3'); expected key=value"),
        ('model.dim=!!int ""', "no valid key or value (IndexError: string index out of range); expected key=value"),
        (
            "model.dim=!!timestamp x",
            "no valid key or value (AttributeError: 'NoneType' object has no attribute 'groupdict'); expected "
            "key=value",
        ),
        ("[=", "no valid key or value (IndexError: list index out of range); expected key=value"),
        ('run.directory="a\\0b"', "run.directory=a\x00b; expected text without null characters"),
        ('data.train="a\\0b"', "data.train=a\x00b; expected text without null characters"),
        ("\x00.yaml", "embedded null byte; expected a YAML file or key=value"),
        ('run.directory=""', "run.directory=; expected a name"),
        ("data.validation=''", "data.validation=; expected a name"),
        (
            "engine.deepspeed=[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]",
            "nested more than 16 levels deep; expected key=value",
        ),
        (
            "train.micro_batch_size=3",
            "train.global_batch_tokens=1024 is not a multiple of 384 = train.sequence_length 128 x "
            "train.micro_batch_size 3 x 1 ranks; change one of them",
        ),
        ("engine.kind=zero2", "engine.kind=zero2; expected zero3 or zero1 or pipeline"),
        ("nowhere.yaml", "No such file or directory; expected a YAML file or key=value"),
        ("engine.deepspeed=3", "engine.deepspeed: Cannot assign int to Dict[str, Any]; expected mapping"),
        (
            "engine.deepspeed={a:{b:2}}",
            "found unexpected ':'; expected key=value, with a space after each colon in braces: {a: {b: 2}}",
        ),
        ("head_loss.weights=[1", "did not find expected ',' or ']'; expected key=value"),
        ("train.steps=!!int a", "invalid literal for int() with base 10: 'a'; expected key=value"),
        ("run.tensorboard=3", "run.tensorboard: 3 is neither true nor false; expected bool"),
        ("run.tensorboard='-1'", "run.tensorboard: -1 is neither true nor false; expected bool"),
        ("run.tensorboard=perhaps", "run.tensorboard: Value 'perhaps' is not a valid bool (type str); expected bool"),
        ("train.compile=2", "train.compile: 2 is neither true nor false; expected bool or null"),
        ("model=", "unknown key model; did you mean model.dim? (--help lists every key)"),
        ("model=${nothing}", "unknown key model; did you mean model.dim? (--help lists every key)"),
        ("optimizer.beta1=1", "optimizer.beta1=1.0; expected a number in [0, 1)"),
        ("optimizer.beta2=-0.1", "optimizer.beta2=-0.1; expected a number in [0, 1)"),
        ("run.peak_flops=0", "run.peak_flops=0.0; expected a number above 0"),
        ("train.steps=0", "train.steps=0; expected at least 1"),
        ("cluster.latency=-1", "cluster.latency=-1.0; expected 0 or more"),
        ("head_loss.weights=[1,-1,1,1]", "head_loss.weights[1]=-1.0; expected 0 or more"),
        ("head_loss.weights=[0,0,0,0]", "head_loss.weights=[0.0, 0.0, 0.0, 0.0]; expected at least one above 0"),
        ("engine.stage_layers=[0,6]", "engine.stage_layers[0]=0; expected at least 1"),
        (
            "cluster.efficiency=null",
            "unknown key cluster.efficiency; did you mean cluster.efficiency.broadcast? (--help lists every key)",
        ),
        (
            "cluster.efficiency=[1]",
            "unknown key cluster.efficiency; did you mean cluster.efficiency.broadcast? (--help lists every key)",
        ),
        (
            "cluster.efficiency.all_gather=a",
            "cluster.efficiency.all_gather: Value 'a' of type 'str' could not be converted to Float; expected float",
        ),
        ("model.rope_theta=0", "model.rope_theta=0.0; expected a number above 0"),
        ("run.directory=~/x", "~/x; expected a path without ~, which is not expanded here: write $HOME"),
        ("data.train=~/x", "~/x; expected a path without ~, which is not expanded here: write $HOME"),
        ("train.seed=-1", "train.seed=-1; expected 0 or more"),
        ("run.requeue_exit_code=-1", "run.requeue_exit_code=-1; expected 0 or more"),
        (
            "head_loss.precision=fp8",
            "head_loss.precision=fp8 with model.vocab_size=100; expected a multiple of 16, as fp8 products need",
        ),
        (
            "model.num_layers=1",
            "model.num_future_tokens=4 with model.num_layers=1; expected fewer heads than layers: num_layers counts "
            "trunk and heads together, and the trunk needs one",
        ),
        ("model.mlp_dim=0", "model.mlp_dim=0; expected at least 1"),
        (
            "engine.kind=pipeline",
            "engine.num_stages=null; expected at least 2 with engine.kind=pipeline (engine.kind=zero1 is a pipeline "
            "of one stage)",
        ),
        (
            "engine.num_stages=2",
            "engine.num_stages=2 with engine.kind=zero3; expected engine.kind=pipeline: the setting has no effect "
            "otherwise",
        ),
        (
            "engine.stage_layers=[3,3]",
            "engine.stage_layers=[3, 3] with engine.kind=zero3; expected engine.kind=pipeline: the setting has no "
            "effect otherwise",
        ),
        (
            "engine.stage_memory_bytes=3",
            "engine.stage_memory_bytes=3.0 with engine.kind=zero3; expected engine.kind=pipeline: the setting has no "
            "effect otherwise",
        ),
    ],
)
def test_bad_settings_are_named_in_one_line(argument, message):
    with pytest.raises(InputError) as error:
        read_config([*GOOD, argument])
    assert str(error.value) in (message, f"{argument}: {message}")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (f"optimizer.lr={'9' * 400}", "int too large to convert to float; expected float"),
        (f"run.tensorboard={'9' * 400}", "is neither true nor false; expected bool"),
        (f"model.dim={'9' * 5000}", "a number of 5000 characters"),
        (f"model.dim=0x{'f' * 5000}", "a number of 5002 characters"),
        (f"run.directory={'a' * 4097}", "run.directory has 4097 bytes; expected at most 4096"),
        (f"engine.deepspeed={'[' * 80}{']' * 80}", "nested more than 16 levels deep"),
        (f"engine.deepspeed={'[' * 200_000}{']' * 200_000}", "nested more than 16 levels deep"),  # would end Python
        (f"engine.deepspeed{'.a' * 3000}=1", "nested more than 16 levels deep"),
    ],
)
def test_long_settings_are_refused(argument, words):
    with pytest.raises(InputError, match=words) as error:
        read_config([*GOOD, argument])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "head_loss.fp8_first_head=false",
            "head_loss.fp8_first_head=False with head_loss.precision=null; expected losses in fp8: the setting has no "
            "effect otherwise",
        ),
        (
            "engine.kind=zero1 engine.offload_parameters=true",
            "engine.offload_parameters=True with engine.kind=zero1; expected engine.kind=zero3: the setting has no "
            "effect otherwise",
        ),
        (
            "engine.kind=zero1 engine.communication=deepspeed",
            "engine.communication=deepspeed with engine.kind=zero1; expected engine.kind=zero3: the setting has no "
            "effect otherwise",
        ),
        (
            "engine.kind=zero1 engine.prefetch_modules=1",
            "engine.prefetch_modules=1 with engine.kind=zero1; expected engine.kind=zero3: the setting has no effect "
            "otherwise",
        ),
        (
            "engine.kind=zero1 engine.param_persistence_threshold=1",
            "engine.param_persistence_threshold=1 with engine.kind=zero1; expected engine.kind=zero3: the setting has "
            "no effect otherwise",
        ),
        (
            "engine.kind=pipeline engine.num_stages=2 engine.prefetch_modules=3",
            "engine.prefetch_modules=3 with engine.kind=pipeline; expected engine.kind=zero3: the setting has no "
            "effect otherwise",
        ),
        (
            "engine.kind=pipeline engine.num_stages=2 engine.communication=deepspeed",
            "engine.communication=deepspeed with engine.kind=pipeline; expected engine.kind=zero3: the setting has no "
            "effect otherwise",
        ),
        (
            "engine.kind=pipeline engine.num_stages=2 engine.head_schedule=deferred",
            "engine.head_schedule=deferred with engine.kind=pipeline; expected engine.kind=zero3 or zero1: the "
            "setting has no effect otherwise",
        ),
        (
            "engine.kind=pipeline engine.num_stages=2 engine.stage_layers=[3,4]",
            "engine.stage_layers=[3, 4]; expected 2 numbers (engine.num_stages) that sum to the 6 trunk layers and "
            "heads",
        ),
        (
            "engine.kind=pipeline engine.num_stages=2 engine.stage_layers=[0,6]",
            "engine.stage_layers[0]=0; expected at least 1",
        ),
        (
            "engine.kind=pipeline engine.num_stages=2 engine.stage_layers=[3,3] engine.stage_memory_bytes=1",
            "engine.stage_memory_bytes with engine.stage_layers; expected one of them",
        ),
        (
            "engine.kind=pipeline engine.num_stages=2 engine.stage_memory_bytes=0",
            "engine.stage_memory_bytes=0.0; expected a number above 0",
        ),
        (
            "engine.kind=pipeline engine.num_stages=2 train.precision=fp16",
            "train.precision=fp16 with engine.kind=pipeline; expected bf16, fp32 or fp8",
        ),
        (
            "engine.kind=pipeline engine.num_stages=2 cluster.emulate=2",
            "cluster.emulate with engine.kind=pipeline; expected engine.kind=zero3",
        ),
        (
            "engine.kind=pipeline engine.num_stages=7",
            "engine.num_stages=7 with 6 trunk layers and heads; expected no more stages than these",
        ),
        (
            "engine.kind=pipeline engine.num_stages=1",
            "engine.num_stages=1; expected at least 2 with engine.kind=pipeline (engine.kind=zero1 is a pipeline of "
            "one stage)",
        ),
        (
            "cluster.emulate=2 run.initial_weights=x",
            "run.initial_weights with cluster.emulate; expected one of them: an emulated rank does not compute "
            "with a model's weights",
        ),
        (
            "engine.kind=pipeline engine.num_stages=2 engine.offload_optimizer=true",
            "engine.offload_optimizer=True with engine.kind=pipeline; expected engine.kind=zero3 or zero1: the "
            "setting has no effect otherwise",
        ),
        (
            "engine.communication=deepspeed engine.prefetch_modules=0",
            "engine.prefetch_modules=0 with engine.communication=deepspeed; expected engine.communication=grouped: "
            "the setting has no effect otherwise",
        ),
    ],
)
def test_settings_that_do_not_go_together(arguments, message):
    """Among them those without an effect: no engine ignores a setting."""
    with pytest.raises(InputError) as error:
        read_config([*GOOD, *arguments.split()])
    assert str(error.value) == message


def test_sections_within_sections(tmp_path):
    config = read_config([*GOOD, "cluster={efficiency: {all_gather: 0.5}}", "cluster.efficiency.broadcast=2"])
    assert config.cluster.efficiency == EfficiencyConfig(all_gather=0.5, broadcast=2.0)
    (tmp_path / "sparse.yaml").write_text("cluster:\n  efficiency:\n  latency: 1e-6\n")
    sparse = read_config([*GOOD, str(tmp_path / "sparse.yaml")])
    assert sparse.cluster.efficiency == EfficiencyConfig() and sparse.cluster.latency == 1e-6
    assert differences(sparse, config) == [
        "cluster.latency: 1e-06 -> 2e-05",
        "cluster.efficiency.all_gather: 1.0 -> 0.5",
        "cluster.efficiency.broadcast: 1.0 -> 2.0",
    ]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("train.precision=fp32", "head_loss.precision=fp8 with train.precision=fp32; expected .*=bf16 or fp8"),
        ("train.precision=fp16", "head_loss.precision=fp8 with train.precision=fp16; expected .*=bf16 or fp8"),
        ("model.vocab_size=100", "head_loss.precision=fp8 with model.vocab_size=100; expected a multiple of 16"),
        ("model.dim=136", "head_loss.precision=fp8 with model.dim=136; expected a multiple of 16"),
    ],
)
def test_what_fp8_cannot_do_is_named(argument, words):
    good = [*GOOD, "model.vocab_size=96", "head_loss.precision=fp8"]
    assert read_config(good).head_loss.in_float8(0)
    with pytest.raises(InputError, match=words):
        read_config([*good, argument])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("model.dim=136 model.num_attention_heads=4", "train.precision=fp8 with model.dim=136; expected a multiple"),
        ("model.mlp_dim=40", "train.precision=fp8 with model.mlp_dim=40; expected a multiple of 16"),
        (
            "model.dim=32 model.num_attention_heads=4 model.num_key_value_heads=1",
            "fp8 with model.num_key_value_heads x the width of an attention head=8; expected a multiple of 16",
        ),
        ("model.vocab_size=100", "train.precision=fp8 with model.vocab_size=100; expected a multiple of 16"),
        (
            "train.sequence_length=24 train.global_batch_tokens=24",
            r"fp8 with .*sequence_length=24; expected a multiple",
        ),
        ("engine.communication=deepspeed", "fp8 with engine.communication=deepspeed; expected grouped"),
    ],
)
def test_what_layers_in_fp8_cannot_do_is_named(arguments, words):
    good = [*GOOD, "model.vocab_size=96", "model.mlp_dim=32", "train.precision=fp8", "train.micro_batch_size=1"]
    assert read_config(good).resolved_head_loss.in_float8(0)
    assert not read_config([*good, "head_loss.precision=bf16"]).resolved_head_loss.in_float8(0)
    with pytest.raises(InputError, match=words):
        read_config([*good, *arguments.split()])


def test_heads_in_fp8():
    further = read_config([*GOOD, "model.vocab_size=96", "head_loss.precision=fp8", "head_loss.fp8_first_head=false"])
    assert [further.head_loss.in_float8(index) for index in range(3)] == [False, True, True]
    assert not read_config(GOOD).head_loss.in_float8(1)


def test_missing_key_is_named():
    with pytest.raises(InputError, match=r"run\.directory is not set"):
        read_config(GOOD[:-1])


@pytest.mark.parametrize(
    ("kind", "settings", "num_trunk_layers"),
    [
        ("linear", {"head_kind": "linear"}, 32),
        ("causal", {"head_kind": "causal"}, 28),
        ("anticausal", {"head_kind": "anticausal"}, 28),
        ("deepseek", {"head_kind": "chained"}, 28),
        ("eagle3", {"head_kind": "chained", "chain_form": "eagle3"}, 30),
    ],
)
def test_configurations_of_head_kinds_differ_from_that_of_parallel_heads_only_in_the_kind(
    kind, settings, num_trunk_layers
):
    parallel, other = published_config("6.7b", 4), published_config("6.7b", f"4_{kind}")
    assert other == dataclasses.replace(parallel, model=dataclasses.replace(parallel.model, **settings))
    assert other.model.num_trunk_layers == num_trunk_layers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "model.first_head=layer",
            "model.first_head=layer with model.head_kind=parallel; expected model.head_kind=linear",
        ),
        ("model.chain_form=eagle3", "model.chain_form=eagle3 with model.head_kind=parallel; expected .*=chained"),
        (
            "model.head_kind=chained model.chain_form=eagle3 model.chain_weights=own",
            "model.chain_weights=own with model.chain_form=eagle3; expected null or shared: a draft layer of EAGLE-3 "
            "has one set of weights",
        ),
        (
            "model.head_kind=chained model.chain_form=eagle3 engine.communication=deepspeed",
            r"heads that share their weights \(.*\) with engine.communication=deepspeed; expected grouped: DeepSpeed "
            "would reduce a module's gradients once for each of its uses",
        ),
        (
            "model.head_kind=chained model.chain_form=eagle3 engine.kind=pipeline engine.num_stages=2 "
            "engine.stage_layers=[6,2]",
            r"engine.stage_layers=\[6, 2\]; expected the last 3 heads in one stage: they share their weights",
        ),
    ],
)
def test_settings_of_head_kinds_are_refused_where_they_do_not_fit(settings, message):
    with pytest.raises(InputError, match=f"^{message}"):
        read_config([*GOOD, "model.num_future_tokens=4", *settings.split()])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("engine.kind=zero1", "engine.kind=zero1; expected zero3"),
        ("engine.kind=pipeline engine.num_stages=2", "engine.kind=pipeline; expected zero3"),
        ("engine.communication=deepspeed", "engine.communication=deepspeed; expected grouped"),
        ("train.compile=false", "train.compile=False; expected null or true: torch.compile makes the graphs"),
        ("train.activation_checkpointing=true", "train.activation_checkpointing=True; expected false"),
        ("data.documents=isolate", "data.documents=isolate; expected continue or mask"),
    ],
)
def test_cuda_graphs_are_refused_where_they_do_not_work(settings, message):
    with pytest.raises(InputError, match=f"^train.cuda_graphs=true with {message}$"):
        read_config([*GOOD, "train.cuda_graphs=true", *settings.split()])


@pytest.mark.parametrize(
    ("text", "words"),
    [("model: {dim: [", "line 2: did not find"), ("model:\n  dim: 3\n  dim: 4\n", "line 3: found duplicate key dim")],
)
def test_broken_yaml_is_named_with_its_line(text, words, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_config([str(path)])
    assert f"{path} is not valid YAML, {words}" in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"3\n", " holds no mapping of keys; expected sections"),
        (b"true", " holds no mapping of keys"),
        (b"'3'\n", " holds no mapping of keys"),
        (b"train: {steps: !!int abc}", " is not valid YAML, invalid literal"),
        (b"- 3\n", " holds no mapping of keys"),
        (b"model: {dim: caf\xe9}", ": not UTF-8 text"),
        (b"modle:\n", ": unknown key modle; did you mean model."),
        (b"train: {steps: !!bool 3}", " is not valid YAML, no valid key or value (KeyError: '3'); correct the file"),
        (b"a: " + b"[" * 80 + b"]" * 80, " is not valid YAML, nested more than 16 levels deep"),
        (b"train: {seed: " + b"9" * 5000 + b"}", " is not valid YAML, a number of 5000 characters"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(content, words, tmp_path):
    path = tmp_path / "other.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_config([*GOOD, str(path)])
    assert str(error.value).startswith(f"{path}{words}")


@pytest.mark.parametrize("text", ["", "model:\n", "head_loss:\n  # z_loss: 1e-4\nrun: null\n"])
def test_an_empty_section_sets_nothing(text, tmp_path):
    (tmp_path / "sparse.yaml").write_text(text)
    assert read_config([*GOOD, str(tmp_path / "sparse.yaml")]) == read_config(GOOD)


@pytest.mark.parametrize(
    ("word", "expected"), [("true", True), ("yes", True), ("1", True), ("off", False), ("no", False), ("0", False)]
)
def test_words_for_true_and_false(word, expected):
    config = read_config([*GOOD, f"run.tensorboard={word}", f"train.compile={word}"])
    assert (config.run.tensorboard, config.train.compile) == (expected, expected)


def test_written_configuration_reads_back(tmp_path):
    config = read_config(
        [
            *GOOD,
            "optimizer.lr=3e-4",
            "data.train=/corpus/train",
            "engine.deepspeed.a.b=1",
            "head_loss.weights=[1,0.5,0.5,0.5]",
        ]
    )
    write_config(config, tmp_path / "config.yaml")
    assert read_config([str(tmp_path / "config.yaml")]) == config
    assert config.optimizer.lr == 3e-4
    assert config.engine.deepspeed == {"a": {"b": 1}}


@pytest.mark.parametrize(
    "train", ["a" * 1_000_000, "a " * 500_000, "1 " + "a" * 1_000_000, "1 '" + "a " * 500_000 + "'"]
)
def test_a_megabyte_of_data_train_is_refused_at_once(train):
    start = time.monotonic()
    with pytest.raises(InputError, match=r"data\.train has .* bytes; expected at most 131072"):
        read_config([*GOOD, f'data.train="{train}"'])
    assert time.monotonic() - start < 5  # shlex takes half a minute to split it


def test_the_longest_blend():
    corpora = " ".join(f"{number}.5 /corpora/{number:0100d}/train" for number in range(1024))
    assert len(read_config([*GOOD, f"data.train={corpora}"]).data.train_corpora) == 1024


WORDS = st.sampled_from(
    '0 1 -1 3 128 1e400 -.inf .nan 0x7fffffffffffffff 9223372036854775808 1:30 true null ~ ??? x \'\' "\\0" "\\n" '
    "2020-01-01 "
    "${model.dim} ${nothing} ${oc.env:HOME} ${ !!bool !!int !!float !!str !!binary !!timestamp !!set !!omap "
    "!!python/name:os &a *a "
    "<< = % @ ` | > - ? : , [ ] { } # \n \t \\ \x00 \x85 \u2028 \ud800 é".split(" ")
)
FRAGMENTS = st.lists(WORDS | st.text(max_size=4), max_size=6).map(" ".join) | st.recursive(
    WORDS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda found: f"[{', '.join(found)}]")
        | st.lists(st.tuples(WORDS, inner), max_size=3).map(lambda found: f"{{{', '.join(map(': '.join, found))}}}")
    ),
    max_leaves=6,
)
KEYS = list(_keys(Config))
NAMES = st.sampled_from([*KEYS, "model", "cluster.efficiency.all_gather", "engine.deepspeed.a"]) | FRAGMENTS


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(NAMES, FRAGMENTS, st.booleans()), min_size=1, max_size=3))
def test_whatever_is_given_is_accepted_for_good_or_refused_in_one_line(tmp_path, capsys, given_settings):
    arguments = [str(tmp_path / "good.yaml")]  # one argument takes less time than ten
    if not (tmp_path / "good.yaml").exists():
        write_config(read_config(GOOD), tmp_path / "good.yaml")
    for index, (name, value, in_a_file) in enumerate(given_settings):
        path = tmp_path / f"{index}.yaml"
        section, _, key = name.partition(".")
        path.write_bytes(f"{section}:\n  {key}: {value}\n".encode(errors="surrogatepass"))
        arguments.append(str(path) if in_a_file else f"{name}={value}")
    try:
        config = read_config(arguments)
    except InputError as error:
        print_error(error)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("megamtp: error: ") and "; " in line
    else:
        write_config(config, tmp_path / "written.yaml")
        assert with_absolute_paths(config) == read_config([str(tmp_path / "written.yaml")])


def test_configuration_is_frozen():
    with pytest.raises(AttributeError):
        read_config(GOOD).model.dim = 3


def test_help_lists_every_key_with_meaning_and_default():
    lines = {line.split()[0]: line for line in describe_keys().splitlines()}
    assert list(lines) == KEYS
    assert "[int; required]" in lines["model.dim"]
    assert "[float; 0.0003]" in lines["optimizer.lr"]
    assert all(re.search(r"  \S+ +\S.* \[.+; .+\]$", line) for line in lines.values())


@pytest.mark.parametrize("size", PARAMETERS)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_paper_configurations(size, n):
    config = paper_config(size, n)
    model = config.model
    assert (model.dim, model.num_layers, model.num_attention_heads) == WIDTHS[size]
    assert (model.num_future_tokens, model.vocab_size, config.train.sequence_length) == (n, 32000, 4096)
    assert cost.num_parameters(model) == pytest.approx(PARAMETERS[size], rel=2e-4)
    assert config.num_micro_batches(64) >= 1


@pytest.mark.parametrize("size", FLOP_RATIOS)
def test_flop_ratios_of_table_s5(size):
    one, two, four = (cost.flops_per_token(paper_config(size, n).model, 4096) for n in (1, 2, 4))
    assert (round(two / one, 3), round(four / one, 3)) == FLOP_RATIOS[size]
