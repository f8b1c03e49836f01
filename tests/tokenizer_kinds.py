"""SentencePiece models of many kinds, and texts on which they differ."""

import argparse
import io
from pathlib import Path

import sentencepiece
from hypothesis import strategies as st

from megamtp.data.tokenizer import train_sentencepiece

TEXT = Path(argparse.__file__).read_text()
OURS = "ours"
UNNORMALISED = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
SYMBOLS = {
    "user_defined_symbols": ["<fim>", "<fim_x>", "self", "\u2581\u2581"],
    "control_symbols": ["[INST]", "[/INST]"],
}

EXPORTED = {
    OURS: {},
    "dummy prefix": {"byte_fallback": True, **UNNORMALISED},  # as Llama and Mistral have it
    "no dummy prefix": {"byte_fallback": True, "add_dummy_prefix": False, **UNNORMALISED},
    "no bytes": UNNORMALISED,
    "characters": {"model_type": "char", **UNNORMALISED},
    "symbols": {"byte_fallback": True, **SYMBOLS, **UNNORMALISED},
    # as Gemma has it
    "symbols, no dummy prefix": {"byte_fallback": True, "add_dummy_prefix": False, **SYMBOLS, **UNNORMALISED},
    "symbols, no bytes": SYMBOLS | UNNORMALISED,
}
NOT_EXPORTED = {
    "normalising": {"byte_fallback": True, "remove_extra_whitespaces": False},
    "default": {},
    "without extra spaces": {"byte_fallback": True, "normalization_rule_name": "identity"},
    "unigram": {"model_type": "unigram", "byte_fallback": True, **UNNORMALISED},
    "normalising unigram": {"model_type": "unigram"},
    "spaces as suffixes": {"byte_fallback": True, "treat_whitespace_as_suffix": True, **UNNORMALISED},
}
KINDS = EXPORTED | NOT_EXPORTED

PARTS = [
    *"\u2581 \t\n\0ax12(_\u00e9\u4e2d\U0001f600\ufb01\uff21\u0301\u2047",
    "  ",
    "\r\n",
    "def ",
    "return",
    "ab",
    "self.",
    "selfself",
    "<fim>",
    "<fim_x>",
    "<fim",
    "</s>",
    "<s>",
    "<unk>",
    "<0x0A>",
    "[INST]",
    "[/INST]",
]
TEXTS = st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=3)), max_size=8).map("".join)


def train_kind(kind: str, path: Path) -> Path:
    """Writes a model of one of the KINDS to `path`, and returns the path."""
    if kind == OURS:
        train_sentencepiece([TEXT], path, vocab_size=500, seed=0)
        return path
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"model_type": "bpe", "vocab_size": 500} | KINDS[kind],
    )
    path.write_bytes(model.getvalue())
    return path
