"""Memory and time of a configuration on a cluster, before renting it.

    python tools/plan.py configs/6.7b_n4.yaml --gpus 64 --gpu h100
    python tools/plan.py configs/13b_n4.yaml --gpus 64 engine.kind=pipeline engine.num_stages=8 train.micro_batch_size=1
    python tools/plan.py configs/13b_n4.yaml --gpus 8 --gpu h100 --bandwidth 100e9 train.micro_batch_size=1

Exits with status 1 if it does not fit. Without --bandwidth the network is cluster.*'s: NVLink and 400 Gb/s per GPU.
"""

import sys

from megamtp.commands.command_line import Parser, run
from megamtp.config import Config, read_config
from megamtp.errors import InputError
from megamtp.planning.loss_choice import describe_speed, with_other_loss_placement
from megamtp.planning.partition import Partition
from megamtp.planning.planner import GPUS, SECONDS_PER_DAY, Gpu, Plan, nearest_fitting, plan
from megamtp.planning.spread import SpreadPartition

GIB = 2**30


def main() -> None:
    """Raises InputError."""
    parser = Parser(__doc__)
    parser.add_argument(
        "config", nargs="+", help="a YAML file and key=value settings, as for pretrain; data and run may be left out"
    )
    parser.add_argument("--gpus", type=int, required=True, help="ranks")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="kind of card [h100]")
    parser.add_argument("--bandwidth", type=float, help="bytes/s of each rank in a flat network")
    options = parser.parse_intermixed_args()
    flat = [] if options.bandwidth is None else [f"cluster.flat_bandwidth={options.bandwidth}"]
    if options.gpus < 1:
        parser.error(f"--gpus {options.gpus}: expected 1 or more")
    config = read_config(["data.train=none", "run.directory=none", *options.config, *flat])
    card = GPUS[options.gpu]
    found = plan(config, options.gpus, card)
    print(_stage_table(found.partition, card) if found.partition else _memory_table(found, card))
    print(_host_table(found, config, options.gpus))
    if found.peak_bytes > card.memory_bytes:
        _explain(found, config, options.gpus, card)
        sys.exit(1)
    print(_time_table(found, config))
    if found.partition:
        print(_other_losses(found, config, options.gpus, card))


def _other_losses(found: Plan, config: Config, world_size: int, card: Gpu) -> str:
    """Lines about the same pipeline with its losses spread, or whole if they are."""
    changed, setting = with_other_loss_placement(config)
    try:
        other = plan(changed, world_size, card)
    except InputError as error:
        return f"\nwith {setting}: {error}"
    assert other.partition is not None
    ratio, memory = other.step_seconds / found.step_seconds, other.peak_bytes / GIB
    fits = "" if other.peak_bytes <= card.memory_bytes else ", which does not fit"
    return (
        f"\nwith {setting}: step {other.step_seconds:.3f} s, at most {memory:.2f} GiB{fits}; "
        f"{other.partition.balance_summary}\n"
        f"{describe_speed(setting, ratio)}"
    )


def _memory_table(found: Plan, card: Gpu) -> str:
    lines = ["| memory of a rank | GiB |", "|---|---|"]
    lines += [f"| {kind} | {size / GIB:.2f} |" for kind, size in found.memory.items()]
    return "\n".join([*lines, f"| **together**, of {card.memory_bytes / GIB:.1f} | **{found.peak_bytes / GIB:.2f}** |"])


def _stage_table(cut: Partition | SpreadPartition, card: Gpu) -> str:
    """Each stage's memory by kind, and the cut."""
    kinds = list(cut.stages[0].memory_bytes)
    lines = [
        f"| GiB of a rank, of {card.memory_bytes / GIB:.1f} | {' | '.join(kinds)} | together |",
        "|---" * (len(kinds) + 2) + "|",
    ]
    for index, stage in enumerate(cut.stages):
        sizes = " | ".join(f"{size / GIB:.2f}" for size in stage.memory_bytes.values())
        lines.append(f"| stage {index} | {sizes} | **{sum(stage.memory_bytes.values()) / GIB:.2f}** |")
    layers = ",".join(str(stage.num_layers) for stage in cut.stages)
    return "\n".join([*lines, "", cut.summary(), f"a run makes this cut with engine.stage_layers=[{layers}]"])


def _host_table(found: Plan, config: Config, world_size: int) -> str:
    """Memory of the CPU, and the disk."""
    ranks, sizes = (
        min(world_size, config.cluster.ranks_per_node),
        {kind: size for kind, size in found.host_memory.items() if size},
    )
    sizes[f"**together, of the {ranks} ranks of a node**"] = ranks * sum(sizes.values())
    sizes[f"a checkpoint on disk ({config.run.keep_checkpoints} are kept, while another is written)"] = (
        found.checkpoint_bytes
    )
    rows = [f"| {kind} | {size / GIB:.2f} |" for kind, size in sizes.items()]
    return "\n".join(["", "| host memory of a rank, and disk | GiB |", "|---|---|", *rows])


def _time_table(found: Plan, config: Config) -> str:
    tokens = config.train.global_batch_tokens
    per_day = tokens / found.step_seconds * SECONDS_PER_DAY
    total = config.train.steps * tokens
    waiting = "waiting for other stages and pipelines" if found.partition else "exposed communication"
    waiting += ", weights from the host not planned" if config.engine.offload_parameters else ""
    rows = {
        "forward and backward, s a step": f"{found.compute_seconds:.3f} ({found.num_micro_batches} micro-batches)",
        f"{waiting}, s a step": f"{found.exposed_seconds:.3f} ({found.exposed_seconds / found.step_seconds:.1%})",
        "optimizer, s a step": "on the host: not planned"
        if found.optimizer_seconds is None
        else f"{found.optimizer_seconds:.3f}",
        "**step, s**": f"**{found.step_seconds:.3f}**",
        "tokens a day": f"{per_day:.3g}",
        f"days for {config.train.steps} steps, {total:.3g} tokens": f"{total / per_day:.2f}",
    }
    return "\n".join(["", "| time | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _explain(found: Plan, config: Config, world_size: int, card: Gpu) -> None:
    largest = max(found.memory, key=found.memory.__getitem__)
    print(
        f"\ndoes not fit, because {found.peak_bytes / GIB:.1f} GiB are needed of {card.memory_bytes / GIB:.1f}, "
        f"most of them for {largest} ({found.memory[largest] / GIB:.1f})"
    )
    nearest = nearest_fitting(config, world_size, card)
    print(
        f"the nearest that fits: {nearest[0]}"
        if nearest
        else "nothing nearby fits: take more cards, or a smaller model"
    )


def entry() -> None:
    run(main)


if __name__ == "__main__":
    entry()
