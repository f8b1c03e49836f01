"""Every setting of a run: frozen dataclasses, filled from one YAML file and `key=value` overrides, then cross-checked.

`read_config(["configs/quickstart.yaml", "optimizer.lr=3e-4"])` is the whole interface; `print_help` is `--help`.
"""

import dataclasses
import difflib
import io
import math
import os
import re
import shlex
import types
import typing
from contextlib import suppress
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING as REQUIRED
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megamtp.errors import InputError
from megamtp.files import write_atomically

RESOLVED = "config.yaml"  # in a run's folder: its whole configuration
BYTES = "bytes"  # data.tokenizer of byte-level runs
COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "broadcast")
MAX_LAYERS = 1000  # several times the deepest models'; to look at the layers of a mistaken number would take minutes
PRECISIONS = ("fp32", "bf16", "fp16")
MAX_DEPTH = 16  # of nested lists and mappings
MAX_NUMBER_LENGTH = 400  # characters; Python refuses to print integers of over 4300 digits
MAX_INTEGER = 2**31 - 1  # products of two, as of a tensor's shape, fit into int64
MAX_FLOAT = 3.4e38  # that of fp32, in which DeepSpeed and torch use these numbers
MAX_BYTES = 4096  # of a string: Linux opens no longer path
LARGEST = {  # where it differs from MAX_INTEGER
    "model.dim": 2**20,
    "model.num_layers": MAX_LAYERS,
    "model.mlp_dim": 2**24,
    "model.vocab_size": 2**24,
    "train.seed": 2**39 - 1,  # see pretrain.py
    "engine.deepspeed": 2**63 - 1,
    "cluster.emulate": 2**20,
    "cluster.communication_sms": 2**10,
    "run.stall_seconds": 10**6,
    "run.requeue_exit_code": 255,
}
LONGEST = {"data.train": 2**17}  # bytes, where it differs from MAX_BYTES; shlex takes a time that grows with the square


def option(default: Any, meaning: str) -> Any:
    """A dataclass field with its `--help` text; `default=REQUIRED` makes the user give it."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"meaning": meaning})
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-form multi-token model. `num_layers` counts trunk layers plus heads, as in the paper (L)."""

    dim: int = option(REQUIRED, "width of the residual stream")
    num_layers: int = option(REQUIRED, "transformer layers, trunk and heads together (L); the trunk has L - n")
    num_future_tokens: int = option(4, "heads (n): head i predicts the i-th next token; 1 is the ordinary model")
    head_kind: str = option(
        "parallel", "parallel: a head is one layer that reads z; or MODULE:CLASS of your own (model/heads.py)"
    )
    num_attention_heads: int = option(REQUIRED, "attention heads of a layer")
    num_key_value_heads: int | None = option(
        None, "key/value heads of a layer (grouped-query attention); null: one per attention head"
    )
    mlp_dim: int | None = option(None, "hidden width of SwiGLU; null: 8/3 of model.dim rounded up to a multiple of 256")
    vocab_size: int = option(
        REQUIRED,
        "rows of embedding and unembedding; may exceed the tokenizer's ids: the further rows are part of every "
        "softmax, in losses, decoding and exports, and training makes them improbable",
    )
    rope_theta: float = option(10000.0, "base of the rotary embedding's wavelengths")
    norm_eps: float = option(1e-5, "epsilon of RMSNorm")

    @property
    def num_trunk_layers(self) -> int:
        return self.num_layers - self.num_future_tokens

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def hidden_dim(self) -> int:
        """Hidden width of SwiGLU (f in paper.md's table)."""
        return self.mlp_dim or -(-8 * self.dim // (3 * 256)) * 256


@dataclass(frozen=True)
class HeadLossConfig:
    """The heads' losses."""

    weights: list[float] | None = option(None, "weight of each head's loss, n numbers; null: all 1, as in the paper")
    chunk_rows: int | None = option(
        None, "rows (positions) whose logits are alive at a time; null: at most 8192, and half a GiB of logits"
    )
    z_loss: float = option(0.0, "coefficient of the mean squared log-partition function (0: none)")
    precision: str | None = option(
        None,
        "fp8: products with the unembedding in 8 bits while training (bf16 models; Ada, Hopper and later); null: the "
        "model's",
    )
    fp8_first_head: bool = option(True, "precision=fp8: head 1 too; false: heads 2 to n only")

    def in_float8(self, index: int) -> bool:
        """Whether the head at `index` (from 0) trains with an fp8 loss."""
        return self.precision == "fp8" and (index > 0 or self.fp8_first_head)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, warm-up and cosine decay. Defaults: the paper's tables S13 and S14."""

    kind: str = option("adamw", "adamw; or MODULE:CLASS of your own (optimizers/base.py)")
    lr: float = option(3e-4, "peak learning rate")
    warmup_steps: int = option(1000, "steps of linear warm-up from 0 to the peak")
    final_lr_ratio: float = option(0.03, "learning rate of the last step over the peak (cosine in between)")
    beta1: float = option(0.9, "decay of AdamW's first moment")
    beta2: float = option(0.95, "decay of AdamW's second moment")
    eps: float = option(1e-8, "AdamW's epsilon")
    weight_decay: float = option(0.1, "decoupled weight decay of matrices (norms have none)")
    gradient_clipping: float = option(1.0, "largest norm of the whole gradient; 0: no clipping")


@dataclass(frozen=True)
class TrainConfig:
    """The mathematics of a run: none of these depends on the number of ranks."""

    steps: int = option(REQUIRED, "optimizer steps")
    global_batch_tokens: int = option(
        REQUIRED, "tokens of one step over all ranks; gradient accumulation follows from the world size"
    )
    micro_batch_size: int = option(REQUIRED, "windows of one forward pass of one rank")
    sequence_length: int = option(4096, "positions of a window (T)")
    precision: str = option("bf16", "bf16, fp32 or fp16 (fp16 on GPUs only)")
    activation_checkpointing: bool = option(False, "recompute trunk layers in the backward pass to save memory")
    compile: bool | None = option(
        None, "run the layers through torch.compile, one function for all of them; null: on GPUs"
    )
    seed: int = option(0, "seed of the initial weights and of the order of the data")


@dataclass(frozen=True)
class EngineConfig:
    """The DeepSpeed engine that hosts the model."""

    kind: str = option(
        "zero3",
        "zero3: parameters, gradients and optimizer sharded; zero1: optimizer only; pipeline: layers cut into stages, "
        "and zero1",
    )
    num_stages: int | None = option(None, "pipeline: stages, each on ranks of its own; a divisor of their number")
    stage_layers: list[int] | None = option(
        None, "pipeline: layers of each stage, trunk and then heads; null: the cut whose slowest stage is fastest"
    )
    spread_losses: bool = option(
        False,
        "pipeline: each stage has some rows of the unembedding, and does their part of all heads' losses in one chunk",
    )
    stage_memory_bytes: float | None = option(
        None, "pipeline: memory of a rank that a chosen cut must fit into; null: any"
    )
    communication: str = option(
        "grouped",
        "zero3: grouped, one collective per module, straight to and from the weights; or deepspeed, as it is shipped",
    )
    prefetch_modules: int = option(2, "zero3, grouped: modules whose weights are on their way before they are needed")
    head_schedule: str = option(
        "sequential", "sequential: heads forward and backward in turn; deferred: one backward through all"
    )
    reduce_bucket_size: int = option(
        500_000_000, "elements of a gradient reduction bucket; unused by grouped communication"
    )
    param_persistence_threshold: int = option(0, "zero3: parameters of fewer elements stay on every rank")
    reduce_dtype: str | None = option(
        None, "precision in which gradients cross ranks: fp32, bf16 or fp16; null: train.precision"
    )
    offload_optimizer: bool = option(False, "keep optimizer state in CPU memory")
    offload_parameters: bool = option(False, "zero3: keep parameter shards in CPU memory")
    deepspeed: dict[str, Any] = option({}, "further DeepSpeed settings, passed through; a clash with ours is refused")

    @property
    def pipeline_stages(self) -> int:
        """num_stages, which every pipeline has."""
        assert self.num_stages is not None
        return self.num_stages


@dataclass(frozen=True)
class ClusterConfig:
    """A cluster that is emulated on one GPU, to see what a job would cost on it. Defaults: H100, NVLink, 400 Gb/s
    per GPU.
    """

    emulate: int | None = option(
        None, "ranks of the emulated cluster, of which this process is one; null: no emulation"
    )
    latency: float = option(20e-6, "seconds before a collective's first byte")
    flat_bandwidth: float | None = option(
        None, "bytes/s of each rank in a network without nodes; null: nodes, as follows"
    )
    ranks_per_node: int = option(8, "ranks of a node")
    node_bandwidth: float = option(360e9, "bytes/s of each rank inside its node")
    network_bandwidth: float = option(
        50e9, "bytes/s of each rank to other nodes; collectives use all of a node's links at once"
    )
    efficiency: dict[str, float] = option(
        {}, "share of the bandwidth that a kind of collective reaches, such as {reduce_scatter: 0.9}; 1 where not given"
    )
    communication_sms: int = option(16, "multiprocessors that a collective holds while it lasts")


@dataclass(frozen=True)
class DataConfig:
    """Prepared corpora: prefixes of Megatron .bin/.idx pairs (tools/prepare_data.py writes them)."""

    train: str = option(
        REQUIRED, "prefix of the training corpus, or of several after their weights: '0.7 a/train 0.3 b/train'"
    )
    validation: str | None = option(None, "prefix of the validation corpus; null: no evaluation")
    tokenizer: str | None = option(
        None, "SentencePiece model of at most model.vocab_size pieces, exported with the model; or bytes"
    )
    documents: str = option(
        "continue",
        "continue: windows cross documents, as the paper's; mask: no target in another document; isolate: nor "
        "attention",
    )
    accept_changes: bool = option(
        False,
        "go on with a run although its windows change: other corpora, weights, sequence length, documents or seed",
    )

    @property
    def train_corpora(self) -> list[tuple[float, str]]:
        """(weight, prefix) of each training corpus; a single one may be given without weight, whatever is in its name.

        Raises:
            InputError: what begins with a weight is no list of weights and prefixes.
        """
        try:
            words = shlex.split(self.train)
        except ValueError:  # a quotation mark in a single corpus's name
            words = [self.train]
        if len(words) < 2 or not _is_number(words[0]):
            return [(1.0, self.train)]
        weights, prefixes = words[::2], words[1::2]
        for weight in weights:
            good = len(words) % 2 == 0 and _is_number(weight) and 0 < float(weight) < math.inf
            _require(
                good,
                f"data.train={self.train}",
                "WEIGHT PREFIX WEIGHT PREFIX ..., weights above 0, names with spaces quoted",
            )
        finite = sum(map(float, weights)) < math.inf
        _require(finite, f"data.train={self.train}", "weights whose sum is a finite number")
        return list(zip(map(float, weights), prefixes, strict=True))


@dataclass(frozen=True)
class RunConfig:
    """Where a run writes, and how often."""

    directory: str = option(
        REQUIRED, "folder of metrics, checkpoints and the resolved configuration; an existing run is resumed"
    )
    initial_weights: str | None = option(
        None,
        "canonical checkpoint (tools/convert_checkpoint.py writes it) whose weights a new run starts from; null: drawn",
    )
    save_every_steps: int = option(1000, "steps between checkpoints; the last step is always saved")
    keep_checkpoints: int = option(2, "newest checkpoints kept")
    keep_every_steps: int | None = option(None, "checkpoints at multiples of this are kept for good; null: none")
    evaluate_every_steps: int = option(1000, "steps between evaluations; the last step is always evaluated")
    evaluation_windows: int | None = option(None, "validation windows of an evaluation; null: all")
    log_every_steps: int = option(1, "steps between lines of metrics")
    tensorboard: bool = option(True, "write TensorBoard events beside metrics.jsonl")
    peak_flops: float | None = option(
        None, "FLOP/s of one card at train.precision, for the model-FLOP share; null: known cards only"
    )
    stall_seconds: int | None = option(
        None,
        "longest a step, a save or some batches of an evaluation may take; a rank that waits longer prints where, and "
        "ends the job",
    )
    requeue_exit_code: int = option(0, "exit status after a save asked for by SIGTERM or SIGUSR1")


@dataclass(frozen=True)
class Config:
    """One run. Sections appear as `section.key` in YAML files, overrides and messages."""

    model: ModelConfig = field(default_factory=ModelConfig)
    head_loss: HeadLossConfig = field(default_factory=HeadLossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def head_weights(self) -> list[float]:
        return list(self.head_loss.weights or [1.0] * self.model.num_future_tokens)

    @property
    def global_batch_windows(self) -> int:
        return self.train.global_batch_tokens // self.train.sequence_length

    def accumulation(self, data_parallel_size: int) -> int:
        """Micro-batches of one rank in a step (A) when `data_parallel_size` ranks, or pipelines of ranks, share the
        global batch.

        Raises:
            InputError: the global batch does not divide.
        """
        tokens = self.train.sequence_length * self.train.micro_batch_size * data_parallel_size
        if self.train.global_batch_tokens % tokens:
            sharers = "pipelines" if self.engine.kind == "pipeline" else "ranks"
            raise InputError(
                f"train.global_batch_tokens={self.train.global_batch_tokens} is not a multiple of {tokens} = "
                f"train.sequence_length {self.train.sequence_length} x train.micro_batch_size "
                f"{self.train.micro_batch_size} x {data_parallel_size} {sharers}; change one of them"
            )
        return self.train.global_batch_tokens // tokens


def read_config(arguments: list[str]) -> Config:
    """`[file.yaml, key=value, ...]` -> a checked configuration.

    Raises:
        InputError: an unreadable file, an unknown key (the nearest right one is named), a wrong type or value.
    """
    settings = _schema()
    for argument in arguments:
        settings = _merge(settings, *_parse(argument))
    try:
        missing = sorted(OmegaConf.missing_keys(settings))
        config = None if missing else OmegaConf.to_object(settings)
    # an interpolation, ${...}, of a missing key or of its own section
    except (OmegaConfBaseException, RecursionError) as error:
        key = getattr(error, "full_key", None)
        raise InputError(
            f"{f'{key}: ' if key else ''}{_first_line(error)}; expected a value, or ${{section.key}}"
        ) from None
    if config is None:
        raise InputError(f"{missing[0]} is not set; give it in the YAML file or as {missing[0]}=VALUE")
    assert isinstance(config, Config)
    _check(config)
    return config


def write_config(config: Config, path: Path) -> None:
    """Saves the resolved configuration as YAML that `read_config` accepts, from any working directory."""
    write_atomically(path, OmegaConf.to_yaml(OmegaConf.structured(from_anywhere(config))).encode())


def from_anywhere(config: Config) -> Config:
    """The same with absolute paths of data and weights."""
    if config.run.initial_weights:
        run = dataclasses.replace(config.run, initial_weights=_absolute(config.run.initial_weights))
        config = dataclasses.replace(config, run=run)
    data = config.data
    validation = _absolute(data.validation) if data.validation else data.validation
    tokenizer = _absolute(data.tokenizer) if data.tokenizer and data.tokenizer != BYTES else data.tokenizer
    corpora = [(weight, _absolute(prefix)) for weight, prefix in data.train_corpora]
    blend = " ".join(f"{weight!r} {shlex.quote(prefix)}" for weight, prefix in corpora)
    train = corpora[0][1] if len(corpora) == 1 else blend
    data = dataclasses.replace(data, train=train, validation=validation, tokenizer=tokenizer)
    return dataclasses.replace(config, data=data)


def differences(old: Config, new: Config) -> list[str]:
    """`section.key: old -> new` of every setting that is not the same."""
    before, after = dataclasses.asdict(old), dataclasses.asdict(new)
    keys = [key.split(".") for key, _, _ in _keys(Config)]
    return [
        f"{section}.{name}: {_shown(before[section][name])} -> {_shown(after[section][name])}"
        for section, name in keys
        if before[section][name] != after[section][name]
    ]


def describe() -> str:
    """One line per key: its meaning and default."""
    defaults = _schema()
    required = OmegaConf.missing_keys(defaults)
    lines = []
    for key, key_type, meaning in _keys(Config):
        default = "required" if key in required else _shown(OmegaConf.select(defaults, key))
        lines.append(f"  {key:38s} {meaning} [{_type_name(key_type)}; {default}]")
    return "\n".join(lines)


def print_help(arguments: list[str], description: str) -> bool:
    """Whether a command that takes keys was asked for help, which this prints."""
    if "--help" not in arguments and "-h" not in arguments:
        return False
    with suppress(BrokenPipeError):  # as of `| head`
        print(f"{description}\nKeys [type; default]:\n{describe()}")
    return True


def _schema() -> DictConfig:
    schema = OmegaConf.structured(Config)
    for node in (schema, *(schema[section] for section in schema)):
        OmegaConf.set_readonly(node, None)  # frozen dataclasses make read-only nodes, which refuse to be merged
    return schema


def _parse(argument: str) -> tuple[str, DictConfig]:
    """The name to blame in messages, and the settings of one argument."""
    if "=" in argument and not os.path.isfile(argument):  # unlike Path's, False where the name is too long
        key, _, value = argument.partition("=")
        try:
            _require_shallow(value, key.count(".") + key.count("["))
            return argument, OmegaConf.from_dotlist([argument])
        except Exception as error:  # YAML's constructors let through what Python's raise: !!bool 3 is a KeyError
            in_braces = isinstance(error, yaml.YAMLError) and "{" in argument
            spaces = ", with a space after each colon in braces: {a: {b: 2}}" if in_braces else ""
            raise InputError(f"{argument}: {_yaml_problem(error)}; expected key=value{spaces}") from None
    try:
        text = Path(argument).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{argument}: not UTF-8 text; expected a YAML file or key=value") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{argument}: {reason}; expected a YAML file or key=value") from None
    try:
        _require_shallow(text)
        settings = OmegaConf.load(io.StringIO(text))
    except (OSError, AssertionError):
        settings = None  # OmegaConf's own: the file holds a number, in quotes or not, or true or false
    except Exception as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        raise InputError(f"{argument} is not valid YAML, {place}{_yaml_problem(error)}; correct the file") from None
    if not isinstance(settings, DictConfig):
        raise InputError(f"{argument} holds no mapping of keys; expected sections such as 'model: {{dim: 128}}'")
    sections = [item.name for item in dataclasses.fields(Config)]
    for section, values in _items(settings):
        if values is None and section in sections:
            del settings[section]  # empty, as where each of its keys is commented out
    return argument, settings


def _items(settings: DictConfig) -> list[tuple[Any, Any]]:
    """(key, value) as YAML has them, of any type."""
    found = OmegaConf.to_container(settings)
    assert isinstance(found, dict)
    return list(found.items())


def _require_shallow(text: str, depth: int = 0) -> None:
    """Raises: yaml.YAMLError for YAML text nested so deeply, or with a number so long, that parsing or printing it
    could fail.
    """
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise yaml.YAMLError(f"nested more than {MAX_DEPTH} levels deep")
        is_long = isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_NUMBER_LENGTH
        if is_long and re.fullmatch(r"[-+_]*[0-9][-+0-9a-fA-FxX_:.]*", event.value):
            raise yaml.YAMLError(f"a number of {len(event.value)} characters")


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, yaml.YAMLError | OmegaConfBaseException | ValueError):
        return getattr(error, "problem", None) or _first_line(error)
    return f"no valid key or value ({type(error).__name__}: {_first_line(error)})"


def _merge(settings: DictConfig, source: str, given: DictConfig) -> DictConfig:
    known = {key: key_type for key, key_type, _ in _keys(Config)}
    sections = [item.name for item in dataclasses.fields(Config)]
    for section, values in _items(given):
        named = {section: values}
        if isinstance(values, dict) and (values or section in sections):
            named = {f"{section}.{name}": value for name, value in values.items()}
        for name, value in named.items():
            if name not in known:
                raise InputError(f"{source}: unknown key {name}; {_nearest(str(name), list(known))}")
            if known[name] in (bool, bool | None) and _is_number(str(value)) and float(str(value)) not in (0, 1):
                # OmegaConf takes any whole number but 0 for true.
                raise InputError(f"{source}: {name}: {value} is neither true nor false{_expected(name)}")
    try:
        merged = OmegaConf.merge(settings, given)
    except (OmegaConfBaseException, TypeError, OverflowError) as error:
        key = getattr(error, "full_key", None)
        raise InputError(
            f"{source}: {f'{key}: ' if key else ''}{_first_line(error)}{_expected(key or source.partition('=')[0])}"
        ) from None
    assert isinstance(merged, DictConfig)
    return merged


def _expected(key: str | None) -> str:
    """What a setting should be, or an element of one, such as `head_loss.weights[0]`."""
    key = key or ""
    setting = ".".join(re.split(r"[.\[]", key)[:2])
    expected = {name: key_type for name, key_type, _ in _keys(Config)}.get(setting)
    if expected and key != setting:
        container = typing.get_args(expected)[0] if isinstance(expected, types.UnionType) else expected
        expected = next(reversed(typing.get_args(container)), None)
    return f"; expected {_type_name(expected)}" if expected else ""


def _keys(section: type, prefix: str = "") -> list[tuple[str, Any, str]]:
    """(dotted key, type, meaning) of every setting."""
    found = []
    for item in dataclasses.fields(section):
        if item.default_factory is not MISSING and dataclasses.is_dataclass(item.default_factory):
            found += _keys(item.default_factory, f"{item.name}.")
        else:
            found.append((prefix + item.name, item.type, item.metadata["meaning"]))
    return found


def _nearest(name: str, known: list[str]) -> str:
    def likeness(key: str) -> float:
        """Of the whole key, or of its last part: `lr` means optimizer.lr."""
        pairs = ((name, key), (name.rpartition(".")[2], key.rpartition(".")[2]))
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return f"did you mean {max(known, key=likeness)}? (--help lists every key)"


def _type_name(key_type: Any) -> str:
    if isinstance(key_type, types.UnionType):
        return " or ".join(_type_name(part) for part in typing.get_args(key_type))
    if key_type is type(None):
        return "null"
    return "mapping" if typing.get_origin(key_type) is dict else getattr(key_type, "__name__", str(key_type))


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).partition("\n")[0].split())


def _absolute(path: str) -> str:
    return str(Path(path).absolute())


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _require(good: bool, found: str, expected: str) -> None:
    if not good:
        raise InputError(f"{found}; expected {expected}")


def _one_of(key: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    _require(value in allowed, f"{key}={_shown(value)}", " or ".join(map(_shown, allowed)))


def _positive(config: Config, *keys: str) -> None:
    for key in keys:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        _require(value is None or value >= 1, f"{key}={value}", "at least 1")


def _not_negative(config: Config, *keys: str) -> None:
    for key in keys:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        _require(value >= 0, f"{key}={value}", "0 or more")


def _check_values(section: str, values: Any) -> None:
    """The type and the size of each setting of a section; OmegaConf does not check the types inside lists and
    mappings.
    """
    for item in dataclasses.fields(values):
        _check_value(f"{section}.{item.name}", getattr(values, item.name), item.type)


def _check_value(key: str, value: Any, expected: Any, place: str = "") -> None:
    """`place`: where in the setting `key` the value is, such as "[0]"."""
    allowed = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    if expected is Any:
        good = isinstance(value, None | bool | int | float | str | list | dict)
    else:
        good = isinstance(value, tuple(typing.get_origin(one) or one for one in allowed)) or (
            float in allowed and isinstance(value, int)
        )
    found = f"{key}{place}={value}"
    _require(
        good,
        found,
        "null, true or false, a number, text, a list or a mapping" if expected is Any else _type_name(expected),
    )
    inner = next((typing.get_args(one)[-1] for one in allowed if typing.get_origin(one) is type(value)), Any)
    if isinstance(value, dict):
        for name, element in value.items():
            _require(isinstance(name, str), found, f"text as keys, not {name!r}")
            _check_value(key, element, inner, f"{place}.{name}")
    elif isinstance(value, list):
        for index, element in enumerate(value):
            _check_value(key, element, inner, f"{place}[{index}]")
    elif isinstance(value, str):
        _check_text(key, value, found, may_be_empty=expected is Any)
    elif isinstance(value, float):
        _require(abs(value) <= MAX_FLOAT, found, f"a finite number, at most {MAX_FLOAT}")
    elif isinstance(value, int):
        largest = LARGEST.get(key, MAX_INTEGER)
        _require(abs(value) <= largest, found, f"at most {largest}")


def _check_text(key: str, value: str, found: str, may_be_empty: bool) -> None:
    _require(bool(value) or may_be_empty, found, "a name")
    try:
        num_bytes = len(value.encode())
    except UnicodeEncodeError:
        raise InputError(f"{found}; expected text that can be written as UTF-8") from None
    _require("\0" not in value, found, "text without null characters")
    longest = LONGEST.get(key, MAX_BYTES)
    _require(num_bytes <= longest, f"{key} has {num_bytes} bytes", f"at most {longest}")


def _check(config: Config) -> None:
    """Everything that can be known without data, devices and peers."""
    check_model_numbers(config.model)
    for section in dataclasses.fields(config):
        _check_values(section.name, getattr(config, section.name))
    train, optimizer = config.train, config.optimizer
    _positive(
        config,
        "train.steps",
        "train.global_batch_tokens",
        "train.micro_batch_size",
        "train.sequence_length",
        "head_loss.chunk_rows",
        "run.save_every_steps",
        "run.keep_checkpoints",
        "run.keep_every_steps",
        "run.evaluate_every_steps",
        "run.evaluation_windows",
        "run.log_every_steps",
        "run.stall_seconds",
        "engine.reduce_bucket_size",
        "cluster.emulate",
        "cluster.ranks_per_node",
        "cluster.flat_bandwidth",
        "cluster.node_bandwidth",
        "cluster.network_bandwidth",
        "cluster.communication_sms",
    )
    _not_negative(
        config,
        "optimizer.lr",
        "optimizer.warmup_steps",
        "optimizer.final_lr_ratio",
        "optimizer.eps",
        "optimizer.weight_decay",
        "optimizer.gradient_clipping",
        "head_loss.z_loss",
        "train.seed",
        "engine.param_persistence_threshold",
        "engine.prefetch_modules",
        "cluster.latency",
        "run.requeue_exit_code",
    )
    for kind, share in config.cluster.efficiency.items():
        _one_of("a kind in cluster.efficiency", kind, COLLECTIVES)
        _require(1e-6 <= share <= 2, f"cluster.efficiency of {kind}={share}", "a share of the bandwidth: 1e-6 to 2")
    _check_paths(config)
    peak = config.run.peak_flops
    _require(peak is None or peak > 0, f"run.peak_flops={peak}", "a number above 0")
    for name in ("beta1", "beta2"):
        value = getattr(optimizer, name)
        _require(0 <= value < 1, f"optimizer.{name}={value}", "a number in [0, 1)")
    _one_of("data.documents", config.data.documents, ("continue", "mask", "isolate"))
    _one_of("train.precision", train.precision, PRECISIONS)
    _one_of("engine.reduce_dtype", config.engine.reduce_dtype, (*PRECISIONS, None))
    _one_of("engine.kind", config.engine.kind, ("zero3", "zero1", "pipeline"))
    _one_of("engine.communication", config.engine.communication, ("grouped", "deepspeed"))
    _one_of("engine.head_schedule", config.engine.head_schedule, ("sequential", "deferred"))
    _check_head_loss(config)
    _require(
        not config.engine.offload_parameters or config.engine.kind == "zero3",
        f"engine.offload_parameters with engine.kind={config.engine.kind}",
        "engine.kind=zero3",
    )
    _require(
        not (config.cluster.emulate and config.run.initial_weights),
        "run.initial_weights with cluster.emulate",
        "one of them: the weights of an emulated rank are no model's",
    )
    _check_pipeline(config)
    config.accumulation(data_parallel_size=1)


def _check_paths(config: Config) -> None:
    data, run = config.data, config.run
    corpora = data.train_corpora
    _require(len(corpora) <= 1024, f"data.train with {len(corpora)} corpora", "at most 1024")
    for path in filter(
        None, (run.directory, run.initial_weights, data.validation, data.tokenizer, *(name for _, name in corpora))
    ):
        _require(path.split("/")[0] != "~", path, "a path without ~, which no shell replaces here: write $HOME")


def _check_head_loss(config: Config) -> None:
    head_loss, n = config.head_loss, config.model.num_future_tokens
    _require(
        head_loss.weights is None or len(head_loss.weights) == n,
        f"head_loss.weights has {len(head_loss.weights or [])} numbers",
        f"{n}, one per head (model.num_future_tokens)",
    )
    for weight in config.head_weights:
        _require(weight >= 0, f"head_loss.weights holds {weight}", "0 or more")
    _require(any(config.head_weights), f"head_loss.weights={config.head_weights}", "at least one above 0")
    _one_of("head_loss.precision", head_loss.precision, (None, "fp8"))
    if head_loss.precision == "fp8":
        _check_float8(config)


def _check_pipeline(config: Config) -> None:
    """The stages of engine.kind=pipeline; no other kind has any."""
    engine, num_layers = config.engine, config.model.num_layers
    if engine.kind != "pipeline":
        for name in ("num_stages", "stage_layers", "stage_memory_bytes"):
            value = getattr(engine, name)
            _require(value is None, f"engine.{name}={value} with engine.kind={engine.kind}", "engine.kind=pipeline")
        _require(
            not engine.spread_losses,
            f"engine.spread_losses=True with engine.kind={engine.kind}",
            "engine.kind=pipeline",
        )
        return
    _require(
        engine.num_stages is not None and engine.num_stages >= 2,
        f"engine.num_stages={_shown(engine.num_stages)}",
        "at least 2 with engine.kind=pipeline (engine.kind=zero1 is a pipeline of one stage)",
    )
    assert engine.num_stages is not None
    _require(
        engine.num_stages <= num_layers,
        f"engine.num_stages={engine.num_stages} with model.num_layers={num_layers}",
        "no more stages than layers",
    )
    limit = engine.stage_memory_bytes
    _require(limit is None or limit > 0, f"engine.stage_memory_bytes={limit}", "a number above 0")
    if engine.stage_layers is not None:
        _require(
            len(engine.stage_layers) == engine.num_stages
            and min(engine.stage_layers) >= 1
            and sum(engine.stage_layers) == num_layers,
            f"engine.stage_layers={engine.stage_layers}",
            f"{engine.num_stages} numbers (engine.num_stages), each at least 1, that sum to "
            f"model.num_layers={num_layers}",
        )
        _require(
            limit is None,
            "engine.stage_memory_bytes with engine.stage_layers",
            "one of them: a limit is for cuts that are chosen",
        )
    _check_only_pipeline(config)


def _check_only_pipeline(config: Config) -> None:
    """Nothing is asked for that the pipeline engine does not do."""
    engine = config.engine
    others = {
        "offload_parameters": False,
        "offload_optimizer": False,
        "param_persistence_threshold": 0,
        "communication": "grouped",
        "head_schedule": "sequential",
    }
    for name, only in others.items():
        value = getattr(engine, name)
        _require(
            value == only,
            f"engine.{name}={value} with engine.kind=pipeline",
            f"{only}, for the pipeline does nothing else",
        )
    zero = engine.deepspeed.get("zero_optimization")
    for name in zero if isinstance(zero, dict) else ():
        _require(
            not str(name).startswith("stage"),
            f"engine.deepspeed.zero_optimization.{name} with engine.kind=pipeline",
            "engine.kind=zero3: a pipeline has ZeRO-1",
        )
    _require(
        not engine.deepspeed.get("wall_clock_breakdown"),
        "engine.deepspeed.wall_clock_breakdown with engine.kind=pipeline",
        "false: DeepSpeed's pipeline starts its timers twice",
    )
    _require(config.train.precision != "fp16", "train.precision=fp16 with engine.kind=pipeline", "bf16 or fp32")
    _require(
        config.cluster.emulate is None, "cluster.emulate with engine.kind=pipeline", "zero3: stages are not emulated"
    )


def _check_float8(config: Config) -> None:
    found = f"head_loss.precision=fp8 with train.precision={config.train.precision}"
    _require(config.train.precision == "bf16", found, "train.precision=bf16")
    for name in ("dim", "vocab_size"):
        value = getattr(config.model, name)
        _require(
            value % 16 == 0,
            f"head_loss.precision=fp8 with model.{name}={value}",
            "a multiple of 16, as fp8 products need",
        )


def check_model_numbers(model: ModelConfig) -> None:
    """Raises: InputError if no model has these numbers."""
    _check_values("model", model)
    for name in ("dim", "num_attention_heads", "vocab_size", "num_key_value_heads", "mlp_dim"):
        value = getattr(model, name)
        _require(value is None or value >= 1, f"model.{name}={value}", "at least 1")
    for name in ("rope_theta", "norm_eps"):
        value = getattr(model, name)
        _require(value > 0, f"model.{name}={value}", "a number above 0")
    n = model.num_future_tokens
    _require(n >= 1, f"model.num_future_tokens={n}", "at least 1 (1 is the ordinary next-token model)")
    _require(
        n < model.num_layers,
        f"model.num_future_tokens={n} with model.num_layers={model.num_layers}",
        "fewer heads than layers: num_layers counts trunk and heads together, and the trunk needs one",
    )
    _require(
        model.num_layers <= MAX_LAYERS, f"model.num_layers={model.num_layers}", f"at most {MAX_LAYERS}, heads included"
    )
    _require(
        model.dim % model.num_attention_heads == 0 and model.head_dim % 2 == 0,
        f"model.dim={model.dim} with model.num_attention_heads={model.num_attention_heads}",
        "heads of one even width: dim a multiple of 2 x num_attention_heads",
    )
    _require(
        model.num_attention_heads % model.key_value_heads == 0,
        f"model.num_key_value_heads={model.num_key_value_heads}",
        f"a divisor of model.num_attention_heads={model.num_attention_heads}",
    )
