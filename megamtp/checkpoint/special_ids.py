"""The ids of the tokens that begin and end a text, for checkpoints whose tokenizer cannot be converted.

A tokenizer that is not a SentencePiece model is not copied, but its special ids are. They are stored beside a
checkpoint in generation_config.json, as transformers writes it. generate() stops at eos_token_id.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamtp.checkpoint.folder import write_json
from megamtp.errors import CheckpointError

FILE = "generation_config.json"
KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_special_ids(folder: Path, special_ids: Mapping[str, int | list[int] | None]) -> None:
    """Writes generation_config.json, unless there are no ids. Raises OSError."""
    if special_ids:
        write_json(folder / FILE, dict(special_ids))


def read_special_ids(folder: Path, vocab_size: int) -> dict[str, int | list[int]]:
    """Returns the ids in generation_config.json; an empty mapping if there is no such file.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / FILE
    try:
        settings = json.loads(path.read_text())
        if not isinstance(settings, dict):
            raise ValueError("not a mapping")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again, or remove it") from None
    return special_ids_of(settings, vocab_size)


def special_ids_of(settings: Mapping[str, Any], vocab_size: int) -> dict[str, int | list[int]]:
    """Returns the special ids in settings of transformers, without values that are not in the vocabulary.

    A value is an id or a list of ids (several tokens may end a text).
    """
    return {key: settings[key] for key in KEYS if _are_tokens(settings.get(key), vocab_size)}


def _are_tokens(value: Any, vocab_size: int) -> bool:
    ids = value if isinstance(value, list) else [value]
    return bool(ids) and all(type(token) is int and 0 <= token < vocab_size for token in ids)
