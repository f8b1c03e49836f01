"""Defines every setting of a run, in frozen dataclasses. Each field has a description and bounds.

`option` and `Section` (fields.py) check a setting by itself; `check_together` checks the settings of one section with
each other; consistency.py checks the sections with each other. reader.py makes a Config from YAML files and overrides.

Tests: tests/unit/config/test_reader.py.
"""

import math
import shlex
from dataclasses import dataclass, field, replace
from typing import Any

from megamtp.config.cluster_schema import ClusterConfig
from megamtp.config.fields import REQUIRED, Section, check_paths, expect, option, parse_number
from megamtp.config.model_schema import ModelConfig
from megamtp.errors import InputError

BYTES = "bytes"  # data.tokenizer of byte-level runs
MAX_CORPORA = 1024
DTYPES = ("fp32", "bf16", "fp16")
FLOAT8_MULTIPLE = 16  # fp8 products need dimensions that are multiples of it
Only = dict[str, tuple[str, ...]]  # the other fields, and their values, with which an option has an effect: see option
ZERO, ZERO3, PIPELINE = Only(kind=("zero3", "zero1")), Only(kind=("zero3",)), Only(kind=("pipeline",))


@dataclass(frozen=True)
class HeadLossConfig(Section):
    """The heads' losses."""

    weights: list[float] | None = option(
        None, "weight of each head's loss, n numbers; null: all 1, as in the paper", at_least=0
    )
    chunk_rows: int | None = option(
        None, "positions whose logits exist at a time; null: as many as fit into half a GiB, at most 8192", at_least=1
    )
    z_loss: float = option(0.0, "coefficient of the mean squared log-partition function (0: none)", at_least=0)
    precision: str | None = option(
        None,
        "products of the losses while training: bf16, or fp8 in a bf16 or fp8 run; null: train.precision",
        one_of=(None, "fp8", "bf16"),
    )
    fp8_first_head: bool = option(True, "fp8 also for head 1; false: heads 2 to n only")

    def in_float8(self, index: int) -> bool:
        """Returns whether the head at `index` (from 0) trains with an fp8 loss."""
        return self.precision == "fp8" and (index > 0 or self.fp8_first_head)


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """AdamW, warm-up and cosine decay. Defaults: the paper's tables S13 and S14."""

    kind: str = option("adamw", "adamw; or MODULE:CLASS of your own (optimizers/base.py)")
    lr: float = option(3e-4, "peak learning rate", at_least=0)
    warmup_steps: int = option(1000, "steps of linear warm-up from 0 to the peak", at_least=0)
    final_lr_ratio: float = option(0.03, "last learning rate / peak learning rate; cosine in between", at_least=0)
    beta1: float = option(0.9, "decay of AdamW's first moment", at_least=0, below=1)
    beta2: float = option(0.95, "decay of AdamW's second moment", at_least=0, below=1)
    eps: float = option(1e-8, "AdamW's epsilon", at_least=0)
    weight_decay: float = option(0.1, "decoupled weight decay of matrices (norms have none)", at_least=0)
    gradient_clipping: float = option(1.0, "largest norm of the whole gradient; 0: no clipping", at_least=0)


@dataclass(frozen=True)
class TrainConfig(Section):
    """What is trained, independently of the number of ranks.

    micro_batch_size, activation_checkpointing, compile and cuda_graphs change only speed, memory and rounding.
    """

    steps: int = option(REQUIRED, "optimizer steps", at_least=1)
    global_batch_tokens: int = option(
        REQUIRED, "tokens of a step over all ranks; the number of micro-batches follows", at_least=1
    )
    micro_batch_size: int = option(REQUIRED, "windows of one forward pass of one rank", at_least=1)
    sequence_length: int = option(4096, "positions of a window (T)", at_least=1)
    precision: str = option(
        "bf16",
        "bf16, fp32, fp16 (on GPUs only), or fp8: as bf16, with the layers' products in fp8 (Ada, Hopper and later "
        "GPUs; emulated on CPUs, slowly)",
        one_of=(*DTYPES, "fp8"),
    )
    activation_checkpointing: bool = option(False, "recompute trunk layers in the backward pass to save memory")
    compile: bool | None = option(None, "run the layers through torch.compile; null: on GPUs")
    cuda_graphs: bool = option(
        False, "zero3, grouped: launch a layer's kernels as a CUDA graph, for small models whose steps wait for the CPU"
    )
    # training/starting.py derives a seed of each rank from it, which must be below 2^63.
    seed: int = option(0, "seed of the initial weights and of the order of the data", at_least=0, at_most=2**39 - 1)

    @property
    def dtype(self) -> str:
        """The dtype of weights and activations. With precision=fp8 only products are in fp8."""
        return "bf16" if self.precision == "fp8" else self.precision


@dataclass(frozen=True)
class EngineConfig(Section):
    """The DeepSpeed engine that hosts the model."""

    kind: str = option(
        "zero3",
        "zero3: parameters, gradients and optimizer state sharded; zero1: optimizer state only; pipeline: layers "
        "divided among stages, and zero1 across pipelines",
        one_of=("zero3", "zero1", "pipeline"),
    )
    num_stages: int | None = option(None, "pipeline: stages; a divisor of the number of ranks", only=PIPELINE)
    stage_layers: list[int] | None = option(
        None,
        "pipeline: layers of each stage, trunk and then heads; null: the fastest partition",
        at_least=1,
        only=PIPELINE,
    )
    spread_losses: bool = option(
        False, "pipeline: every stage computes a part of each loss, from its rows of the unembedding", only=PIPELINE
    )
    stage_memory_bytes: float | None = option(
        None, "pipeline: largest memory of a rank when the partition is chosen; null: no limit", above=0, only=PIPELINE
    )
    communication: str = option(
        "grouped",
        "zero3: grouped, one collective per module; or deepspeed, DeepSpeed's implementation",
        one_of=("grouped", "deepspeed"),
        only=ZERO3,
    )
    prefetch_modules: int = option(
        2,
        "zero3, grouped: modules whose weights are gathered ahead of their use",
        at_least=0,
        only=ZERO3 | Only(communication=("grouped",)),
    )
    head_schedule: str = option(
        "sequential",
        "sequential: a backward pass per head; deferred: one through all heads",
        one_of=("sequential", "deferred"),
        only=ZERO,
    )
    reduce_bucket_size: int = option(
        500_000_000, "elements of a gradient bucket; not used by grouped communication", at_least=1
    )
    param_persistence_threshold: int = option(
        0, "zero3: parameters with fewer elements than this stay on every rank", at_least=0, only=ZERO3
    )
    reduce_dtype: str | None = option(
        None, "precision of gradient reductions; null: that of train.precision, bf16 for fp8", one_of=(*DTYPES, None)
    )
    offload_optimizer: bool = option(False, "zero1, zero3: keep optimizer state in CPU memory", only=ZERO)
    offload_parameters: bool = option(False, "zero3: keep parameter shards in CPU memory", only=ZERO3)
    deepspeed: dict[str, Any] = option(
        {}, "further DeepSpeed settings; those that megamtp sets are refused", at_most=2**63 - 1
    )

    @property
    def pipeline_stages(self) -> int:
        """Returns num_stages. It must be set, as it is in every checked configuration of a pipeline."""
        assert self.num_stages is not None
        return self.num_stages


@dataclass(frozen=True)
class DataConfig(Section):
    """Prepared corpora: prefixes of Megatron .bin/.idx pairs (tools/prepare_data.py writes them)."""

    train: str = option(
        REQUIRED,
        "prefix of the corpus, or weights and prefixes: '0.7 a/train 0.3 b/train'",
        max_bytes=2**17,  # the time of shlex grows with the square of the length
    )
    validation: str | None = option(None, "prefix of the validation corpus; null: no evaluation")
    tokenizer: str | None = option(None, "SentencePiece model, which is exported with the weights; or bytes")
    documents: str = option(
        "continue",
        "continue: windows cross documents, as in the paper; mask: no targets across them; isolate: also no attention",
        one_of=("continue", "mask", "isolate"),
    )
    accept_changes: bool = option(False, "resume even if corpora, weights, sequence length, documents or seed differ")

    @property
    def train_corpora(self) -> list[tuple[float, str]]:
        """Returns (weight, prefix) of each training corpus. Without a weight, all of `train` is one prefix.

        Raises:
            InputError: `train` begins with a weight but is not a list of weights and prefixes.
        """
        try:
            words = shlex.split(self.train)
        except ValueError:  # a quotation mark in a single corpus's name
            words = [self.train]
        if len(words) < 2 or parse_number(words[0]) is None:
            return [(1.0, self.train)]
        found, prefixes = f"data.train={self.train}", words[1::2]
        weights = [weight for weight in map(parse_number, words[::2]) if weight is not None and 0 < weight < math.inf]
        good = len(words) % 2 == 0 and len(weights) == len(prefixes)
        expect(good, found, "WEIGHT PREFIX WEIGHT PREFIX ..., weights above 0, names with spaces quoted")
        expect(sum(weights) < math.inf, found, "weights whose sum is a finite number")
        return list(zip(weights, prefixes, strict=True))

    def check_together(self) -> None:
        """See Section."""
        corpora = self.train_corpora
        expect(len(corpora) <= MAX_CORPORA, f"data.train with {len(corpora)} corpora", f"at most {MAX_CORPORA}")
        check_paths(self.validation, self.tokenizer, *(prefix for _, prefix in corpora))


@dataclass(frozen=True)
class RunConfig(Section):
    """The run directory, and how often a run writes to it."""

    directory: str = option(REQUIRED, "folder of metrics, checkpoints and configuration; an existing run is resumed")
    initial_weights: str | None = option(
        None, "canonical checkpoint (of tools/convert_checkpoint.py) that a new run starts from; null: random weights"
    )
    save_every_steps: int = option(1000, "steps between checkpoints; the last step is always saved", at_least=1)
    keep_checkpoints: int = option(2, "newest checkpoints kept", at_least=1)
    keep_every_steps: int | None = option(None, "also keep checkpoints of steps it divides; null: none", at_least=1)
    evaluate_every_steps: int = option(1000, "steps between evaluations; the last is always evaluated", at_least=1)
    evaluation_windows: int | None = option(None, "validation windows of an evaluation; null: all", at_least=1)
    log_every_steps: int = option(1, "steps between lines of metrics", at_least=1)
    tensorboard: bool = option(True, "write TensorBoard events beside metrics.jsonl")
    peak_flops: float | None = option(
        None,
        "FLOP/s of a GPU, for the model FLOPs utilization; null: the rate of a known GPU; for fp8, its rate in bf16",
        above=0,
    )
    stall_seconds: int | None = option(
        None,
        "longest time for a step, a save or some batches of an evaluation; then a rank prints where it waits and exits",
        at_least=1,
        at_most=10**6,
    )
    requeue_exit_code: int = option(0, "exit status after SIGTERM or SIGUSR1", at_least=0, at_most=255)

    def check_together(self) -> None:
        """See Section."""
        check_paths(self.directory, self.initial_weights)


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
    def resolved_head_loss(self) -> HeadLossConfig:
        """Returns head_loss with its precision filled in from train.precision."""
        return replace(self.head_loss, precision=self.head_loss.precision or self.train.precision)

    @property
    def global_batch_windows(self) -> int:
        return self.train.global_batch_tokens // self.train.sequence_length

    def num_micro_batches(self, data_parallel_size: int) -> int:
        """Returns each rank's number of micro-batches in a step that `data_parallel_size` ranks or pipelines share.

        Raises:
            InputError: the global batch cannot be divided into such micro-batches.
        """
        train = self.train
        tokens = train.sequence_length * train.micro_batch_size * data_parallel_size
        if train.global_batch_tokens % tokens:
            sharers = "pipelines" if self.engine.kind == "pipeline" else "ranks"
            raise InputError(
                f"train.global_batch_tokens={train.global_batch_tokens} is not a multiple of {tokens} = "
                f"train.sequence_length {train.sequence_length} x train.micro_batch_size {train.micro_batch_size} x "
                f"{data_parallel_size} {sharers}; change one of them"
            )
        return train.global_batch_tokens // tokens
