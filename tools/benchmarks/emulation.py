"""Configurations and options of the benchmarks that measure steps.

A configuration is for one rank of an emulated cluster or, under a launcher, for the ranks of a real job.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks import output
from megamtp.cluster.environment import find_place, place_in_cluster
from megamtp.commands.command_line import Parser
from megamtp.config import Config, read_config
from megamtp.engines.deepspeed.join import join_peers
from megamtp.errors import InputError

CONFIGS = Path(__file__).parents[2] / "configs"
MICRO_BATCH_SIZES = {"0.3b": 4, "0.6b": 4, "1.3b": 2, "3b": 2, "6.7b": 2, "13b": 1}  # windows, by model
SIZES = list(MICRO_BATCH_SIZES)
SEQUENCE_LENGTH = 4096
TINY = [  # model settings for smoke runs
    "model.dim=64",
    "model.mlp_dim=128",
    "model.num_layers=6",
    "model.num_attention_heads=2",
    "model.vocab_size=512",
]
SMOKE: dict[str, Any] = {"micro_batch": 1, "steps": 2, "set": TINY, "sequence_length": 64}


def parser(description: str, name: str) -> Parser:
    """Returns a parser with the options that all benchmarks of steps share."""
    parser = output.parser(description, name)
    parser.add_argument(
        "--bandwidth",
        default="100e9",
        help="bytes/s of a flat network; null: NVLink inside a node, 400 Gb/s between nodes [100e9]",
    )
    parser.add_argument("--sms", default="1", help="multiprocessors (SMs) that communication occupies [1]")
    parser.add_argument(
        "--micro-batch", type=output.positive, help="windows per micro-batch and rank [from 4 for 0.3b to 1 for 13b]"
    )
    parser.add_argument("--micro-batches", type=output.positive, default=1, help="micro-batches per step and rank [1]")
    parser.add_argument("--steps", type=output.positive, default=5, help="measured steps in each round [5]")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings")
    parser.set_defaults(sequence_length=SEQUENCE_LENGTH)
    return parser


def num_ranks(requested: int) -> int:
    """Returns the number of ranks that a launcher started, or `requested` emulated ranks without a launcher."""
    launched = find_place().world_size
    return launched if launched > 1 else requested


def model_arguments(size: str, heads: int) -> list[str]:
    """Returns the arguments of read_config for a model of one of the paper's sizes."""
    # the files of one size differ only in the number of heads
    return [str(CONFIGS / f"{size}_n4.yaml"), f"model.num_future_tokens={heads}"]


def config(size: str, heads: int, world_size: int, options: argparse.Namespace, *overrides: str) -> Config:
    """Returns the configuration of a step with sequential heads and options.micro_batches micro-batches per rank.

    Raises:
        InputError: a setting is invalid, or the heads are not sequential.
    """
    micro_batch = options.micro_batch or MICRO_BATCH_SIZES[size]
    cluster = [
        f"cluster.emulate={world_size}",
        f"cluster.flat_bandwidth={options.bandwidth}",
        f"cluster.communication_sms={options.sms}",
    ]
    step_config = read_config(
        [
            *model_arguments(size, heads),
            "data.train=none",
            "run.directory=none",
            *([] if find_place().world_size > 1 else cluster),
            f"train.sequence_length={options.sequence_length}",
            f"train.micro_batch_size={micro_batch}",
            f"train.global_batch_tokens={options.sequence_length * micro_batch * options.micro_batches * world_size}",
            *options.set,
            *overrides,
        ]
    )
    if step_config.engine.head_schedule != "sequential":
        raise InputError(
            f"engine.head_schedule={step_config.engine.head_schedule}; expected sequential: only it has a head phase "
            "to measure"
        )
    return step_config


def settings(config: Config, options: argparse.Namespace) -> dict[str, object]:
    """Returns the settings of the cluster and of the step, as the result files name them."""
    cluster = config.cluster
    other_settings = {"T": options.sequence_length, "micro-batches": options.micro_batches}
    other_settings |= {"set": " ".join(options.set)} if options.set else {}
    if not cluster.emulate:
        return {"network": "NCCL", **other_settings}
    network = {"bandwidth": "null" if cluster.flat_bandwidth is None else f"{cluster.flat_bandwidth:g}"}
    if cluster.flat_bandwidth is None:
        network |= {"in nodes": f"{cluster.node_bandwidth:g}", "between nodes": f"{cluster.network_bandwidth:g}"}
    return {**network, "latency": f"{cluster.latency:g}", "SMs held": cluster.communication_sms, **other_settings}


def join(config: Config) -> None:
    """Makes this process rank 0 of the emulated cluster, or joins the launcher's ranks. Later calls do nothing."""
    if not torch.distributed.is_initialized():
        join_peers(place_in_cluster(find_place(), config.cluster), config.cluster)
