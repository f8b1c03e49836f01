"""Text -> a prepared corpus: tokenizer.model, train and validation .bin/.idx/.crc, lengths.png, and corpus.json, which
is last.

A folder without corpus.json is not a corpus, whatever else lies in it. Until then finished parts are kept in
.preparation, from which the next call goes on.
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

from megamtp.data.documents import Source
from megamtp.data.jobs import DEFAULT_VOCAB_SIZE, TokenisationJob, make_job, place
from megamtp.data.length_report import draw_lengths
from megamtp.data.merge import SPLITS, Parts, Totals, split_limit, write_splits
from megamtp.data.records import FORMAT_OF_SUFFIX, TEXT, Span, content_suffix
from megamtp.data.shards import Shard, plan
from megamtp.data.tokenizer import BYTES, open_tokenizer
from megamtp.data.workers import tokenise_all
from megamtp.errors import InputError
from megamtp.files import open_atomically, take_lock, write_atomically

SUMMARY = "corpus.json"
PICTURE = "lengths.png"
SKIPPED = "skipped_records.txt"
WORK = ".preparation"
# Files that decide whether a folder without corpus.json belongs to another program.
CONTENT = (*(f"{split}{end}" for split in SPLITS for end in (".bin", ".idx")), "tokenizer.model")


@dataclass(frozen=True)
class Corpus:
    """What corpus.json says. `settings` decides whether a second preparation would make the same corpus.

    Attributes:
        unigram_entropy: of the validation split's own token frequencies, in nats per token: the loss of the best model
            that knows no context.
        duplicates: documents that were dropped because an earlier one has the same text.
        document_lengths: how many documents have at least so many tokens, their ends included, and fewer than twice as
            many.
        space_marks: documents with U+2581, if the tokenizer reads that as a space.
        end_markers: documents in which an end-of-text marker is written, which is tokenised as ordinary characters.
        unreadable_files: names of files that were read as text and are not UTF-8.
        files: how many files of each format were read, unreadable ones included.
        passed_over: names of what was not read at all, by the reason.
        skipped_records: bad records that skipped_records.txt lists.
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
    """Tokenises all documents into `output`, each ended by the tokenizer's end-of-document id.

    Documents go to the validation split by a hash of (seed, name), so the split does not depend on their order.
    Every error but a full disk is found before an earlier corpus is touched. The files do not depend on `workers`.

    Args:
        vocab_size: of the SentencePiece model that is trained on the documents [4096], or that a given tokenizer must
            have.
        tokenizer: an existing SentencePiece model, or `bytes`.
        deduplicate: drop documents whose text an earlier one has.
        workers: processes that tokenise, or an executor.

    Returns:
        (the corpus, whether an earlier preparation with the same settings and inputs was found and reused).

    Raises:
        InputError: nothing to read or nowhere to write, an input changed meanwhile, or `output` holds another corpus,
            perhaps of another program, and `overwrite` is not set.
    """
    find_settings = partial(_settings, source, vocab_size, tokenizer, validation_fraction, seed, deduplicate)
    settings = find_settings()
    try:
        if not overwrite and (existing := _reused(output, settings, tokenizer)):
            return existing, True
        with _work_folder(output) as work:
            in_pieces = source.is_small()
            skipped = source.duplicates() if in_pieces and deduplicate else None
            shards = plan(source.files, in_pieces, skipped)
            job = make_job(source, shards, in_pieces, work, vocab_size, tokenizer, seed, deduplicate)
            parts = _tokenised(shards, job, workers)
            limit = split_limit(parts, validation_fraction, place(source))
            _require_unchanged(settings, find_settings())
            totals = _publish(parts, limit, output, job)
            corpus = _summary(totals, source, settings, parts.vocab_size, sum(map(len, skipped or [])))
            _write_summary(output, corpus, totals)
    except OSError as error:
        problem = f"{output} cannot be written to: {error.strerror}"
        raise InputError(f"{problem}; choose another folder or make room") from None
    return corpus, False


def _require_unchanged(before: object, after: object) -> None:
    if before != after:
        raise InputError("an input changed while it was read; expected all to stay as they are: wait, then call again")


@contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """Where parts are kept; only one preparation at a time has it. Removed in the end, but for finished parts after
    a mistake.
    """
    work = output / WORK
    output.mkdir(parents=True, exist_ok=True)
    work.mkdir(exist_ok=True)
    with open(work / "lock", "wb") as stream:
        if not take_lock(stream, output, "make sure that no other process prepares it"):
            raise InputError(
                f"{output} is being prepared by another process; expected one at a time: wait for it or end it"
            )
        try:
            yield work
        except (InputError, OSError):
            if not any(work.glob("*.npy")):
                shutil.rmtree(work, ignore_errors=True)
            raise
    shutil.rmtree(work)


def _tokenised(shards: list[Shard], job: TokenisationJob, workers: int | Executor) -> Parts:
    """All parts, without duplicates if the job drops them."""
    _remove_strangers(shards, job)
    tokenise_all(shards, job, workers)
    parts = Parts(shards, job, open_tokenizer(job.tokenizer).vocab_size)
    if job.with_text_hashes:
        parts.drop_duplicates()
    return parts


def _remove_strangers(shards: list[Shard], job: TokenisationJob) -> None:
    """Removes parts and tokenizers of an earlier preparation that had other settings or inputs."""
    wanted = {"lock", Path(job.tokenizer).name, *(job.key(shard) for shard in shards)}
    for path in job.folder.iterdir():
        if path.name.partition(".")[0] not in wanted and path.name not in wanted:
            path.unlink()


def _publish(parts: Parts, limit: int, output: Path, job: TokenisationJob) -> Totals:
    """Writes all files but the picture and corpus.json, which is removed first."""
    (output / SUMMARY).unlink(missing_ok=True)
    if job.tokenizer == BYTES:
        (output / "tokenizer.model").unlink(missing_ok=True)
    else:
        write_atomically(output / "tokenizer.model", Path(job.tokenizer).read_bytes())
    if job.skip_bad_records:
        with open_atomically(output / SKIPPED) as stream:
            for part, _ in parts:
                stream.writelines(f"{record}\n".encode() for record in part.bad_records)
    else:
        (output / SKIPPED).unlink(missing_ok=True)
    return write_splits(parts, limit, output)


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
    """The summary of a prepared corpus.

    Raises:
        InputError: there is none, or it is damaged.
    """
    try:
        return Corpus(**json.loads((folder / SUMMARY).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{folder / SUMMARY} cannot be read ({error}); prepare the corpus again, with --overwrite"
        ) from None


def _existing(output: Path) -> Corpus | None:
    """A whole earlier corpus, or None."""
    files = [output / SUMMARY, *(output / f"{split}{end}" for split in SPLITS for end in (".bin", ".idx"))]
    if not all(file.is_file() for file in files):
        return None
    corpus = read_corpus(output)
    return corpus if corpus.settings.get("tokenizer") == BYTES or (output / "tokenizer.model").is_file() else None


def _write_summary(output: Path, corpus: Corpus, totals: Totals) -> None:
    write_atomically(output / PICTURE, draw_lengths(totals.lengths))
    write_atomically(output / SUMMARY, json.dumps(dataclasses.asdict(corpus), indent=1).encode())


def _reused(output: Path, settings: dict, tokenizer: Path | str | None) -> Corpus | None:
    """A whole earlier corpus with these settings, or None. Raises InputError: it has others, or files would be
    replaced.
    """
    corpus = _existing(output)
    if corpus is None:
        _refuse_to_replace(output, tokenizer)
    elif corpus.settings != settings:
        raise InputError(
            f"{output} holds a corpus of other inputs or settings; expected the same: use --overwrite or another folder"
        )
    elif (output / WORK).exists():
        with _work_folder(output):
            pass  # removes what a call left that was killed at its very end
    return corpus


def _refuse_to_replace(output: Path, tokenizer: Path | str | None) -> None:
    """Raises InputError: files of our names lie where neither a corpus nor what a killed call has left does."""
    if (output / SUMMARY).exists() or (output / WORK).exists():
        return
    for name in CONTENT:
        if (output / name).exists() and str(output / name) != str(tokenizer):
            raise InputError(
                f"{output / name} is there without a {SUMMARY}; expected a folder without it: use another or "
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
    """Raises InputError: an input or the tokenizer cannot be read, or the tokenizer's vocabulary is another than
    vocab_size.
    """
    inputs = hashlib.sha256(source.json_key.encode(errors="backslashreplace"))
    try:
        for file in source.files:
            status = file.path.stat()
            inputs.update(f"\n{file.name}\t{status.st_size}\t{status.st_mtime_ns}{_format_if_untold(file)}".encode())
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; expected a readable file") from None
    model: str | int = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
    if tokenizer:
        found = open_tokenizer(tokenizer).vocab_size
        if vocab_size not in (None, found):
            raise InputError(
                f"{tokenizer} has {found} pieces, expected {vocab_size}: leave --vocab-size out or give another "
                "tokenizer"
            )
        model = BYTES if str(tokenizer) == BYTES else hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest()
    settings = {
        "inputs": inputs.hexdigest(),
        "tokenizer": model,
        "validation_fraction": validation_fraction,
        "seed": seed,
    }
    chosen = {"deduplicate": deduplicate, "skip_bad_records": source.skip_bad_records}
    return settings | {name: True for name, is_chosen in chosen.items() if is_chosen}


def _format_if_untold(file: Span) -> str:
    """A file's format, unless its name tells it: only .jsonl, .parquet and the names of text do."""
    suffix = content_suffix(file.path)
    told = suffix.removeprefix(".") if suffix in (*FORMAT_OF_SUFFIX, ".json") else TEXT
    return "" if file.format == told else f"\t{file.format}"


def own_files(output: Path) -> list[Path]:
    """What a preparation, perhaps a killed one, leaves in `output`, for an input folder that holds it."""
    names = (*CONTENT, *(f"{split}.crc" for split in SPLITS), SUMMARY, PICTURE, SKIPPED)
    return [output / WORK, *(output / f"{name}{end}" for name in names for end in ("", ".partial"))]


def _entropy(counts: np.ndarray) -> float:
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())
