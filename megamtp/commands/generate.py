"""Continues a prompt with a trained model: an export of convert_checkpoint, a run directory, or one of its checkpoints.

    python -m megamtp.commands.generate runs/quickstart --prompt "def main("
    python -m megamtp.commands.generate exported --max-new-tokens 200 --temperature 0.8 --top-p 0.95 < prompt.py

Prints the prompt and its continuation, head 1's.
"""

import contextlib
import sys
from pathlib import Path

import torch

from megamtp.checkpoint import formats
from megamtp.checkpoint.tensors import read_tensor
from megamtp.commands.command_line import Parser, run
from megamtp.config import BYTES
from megamtp.data.tokenizer import open_tokenizer
from megamtp.decoding.generate import generate
from megamtp.errors import InputError
from megamtp.model.mtp import MTPModel


def main() -> None:
    """Prints the prompt and its continuation. Raises InputError."""
    arguments = _parser().parse_args()
    prompt = _prompt(arguments.prompt)
    device = _device(arguments.device)
    model, tokenizer_path = _load(arguments.model, device)
    tokenizer = open_tokenizer(_required(arguments.tokenizer or tokenizer_path))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"{tokenizer.path} has {tokenizer.vocab_size} pieces, expected the model's {model.config.vocab_size} or "
            "fewer: give the model's tokenizer with --tokenizer"
        )
    prompt_ids = tokenizer.encode(prompt)
    new_ids = generate(
        model,
        prompt_ids,
        arguments.max_new_tokens,
        arguments.temperature,
        arguments.top_k,
        arguments.top_p,
        arguments.seed,
        tokenizer.end_of_document_id,
    )
    print(tokenizer.decode(prompt_ids + new_ids))


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument(
        "model", type=Path, help="an exported folder, a run directory (its newest checkpoint), or a checkpoint"
    )
    parser.add_argument("--prompt", help="text to continue; without it, what is piped in; without either, from scratch")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="fewer if the model ends the text (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    parser.add_argument("--top-k", type=int, help="sample among the k likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, help="sample among the likeliest tokens that together reach this probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="SentencePiece model, or bytes (default: the export's, or the run's data.tokenizer)",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if there is one"
    )
    return parser


def _prompt(given: str | None) -> str:
    try:
        prompt = given if given is not None else "" if not sys.stdin or sys.stdin.isatty() else sys.stdin.read()
        prompt.encode()  # bytes that were no text came in as lone surrogates
    except UnicodeError as error:
        raise InputError(f"the prompt is not UTF-8 text ({error}); expected text") from None
    return prompt


def _device(name: str) -> torch.device:
    try:
        tensor = torch.empty(0, device=name)
        tensor.cpu()  # where nothing comes back from, as from meta, no text does
        return tensor.device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise InputError(
            f"--device {name}: {str(error).splitlines()[0]}; expected cpu, or cuda on a machine with a GPU"
        ) from None


def _required(path: Path | None) -> Path:
    if path is None:
        raise InputError(
            "the model has no tokenizer; expected --tokenizer PATH, a SentencePiece model, or --tokenizer bytes"
        )
    return path


def _load(source: Path, device: torch.device) -> tuple[MTPModel, Path | None]:
    """The model on its device, and where its tokenizer should be."""
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints what it reads; our output is text alone
        contents = formats.read(source)
    with torch.device("meta"):
        model = MTPModel(contents.model)
    weights = {name: read_tensor(contents.weights, name, torch.float32).to(device) for name in contents.weights.shapes}
    model.load_state_dict(weights, strict=True, assign=True)
    return model, Path(BYTES) if contents.tokens_are_bytes else contents.tokenizer


def entry() -> None:
    run(main)


if __name__ == "__main__":
    entry()
