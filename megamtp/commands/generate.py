"""Continues a prompt with a trained model: an exported checkpoint, a run directory, or one of its checkpoints.

    %(prog)s runs/quickstart --prompt "def main("
    %(prog)s exported --max-new-tokens 200 --temperature 0.8 --top-p 0.95 < prompt.py

Prints the prompt and the continuation that head 1, the next-token head, generates.
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
    tokenizer = open_tokenizer(_require_tokenizer(arguments.tokenizer or tokenizer_path))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"{tokenizer.path} has {tokenizer.vocab_size} pieces; expected at most the model's "
            f"{model.config.vocab_size}: pass the model's tokenizer with --tokenizer"
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
    parser.add_argument(
        "--prompt", help="text to continue (default: standard input if it is piped, else an empty prompt)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, help="length limit; the model may end the text earlier (default: 64)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default) always chooses the most likely token"
    )
    parser.add_argument("--top-k", type=int, help="sample from the k most likely tokens")
    parser.add_argument(
        "--top-p", type=float, help="sample from the most likely tokens that together reach this probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the sampling (default: 0)")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="SentencePiece model, or bytes (default: that of the export, or data.tokenizer of the run)",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default: cuda if there is a GPU)",
    )
    return parser


def _prompt(option: str | None) -> str:
    """Returns the value of --prompt, or else the piped standard input, or else an empty text."""
    try:
        is_piped = sys.stdin and not sys.stdin.isatty()
        prompt = option if option is not None else sys.stdin.read() if is_piped else ""
        prompt.encode()  # fails for bytes that are not UTF-8: Python reads them as lone surrogates
    except UnicodeError as error:
        raise InputError(f"the prompt is not UTF-8 text ({error}); expected UTF-8: convert it first") from None
    return prompt


def _device(name: str) -> torch.device:
    try:
        tensor = torch.empty(0, device=name)
        tensor.cpu()  # fails for devices without data, such as meta
        return tensor.device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise InputError(
            f"--device {name}: {str(error).splitlines()[0]}; expected cpu, or cuda on a machine with a GPU"
        ) from None


def _require_tokenizer(path: Path | None) -> Path:
    if path is None:
        raise InputError(
            "the model has no tokenizer; expected a SentencePiece model or `bytes`: pass it with --tokenizer"
        )
    return path


def _load(source: Path, device: torch.device) -> tuple[MTPModel, Path | None]:
    """Returns the model on the device, and the path of its tokenizer, if it names one."""
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints while it reads a checkpoint
        contents = formats.read(source)
    with torch.device("meta"):
        model = MTPModel(contents.model)
    weights = {name: read_tensor(contents.weights, name, torch.float32).to(device) for name in contents.weights.shapes}
    model.load_state_dict(weights, strict=True, assign=True)
    return model, Path(BYTES) if contents.tokens_are_bytes else contents.tokenizer


def entry() -> None:
    """Runs the command line of megamtp-generate."""
    run(main)


if __name__ == "__main__":
    entry()
