"""What is done with every shard of the inputs: the tokenizer, which may be trained here, and the document settings."""

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megamtp.data.input_files import Source
from megamtp.data.records import Reader
from megamtp.data.shards import Shard
from megamtp.data.tokenizer import BYTES, train_sentencepiece
from megamtp.errors import InputError
from megamtp.files import write_atomically

FORMAT = 2  # version of the files of tokenised shards
DEFAULT_VOCAB_SIZE = 4096
# A tokenizer is trained on all inputs if they have at most so many bytes, else on a sample of about so many bytes.
TRAINING_BYTES = 256 << 20


@dataclass(frozen=True)
class TokenisationTask:
    """The settings of tokenisation, the same for all shards.

    Attributes:
        folder: where tokenised shards are written.
        tokenizer: `bytes`, or the path of a SentencePiece model.
        tokenizer_digest: the SHA-256 of the model, or `bytes`.
        json_key, skip_bad_records: see Reader.
        cuts_documents: whether documents are cut into pieces.
        with_text_hashes: also compute hashes of the documents' texts.
    """

    folder: Path
    tokenizer: str
    tokenizer_digest: str
    json_key: str
    seed: int
    cuts_documents: bool
    with_text_hashes: bool
    skip_bad_records: bool = False

    def key(self, shard: Shard) -> str:
        """Returns a hash of everything that a tokenised shard depends on.

        It does not depend on skip_bad_records, because shards without bad records are the same either way.
        """
        settings = dataclasses.asdict(self) | {"folder": FORMAT, "tokenizer": "", "skip_bad_records": ""}
        return hashlib.sha256(f"{json.dumps(settings)}\n{shard.fingerprint}".encode()).hexdigest()[:32]


def make_task(
    source: Source,
    shards: list[Shard],
    cuts_documents: bool,
    work: Path,
    vocab_size: int | None,
    tokenizer: Path | str | None,
    seed: int,
    deduplicate: bool,
) -> TokenisationTask:
    """Returns the task of tokenising `shards` of `source` into the folder `work`. Trains a tokenizer if none is given.

    The other arguments are those of corpus.prepare.

    Raises:
        InputError: there is too little text, or the tokenizer cannot be trained or read.
        OSError: `work` cannot be written to.
    """
    if cuts_documents and (num_names := _count_names(source, reader := source.reader())) < 2:
        raise too_few_documents(num_names, describe_inputs(source), reader)
    path = _tokenizer(source, shards, work, vocab_size, tokenizer, seed)
    digest = BYTES if path == BYTES else hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return TokenisationTask(
        work,
        path,
        digest,
        source.json_key,
        seed,
        cuts_documents,
        deduplicate and not cuts_documents,
        source.skip_bad_records,
    )


def _count_names(source: Source, reader: Reader) -> int:
    """Returns the number of different names of documents or pieces, but at most 2."""
    names: set[str] = set()
    for name, _ in source.pieces(reader):
        names.add(name)
        if len(names) == 2:
            break
    return len(names)


def _tokenizer(
    source: Source, shards: list[Shard], work: Path, vocab_size: int | None, tokenizer: Path | str | None, seed: int
) -> str:
    """Returns `bytes`, or the path of a model in the work folder: a copy of the given model, or a trained one.

    A model that an earlier call has trained is reused.
    """
    if str(tokenizer) == BYTES:
        return BYTES
    if tokenizer:
        write_atomically(work / "given.model", Path(tokenizer).read_bytes())
        return str(work / "given.model")
    size = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
    key = hashlib.sha256(
        json.dumps([size, seed, source.json_key, *(shard.fingerprint for shard in shards)]).encode()
    ).hexdigest()
    path = work / f"trained-{key[:32]}.model"
    if not path.is_file():
        train_sentencepiece(_training_texts(source, shards, seed), path, size, seed)
    return str(path)


def _training_texts(source: Source, shards: list[Shard], seed: int) -> Iterator[str]:
    remaining_bytes = TRAINING_BYTES
    sample = set()
    for number in random.Random(seed).sample(range(len(shards)), len(shards)):
        if remaining_bytes > 0:
            sample.add(number)
            remaining_bytes -= shards[number].num_bytes
    for number in sorted(sample):
        yield from (text for _, text in shards[number].documents(source.reader()))


def describe_inputs(source: Source) -> str:
    """Returns the name of the first input file, and whether there are others, for a message."""
    return f"{source.files[0].path}{' and others' if len(source.files) > 1 else ''}"


def too_few_documents(num_names: int, inputs: str, reader: Reader | None = None) -> InputError:
    """Returns the error for inputs that cannot be split into train and validation documents.

    Args:
        num_names: the number of different document names.
        inputs: as describe_inputs returns.
        reader: names the files and records that it has passed over.
    """
    skipped, remedy = "", "add text"
    if reader and reader.bad_records:
        skipped += f", skipped {len(reader.bad_records)} bad records, the first: {reader.bad_records[0]}"
    if reader and reader.not_utf8:
        skipped += (
            f", and passed over {len(reader.not_utf8)} files that are not UTF-8 text, the first: {reader.not_utf8[0]}"
        )
        remedy = "convert files to UTF-8, or add text"
    return InputError(
        f"found {num_names} documents with different names in {inputs}{skipped}; "
        f"expected at least two, or one document that is long enough to be cut into pieces: {remedy}"
    )
