"""Runs a benchmark: python tools/benchmark.py NAME. Its options: python tools/benchmark.py NAME --help."""

import importlib
import sys

from megamtp.commands.command_line import run
from megamtp.errors import InputError

BENCHMARKS = {
    "quickstart": "the losses that launch/quickstart.sh reached: reads its run, trains nothing",
    "overhead": "step time with n heads divided by step time with one head: megamtp, FSDP2, and no engine",
    "world": "step time for several numbers of ranks: megamtp, FSDP2, and megamtp with DeepSpeed's communication",
    "links": "latency and bandwidth of collectives on real GPUs, compared with the emulated cluster",
    "prediction": "step times of the emulated cluster compared with real ranks: reads two result files of `overhead`",
    "trace": "exposed communication in the head phase with and without prefetch; fails if it is above a limit",
    "layer": "one transformer layer in bf16 and in fp8: its time, beside its products, attention and memory traffic",
    "float8": "the errors of fp8 products with scales per tensor, per row and per block (time: on a GPU)",
    "gradients": "the angles between the gradients of steps in fp8, bf16 and fp32, by kind of parameter",
    "loss": "the loss of one head: its time divided by the time of its three matrix products, and its memory",
    "pipeline": "the step of a pipeline, simulated with measured stage times, for three plans and several n",
    "real_pipeline": "the step of a pipeline on real ranks, compared with the prediction of `pipeline`",
    "prepare": "preparation of a corpus: MB/s of SentencePiece, of one worker and of several workers",
    "data": "time and memory to open corpora of several sizes, and tokens per second of reading (needs no GPU)",
    "saving": "a training that saves often: step time while a checkpoint is written, compared with other steps",
    "recovery": "a training on all GPUs in which one rank is killed: losses, throughput, and the time lost",
    "train_step": "whole steps of training: tokens per second, and the shares of optimizer, data and the rest",
    "learning": "training and validation losses of models trained in bf16 and in fp8, and with a planted fault",
    "results": "writes tools/results/README.md from the JSON files in its folder: measures nothing",
}


def main() -> None:
    """Runs the benchmark that the command line names. Raises InputError."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__ + "\n" + "\n".join(f"  {name:15s}{meaning}" for name, meaning in BENCHMARKS.items()))
        return
    name, *arguments = sys.argv[1:]
    if name not in BENCHMARKS:
        raise InputError(f"unknown benchmark {name}; expected one of {', '.join(BENCHMARKS)}")
    importlib.import_module(f"benchmarks.{name}").main(arguments)


def entry() -> None:
    run(main)
