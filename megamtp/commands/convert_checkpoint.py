"""Turns a run's newest checkpoint, or a given one, into a folder that transformers loads.

    python -m megamtp.commands.convert_checkpoint runs/quickstart exported --to hf
    python -m megamtp.commands.convert_checkpoint runs/quickstart/checkpoints/step-0000100 exported --to hf

The folder holds trunk and head 1 as a Llama model, and the tokenizer if the run has one.
"""

from pathlib import Path

from megamtp.checkpoint import hf, store
from megamtp.commands.command_line import Parser, run
from megamtp.config import RESOLVED, read_config


def main() -> None:
    """Raises InputError."""
    parser = Parser(__doc__)
    parser.add_argument("source", type=Path, help="a run directory (its newest checkpoint), or one checkpoint in it")
    parser.add_argument("destination", type=Path, help="a new or empty folder, or an earlier export, which is replaced")
    parser.add_argument("--to", choices=["hf"], default="hf", help="hf: LlamaForCausalLM of transformers")
    arguments = parser.parse_args()
    checkpoint, run_directory = find_checkpoint(arguments.source)
    config = read_config([str(run_directory / RESOLVED)])
    hf.check_replaceable(arguments.destination)  # both before the weights, which may take long to read
    tokenizer = hf.read_tokenizer(Path(config.data.tokenizer), config.model.vocab_size) if config.data.tokenizer else None
    model, weights = store.load_weights(checkpoint)
    hf.export(model, weights, arguments.destination, config.train.sequence_length, tokenizer)
    print(f"{checkpoint} -> {arguments.destination}")


def find_checkpoint(source: Path) -> tuple[Path, Path]:
    """(checkpoint, its run directory) of either of the two.

    Raises:
        CheckpointError: there is none.
    """
    source = source.resolve()
    if source.parent.name == "checkpoints" and store.NAME.fullmatch(source.name):
        return source, source.parent.parent
    return store.newest_checkpoint(source), source


def entry() -> None:
    run(main)


if __name__ == "__main__":
    entry()
