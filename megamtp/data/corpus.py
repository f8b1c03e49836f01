"""Prepares a corpus from text.

Writes tokenizer.model, train and validation .bin/.idx/.crc, lengths.png, and at last corpus.json. A folder without
corpus.json is not a corpus. Until then, tokenised shards are kept in the folder .preparation, so that a preparation
that was interrupted can resume.
"""

import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from megamtp.data.input_files import Source
from megamtp.data.length_report import draw_lengths
from megamtp.data.merge import SPLITS, TokenisedShards, Totals, split_threshold, write_splits
from megamtp.data.records import FORMAT_OF_SUFFIX, TEXT, Span, content_suffix
from megamtp.data.shards import Shard, cut_into_shards
from megamtp.data.tokenisation import DEFAULT_VOCAB_SIZE, TokenisationTask, describe_inputs, make_task
from megamtp.data.tokenizer import BYTES, open_tokenizer
from megamtp.data.workers import tokenise_all
from megamtp.errors import InputError
from megamtp.files import open_atomically, take_lock, write_atomically

SUMMARY = "corpus.json"
PICTURE = "lengths.png"
SKIPPED = "skipped_records.txt"
WORK = ".preparation"
# If a folder has these files but no corpus.json, they may belong to another program.
CONTENT = (*(f"{split}{end}" for split in SPLITS for end in (".bin", ".idx")), "tokenizer.model")


@dataclass(frozen=True)
class Corpus:
    """The content of corpus.json.

    Attributes:
        settings: a second preparation with equal settings would make the same corpus.
        documents, tokens: numbers of documents and tokens, by split.
        unigram_entropy: of the validation split's token frequencies, in nats per token. This is the loss of the best
            model that does not see the context.
        duplicates: number of documents that were dropped because an earlier document has the same text.
        document_lengths: number of documents, by length: key k counts documents of k to 2 k - 1 tokens, with their
            end-of-document tokens.
        space_marks: number of documents that contain U+2581, if the tokenizer reads it as a space.
        end_markers: number of documents that contain an end-of-text marker, which is tokenised as ordinary characters.
        unreadable_files: names of text files that are not UTF-8.
        files: number of files that were read, by format, including unreadable files.
        passed_over: names of files and folders that were not read, by reason.
        skipped_records: number of bad records, which are listed in skipped_records.txt.
    """

    settings: dict
    vocab_size: int
    documents: dict[str, int]
    tokens: dict[str, int]
    bytes_per_token: float
    unigram_entropy: float
    unreadable_files: list[str]
    duplicates: int = 0
    document_lengths: dict[str, int] = field(default_factory=dict)
    space_marks: int = 0
    end_markers: int = 0
    files: dict[str, int] = field(default_factory=dict)
    passed_over: dict[str, list[str]] = field(default_factory=dict)
    skipped_records: int = 0


def prepare(
    source: Source,
    output: Path,
    vocab_size: int | None = None,
    tokenizer: Path | str | None = None,
    validation_fraction: float = 0.02,
    seed: int = 0,
    overwrite: bool = False,
    deduplicate: bool = False,
    workers: int | Executor = 1,
) -> tuple[Corpus, bool]:
    """Tokenises all documents into `output` and appends the end-of-document token to each.

    A hash of (`seed`, name) decides which documents are held out for validation (at least one), so the split does not
    depend on their order. The files do not depend on `workers`. All errors except a full disk are detected before an
    existing corpus is touched.

    Args:
        vocab_size: the number of pieces of the trained tokenizer [4096], or that a given tokenizer must have.
        tokenizer: an existing SentencePiece model, or `bytes`.
        overwrite: replace another corpus, or other files of the same names.
        deduplicate: drop documents that have the same text as an earlier one.
        workers: the number of processes that tokenise, or an executor.

    Returns:
        (the corpus, whether an existing corpus of the same inputs and settings was reused).

    Raises:
        InputError: an input is bad or has changed, or `output` cannot be written or replaced without `overwrite`.
    """
    find_settings = partial(_settings, source, vocab_size, tokenizer, validation_fraction, seed, deduplicate)
    settings = find_settings()
    try:
        if not overwrite and (existing := _reusable_corpus(output, settings, tokenizer)):
            return existing, True
        with _work_folder(output) as work:
            cuts_documents = source.has_few_documents()
            skipped = source.find_duplicates() if cuts_documents and deduplicate else None
            shards = cut_into_shards(source.files, cuts_documents, skipped)
            task = make_task(source, shards, cuts_documents, work, vocab_size, tokenizer, seed, deduplicate)
            tokenised = _tokenise(shards, task, workers)
            threshold = split_threshold(tokenised, validation_fraction, describe_inputs(source))
            _require_unchanged(settings, find_settings())
            totals = _publish(tokenised, threshold, output, task)
            corpus = _summary(totals, source, settings, tokenised.vocab_size, sum(map(len, skipped or [])))
            _write_summary(output, corpus, totals)
    except OSError as error:
        problem = f"{output} cannot be written to: {error.strerror}"
        raise InputError(f"{problem}; choose another folder or make room") from None
    return corpus, False


def _require_unchanged(before: object, after: object) -> None:
    if before != after:
        raise InputError(
            "an input changed while it was read; expected inputs that do not change: wait, then run the command again"
        )


@contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """Creates the locked folder of tokenised shards. Removes it at the end, unless an error leaves shards to reuse.

    Raises:
        InputError: another process prepares this corpus.
    """
    work = output / WORK
    output.mkdir(parents=True, exist_ok=True)
    work.mkdir(exist_ok=True)
    with open(work / "lock", "wb") as stream:
        if not take_lock(stream, output, "make sure that no other process prepares it"):
            raise InputError(
                f"another process is preparing {output}; expected one process at a time: wait for it or end it"
            )
        try:
            yield work
        except (InputError, OSError):
            if not any(work.glob("*.npy")):
                shutil.rmtree(work, ignore_errors=True)
            raise
    shutil.rmtree(work)


def _tokenise(shards: list[Shard], task: TokenisationTask, workers: int | Executor) -> TokenisedShards:
    """Tokenises all shards, and drops duplicates if the task has text hashes."""
    _remove_stale_files(shards, task)
    tokenise_all(shards, task, workers)
    tokenised = TokenisedShards(shards, task, open_tokenizer(task.tokenizer).vocab_size)
    if task.with_text_hashes:
        tokenised.drop_duplicates()
    return tokenised


def _remove_stale_files(shards: list[Shard], task: TokenisationTask) -> None:
    """Removes files of an earlier preparation that had other settings or inputs."""
    current = {"lock", Path(task.tokenizer).name, *(task.key(shard) for shard in shards)}
    for path in task.folder.iterdir():
        if path.name.partition(".")[0] not in current and path.name not in current:
            path.unlink()


def _publish(tokenised: TokenisedShards, threshold: int, output: Path, task: TokenisationTask) -> Totals:
    """Removes an old corpus.json, then writes all files except corpus.json and lengths.png."""
    (output / SUMMARY).unlink(missing_ok=True)
    if task.tokenizer == BYTES:
        (output / "tokenizer.model").unlink(missing_ok=True)
    else:
        write_atomically(output / "tokenizer.model", Path(task.tokenizer).read_bytes())
    if task.skip_bad_records:
        with open_atomically(output / SKIPPED) as stream:
            for shard, _ in tokenised:
                stream.writelines(f"{record}\n".encode() for record in shard.bad_records)
    else:
        (output / SKIPPED).unlink(missing_ok=True)
    return write_splits(tokenised, threshold, output)


def _summary(totals: Totals, source: Source, settings: dict, vocab_size: int, dropped: int) -> Corpus:
    lengths = {str(1 << power): int(number) for power, number in enumerate(totals.lengths) if number}
    return Corpus(
        settings,
        vocab_size,
        totals.documents,
        totals.tokens,
        totals.num_bytes / sum(totals.tokens.values()),
        _entropy(totals.validation_counts),
        totals.not_utf8,
        totals.duplicates + dropped,
        lengths,
        totals.space_marks,
        totals.end_markers,
        dict(Counter(sorted(file.format for file in source.files))),
        source.passed_over,
        totals.skipped_records,
    )


def read_corpus(folder: Path) -> Corpus:
    """Reads corpus.json from the folder of a corpus.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        return Corpus(**json.loads((folder / SUMMARY).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{folder / SUMMARY} cannot be read ({error}); prepare the corpus again, with --overwrite"
        ) from None


def _complete_corpus(output: Path) -> Corpus | None:
    """Returns the corpus in `output` if it is complete, or None."""
    files = [output / SUMMARY, *(output / f"{split}{end}" for split in SPLITS for end in (".bin", ".idx"))]
    if not all(file.is_file() for file in files):
        return None
    corpus = read_corpus(output)
    return corpus if corpus.settings.get("tokenizer") == BYTES or (output / "tokenizer.model").is_file() else None


def _write_summary(output: Path, corpus: Corpus, totals: Totals) -> None:
    write_atomically(output / PICTURE, draw_lengths(totals.lengths))
    write_atomically(output / SUMMARY, json.dumps(dataclasses.asdict(corpus), indent=1).encode())


def _reusable_corpus(output: Path, settings: dict, tokenizer: Path | str | None) -> Corpus | None:
    """Returns the corpus in `output` if it is complete and has these settings, or None if there is no corpus.

    Raises:
        InputError: the corpus has other settings, or another program's files would be replaced.
    """
    corpus = _complete_corpus(output)
    if corpus is None:
        _refuse_to_replace(output, tokenizer)
    elif corpus.settings != settings:
        raise InputError(
            f"{output} holds a corpus of other inputs or settings; expected the same: use --overwrite or another folder"
        )
    elif (output / WORK).exists():
        with _work_folder(output):
            pass  # removes the work folder of a preparation that was killed after it had written corpus.json
    return corpus


def _refuse_to_replace(output: Path, tokenizer: Path | str | None) -> None:
    """Raises InputError if the files that would be replaced do not come from an earlier preparation."""
    if (output / SUMMARY).exists() or (output / WORK).exists():
        return
    for name in CONTENT:
        if (output / name).exists() and str(output / name) != str(tokenizer):
            raise InputError(
                f"{output / name} exists without a {SUMMARY}; expected a folder without {name}: use another folder or "
                "--overwrite"
            )


def _settings(
    source: Source,
    vocab_size: int | None,
    tokenizer: Path | str | None,
    validation_fraction: float,
    seed: int,
    deduplicate: bool,
) -> dict:
    """Returns everything that the corpus depends on, as corpus.json holds it.

    Raises:
        InputError: an input or the tokenizer cannot be read, or the tokenizer does not have `vocab_size` pieces.
    """
    inputs = hashlib.sha256(source.json_key.encode(errors="backslashreplace"))
    try:
        for file in source.files:
            status = file.path.stat()
            inputs.update(
                f"\n{file.name}\t{status.st_size}\t{status.st_mtime_ns}{_format_unless_implied(file)}".encode()
            )
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; expected a readable file") from None
    model: str | int = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
    if tokenizer:
        num_pieces = open_tokenizer(tokenizer).vocab_size
        if vocab_size not in (None, num_pieces):
            raise InputError(
                f"{tokenizer} has {num_pieces} pieces; expected {vocab_size}: leave --vocab-size out or give another "
                "tokenizer"
            )
        model = BYTES if str(tokenizer) == BYTES else hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest()
    settings = {
        "inputs": inputs.hexdigest(),
        "tokenizer": model,
        "validation_fraction": validation_fraction,
        "seed": seed,
    }
    flags = {"deduplicate": deduplicate, "skip_bad_records": source.skip_bad_records}
    return settings | {name: True for name, is_set in flags.items() if is_set}


def _format_unless_implied(file: Span) -> str:
    """Returns a file's format, or an empty string if its name implies it, as .jsonl, .parquet and .txt do."""
    suffix = content_suffix(file.path)
    implied = suffix.removeprefix(".") if suffix in (*FORMAT_OF_SUFFIX, ".json") else TEXT
    return "" if file.format == implied else f"\t{file.format}"


def own_files(output: Path) -> list[Path]:
    """Returns all paths that a preparation may leave in `output`, so that they are not read as inputs."""
    names = (*CONTENT, *(f"{split}.crc" for split in SPLITS), SUMMARY, PICTURE, SKIPPED)
    return [output / WORK, *(output / f"{name}{end}" for name in names for end in ("", ".partial"))]


def _entropy(counts: np.ndarray) -> float:
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())
