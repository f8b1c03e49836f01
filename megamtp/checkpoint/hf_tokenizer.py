"""Converts a SentencePiece model, or the byte tokenizer, to tokenizer files of transformers that give the same ids."""

import re
from collections.abc import Iterable
from pathlib import Path

from sentencepiece.sentencepiece_model_pb2 import TrainerSpec  # type: ignore[attr-defined]  # made at run time
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from megamtp.checkpoint.contents import Contents
from megamtp.checkpoint.folder import write_json
from megamtp.data.tokenizer import SPACE_MARK, ByteTokenizer, SentencePieceTokenizer
from megamtp.errors import CheckpointError, InputError

TOKENIZER = "tokenizer.model"
# Bytes of tokenizer.json. A larger file belongs to another tokenizer, and would take long to read.
LARGEST_BYTE_TOKENIZER = 100_000
BYTES_END = ByteTokenizer.end_of_document_id

# Texts that would reveal normalisation or whitespace rules, or another treatment of U+2581.
PROBES = (
    "\t x\r\n",
    "  two  spaces  ",
    "\ufb01 \uff21 \u00e9 e\u0301 \u200b \U0001f600\x01",
    SPACE_MARK,
    f" {SPACE_MARK}a{SPACE_MARK} {SPACE_MARK}{SPACE_MARK}b{SPACE_MARK}",
)


def read_tokenizer(path: Path, vocab_size: int) -> SentencePieceTokenizer:
    """Opens a SentencePiece model. Raises CheckpointError if it is invalid or has more pieces than the model rows."""
    try:
        tokenizer = SentencePieceTokenizer(path)
    except InputError as error:
        raise CheckpointError(f"{error}; correct data.tokenizer of the run") from None
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{path} has {tokenizer.vocab_size} pieces, expected at most {vocab_size}, the model's vocabulary; correct "
            "data.tokenizer of the run"
        )
    return tokenizer


def copy_tokenizer(contents: Contents, folder: Path) -> None:
    """Copies the SentencePiece model, if there is one, into `folder`.

    Raises:
        CheckpointError: the model cannot be read.
        OSError: the copy cannot be written.
    """
    if contents.tokenizer is None:
        return
    try:
        model = contents.tokenizer.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{contents.tokenizer} cannot be read ({error.strerror}); correct data.tokenizer of the run"
        ) from None
    (folder / TOKENIZER).write_bytes(model)


def find_tokenizer(folder: Path) -> Path | None:
    """Returns the copy that `copy_tokenizer` has made in `folder`, or None."""
    return folder / TOKENIZER if (folder / TOKENIZER).exists() else None


def fits_vocabulary(path: Path, vocab_size: int) -> bool:
    """Returns whether this is a SentencePiece model with at most `vocab_size` pieces."""
    try:
        return SentencePieceTokenizer(path).vocab_size <= vocab_size
    except InputError:
        return False


def write_tokenizer(folder: Path, tokenizer: SentencePieceTokenizer, sequence_length: int) -> None:
    """Writes tokenizer.model, and tokenizer.json and tokenizer_config.json for transformers.

    tokenizer.json is needed because transformers' own conversion of tokenizer.model adds a space before the text.

    Raises:
        CheckpointError: the tokenizer cannot be translated, see `translate`.
    """
    translated, processor = translate(tokenizer), tokenizer.processor
    end = processor.id_to_piece(tokenizer.end_of_document_id)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "unk_token": processor.id_to_piece(processor.unk_id()),
        "split_special_tokens": True,  # "</s>" in a text is encoded as four characters, as by SentencePiece
        "clean_up_tokenization_spaces": False,
        "model_max_length": sequence_length,
    }
    (folder / TOKENIZER).write_bytes(processor.serialized_model_proto())
    (folder / "tokenizer.json").write_text(translated.to_str(), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", settings)


def write_byte_tokenizer(folder: Path, sequence_length: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json of the byte tokenizer: ids are bytes, and BYTES_END.

    ByteLevel represents each byte by a character: printable bytes by themselves, the others by characters from U+0100
    on.

    Source: the byte-level BPE of GPT-2, which `tokenizers` calls ByteLevel.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    characters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    tokenizer = Tokenizer(BPE({character: byte for byte, character in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = ByteTokenizer.end_piece
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


def is_byte_tokenizer(folder: Path, vocab_size: int) -> bool:
    """Returns whether `folder` has the tokenizer that `write_byte_tokenizer` writes, and the vocabulary can hold it."""
    path, probe = folder / "tokenizer.json", "".join(PROBES)
    if vocab_size < ByteTokenizer.vocab_size or not path.exists() or path.stat().st_size > LARGEST_BYTE_TOKENIZER:
        return False
    tokenizer = Tokenizer.from_file(str(path))
    return tokenizer.get_vocab_size() == ByteTokenizer.vocab_size and tokenizer.encode(probe).ids == list(
        probe.encode()
    )


def translate(tokenizer: SentencePieceTokenizer) -> Tokenizer:
    """Returns the BPE tokenizer of the `tokenizers` library that is equivalent to a SentencePiece model.

    Its merges are all ways to split a piece into two pieces, in the order of the pieces' scores. Pieces contain real
    spaces instead of SentencePiece's U+2581. If SentencePiece reads U+2581 in a text as a space, it is replaced first.

    Raises:
        CheckpointError: the kind of model is not supported, or the result gives other ids than SentencePiece.
    """
    _check_kind(tokenizer)
    processor, ids = tokenizer.processor, range(tokenizer.vocab_size)
    special = {token for token in ids if processor.is_control(token) or processor.is_unknown(token)}
    named = {token for token in ids if token in special or processor.is_byte(token)}
    plain = set(ids) - named - set(tokenizer.user_defined)
    pieces = [processor.id_to_piece(token) for token in ids]
    texts = {piece if token in named else piece.replace(SPACE_MARK, " "): token for token, piece in enumerate(pieces)}
    best_first = [text for text, token in texts.items() if token in plain]
    best_first.sort(key=lambda text: -processor.get_score(texts[text]))
    merges = [
        (text[:cut], text[cut:])
        for text in best_first
        for cut in range(1, len(text))
        if texts.get(text[:cut]) in plain and texts.get(text[cut:]) in plain
    ]
    unknown = pieces[processor.unk_id()]
    translated = Tokenizer(BPE(texts, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    symbols = [text for text, token in texts.items() if token in tokenizer.user_defined]
    names = [pieces[token] for token in sorted(named)]
    if symbols:
        _isolate(translated, symbols, names)
    steps: list[decoders.Decoder] = [decoders.ByteFallback(), decoders.Fuse()]
    changes: list[normalizers.Normalizer] = []
    if not tokenizer.keeps_space_marks:
        changes.append(normalizers.Replace(SPACE_MARK, " "))
    if tokenizer.proto.normalizer_spec.add_dummy_prefix:
        changes.append(normalizers.Prepend(" "))
        steps.append(decoders.Strip(" ", left=1))
    if changes:
        translated.normalizer = normalizers.Sequence(changes)
    translated.decoder = decoders.Sequence(steps)
    probes = [*best_first, *PROBES]
    if symbols:
        probes += [*symbols, "".join(symbols)]
        probes += [f"a {symbols[0]}{text}{symbols[-1]} b" for text in [*best_first, *symbols, *names]]
    _check_translation(tokenizer, translated, probes)
    translated.add_special_tokens([AddedToken(pieces[token], normalized=False) for token in sorted(special)])
    return translated


def _isolate(translated: Tokenizer, symbols: list[str], names: list[str]) -> None:
    """Lets each of the `symbols` in a text become one token; where several match, the longest.

    The symbols cannot be added tokens: these are extracted before the dummy prefix is added, so a text that begins with
    a symbol would get no prefix. Instead, the text is split around the symbols, and a part that equals a piece becomes
    that piece without merges. This must not happen to a part that equals the name of a control or byte piece (`names`),
    such as "</s>", so that part is split after its first token.
    """
    longest_first = sorted(symbols, key=len, reverse=True)
    steps = [pre_tokenizers.Split(Regex(_any_of(map(re.escape, longest_first))), "isolated")]
    cuts = [(name, translated.encode(name).offsets[0][1]) for name in names]
    beginnings = [rf"\A{re.escape(name[:cut])}(?={re.escape(name[cut:])}\z)" for name, cut in cuts]
    steps.append(pre_tokenizers.Split(Regex(_any_of(beginnings)), "isolated"))
    translated.pre_tokenizer = pre_tokenizers.Sequence(steps)
    translated.model.ignore_merges = True


def _any_of(patterns: Iterable[str]) -> str:
    return "|".join(patterns)


def _check_kind(tokenizer: SentencePieceTokenizer) -> None:
    """Raises CheckpointError if this is not a BPE model, or if it changes texts in a way that `translate` cannot."""
    trainer, normalizer = tokenizer.proto.trainer_spec, tokenizer.proto.normalizer_spec
    if trainer.model_type not in (TrainerSpec.BPE, TrainerSpec.CHAR):
        raise _refusal(tokenizer, f"it is a {TrainerSpec.ModelType.Name(trainer.model_type).lower()} model")
    if normalizer.precompiled_charsmap:
        raise _refusal(tokenizer, f"it normalises texts ({normalizer.name})")
    if normalizer.remove_extra_whitespaces:
        raise _refusal(tokenizer, "it removes extra spaces from texts")
    if trainer.treat_whitespace_as_suffix:
        raise _refusal(tokenizer, "its pieces end, rather than begin, with spaces")


def _check_translation(tokenizer: SentencePieceTokenizer, translated: Tokenizer, texts: list[str]) -> None:
    """Raises CheckpointError if any text gets other ids than those of SentencePiece."""
    for text, expected in zip(texts, tokenizer.encode_batch(texts), strict=True):
        # translated.encode_batch would start threads, and cause warnings in every process that is forked afterwards.
        ids = translated.encode(text).ids
        if ids != expected:
            raise _refusal(tokenizer, f"{text!r} would become {ids}, not {expected}")


def _refusal(tokenizer: SentencePieceTokenizer, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{tokenizer.path} cannot be exported to hf or hf-mtp: {reason}; expected a BPE model without normalisation, "
        "such as prepare_data trains, or no tokenizer: unset data.tokenizer"
    )
