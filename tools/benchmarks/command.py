"""Runs a benchmark: python tools/benchmark.py NAME. Its options: python tools/benchmark.py NAME --help."""

import importlib
import sys

from megamtp.commands.command_line import run
from megamtp.errors import InputError

COMMANDS = {
    "quickstart": "losses that launch/quickstart.sh has reached: reads its run, trains nothing",
    "overhead": "step time of n heads over that of one: ours, FSDP2, and a step without engine and communication",
    "world": "step time against the number of ranks: ours, FSDP2, and DeepSpeed as shipped",
    "links": "latency and bandwidth among real GPUs, beside what the emulated cluster makes of them",
    "prediction": "the emulated cluster's steps beside those of real ranks, as `overhead` has written both",
    "trace": "exposed communication in the head phase, with prefetch and without, and whether it is below a limit",
    "loss": "the loss of one head: time over that of its three products, and memory",
    "pipeline": "a pipeline's step, played with the measured times of its stages: three plans, and how much n heads "
    "cost",
    "real_pipeline": "a pipeline's step on real ranks, beside what `pipeline` predicted for it",
    "prepare": "preparation of a corpus: MB/s of one worker over bare SentencePiece's, and of several over one's",
    "data": "opening a corpus: time and memory against its size; batches: tokens per second (needs no GPU)",
    "saving": "a training that saves often: step time while a checkpoint is written over that of other steps, and "
    "bandwidth",
    "recovery": "a pretraining on all GPUs, a rank of which is killed: losses, throughput, and what the kill cost",
    "learning": "whether fp8 losses learn as well as bf16's: a 0.3B model trained with both",
    "results": "writes tools/results/README.md from the JSON files beside it: measures nothing",
}


def main() -> None:
    """Raises InputError."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__ + "\n" + "\n".join(f"  {name:15s}{meaning}" for name, meaning in COMMANDS.items()))
        return
    name, *arguments = sys.argv[1:]
    if name not in COMMANDS:
        raise InputError(f"unknown benchmark {name}; expected one of {', '.join(COMMANDS)}")
    importlib.import_module(f"benchmarks.{name}").main(arguments)


def entry() -> None:
    run(main)
