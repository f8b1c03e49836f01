"""A SentencePiece model, or bytes, as tokenizer files of transformers, which give the same ids."""

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
LARGEST_BYTE_TOKENIZER = 100_000  # bytes of its tokenizer.json; larger ones are others', which take long to read
BYTES_END = ByteTokenizer.end_of_document_id

# What normalisation and whitespace rules of other tokenizers would change, and the character that stands for a space.
PROBES = (
    "\t x\r\n",
    "  two  spaces  ",
    "\ufb01 \uff21 \u00e9 e\u0301 \u200b \U0001f600\x01",
    SPACE_MARK,
    f" {SPACE_MARK}a{SPACE_MARK} {SPACE_MARK}{SPACE_MARK}b{SPACE_MARK}",
)


def read_tokenizer(path: Path, vocab_size: int) -> SentencePieceTokenizer:
    """Raises: CheckpointError if it is no SentencePiece model, or has more pieces than the model has rows."""
    try:
        tokenizer = SentencePieceTokenizer(path)
    except InputError as error:
        raise CheckpointError(f"{error}; mend data.tokenizer of the run") from None
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{path} has {tokenizer.vocab_size} pieces, expected the model's {vocab_size} or fewer; mend data.tokenizer"
        )
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
        raise CheckpointError(
            f"{contents.tokenizer} cannot be read ({error.strerror}); mend data.tokenizer of the run"
        ) from None
    (folder / TOKENIZER).write_bytes(model)


def copied_tokenizer(folder: Path) -> Path | None:
    return folder / TOKENIZER if (folder / TOKENIZER).exists() else None


def fits(path: Path, vocab_size: int) -> bool:
    """Whether it is a SentencePiece model of no more pieces."""
    try:
        return SentencePieceTokenizer(path).vocab_size <= vocab_size
    except InputError:
        return False


def write_tokenizer(folder: Path, tokenizer: SentencePieceTokenizer, sequence_length: int) -> None:
    """tokenizer.json rather than transformers' own reading of tokenizer.model, which adds a space before the text.

    Raises:
        CheckpointError: the translation does not give SentencePiece's ids.
    """
    translated, processor = translate(tokenizer), tokenizer.processor
    end = processor.id_to_piece(tokenizer.end_of_document_id)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "unk_token": processor.id_to_piece(processor.unk_id()),
        "split_special_tokens": True,  # "</s>" in a text is four characters, as for SentencePiece
        "clean_up_tokenization_spaces": False,
        "model_max_length": sequence_length,
    }
    (folder / TOKENIZER).write_bytes(processor.serialized_model_proto())
    (folder / "tokenizer.json").write_text(translated.to_str(), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", settings)


def write_byte_tokenizer(folder: Path, sequence_length: int) -> None:
    """Bytes as tokens, and BYTES_END.

    ByteLevel spells each byte as a character: those that can be printed as themselves, the others as those from U+0100
    on. Source: the byte-level BPE of GPT-2, which `tokenizers` calls ByteLevel.
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


def are_bytes(folder: Path, vocab_size: int) -> bool:
    """Whether tokenizer.json there, of a model of so many tokens, is what write_byte_tokenizer writes."""
    path, probe = folder / "tokenizer.json", "".join(PROBES)
    if vocab_size < ByteTokenizer.vocab_size or not path.exists() or path.stat().st_size > LARGEST_BYTE_TOKENIZER:
        return False
    tokenizer = Tokenizer.from_file(str(path))
    return tokenizer.get_vocab_size() == ByteTokenizer.vocab_size and tokenizer.encode(probe).ids == list(
        probe.encode()
    )


def translate(tokenizer: SentencePieceTokenizer) -> Tokenizer:
    """SentencePiece's BPE in the `tokenizers` library.

    Its merges are all the ways to cut a piece into two pieces, those of the best piece first. Pieces are written with
    real spaces, not with SentencePiece's mark U+2581. A mark in the text is first made a space where SentencePiece
    reads it as one.

    Raises:
        CheckpointError: it is a tokenizer of another kind, or the translation does not give SentencePiece's ids.
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
    """Makes each of the `symbols` in a text its own token, the longest where several begin.

    Not as added tokens: those are taken out of a text before it gets its dummy prefix, so a text that begins with a
    symbol would get none. Instead the text is cut around the symbols, and a part that equals a piece becomes that piece
    without any merge. That must not happen to a part that reads like the name of a control or byte piece, such as
    "</s>": it is cut where its first token ends.
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
    """Raises: CheckpointError if this is no BPE model, or it changes texts in a way that `translate` does not
    translate.
    """
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
    """Raises: CheckpointError if any text becomes other ids than SentencePiece's."""
    for text, expected in zip(texts, tokenizer.encode_batch(texts), strict=True):
        # encode_batch would start threads, and warn in every process forked afterwards
        ids = translated.encode(text).ids
        if ids != expected:
            raise _refusal(tokenizer, f"{text!r} would become {ids}, expected {expected}")


def _refusal(tokenizer: SentencePieceTokenizer, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{tokenizer.path} cannot be exported to hf or hf-mtp: {reason}; expected a BPE model without normalisation "
        "(prepare_data trains such) or none: unset data.tokenizer"
    )
