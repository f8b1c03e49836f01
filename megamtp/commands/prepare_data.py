"""Converts text to a corpus that megamtp and Megatron-LM can train on.

    %(prog)s --input src/ more.jsonl.gz --output corpus
    %(prog)s --standard-library --output corpus
    mpirun -n 65 %(prog)s --input /data/pile --tokenizer tokenizer.model --output /shared/corpus

The content of a file decides whether it is text, JSON lines or Parquet. It counts as JSON lines if most of its first
ten lines are objects. A file named .jsonl, .ndjson or .parquet must have that format, and so must a .json file that
--input names. Text and JSON lines may be compressed (.gz, .bz2, .xz, .zst); Parquet and .zst need pip install
'.[data]'. Binary files, hidden files (such as .git) and links to folders in a folder are passed over; the summary
counts them and names the first. A broken link is an error.

The corpus is Megatron-LM's .bin/.idx, byte for byte, with checksums in .crc: Megatron-LM, NeMo and GPT-NeoX read it,
and megamtp reads theirs. A folder without corpus.json, which is written last, is not a corpus. End-of-text markers in a
text, such as </s>, are tokenized as ordinary characters; the summary counts their documents. For a byte-level corpus
(--tokenizer bytes) train with data.tokenizer=bytes model.vocab_size=257, or 272 for fp8 losses.

The corpus does not depend on the number of workers. If the command is killed, the same command continues from the parts
that are finished. Under mpirun, rank 0 distributes the work to the other ranks; all of them must see the inputs and the
output. Finished parts are in .preparation in the output folder until the corpus is complete, so the disk needs room for
all tokens twice.
"""

import argparse
import os
from concurrent.futures import Executor
from pathlib import Path

from megamtp.commands.command_line import Parser, run
from megamtp.data.corpus import PICTURE, SKIPPED, Corpus, own_files, prepare
from megamtp.data.input_files import find_source, standard_library
from megamtp.data.records import FORMATS, JSON_LINES, PARQUET, TEXT
from megamtp.data.tokenisation import DEFAULT_VOCAB_SIZE
from megamtp.data.workers import mpi_ranks, num_mpi_ranks
from megamtp.errors import InputError

PLURALS = {TEXT: "text files", JSON_LINES: "files of JSON lines", PARQUET: "Parquet files"}


def main() -> None:
    """Prepares a corpus with processes of this machine, or with the ranks of an MPI job. Raises InputError."""
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
            f"--workers {options.workers} under mpirun; expected no --workers: the ranks of mpirun are the workers"
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
    corpus, is_reused = prepare(
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
    _print_summary(corpus, is_reused, options.output)


def _print_summary(corpus: Corpus, is_reused: bool, output: Path) -> None:
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
        print(f"dropped {corpus.duplicates:,} documents with the same text as an earlier one")
    if corpus.space_marks:
        print(f"{corpus.space_marks:,} documents contain the character U+2581, which this tokenizer reads as a space")
    if corpus.end_markers:
        print(
            f"{corpus.end_markers:,} documents contain an end-of-text marker such as </s> or <|endoftext|>: "
            "it is tokenised as ordinary characters and does not end the document"
        )
    for split in corpus.tokens:
        documents, tokens = corpus.documents[split], corpus.tokens[split]
        print(f"{split}: {documents:,} documents, {tokens:,} tokens in {output / split}.bin, .idx, .crc")
    print(f"lengths of documents: {output / PICTURE}")
    print(
        f"{corpus.vocab_size} pieces, {corpus.bytes_per_token:.2f} bytes per token, unigram entropy of validation "
        f"{corpus.unigram_entropy:.3f} nats{' (reused)' if is_reused else ''}"
    )


def _options() -> argparse.Namespace:
    parser = Parser(__doc__)
    _add_input_options(parser)
    _add_corpus_options(parser)
    return parser.parse_args()


def _add_input_options(parser: Parser) -> None:
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument(
        "--input",
        nargs="+",
        type=_path,
        metavar="PATH",
        help="text or JSON lines files (also as .gz, .bz2, .xz, .zst), Parquet files, or folders of these",
    )
    inputs.add_argument(
        "--standard-library", action="store_true", help="use the standard library of the running Python as text"
    )
    parser.add_argument(
        "--exclude",
        nargs="*",
        default=[],
        metavar="NAME",
        help="names of files or folders to pass over; quote names with * and ?",
    )
    parser.add_argument(
        "--format", choices=FORMATS, help="format of all inputs [detected from each file's name and content]"
    )
    parser.add_argument(
        "--on-bad-record",
        choices=("stop", "skip"),
        default="stop",
        help=f"at a JSON line or Parquet row without valid text: stop, or skip it and list it in {SKIPPED} [stop]",
    )
    parser.add_argument(
        "--json-key", default="text", help="key of the text in a JSON line, or name of the Parquet column [text]"
    )


def _add_corpus_options(parser: Parser) -> None:
    parser.add_argument("--output", required=True, type=_path, metavar="DIR", help="folder of the corpus")
    parser.add_argument(
        "--tokenizer", type=_word, metavar="MODEL", help="SentencePiece model, or `bytes` [a new model is trained]"
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        help=f"pieces of the trained tokenizer [{DEFAULT_VOCAB_SIZE}]; with --tokenizer, the number it must have",
    )
    parser.add_argument(
        "--workers", type=int, metavar="K", help="number of processes that tokenise [one per core]; not under mpirun"
    )
    parser.add_argument(
        "--deduplicate", action="store_true", help="drop documents with the same text as an earlier one"
    )
    parser.add_argument(
        "--validation-fraction", type=float, default=0.02, help="share of documents in the validation split [0.02]"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed of the split and of the text that the tokenizer is trained on [0]",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a corpus that was made from other inputs or settings"
    )


def _word(argument: str) -> str:
    """Rejects an empty argument, as from an unset shell variable: as a path it would mean the current folder."""
    if not argument:
        raise argparse.ArgumentTypeError("the name is empty; expected a path")
    return argument


def _path(argument: str) -> Path:
    return Path(_word(argument))


def entry() -> None:
    """Runs the command line of megamtp-prepare-data."""
    run(main)


if __name__ == "__main__":
    entry()
