"""Tokenizers: SentencePiece models, training of a BPE model that suits code, and bytes."""

import io
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]  # made at run time

from megamtp.config import BYTES
from megamtp.data.indexed_dataset import best_dtype
from megamtp.errors import InputError
from megamtp.files import write_atomically

# SentencePiece represents a space by this character, so it reads the character in a text as a space.
SPACE_MARK = "\u2581"
# A common way to mark the end of a text. All tokenizers here encode it, and the name of their own end-of-document
# piece, as ordinary characters.
END_MARKER = "<|endoftext|>"
# Training reads at most 5000 chunks of 4096 characters, about 20 MB. That takes seconds, and more text hardly changes
# the merges.
CHUNK_CHARACTERS = 4096
MAX_CHUNKS = 5000
# The options of train_sentencepiece. A model file records its training options, so they also identify our models.
TRAINER_OPTIONS = {
    "byte_fallback": True,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "max_sentence_length": 4 * CHUNK_CHARACTERS,  # in UTF-8 bytes; longer sentences would be dropped
}
NORMALIZER_OPTIONS = {"add_dummy_prefix": False, "remove_extra_whitespaces": False}
NO_NORMALIZATION = "identity"


class ByteTokenizer:
    """Token ids are the bytes of the text in UTF-8; 256 ends a document.

    Source: Gloeckle et al. 2024, section 3.3 (byte-level models).
    """

    path = BYTES
    vocab_size = 257
    end_of_document_id = 256
    end_piece = "<|end|>"
    end_markers = (end_piece, END_MARKER)
    keeps_space_marks = True

    def encode(self, text: str) -> list[int]:
        """Returns the bytes of `text`, without an end-of-document id."""
        return list(text.encode())

    def encode_documents(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns (concatenated tokens of all texts, number of tokens of each text), with end-of-document ids."""
        encoded = [text.encode() for text in texts]
        lengths = np.array([len(text) + 1 for text in encoded], dtype=np.int64)
        tokens = np.frombuffer(b"\0".join([*encoded, b""]), dtype=np.uint8).astype(np.uint16)
        tokens[np.cumsum(lengths) - 1] = self.end_of_document_id
        return tokens, lengths

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`. Invalid UTF-8 becomes U+FFFD; end-of-document ids are left out."""
        return bytes(int(token) for token in ids if token < 256).decode(errors="replace")


class SentencePieceTokenizer:
    """A SentencePiece model.

    The ids equal those of the SentencePiece library, with one exception: models of `train_sentencepiece` encode U+2581
    as the three bytes of its UTF-8, where the library would read a space. With these models,
    decode(encode(text)) == text for every text without lone surrogates.

    Attributes:
        processor: the library's tokenizer.
        proto: the content of the model file: the pieces and the training options.
        user_defined: ids of user-defined pieces, which the library matches in a text before all others.
        end_markers: strings that look like the end of a document, but are encoded as ordinary characters.
        keeps_space_marks: U+2581 is distinguished from a space, as by models of `train_sentencepiece`.

    Raises:
        InputError: the file is missing, is not a SentencePiece model, or has no end-of-sequence piece.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.processor = _load(self.path)
        self.vocab_size: int = self.processor.vocab_size()
        self.end_of_document_id: int = self.processor.eos_id()
        if self.end_of_document_id < 0:
            raise InputError(
                f"{path}: this tokenizer has no end-of-sequence piece; expected one, to end each document: train the "
                "tokenizer with an eos_id, or let prepare_data train one"
            )
        self.proto = ModelProto.FromString(self.processor.serialized_model_proto())
        user_defined = ModelProto.SentencePiece.USER_DEFINED
        self.user_defined = [token for token, piece in enumerate(self.proto.pieces) if piece.type == user_defined]
        symbols = {self.processor.id_to_piece(token) for token in self.user_defined}
        self.end_markers = tuple({self.processor.id_to_piece(self.end_of_document_id), END_MARKER} - symbols)
        self.keeps_space_marks = not self.user_defined and _is_ours(self.proto)

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of `text`, without an end-of-document id."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the token ids of each text, as `encode` does."""
        encoded = self.processor.encode(texts, num_threads=1)
        if self.keeps_space_marks:
            for index, text in enumerate(texts):
                if SPACE_MARK in text:
                    encoded[index] = self._encode_around_space_marks(text)
        return encoded

    def encode_documents(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns (concatenated tokens of all texts, number of tokens of each text), with end-of-document ids."""
        encoded = self.encode_batch(texts)
        lengths = np.array([len(ids) + 1 for ids in encoded], dtype=np.int64)
        tokens = np.full(lengths.sum(), self.end_of_document_id, dtype=best_dtype(self.vocab_size))
        for ids, stop in zip(encoded, np.cumsum(lengths) - 1, strict=True):
            tokens[stop - len(ids) : stop] = ids
        return tokens, lengths

    def _encode_around_space_marks(self, text: str) -> list[int]:
        mark_ids = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        first, *others = self.processor.encode(text.split(SPACE_MARK))
        return first + [token for part in others for token in mark_ids + part]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, without control pieces such as end of document, and ids beyond the vocabulary."""
        return self.processor.decode([int(token) for token in ids if token < self.vocab_size])


Tokenizer = SentencePieceTokenizer | ByteTokenizer


def open_tokenizer(path: Path | str) -> Tokenizer:
    """Opens the tokenizer of data.tokenizer or --tokenizer: `bytes`, or a SentencePiece model. Raises InputError."""
    return ByteTokenizer() if str(path) == BYTES else SentencePieceTokenizer(path)


def _load(path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        model = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot read this tokenizer ({error.strerror}); expected a SentencePiece model: check the path"
        ) from error
    try:
        if model:
            return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        pass
    raise InputError(f"{path}: not a SentencePiece model; expected one: use a tokenizer.model made by prepare_data")


def _is_ours(model: ModelProto) -> bool:
    """Returns whether `train_sentencepiece` has trained this model."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    return (
        trainer.model_type == TrainerSpec.BPE
        and normalizer.name == NO_NORMALIZATION
        and all(getattr(trainer, name) == value for name, value in TRAINER_OPTIONS.items())
        and all(getattr(normalizer, name) == value for name, value in NORMALIZER_OPTIONS.items())
    )


def train_sentencepiece(documents: Iterable[str], path: Path, vocab_size: int, seed: int) -> None:
    """Trains a BPE model with byte fallback on a seeded sample of `documents`, and writes it atomically to `path`.

    Whitespace is kept exactly: there is no normalisation, and no space is added or removed. Runs of spaces may become
    one piece. The same documents, size and seed give the same bytes.

    Raises:
        InputError: the text cannot fill the vocabulary, or the vocabulary cannot hold the characters of the text.
    """
    model, sample = io.BytesIO(), _sample_chunks(documents, seed)
    options: dict[str, Any] = {**TRAINER_OPTIONS, **NORMALIZER_OPTIONS}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name=NO_NORMALIZATION,
            minloglevel=2,
            **options,
        )
    except (RuntimeError, ValueError) as error:  # ValueError: vocab_size exceeds 32 bits
        raise InputError(_explain(str(error), vocab_size)) from error
    write_atomically(path, model.getvalue())


def _sample_chunks(documents: Iterable[str], seed: int) -> list[str]:
    """Returns at most MAX_CHUNKS chunks, sampled uniformly. Source: Vitter 1985, reservoir sampling, algorithm R."""
    generator = random.Random(seed)
    sample: list[str] = []
    for number, chunk in enumerate(_chunks(documents)):
        if number < MAX_CHUNKS:
            sample.append(chunk)
        elif (slot := generator.randrange(number + 1)) < MAX_CHUNKS:
            sample[slot] = chunk
    return sample


def _chunks(documents: Iterable[str]) -> Iterator[str]:
    for document in documents:
        for start in range(0, len(document), CHUNK_CHARACTERS):
            yield document[start : start + CHUNK_CHARACTERS]


def _explain(message: str, vocab_size: int) -> str:
    """Returns our error message for an error of SentencePiece's training."""
    if largest := re.search(r"value <= (\d+)", message):
        return (
            f"the corpus is too small for a vocabulary of {vocab_size} pieces; expected at most {largest[1]}: "
            "lower vocab_size or add text"
        )
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"a vocabulary of {vocab_size} pieces cannot hold the bytes and characters of the corpus; "
            f"expected at least {smallest[1]}: raise vocab_size"
        )
    return (
        f"SentencePiece cannot train {vocab_size} pieces on this corpus ({' '.join(message.split())}); "
        "expected text, and a few hundred pieces or more: check both"
    )
