"""Prepares text corpora for benchmarks that train a model, and writes synthetic corpora for the others.

The synthetic corpora have many documents, either of random tokens or of zeros in sparse files.
"""

import argparse
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import output
from benchmarks.processes import call
from megamtp.commands.command_line import Parser
from megamtp.data import checksums
from megamtp.data.corpus import SUMMARY
from megamtp.data.indexed_dataset import DTYPES, HEADER, LONGEST_SEQUENCE, MAGIC, VERSION, IndexedDatasetWriter
from megamtp.errors import InputError

SMOKE_TEXT = Path(__file__).parents[2] / "megamtp/data"  # for smoke runs: megamtp's own source code
SMOKE: dict[str, Any] = {"data": Path("corpus"), "prepare": [str(SMOKE_TEXT)], "vocab_size": 512}
UINT16 = next(code for code, dtype in DTYPES.items() if dtype == np.uint16)
CHUNK = 1 << 20  # entries of the index, or checksums, that are written together


def add_options(parser: Parser) -> None:
    """Adds the options that name a prepared corpus, or text from which to prepare one."""
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a corpus written by prepare_data")
    parser.add_argument(
        "--prepare", nargs="+", metavar="PATH", help="text from which to prepare the corpus, if it does not exist yet"
    )
    parser.add_argument(
        "--vocab-size",
        type=output.positive,
        default=32000,
        help="vocabulary size of the corpus that --prepare writes [32000]",
    )


def prepare(options: argparse.Namespace) -> None:
    """Prepares the corpus if --prepare was given. Raises InputError."""
    if options.prepare:
        corpus = ["--output", str(options.data), "--vocab-size", str(options.vocab_size)]
        call("megamtp.commands.prepare_data", "--input", *options.prepare, *corpus)


def overrides(data: Path) -> list[str]:
    """Returns the `key=value` arguments of a training on the corpus in `data`. Raises InputError."""
    try:
        vocab_size = json.loads((data / SUMMARY).read_text())["vocab_size"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{data / SUMMARY} cannot be read ({error}); expected a corpus written by prepare_data: see --prepare"
        ) from None
    return [f"model.vocab_size={vocab_size}", f"data.train={data}/train", f"data.validation={data}/validation"]


def write_even(prefix: Path, num_tokens: int, document_tokens: int) -> None:
    """Writes documents of equal length that consist of token 0. The .bin is a sparse file without data."""
    num_documents = num_tokens // document_tokens
    with open(f"{prefix}.idx", "wb") as index:
        index.write(HEADER.pack(MAGIC, VERSION, UINT16, num_documents, num_documents + 1))
        # The arrays of the index (see megamtp/data/indexed_dataset.py). Entry i of each is factor * i + offset.
        for dtype, factor, offset, count in (
            ("<i4", 0, document_tokens, num_documents),  # lengths
            ("<i8", 2 * document_tokens, 0, num_documents),  # offsets in the .bin
            ("<i8", 1, 0, num_documents + 1),  # first sequence of each document
        ):
            for first in range(0, count, CHUNK):
                index.write((np.arange(first, min(first + CHUNK, count)) * factor + offset).astype(dtype).data)
    _write_zeros(prefix, 2 * num_documents * document_tokens, checksums.BLOCK_BYTES)


def write_sparse(prefix: Path, num_tokens: int, num_documents: int, block_bytes: int = checksums.BLOCK_BYTES) -> None:
    """Writes empty documents, and a last document that has all tokens. The .bin and the .idx are sparse files.

    The .crc is not sparse: for 10^12 tokens and the default block size, it takes 2 GB.
    """
    # The lengths of the last sequences, which have all tokens. The other sequences are empty.
    lengths = [LONGEST_SEQUENCE] * (num_tokens // LONGEST_SEQUENCE)
    lengths.append(num_tokens - sum(lengths))
    offsets = np.cumsum([0, *lengths[:-1]], dtype="<i8") * 2
    num_sequences = num_documents
    # The arrays of the index (see megamtp/data/indexed_dataset.py). Entries that are not written are 0.
    lengths_start = HEADER.size
    offsets_start = lengths_start + 4 * num_sequences
    documents_start = offsets_start + 8 * num_sequences
    with open(f"{prefix}.idx", "wb") as index:
        index.write(HEADER.pack(MAGIC, VERSION, UINT16, num_sequences, num_documents + 1))
        index.seek(lengths_start + 4 * (num_sequences - len(lengths)))
        index.write(np.array(lengths, dtype="<i4").data)
        index.seek(offsets_start + 8 * (num_sequences - len(offsets)))
        index.write(offsets.data)
        # all documents begin at sequence 0, so only the last has tokens
        index.seek(documents_start + 8 * num_documents)
        index.write(np.array([num_sequences], dtype="<i8").data)
    _write_zeros(prefix, 2 * num_tokens, block_bytes)


def _write_zeros(prefix: Path, num_bytes: int, block_bytes: int) -> None:
    """Writes a .bin that is a sparse file without data, and its .crc."""
    with open(f"{prefix}.bin", "wb") as tokens:
        tokens.truncate(num_bytes)
    num_whole_blocks, rest = divmod(num_bytes, block_bytes)
    with open(f"{prefix}.crc", "wb") as stream:
        stream.write(checksums.HEADER.pack(checksums.MAGIC, checksums.VERSION, block_bytes, num_bytes))
        chunk = np.full(CHUNK, zlib.crc32(bytes(block_bytes)), "<u4")
        for first in range(0, num_whole_blocks, CHUNK):
            stream.write(chunk[: num_whole_blocks - first].data)
        if rest:
            stream.write(zlib.crc32(bytes(rest)).to_bytes(4, "little"))


def write_random(prefix: Path, num_tokens: int, mean_document_tokens: int, vocab_size: int) -> None:
    """Writes random tokens in documents of 1 to 2 * mean_document_tokens tokens."""
    generator, written = np.random.default_rng(0), 0
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        while written < num_tokens:
            document = generator.integers(vocab_size, size=generator.integers(1, 2 * mean_document_tokens + 1))
            writer.add_document(document)
            written += len(document)
