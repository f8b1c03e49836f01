"""Trunk and head 1 as a LlamaForCausalLM folder of transformers, and back.

    export(model, weights, Path("exported"), 4096, read_tokenizer(Path("corpus/tokenizer.model"), model.vocab_size))
    model, weights = read(Path("exported"))       # the ordinary next-token model: num_future_tokens = 1

Head 1 is the last layer; heads 2 to n stay behind, being no part of that architecture. Versions 4 and 5 of transformers
load it.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from torch import Tensor

from megamtp.config import ModelConfig
from megamtp.errors import CheckpointError
from megamtp.model.mtp import MTPModel

CONFIG, TOKENIZER = "config.json", "tokenizer.model"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"  # the index only beside weights in several files
EXPORT_LIST = "megamtp_export.json"  # names the files of an export of ours: only such a folder is ever replaced

# MTPModel's names -> LlamaForCausalLM's. Both write rotary pairs as (k, k + K/2), so no row of a matrix moves.
OUTER_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "unembedding.norm": "model.norm.weight",
    "unembedding.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}

# What normalisation and whitespace rules of other tokenizers would change.
PROBES = ("\t x\r\n", "  two  spaces  ", "\ufb01 \uff21 \u00e9 e\u0301 \u200b \U0001f600\x01")


def export(
    model: ModelConfig, weights: dict[str, Tensor], directory: Path, sequence_length: int, tokenizer: SentencePieceProcessor | None
) -> None:
    """Writes the folder in a temporary one beside `directory` and renames it: what bears the final name is whole.

    Args:
        weights: every parameter of MTPModel by name; written as fp32, in files of at most 5 GB.
        directory: new, empty, or an earlier export, which is replaced.
        sequence_length: positions of a training window, the exported model's `max_position_embeddings`.
        tokenizer: None exports none, and no end-of-text id.

    Raises:
        CheckpointError: the destination holds something else or cannot be written, a weight is missing, misshaped
            or unknown, or transformers cannot reproduce the tokenizer.
    """
    directory = directory.resolve()
    check_replaceable(directory)
    _check_tensors({name: tuple(weight.shape) for name, weight in weights.items()}, _shapes(model), "the checkpoint")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as temporary:
            new, old = Path(temporary, "new"), Path(temporary, "old")
            new.mkdir()
            _write_model(new, model, weights, sequence_length, tokenizer)
            if tokenizer:
                _write_tokenizer(new, tokenizer, sequence_length)
            _seal(new)
            if directory.exists():
                os.rename(directory, old)
            os.rename(new, directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory} cannot be written: {error}; choose another destination") from None


def read(directory: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model of a LlamaForCausalLM folder and its weights in fp32, by MTPModel's names with num_future_tokens = 1.

    Raises:
        CheckpointError: a file is missing or unreadable, the model is of another form, or a tensor is missing,
            misshaped or unknown (the message names it).
    """
    try:
        settings = json.loads((directory / CONFIG).read_text())
        index = directory / INDEX
        files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {WEIGHTS}
        found = {name: tensor for file in sorted(files) for name, tensor in load_file(directory / file).items()}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{directory} is no exported model or a damaged one ({error}); export it again") from None
    model = _model_config(settings, directory)
    names = _names(model)
    expected = {names[name]: shape for name, shape in _shapes(model).items()}
    _check_tensors({name: tuple(tensor.shape) for name, tensor in found.items()}, expected, directory)
    return model, {ours: found[theirs].float() for ours, theirs in names.items()}


def _names(model: ModelConfig) -> dict[str, str]:
    """MTPModel's name -> LlamaForCausalLM's, of all that is exported."""
    layers = [*(f"trunk.{index}" for index in range(model.num_trunk_layers)), "heads.0"]
    return OUTER_NAMES | {
        f"{layer}.{ours}": f"model.layers.{number}.{theirs}"
        for number, layer in enumerate(layers)
        for ours, theirs in LAYER_NAMES.items()
    }


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in MTPModel(model).named_parameters()}


def _check_tensors(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], where: Path | str) -> None:
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(f"{where} has no tensor {name}; expected one of shape {list(shape)}")
        if found[name] != shape:
            raise CheckpointError(f"{where}: tensor {name} has shape {list(found[name])}, expected {list(shape)}")
    for name in found:
        if name not in expected:
            raise CheckpointError(f"{where} has an unknown tensor {name}; expected only its configuration's {len(expected)}")


def _model_config(settings: dict[str, Any], directory: Path) -> ModelConfig:
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}  # where transformers 5 and 4 put it
    form = {
        "model_type": settings.get("model_type"),
        "hidden_act": settings.get("hidden_act", "silu"),
        "rope_type": rope.get("rope_type", "default"),
    }
    expected = {"model_type": "llama", "hidden_act": "silu", "rope_type": "default"}
    for key, value in form.items():
        if value != expected[key]:
            raise CheckpointError(f"{directory}/{CONFIG}: {key} is {value}, expected {expected[key]}: another form of model")
    try:
        return ModelConfig(
            dim=settings["hidden_size"],
            num_layers=settings["num_hidden_layers"],
            num_future_tokens=1,
            num_attention_heads=settings["num_attention_heads"],
            num_key_value_heads=settings["num_key_value_heads"],
            mlp_dim=settings["intermediate_size"],
            vocab_size=settings["vocab_size"],
            rope_theta=settings["rope_theta"] if "rope_theta" in settings else rope["rope_theta"],
            norm_eps=settings["rms_norm_eps"],
        )
    except KeyError as error:
        raise CheckpointError(f"{directory}/{CONFIG} has no {error}; export the model again") from None


def _write_model(
    folder: Path,
    model: ModelConfig,
    weights: dict[str, Tensor],
    sequence_length: int,
    tokenizer: SentencePieceProcessor | None,
) -> None:
    # Documents follow each other's end piece in training, so that piece, not <s>, is what a text begins with.
    end_id = tokenizer.eos_id() if tokenizer else None
    ids = {"bos_token_id": end_id, "eos_token_id": end_id}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.hidden_dim,
        "num_hidden_layers": model.num_trunk_layers + 1,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.key_value_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": sequence_length,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        **ids,
    }
    _write_json(folder / CONFIG, config)
    _write_json(folder / "generation_config.json", ids)
    exported = {theirs: weights[ours].float() for ours, theirs in _names(model).items()}
    save_torch_state_dict(exported, folder, max_shard_size="5GB", metadata={"format": "pt"})


def read_tokenizer(path: Path, vocab_size: int) -> SentencePieceProcessor:
    """Raises: CheckpointError if it is no SentencePiece model of so many pieces."""
    try:
        tokenizer = SentencePieceProcessor(model_proto=path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no SentencePiece model ({error}); mend data.tokenizer of the run") from None
    if tokenizer.vocab_size() != vocab_size:
        raise CheckpointError(f"{path} has {tokenizer.vocab_size()} pieces, expected the model's {vocab_size}; mend data.tokenizer")
    return tokenizer


def _write_tokenizer(folder: Path, tokenizer: SentencePieceProcessor, sequence_length: int) -> None:
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
    _write_json(folder / "tokenizer_config.json", settings)


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


def check_replaceable(directory: Path) -> None:
    """Raises: CheckpointError if an export would destroy something else."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; expected a new or empty folder: choose another destination")
    found = sorted(path.name for path in directory.iterdir())
    if found and found != _listed(directory):
        raise CheckpointError(
            f"{directory} holds other files than an earlier export ({found[0]}, ...); expected a new or empty folder: "
            "choose another destination"
        )


def _listed(directory: Path) -> list[str] | None:
    try:
        return json.loads((directory / EXPORT_LIST).read_text())
    except (OSError, ValueError):
        return None


def _seal(folder: Path) -> None:
    """Lists the files, readable for all who may read the folder's, and waits until they are on disk."""
    _write_json(folder / EXPORT_LIST, sorted([EXPORT_LIST, *(path.name for path in folder.iterdir())]))
    for path in folder.iterdir():
        shutil.copymode(folder / CONFIG, path)  # safetensors makes files that only their owner may read
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
