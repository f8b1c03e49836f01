"""A SentencePiece model, or bytes, as tokenizer files of transformers, which give the same ids."""

from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from megamtp.checkpoint.contents import Contents
from megamtp.checkpoint.folder import write_json
from megamtp.data.tokenizer import ByteTokenizer
from megamtp.errors import CheckpointError

TOKENIZER = "tokenizer.model"
LARGEST_BYTE_TOKENIZER = 100_000  # bytes of its tokenizer.json; larger ones are others', which take long to read
BYTES_END = ByteTokenizer.end_of_document_id

# What normalisation and whitespace rules of other tokenizers would change.
PROBES = ("\t x\r\n", "  two  spaces  ", "\ufb01 \uff21 \u00e9 e\u0301 \u200b \U0001f600\x01")


def read_tokenizer(path: Path, vocab_size: int) -> SentencePieceProcessor:
    """Raises: CheckpointError if it is no SentencePiece model of so many pieces."""
    try:
        tokenizer = SentencePieceProcessor(model_proto=path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no SentencePiece model ({error}); mend data.tokenizer of the run") from None
    if tokenizer.vocab_size() != vocab_size:
        raise CheckpointError(f"{path} has {tokenizer.vocab_size()} pieces, expected the model's {vocab_size}; mend data.tokenizer")
    return tokenizer


def copy_tokenizer(contents: Contents, folder: Path) -> None:
    """Copies the SentencePiece model, if there is one, to where copied_tokenizer looks for it.

    Raises:
        CheckpointError: it cannot be read.
        OSError: it cannot be written.
    """
    if contents.tokenizer is None:
        return
    try:
        model = contents.tokenizer.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{contents.tokenizer} cannot be read ({error.strerror}); mend data.tokenizer of the run") from None
    (folder / TOKENIZER).write_bytes(model)


def copied_tokenizer(folder: Path) -> Path | None:
    return folder / TOKENIZER if (folder / TOKENIZER).exists() else None


def fits(path: Path, vocab_size: int) -> bool:
    """Whether it is a SentencePiece model of so many pieces."""
    try:
        return SentencePieceProcessor(model_proto=path.read_bytes()).vocab_size() == vocab_size
    except (OSError, RuntimeError):
        return False


def write_tokenizer(folder: Path, tokenizer: SentencePieceProcessor, sequence_length: int) -> None:
    """tokenizer.json rather than transformers' own reading of tokenizer.model, which adds a space before the text.

    Raises:
        CheckpointError: the translation does not give SentencePiece's ids.
    """
    translated = _translate(tokenizer)
    end = tokenizer.id_to_piece(tokenizer.eos_id())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "unk_token": tokenizer.id_to_piece(tokenizer.unk_id()),
        "split_special_tokens": True,  # "</s>" in a text is five characters of it, as for SentencePiece
        "clean_up_tokenization_spaces": False,
        "model_max_length": sequence_length,
    }
    (folder / TOKENIZER).write_bytes(tokenizer.serialized_model_proto())
    (folder / "tokenizer.json").write_text(translated.to_str(), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", settings)


def write_byte_tokenizer(folder: Path, sequence_length: int) -> None:
    """Bytes as tokens, and BYTES_END.

    ByteLevel spells each byte as a character: those that can be printed as themselves, the others as those from U+0100 on.
    Source: the byte-level BPE of GPT-2, which `tokenizers` calls ByteLevel.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    characters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    tokenizer = Tokenizer(BPE({character: byte for byte, character in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|end|>"
    tokenizer.add_special_tokens([AddedToken(end, normalized=False)])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": sequence_length,
    }
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", settings)


def are_bytes(folder: Path, vocab_size: int) -> bool:
    """Whether tokenizer.json there, of a model of so many tokens, is what write_byte_tokenizer writes."""
    path, probe = folder / "tokenizer.json", "".join(PROBES)
    if vocab_size < ByteTokenizer.vocab_size or not path.exists() or path.stat().st_size > LARGEST_BYTE_TOKENIZER:
        return False
    tokenizer = Tokenizer.from_file(str(path))
    return tokenizer.get_vocab_size() == ByteTokenizer.vocab_size and tokenizer.encode(probe).ids == list(probe.encode())


def _translate(tokenizer: SentencePieceProcessor) -> Tokenizer:
    """SentencePiece's BPE with byte fallback in the `tokenizers` library.

    Its merges are all the ways to cut a piece into two pieces, those of the best piece first. Pieces are written with
    real spaces, not with SentencePiece's mark U+2581, so that a mark in the text is none.
    """
    ids = range(tokenizer.vocab_size())
    special = {token for token in ids if tokenizer.is_control(token) or tokenizer.is_unknown(token)}
    plain = {token for token in ids if token not in special and not tokenizer.is_byte(token)}
    pieces = [tokenizer.id_to_piece(token) for token in ids]
    texts = {piece.replace("\u2581", " ") if token in plain else piece: token for token, piece in enumerate(pieces)}
    best_first = [text for text, token in texts.items() if token in plain]
    best_first.sort(key=lambda text: -tokenizer.get_score(texts[text]))
    merges = [
        (text[:cut], text[cut:])
        for text in best_first
        for cut in range(1, len(text))
        if texts.get(text[:cut]) in plain and texts.get(text[cut:]) in plain
    ]
    translated = Tokenizer(BPE(texts, merges, unk_token=pieces[tokenizer.unk_id()], byte_fallback=True))
    steps = [decoders.ByteFallback(), decoders.Fuse()]
    if tokenizer.encode("a", out_type=str)[0].startswith("\u2581"):  # trained with add_dummy_prefix
        translated.normalizer = normalizers.Prepend(" ")
        steps.append(decoders.Strip(" ", left=1))
    translated.decoder = decoders.Sequence(steps)
    _check_translation(tokenizer, translated, [*best_first, *PROBES])
    translated.add_special_tokens([AddedToken(pieces[token], normalized=False) for token in sorted(special)])
    return translated


def _check_translation(tokenizer: SentencePieceProcessor, translated: Tokenizer, texts: list[str]) -> None:
    """Raises: CheckpointError if any text becomes other ids than SentencePiece's: a tokenizer of another kind."""
    found = [encoding.ids for encoding in translated.encode_batch(texts)]
    for text, ids, expected in zip(texts, found, tokenizer.encode(texts), strict=True):
        if ids != expected:
            raise CheckpointError(
                f"the tokenizer cannot be exported: {text!r} would become {ids}, expected {expected}; expected a BPE "
                "model with byte fallback and no normalisation (prepare_data trains such) or none: unset data.tokenizer"
            )
