"""Text -> a prepared corpus: tokenizer.model, train.bin/.idx, validation.bin/.idx, and corpus.json, which is written last.

A folder without corpus.json is not a corpus, whatever else lies in it.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from megamtp.data.documents import Source
from megamtp.data.indexed_dataset import IndexedDatasetWriter, best_dtype
from megamtp.data.tokenizer import SentencePieceTokenizer, train_sentencepiece
from megamtp.errors import InputError
from megamtp.files import write_atomically

SUMMARY = "corpus.json"
SPLITS = ("train", "validation")
BATCH_DOCUMENTS = 256


@dataclass(frozen=True)
class Corpus:
    """What corpus.json says. `settings` decides whether a second preparation would make the same corpus.

    Attributes:
        unigram_entropy: of the validation split's own token frequencies, in nats per token: the loss of the best model that
            knows no context.
    """

    settings: dict
    vocab_size: int
    documents: dict[str, int]
    tokens: dict[str, int]
    bytes_per_token: float
    unigram_entropy: float
    unreadable_files: list[str]


def prepare(
    source: Source,
    output: Path,
    vocab_size: int = 4096,
    tokenizer: Path | None = None,
    validation_fraction: float = 0.02,
    seed: int = 0,
    overwrite: bool = False,
) -> tuple[Corpus, bool]:
    """Tokenises all documents into `output`, each ended by the tokenizer's end-of-document id.

    Documents go to the validation split by a hash of (seed, name), so the split does not depend on their order. Whatever else is
    wrong than the disk is found before an earlier corpus is touched.

    Args:
        tokenizer: an existing SentencePiece model; without, one of `vocab_size` pieces is trained on the documents.

    Returns:
        (the corpus, whether an earlier preparation with the same settings and inputs was found and reused).

    Raises:
        InputError: nothing to read or nowhere to write, or `output` holds another corpus and `overwrite` is not set.
    """
    settings = _settings(source, vocab_size, tokenizer, validation_fraction, seed)
    try:
        existing = None if overwrite else _existing(output)
        if existing and existing.settings != settings:
            raise InputError(
                f"{output} holds a corpus of other inputs or settings; expected the same: use --overwrite or another folder"
            )
        if existing:
            return existing, True
        output.mkdir(parents=True, exist_ok=True)
        held_out = _held_out(source, validation_fraction, seed)
        new_tokenizer = output / "tokenizer.model.new"
        if tokenizer:
            SentencePieceTokenizer(tokenizer)
            write_atomically(new_tokenizer, tokenizer.read_bytes())
        else:
            train_sentencepiece((text for _, text in source.documents()), new_tokenizer, vocab_size, seed)
        (output / SUMMARY).unlink(missing_ok=True)
        os.replace(new_tokenizer, output / "tokenizer.model")
        corpus = _tokenise(source, output, settings, held_out)
        write_atomically(output / SUMMARY, json.dumps(dataclasses.asdict(corpus), indent=1).encode())
    except OSError as error:
        raise InputError(f"{output} cannot be written to: {error.strerror}; choose another folder or make room") from None
    return corpus, False


def read_corpus(folder: Path) -> Corpus:
    """The summary of a prepared corpus.

    Raises:
        InputError: there is none, or it is damaged.
    """
    try:
        return Corpus(**json.loads((folder / SUMMARY).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder / SUMMARY} cannot be read ({error}); prepare the corpus again, with --overwrite") from None


def _existing(output: Path) -> Corpus | None:
    """A whole earlier corpus, or None."""
    files = [
        output / SUMMARY,
        output / "tokenizer.model",
        *(output / f"{split}{end}" for split in SPLITS for end in (".bin", ".idx")),
    ]
    return read_corpus(output) if all(file.is_file() for file in files) else None


def _settings(source: Source, vocab_size: int, tokenizer: Path | None, validation_fraction: float, seed: int) -> dict:
    inputs = hashlib.sha256(source.json_key.encode(errors="backslashreplace"))
    try:
        for name, path in source.files:
            inputs.update(f"\n{name}\t{path.stat().st_size}\t{path.stat().st_mtime_ns}".encode())
        model = hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer else vocab_size
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; expected a readable file") from None
    return {"inputs": inputs.hexdigest(), "tokenizer": model, "validation_fraction": validation_fraction, "seed": seed}


def _tokenise(source: Source, output: Path, settings: dict, held_out: set[str]) -> Corpus:
    tokenizer = SentencePieceTokenizer(output / "tokenizer.model")
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    documents, tokens, num_bytes = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0), 0
    with ExitStack() as stack:
        dtype = best_dtype(tokenizer.vocab_size)
        writers = {split: stack.enter_context(IndexedDatasetWriter(output / split, dtype)) for split in SPLITS}
        for batch in _batches(source.pieces()):
            encoded = tokenizer.encode_batch([text for _, text in batch], num_threads=os.cpu_count() or 1)
            for (name, text), ids in zip(batch, encoded, strict=True):
                split = "validation" if name in held_out else "train"
                ids = np.array([*ids, tokenizer.end_of_document_id])
                writers[split].add_document(ids)
                documents[split] += 1
                tokens[split] += len(ids)
                num_bytes += len(text.encode())
                if split == "validation":
                    counts += np.bincount(ids, minlength=len(counts))
    return Corpus(
        settings, tokenizer.vocab_size, documents, tokens, num_bytes / sum(tokens.values()), _entropy(counts), source.unreadable
    )


def _held_out(source: Source, validation_fraction: float, seed: int) -> set[str]:
    """Names of the validation documents: those with the smallest hashes, at least one, and never all.

    Documents of one name, from several inputs, stay together.
    """
    ranked = sorted((hashlib.sha256(f"{seed}/{name}".encode()).digest(), name) for name in {name for name, _ in source.pieces()})
    if len(ranked) < 2:
        place = f"{source.files[0][1]}{' and others' if len(source.files) > 1 else ''}"
        raise InputError(
            f"found {len(ranked)} documents that differ in name in {place}; "
            "expected at least two, or one long enough to be cut in pieces: add text"
        )
    number = min(len(ranked) - 1, max(1, round(validation_fraction * len(ranked))))
    return {name for _, name in ranked[:number]}


def _batches(pieces: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    while batch := list(islice(pieces, BATCH_DOCUMENTS)):
        yield batch


def _entropy(counts: np.ndarray) -> float:
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())
