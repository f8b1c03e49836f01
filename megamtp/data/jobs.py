"""What is done with every shard: which tokenizer, perhaps trained now, and how documents are treated."""

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megamtp.data.documents import Source
from megamtp.data.records import Reader
from megamtp.data.shards import Shard
from megamtp.data.tokenizer import BYTES, train_sentencepiece
from megamtp.errors import InputError
from megamtp.files import write_atomically

PART_FORMAT = 2
DEFAULT_VOCAB_SIZE = 4096
# The tokenizer's sample is drawn from all inputs if they are no larger than this, else from as many bytes of them.
TRAINING_BYTES = 256 << 20


@dataclass(frozen=True)
class TokenisationJob:
    """What is done with every shard.

    Attributes:
        folder: of the parts.
        tokenizer: `bytes` or a SentencePiece model whose SHA-256 is tokenizer_digest.
        with_text_hashes: hash the documents' texts, too.
        skip_bad_records: as of Reader.
    """

    folder: Path
    tokenizer: str
    tokenizer_digest: str
    json_key: str
    seed: int
    in_pieces: bool
    with_text_hashes: bool
    skip_bad_records: bool = False

    def key(self, shard: Shard) -> str:
        """Changes with all that a part depends on; those without bad records are the same whether these are skipped
        or not.
        """
        settings = dataclasses.asdict(self) | {"folder": PART_FORMAT, "tokenizer": "", "skip_bad_records": ""}
        return hashlib.sha256(f"{json.dumps(settings)}\n{shard.fingerprint}".encode()).hexdigest()[:32]


def make_job(
    source: Source,
    shards: list[Shard],
    in_pieces: bool,
    work: Path,
    vocab_size: int | None,
    tokenizer: Path | str | None,
    seed: int,
    deduplicate: bool,
) -> TokenisationJob:
    """The job of preparing `shards` of `source` with parts in the folder `work`; the other arguments are
    corpus.prepare's.

    Raises:
        InputError: there is too little text, or the tokenizer cannot be trained or read.
        OSError: `work` cannot be written to.
    """
    if in_pieces and (found := _count_names(source, reader := source.reader())) < 2:
        raise too_few(found, place(source), reader)
    path = _tokenizer(source, shards, work, vocab_size, tokenizer, seed)
    digest = BYTES if path == BYTES else hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return TokenisationJob(
        work, path, digest, source.json_key, seed, in_pieces, deduplicate and not in_pieces, source.skip_bad_records
    )


def _count_names(source: Source, reader: Reader) -> int:
    """How many names of documents or pieces there are, up to 2."""
    names: set[str] = set()
    for name, _ in source.pieces(reader):
        names.add(name)
        if len(names) == 2:
            break
    return len(names)


def _tokenizer(
    source: Source, shards: list[Shard], work: Path, vocab_size: int | None, tokenizer: Path | str | None, seed: int
) -> str:
    """`bytes`, or a model in the work folder: a copy of the given one, or one that is trained, if not an earlier
    call did that.
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
    left = TRAINING_BYTES
    chosen = set()
    for number in random.Random(seed).sample(range(len(shards)), len(shards)):
        if left > 0:
            chosen.add(number)
            left -= shards[number].num_bytes
    for number in sorted(chosen):
        yield from (text for _, text in shards[number].documents(source.reader()))


def place(source: Source) -> str:
    """The inputs, for a message."""
    return f"{source.files[0].path}{' and others' if len(source.files) > 1 else ''}"


def too_few(found: int, place: str, reader: Reader | None = None) -> InputError:
    """The refusal of inputs that cannot be split; `reader` has passed over some of them."""
    skipped, remedy = "", "add text"
    if reader and reader.bad_records:
        skipped += f", skipped {len(reader.bad_records)} bad records, the first: {reader.bad_records[0]}"
    if reader and reader.not_utf8:
        skipped += (
            f", and passed over {len(reader.not_utf8)} files that are not UTF-8 text, the first: {reader.not_utf8[0]}"
        )
        remedy = "convert files to UTF-8, or add text"
    return InputError(
        f"found {found} documents that differ in name in {place}{skipped}; "
        f"expected at least two, or one long enough to be cut in pieces: {remedy}"
    )
