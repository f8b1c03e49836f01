"""Configuration: what is accepted, what is refused and in which words, and every file in configs/."""

import re
import time
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megamtp.config import Config, describe, from_anywhere, read_config, write_config
from megamtp.console import print_error
from megamtp.errors import InputError
from megamtp.model import cost

ROOT = Path(__file__).parents[2]
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
    ("argument", "words"),
    [
        ("model.dmi=3", ["model.dmi", "did you mean model.dim?"]),
        ("lr=3", ["unknown key lr", "did you mean optimizer.lr?"]),
        ("optimiser.lr=3", ["did you mean optimizer.lr?"]),
        ("model.dim=wide", ["model.dim", "wide", "expected int"]),
        ("model.dim=null", ["model.dim", "expected int"]),
        ("train.precision=fp8", ["train.precision=fp8", "fp32 or bf16 or fp16"]),
        ("model.num_future_tokens=0", ["model.num_future_tokens=0", "at least 1"]),
        ("model.num_future_tokens=6", ["model.num_future_tokens=6", "fewer heads than layers"]),
        ("model.num_attention_heads=3", ["model.num_attention_heads=3", "multiple"]),
        ("model.num_key_value_heads=3", ["model.num_key_value_heads=3", "divisor"]),
        ("engine.spread_losses=true", ["engine.spread_losses=True with engine.kind=zero3", "engine.kind=pipeline"]),
        ("head_loss.weights=[1,2]", ["2 numbers", "4"]),
        ("head_loss.precision=fp4", ["head_loss.precision=fp4", "null or fp8"]),
        ("optimizer.lr=nan", ["optimizer.lr=nan", "a finite number"]),
        ("optimizer.lr=-1", ["optimizer.lr=-1", "0 or more"]),
        ("optimizer.lr=1e39", ["optimizer.lr=1e+39", "at most 3.4e+38"]),  # torch would raise an overflow
        ("cluster.node_bandwidth=inf", ["cluster.node_bandwidth=inf", "a finite number"]),
        (f"optimizer.lr={'9' * 400}", ["int too large to convert to float; expected float"]),
        (f"run.tensorboard={'9' * 400}", ["is neither true nor false; expected bool"]),
        (f"model.dim={'9' * 5000}", ["a number of 5000 characters"]),
        (f"model.dim=0x{'f' * 5000}", ["a number of 5002 characters"]),
        ("model.vocab_size=9223372036854775807", ["model.vocab_size=9223372036854775807; expected at most 16777216"]),
        ("model.num_layers=1000000", ["model.num_layers=1000000; expected at most 1000"]),
        ("train.steps=2147483648", ["train.steps=2147483648; expected at most 2147483647"]),
        ("engine.reduce_bucket_size=100000000000000000000", ["engine.reduce_bucket_size=1000", "at most 2147483647"]),
        ("train.seed=549755813888", ["train.seed=549755813888; expected at most 549755813887"]),
        ("run.stall_seconds=0", ["run.stall_seconds=0; expected at least 1"]),
        ("run.requeue_exit_code=256", ["run.requeue_exit_code=256; expected at most 255"]),
        (
            "engine.deepspeed.a=[1, {b: 9223372036854775808}]",
            ["engine.deepspeed.a[1].b=9223372036854775808; expected at most"],
        ),
        ("cluster.efficiency.all_gather=[1]", ["cluster.efficiency.all_gather=[1]; expected float"]),
        ("cluster.efficiency.all_gather={a: 1}", ["cluster.efficiency.all_gather={'a': 1}; expected float"]),
        (
            "cluster.efficiency={all_gather: 0}",
            ["cluster.efficiency of all_gather=0.0; expected a share of the bandwidth"],
        ),
        ("cluster.efficiency={gather: 0.5}", ["cluster.efficiency=gather; expected all_gather or reduce_scatter"]),
        ("cluster.efficiency.all_gather=1e-300", ["all_gather=1e-300; expected a share", "1e-6 to 2"]),
        ("head_loss.weights=[1,[2],3,4]", ["head_loss.weights[1]=[2]; expected float"]),
        ("head_loss.weights=[1,true,1,1]", ["head_loss.weights[1]: Value 'True' of type 'bool'", "; expected float"]),
        ("cluster.efficiency.all_gather=null", ["cluster.efficiency.all_gather", "; expected float"]),
        ("foo={}", ["foo={}: unknown key foo; did you mean"]),
        ("engine.stage_layers=[1,{a: 2}]", ["engine.stage_layers[1]={'a': 2}; expected int"]),
        ("engine.deepspeed.a=!!binary aGk=", ["engine.deepspeed.a=b'hi'", "text, a list or a mapping"]),
        ("engine.deepspeed.a={1: 2}", ["engine.deepspeed.a={1: 2}; expected text as keys"]),
        ("model.dim=!!bool 3", ["model.dim=!!bool 3: no valid key or value (KeyError: '3'); expected key=value"]),
        ('model.dim=!!int ""', ["no valid key or value (IndexError"]),
        ("model.dim=!!timestamp x", ["no valid key or value (AttributeError"]),
        ("[=", ["[=: no valid key or value"]),
        ('run.directory="a\\0b"', ["run.directory=a\0b; expected text without null characters"]),
        ('data.train="a\\0b"', ["data.train=a\0b; expected text without null characters"]),
        ("\0.yaml", ["null byte; expected a YAML file or key=value"]),
        ('run.directory=""', ["run.directory=; expected a name"]),
        ("data.validation=''", ["data.validation=; expected a name"]),
        (f"run.directory={'a' * 4097}", ["run.directory has 4097 bytes; expected at most 4096"]),
        (f"engine.deepspeed={'[' * 80}{']' * 80}", ["nested more than 16 levels deep"]),
        # would end the interpreter
        (f"engine.deepspeed={'[' * 200_000}{']' * 200_000}", ["nested more than 16 levels deep"]),
        (f"engine.deepspeed{'.a' * 3000}=1", ["nested more than 16 levels deep"]),
        ("train.micro_batch_size=3", ["train.global_batch_tokens=1024", "multiple of 384"]),
        ("engine.kind=zero2", ["engine.kind=zero2", "zero3 or zero1"]),
        ("nowhere.yaml", ["nowhere.yaml", "No such file"]),
        ("engine.deepspeed=3", ["engine.deepspeed", "mapping"]),
        (
            "engine.deepspeed={a:{b:2}}",
            ["engine.deepspeed={a:{b:2}}: found unexpected ':'", "a space after each colon", "{a: {b: 2}}"],
        ),
        ("head_loss.weights=[1", ["head_loss.weights=[1: did not find expected ',' or ']'; expected key=value"]),
        ("train.steps=!!int a", ["train.steps=!!int a: invalid literal", "expected key=value"]),
        ("run.tensorboard=3", ["run.tensorboard: 3 is neither true nor false; expected bool"]),
        ("run.tensorboard='-1'", ["run.tensorboard: -1 is neither true nor false; expected bool"]),
        ("run.tensorboard=perhaps", ["run.tensorboard", "perhaps", "expected bool"]),
        ("train.compile=2", ["train.compile: 2 is neither true nor false; expected bool or null"]),
        ("model=", ["unknown key model", "did you mean model."]),
        ("model=${nothing}", ["unknown key model", "did you mean model."]),
    ],
)
def test_bad_settings_are_named_in_one_line(argument, words):
    with pytest.raises(InputError) as error:
        read_config([*GOOD, argument])
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("train.precision=fp32", "head_loss.precision=fp8 with train.precision=fp32; expected train.precision=bf16"),
        ("train.precision=fp16", "head_loss.precision=fp8 with train.precision=fp16; expected train.precision=bf16"),
        ("model.vocab_size=100", "head_loss.precision=fp8 with model.vocab_size=100; expected a multiple of 16"),
        ("model.dim=136", "head_loss.precision=fp8 with model.dim=136; expected a multiple of 16"),
    ],
)
def test_what_fp8_cannot_do_is_named(argument, words):
    good = [*GOOD, "model.vocab_size=96", "head_loss.precision=fp8"]
    assert read_config(good).head_loss.in_float8(0)
    with pytest.raises(InputError, match=words):
        read_config([*good, argument])


def test_heads_in_fp8():
    further = read_config([*GOOD, "model.vocab_size=96", "head_loss.precision=fp8", "head_loss.fp8_first_head=false"])
    assert [further.head_loss.in_float8(index) for index in range(3)] == [False, True, True]
    assert not read_config(GOOD).head_loss.in_float8(1)


def test_missing_key_is_named():
    with pytest.raises(InputError, match=r"run\.directory is not set"):
        read_config(GOOD[:-1])


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
KEYS = [f"{section.name}.{item.name}" for section in fields(Config) for item in fields(section.default_factory)]
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
        assert from_anywhere(config) == read_config([str(tmp_path / "written.yaml")])


def test_configuration_is_frozen():
    with pytest.raises(AttributeError):
        read_config(GOOD).model.dim = 3


def test_help_lists_every_key_with_meaning_and_default():
    lines = {line.split()[0]: line for line in describe().splitlines()}
    keys = [f"{section.name}.{item.name}" for section in fields(Config) for item in fields(section.default_factory)]
    assert list(lines) == keys
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
    assert cost.parameters(model) == pytest.approx(PARAMETERS[size], rel=2e-4)
    assert config.accumulation(64) >= 1


@pytest.mark.parametrize("size", FLOP_RATIOS)
def test_flop_ratios_of_table_s5(size):
    one, two, four = (cost.flops_per_token(paper_config(size, n).model, 4096) for n in (1, 2, 4))
    assert (round(two / one, 3), round(four / one, 3)) == FLOP_RATIOS[size]
