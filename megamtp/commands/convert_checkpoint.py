"""Turns a checkpoint into one of another format; SOURCE's own is recognised.

    python -m megamtp.commands.convert_checkpoint runs/quickstart exported --to hf
    python -m megamtp.commands.convert_checkpoint runs/quickstart/checkpoints/step-0000100 exported --to meta --dtype
    fp16 python -m megamtp.commands.convert_checkpoint Llama-2-7b-hf initial --to canonical --num-future-tokens 4
    python -m megamtp.commands.convert_checkpoint universal runs/new --to zero3        (then pretrain with
    run.directory=runs/new)

Adam's moments go along between run, canonical and universal; the other formats hold weights alone.
"""

import argparse
from pathlib import Path

import torch

from megamtp.checkpoint import formats
from megamtp.checkpoint.folder import check_destination
from megamtp.commands.command_line import Parser, run
from megamtp.config import MAX_LAYERS, read_config

ENGINES = ("zero3", "zero1", "pipeline")  # all of which read a run's checkpoint
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main() -> None:
    """Raises InputError."""
    arguments = _parser().parse_args()
    check_destination(arguments.destination)  # before the source, which may take long to read
    model = read_config([str(arguments.config)]).model if arguments.config else None
    contents = formats.read(arguments.source, formats.Options(arguments.num_future_tokens, model))
    for note in contents.notes:
        print(note)
    if arguments.to in ("hf", "hf-mtp") and not contents.has_end_of_text:
        print(
            f"{arguments.source} does not say which token ends a text: generate() of the export stops at its longest "
            "length only"
        )
    target = "run" if arguments.to in ENGINES else arguments.to
    write = formats.FORMATS[target].write
    assert write is not None  # of all that the parser lets through
    write(contents, arguments.destination, DTYPES[arguments.dtype])
    print(f"{arguments.source} -> {arguments.destination}")


def _parser() -> Parser:
    described = "\n".join(f"  {name:12s}{entry.meaning}" for name, entry in formats.FORMATS.items())
    parser = Parser(f"{__doc__}\nFormats:\n{described}")
    parser.add_argument(
        "source", type=Path, help=f"a checkpoint of one of these formats: {', '.join(formats.readable_formats())}"
    )
    parser.add_argument("destination", type=Path, help="a new or empty folder, or an earlier export, which is replaced")
    parser.add_argument(
        "--to",
        choices=[*formats.writable_formats(), *ENGINES],
        default="hf",
        help="format of the destination (default: hf); an engine's is a run's",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="type of exported weights (default: fp32)")
    parser.add_argument(
        "--num-future-tokens",
        type=_num_heads,
        help="heads to make of a source with one: its last layer, and copies of it (default: 1)",
    )
    parser.add_argument("--config", type=Path, help="a run's config.yaml, for a source that says nothing of its model")
    return parser


def _num_heads(word: str) -> int:
    number = int(word) if word.isdecimal() and len(word) < 10 else 0
    if not 1 <= number < MAX_LAYERS:
        raise argparse.ArgumentTypeError(f"{word[:20]}; expected a whole number, 1 to {MAX_LAYERS - 1}")
    return number


def entry() -> None:
    run(main)


if __name__ == "__main__":
    entry()
