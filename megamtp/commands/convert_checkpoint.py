"""Converts a checkpoint to another format. The source's format is detected.

    %(prog)s runs/quickstart exported --to hf
    %(prog)s runs/quickstart/checkpoints/step-0000100 exported --to meta --dtype fp16
    %(prog)s Llama-2-7b-hf initial --to canonical --num-future-tokens 4
    %(prog)s universal runs/new --to zero3        (then pretrain with run.directory=runs/new)

Conversions between run, canonical and universal keep Adam's moments. The other formats hold only weights. A
conversion needs about 0.3 GB of memory for a model of any size, except that torch files written before torch 1.6 are
read into memory as a whole.
"""

import argparse
from pathlib import Path

import torch

from megamtp.checkpoint import formats
from megamtp.checkpoint.folder import check_destination
from megamtp.commands.command_line import Parser, run
from megamtp.config import MAX_LAYERS, read_config

ENGINES = ("zero3", "zero1", "pipeline")  # as a destination format, each means "run": all engines read it
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main() -> None:
    """Converts the checkpoint. Raises InputError."""
    arguments = _parser().parse_args()
    check_destination(arguments.destination)  # before the source is read, which may take long
    model = read_config([str(arguments.config)]).model if arguments.config else None
    contents = formats.read(arguments.source, formats.Options(arguments.num_future_tokens, model))
    for note in contents.notes:
        print(note)
    if arguments.to in ("hf", "hf-mtp") and not contents.has_end_of_text:
        print(
            f"{arguments.source} does not say which token ends a text: generate() of the export stops only at its "
            "maximum length"
        )
    target = "run" if arguments.to in ENGINES else arguments.to
    write = formats.FORMATS[target].write
    assert write is not None  # the parser accepts only writable formats
    write(contents, arguments.destination, DTYPES[arguments.dtype])
    print(f"{arguments.source} -> {arguments.destination}")


def _parser() -> Parser:
    format_lines = "\n".join(f"  {name:12s}{entry.meaning}" for name, entry in formats.FORMATS.items())
    parser = Parser(f"{__doc__}\nFormats:\n{format_lines}")
    parser.add_argument(
        "source", type=Path, help=f"a checkpoint of one of these formats: {', '.join(formats.readable_formats())}"
    )
    parser.add_argument("destination", type=Path, help="a new or empty folder, or an earlier export, which is replaced")
    parser.add_argument(
        "--to",
        choices=[*formats.writable_formats(), *ENGINES],
        default="hf",
        help="format of the destination (default: hf); zero3, zero1 and pipeline mean run",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="data type of the exported weights (default: fp32)"
    )
    parser.add_argument(
        "--num-future-tokens",
        type=_num_heads,
        help="heads to make from a source with one head: its last layer and copies of it (default: 1)",
    )
    parser.add_argument(
        "--config", type=Path, help="a run's config.yaml, for a source that does not describe its model"
    )
    return parser


def _num_heads(word: str) -> int:
    number = int(word) if word.isdecimal() and len(word) < 10 else 0
    if not 1 <= number < MAX_LAYERS:
        raise argparse.ArgumentTypeError(f"{word[:20]}; expected a whole number, 1 to {MAX_LAYERS - 1}")
    return number


def entry() -> None:
    """Runs the command line of megamtp-convert."""
    run(main)


if __name__ == "__main__":
    entry()
