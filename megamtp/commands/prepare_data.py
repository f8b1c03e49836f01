"""Turns text into a corpus that megamtp and Megatron-LM can train on.

megamtp-prepare-data --input src/ more.jsonl --output corpus
megamtp-prepare-data --standard-library --output corpus
"""

import argparse
from pathlib import Path

from megamtp.commands.command_line import Parser, run
from megamtp.data.corpus import prepare
from megamtp.data.documents import find_source, standard_library
from megamtp.errors import InputError


def main() -> None:
    """Raises InputError."""
    options = _options()
    if not 0 < options.validation_fraction < 1:
        raise InputError(f"--validation-fraction {options.validation_fraction}; expected a number between 0 and 1")
    if options.standard_library:
        source = standard_library()
    else:
        source = find_source(options.input, tuple(options.exclude), options.json_key)
    corpus, reused = prepare(
        source, options.output, options.vocab_size, options.tokenizer, options.validation_fraction, options.seed, options.overwrite
    )
    if corpus.unreadable_files:
        print(f"passed over {len(corpus.unreadable_files)} files that are not UTF-8, the first: {corpus.unreadable_files[0]}")
    for split in corpus.tokens:
        print(
            f"{split}: {corpus.documents[split]:,} documents, {corpus.tokens[split]:,} tokens in {options.output / split}.bin, .idx"
        )
    print(
        f"{corpus.vocab_size} pieces, {corpus.bytes_per_token:.2f} bytes per token, unigram entropy of validation "
        f"{corpus.unigram_entropy:.3f} nats{' (reused)' if reused else ''}"
    )


def _options() -> argparse.Namespace:
    parser = Parser(__doc__)
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--input", nargs="+", type=Path, metavar="PATH", help="text files, .jsonl files, folders of source or text")
    inputs.add_argument("--standard-library", action="store_true", help="the running Python's own standard library")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the corpus")
    parser.add_argument("--vocab-size", type=int, default=4096, help="pieces of the tokenizer that is trained [4096]")
    parser.add_argument("--tokenizer", type=Path, metavar="MODEL", help="use this SentencePiece model instead of training one")
    parser.add_argument("--validation-fraction", type=float, default=0.02, help="share of documents held out [0.02]")
    parser.add_argument("--exclude", nargs="*", default=[], metavar="NAME", help="names of files or folders to leave out")
    parser.add_argument("--json-key", default="text", help="key of a JSONL line's text [text]")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the tokenizer's sample [0]")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus of other inputs or settings")
    return parser.parse_args()


def entry() -> None:
    """The command line of megamtp-prepare-data."""
    run(main)


if __name__ == "__main__":
    entry()
