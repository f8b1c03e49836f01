"""Predicts the memory and the step time of a configuration on a cluster.

    %(prog)s configs/6.7b_n4.yaml --gpus 64 --gpu h100
    %(prog)s configs/13b_n4.yaml --gpus 64 engine.kind=pipeline engine.num_stages=8 train.micro_batch_size=1
    %(prog)s configs/13b_n4.yaml --gpus 8 --gpu h100 --bandwidth 100e9 train.micro_batch_size=1

Exits with status 1 if the configuration does not fit into the GPUs' memory. Without --bandwidth, the settings
cluster.* describe the network, by default NVLink inside a node and 400 Gb/s per GPU between nodes.
"""

import sys

from megamtp.commands.command_line import Parser, run
from megamtp.config import Config, read_config
from megamtp.errors import InputError
from megamtp.model.cost import describe_trunk
from megamtp.planning.gpus import GPUS, Gpu
from megamtp.planning.loss_choice import describe_speed, with_other_loss_placement
from megamtp.planning.memory import describe_heads
from megamtp.planning.partition import Partition
from megamtp.planning.planner import SECONDS_PER_DAY, Plan, nearest_fitting, plan
from megamtp.planning.precision_choice import with_bf16
from megamtp.planning.spread import SpreadPartition

GIB = 2**30


def main() -> None:
    """Prints the plan, and exits with status 1 if the configuration does not fit. Raises InputError."""
    parser = Parser(__doc__)
    parser.add_argument(
        "config", nargs="+", help="a YAML file and key=value settings, as for pretraining; data and run may be omitted"
    )
    parser.add_argument("--gpus", type=int, required=True, help="number of GPUs, one rank each")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="type of GPU [h100]")
    parser.add_argument("--bandwidth", type=float, help="bytes per second of each rank in a flat network")
    options = parser.parse_intermixed_args()
    flat = [] if options.bandwidth is None else [f"cluster.flat_bandwidth={options.bandwidth}"]
    if options.gpus < 1:
        parser.error(f"--gpus {options.gpus}; expected 1 or more")
    config = read_config(["data.train=none", "run.directory=none", *options.config, *flat])
    gpu = GPUS[options.gpu]
    planned = plan(config, options.gpus, gpu)
    print(_stage_table(planned.partition, gpu) if planned.partition else _memory_table(planned, gpu))
    for line in filter(None, (describe_trunk(config.model), describe_heads(config))):
        print(f"\n{line}")
    print(_host_table(planned, config, options.gpus))
    if planned.peak_bytes > gpu.memory_bytes:
        _print_misfit(planned, config, options.gpus, gpu)
        sys.exit(1)
    print(_time_table(planned, config))
    if planned.partition:
        print(_alternative(planned, *with_other_loss_placement(config), options.gpus, gpu))
    if config.train.precision == "fp8":
        print(_alternative(planned, *with_bf16(config), options.gpus, gpu))


def _alternative(planned: Plan, changed: Config, setting: str, world_size: int, gpu: Gpu) -> str:
    """Returns lines about the same run with one setting changed: its step, its memory, and whether it is faster."""
    try:
        other = plan(changed, world_size, gpu)
    except InputError as error:
        return f"\nwith {setting}: {error}"
    ratio, memory = other.step_seconds / planned.step_seconds, other.peak_bytes / GIB
    fits = "" if other.peak_bytes <= gpu.memory_bytes else ", which does not fit"
    balance = f"; {other.partition.balance_summary}" if other.partition else ""
    return (
        f"\nwith {setting}: step {other.step_seconds:.3f} s, at most {memory:.2f} GiB{fits}{balance}\n"
        f"{describe_speed(setting, ratio)}"
    )


def _memory_table(planned: Plan, gpu: Gpu) -> str:
    lines = ["| memory per rank | GiB |", "|---|---|"]
    lines += [f"| {kind} | {size / GIB:.2f} |" for kind, size in planned.memory.items()]
    total = f"| **total** (of {gpu.memory_bytes / GIB:.1f}) | **{planned.peak_bytes / GIB:.2f}** |"
    return "\n".join([*lines, total])


def _stage_table(partition: Partition | SpreadPartition, gpu: Gpu) -> str:
    """Returns a table of each stage's memory by kind, and lines about the partition."""
    kinds = list(partition.stages[0].memory_bytes)
    lines = [
        f"| GiB per rank (of {gpu.memory_bytes / GIB:.1f}) | {' | '.join(kinds)} | total |",
        "|---" * (len(kinds) + 2) + "|",
    ]
    for index, stage in enumerate(partition.stages):
        sizes = " | ".join(f"{size / GIB:.2f}" for size in stage.memory_bytes.values())
        lines.append(f"| stage {index} | {sizes} | **{sum(stage.memory_bytes.values()) / GIB:.2f}** |")
    layers = ",".join(str(stage.num_layers) for stage in partition.stages)
    return "\n".join(
        [*lines, "", partition.summary(), f"a run uses this partition with engine.stage_layers=[{layers}]"]
    )


def _host_table(planned: Plan, config: Config, world_size: int) -> str:
    """Returns a table of host memory and disk space."""
    ranks = min(world_size, config.cluster.ranks_per_node)
    sizes = {kind: size for kind, size in planned.host_memory.items() if size}
    sizes[f"**total of the {ranks} ranks of a node**"] = ranks * sum(sizes.values())
    checkpoint = f"checkpoint on disk ({config.run.keep_checkpoints} are kept while another is written)"
    sizes[checkpoint] = planned.checkpoint_bytes
    rows = [f"| {kind} | {size / GIB:.2f} |" for kind, size in sizes.items()]
    return "\n".join(["", "| host memory per rank, and disk | GiB |", "|---|---|", *rows])


def _time_table(planned: Plan, config: Config) -> str:
    tokens = config.train.global_batch_tokens
    per_day = tokens / planned.step_seconds * SECONDS_PER_DAY
    total = config.train.steps * tokens
    waiting = "waiting for other stages and pipelines" if planned.partition else "exposed communication"
    waiting += ", without weights from the host (not planned)" if config.engine.offload_parameters else ""
    compute, exposed, optimizer = planned.compute_seconds, planned.exposed_seconds, planned.optimizer_seconds
    rows = {
        "forward and backward, s per step": f"{compute:.3f} ({planned.num_micro_batches} micro-batches)",
        f"{waiting}, s per step": f"{exposed:.3f} ({exposed / planned.step_seconds:.1%})",
        "optimizer, s per step": "on the host: not planned" if optimizer is None else f"{optimizer:.3f}",
        "**step, s**": f"**{planned.step_seconds:.3f}**",
        "tokens per day": f"{per_day:.3g}",
        f"days for {config.train.steps} steps, {total:.3g} tokens": f"{total / per_day:.2f}",
    }
    return "\n".join(["", "| time | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _print_misfit(planned: Plan, config: Config, world_size: int, gpu: Gpu) -> None:
    largest = max(planned.memory, key=planned.memory.__getitem__)
    print(
        f"\ndoes not fit: needs {planned.peak_bytes / GIB:.1f} GiB of {gpu.memory_bytes / GIB:.1f}, "
        f"most of it for {largest} ({planned.memory[largest] / GIB:.1f})"
    )
    nearest = nearest_fitting(config, world_size, gpu)
    print(
        f"nearest configuration that fits: {nearest[0]}"
        if nearest
        else "no similar configuration fits: use more GPUs or a smaller model"
    )


def entry() -> None:
    """Runs the command line of megamtp-plan."""
    run(main)


if __name__ == "__main__":
    entry()
