"""Turns text into a corpus that megamtp and Megatron-LM can train on.

megamtp-prepare-data --input src/ more.jsonl.gz --output corpus
megamtp-prepare-data --standard-library --output corpus
mpirun -n 65 megamtp-prepare-data --input /data/pile --tokenizer tokenizer.model --output /shared/corpus

A file's content decides whether it is text, JSON lines or Parquet: most of the first ten lines of JSON lines are
objects. Files named .jsonl, .ndjson or .parquet, and .json if they are given themselves, must be that. In folders,
binary files, links to folders and whatever is hidden (such as .git) are passed over, counted and the first named; a
link that points nowhere is an error.

The corpus is the same for any number of workers. Killed and called again, it goes on from the parts it has finished.
Under mpirun rank 0 hands out the work and the others do it; all must see the inputs and the output. While it runs, and
until it is called again after it was killed, the output folder holds the tokens of finished parts in .preparation: room
for all tokens twice.
"""

import argparse
import os
from concurrent.futures import Executor
from pathlib import Path

from megamtp.commands.command_line import Parser, run
from megamtp.data.corpus import PICTURE, SKIPPED, Corpus, own_files, prepare
from megamtp.data.documents import find_source, standard_library
from megamtp.data.records import FORMATS, JSON_LINES, PARQUET, TEXT
from megamtp.data.tokenisation import DEFAULT_VOCAB_SIZE
from megamtp.data.workers import mpi_ranks, num_mpi_ranks
from megamtp.errors import InputError

PLURALS = {TEXT: "text files", JSON_LINES: "files of JSON lines", PARQUET: "Parquet files"}


def main() -> None:
    """Prepares with processes of this machine, or as rank 0 of an MPI job with its other ranks. Raises InputError."""
    if num_mpi_ranks() == 1:
        _prepare(None)
        return
    with mpi_ranks() as executor:
        if executor:
            _prepare(executor)


def _prepare(ranks: Executor | None) -> None:
    options = _options()
    if not 0 < options.validation_fraction < 1:
        raise InputError(f"--validation-fraction {options.validation_fraction}; expected a number between 0 and 1")
    if ranks and options.workers:
        raise InputError(
            f"--workers {options.workers} under mpirun; expected one of them: mpirun's ranks are the workers"
        )
    if options.workers is not None and options.workers < 1:
        raise InputError(f"--workers {options.workers}; expected 1 or more")
    if options.standard_library:
        source = standard_library()
    else:
        source = find_source(
            options.input,
            tuple(options.exclude),
            options.json_key,
            options.format,
            options.on_bad_record == "skip",
            own_files(options.output),
        )
    corpus, reused = prepare(
        source,
        options.output,
        options.vocab_size,
        options.tokenizer,
        options.validation_fraction,
        options.seed,
        options.overwrite,
        options.deduplicate,
        ranks or options.workers or len(os.sched_getaffinity(0)),
    )
    _report(corpus, reused, options.output)


def _report(corpus: Corpus, reused: bool, output: Path) -> None:
    if corpus.files:
        print("read", ", ".join(f"{number:,} {PLURALS[name]}" for name, number in corpus.files.items()))
    for reason, names in corpus.passed_over.items():
        print(f"passed over {len(names):,} {reason}, the first: {names[0]}")
    if corpus.unreadable_files:
        print(
            f"passed over {len(corpus.unreadable_files)} files that are not UTF-8, the first: "
            f"{corpus.unreadable_files[0]}"
        )
    if corpus.skipped_records:
        print(f"skipped {corpus.skipped_records:,} bad records, listed in {output / SKIPPED}")
    if corpus.duplicates:
        print(f"dropped {corpus.duplicates:,} documents whose text an earlier one has")
    if corpus.space_marks:
        print(f"{corpus.space_marks:,} documents hold the character U+2581, which this tokenizer reads as a space")
    if corpus.end_markers:
        print(
            f"{corpus.end_markers:,} documents hold an end-of-text marker such as </s> or <|endoftext|>: "
            "it is tokenised as ordinary characters and ends no document"
        )
    for split in corpus.tokens:
        documents, tokens = corpus.documents[split], corpus.tokens[split]
        print(f"{split}: {documents:,} documents, {tokens:,} tokens in {output / split}.bin, .idx, .crc")
    print(f"lengths of documents: {output / PICTURE}")
    print(
        f"{corpus.vocab_size} pieces, {corpus.bytes_per_token:.2f} bytes per token, unigram entropy of validation "
        f"{corpus.unigram_entropy:.3f} nats{' (reused)' if reused else ''}"
    )


def _options() -> argparse.Namespace:
    parser = Parser(__doc__)
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument(
        "--input",
        nargs="+",
        type=_path,
        metavar="PATH",
        help="text, JSON lines (either also .gz, .bz2, .xz, .zst) and Parquet files, or folders of them",
    )
    inputs.add_argument("--standard-library", action="store_true", help="the running Python's own standard library")
    parser.add_argument("--output", required=True, type=_path, metavar="DIR", help="folder of the corpus")
    parser.add_argument(
        "--tokenizer", type=_word, metavar="MODEL", help="SentencePiece model, or `bytes`; without, one is trained"
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        help=f"pieces of the tokenizer that is trained [{DEFAULT_VOCAB_SIZE}], or that the given one must have",
    )
    parser.add_argument(
        "--workers", type=int, metavar="K", help="processes that tokenise [one for each core]; not under mpirun"
    )
    parser.add_argument("--deduplicate", action="store_true", help="drop documents whose text an earlier one has")
    parser.add_argument("--validation-fraction", type=float, default=0.02, help="share of documents held out [0.02]")
    parser.add_argument(
        "--exclude",
        nargs="*",
        default=[],
        metavar="NAME",
        help="names of files or folders to leave out; 'quoted', with * and ?",
    )
    parser.add_argument("--format", choices=FORMATS, help="of all inputs, instead of what their names and content tell")
    parser.add_argument(
        "--on-bad-record",
        choices=("stop", "skip"),
        default="stop",
        help=f"a JSON line or Parquet row without a valid text: stop, or skip it and list it in {SKIPPED} [stop]",
    )
    parser.add_argument(
        "--json-key", default="text", help="key of a JSON line's text, or name of the Parquet column [text]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the tokenizer's sample [0]")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus of other inputs or settings")
    return parser.parse_args()


def _word(argument: str) -> str:
    """Refuses what an unset variable of a shell leaves: as a path it would be the current folder."""
    if not argument:
        raise argparse.ArgumentTypeError("found an empty name, expected one")
    return argument


def _path(argument: str) -> Path:
    return Path(_word(argument))


def entry() -> None:
    """The command line of megamtp-prepare-data."""
    run(main)


if __name__ == "__main__":
    entry()
